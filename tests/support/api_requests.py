"""
Requests to the tests' API server, read: what they are about, what they ask for, what they bring.

Whatever cannot be read is a ``Refusal`` with the Status that kube-apiserver would answer. Nothing
here looks at stored objects.
"""

import base64
import dataclasses
import json
from typing import Any, Final

from tests.support import api_http, api_selectors, api_store
from tests.support.api_status import Refusal

_VERBS: Final = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
PATCH_TYPES: Final = frozenset(
    ["application/merge-patch+json", "application/strategic-merge-patch+json"]
)
INCONSISTENT: Final = -1  # in a continue token: go on with whatever there is now


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """What a path leads to."""

    resource: api_store.Resource
    namespace: str  # "": all, or the resource has none
    name: str  # "": the collection


def parse_path(path: str) -> Route | None:
    """Return what *path* leads to, or None if that is not served."""
    parts = path.strip("/").split("/")
    if parts[0] == "api" and len(parts) >= 3:
        group_version, rest = parts[1], parts[2:]
    elif parts[0] == "apis" and len(parts) >= 4:
        group_version, rest = f"{parts[1]}/{parts[2]}", parts[3:]
    else:
        return None
    namespace = ""
    if rest[0] == "namespaces" and len(rest) >= 3:
        namespace, rest = rest[1], rest[2:]
    for resource in api_store.RESOURCES:
        if (resource.group_version, resource.plural) == (group_version, rest[0]):
            name = rest[1] if len(rest) == 2 else ""
            is_misplaced = bool(namespace) and not resource.is_namespaced
            is_ambiguous = bool(name) and resource.is_namespaced and not namespace
            if len(rest) > 2 or is_misplaced or is_ambiguous:
                return None
            return Route(resource, namespace, name)
    return None


def verb_of(request: api_http.Request, route: Route) -> str:
    """Return the verb as RBAC names it, or "" if the method does not fit the path."""
    if request.method == "GET":
        if flag(request.query, "watch"):
            return "watch"
        return "get" if route.name else "list"
    verb = _VERBS.get(request.method, "")
    return verb if bool(route.name) != (verb == "create") else ""


def parse_selector(
    query: dict[str, str], route: Route, *, knows_service_fields: bool = True
) -> api_selectors.Selector:
    supported = route.resource.supported_fields
    if route.resource.kind == "Service" and not knows_service_fields:
        supported -= route.resource.fields
    try:
        labels = api_selectors.parse_labels(query.get("labelSelector", ""))
        fields = api_selectors.parse_fields(query.get("fieldSelector", ""), supported=supported)
    except api_selectors.SelectorError as error:
        raise Refusal(400, str(error)) from error
    if route.name:
        # A watch of one object is a watch of the collection, as the real server does it.
        fields += (api_selectors.Requirement("metadata.name", "=", frozenset([route.name])),)
    return api_selectors.Selector(labels, fields, route.namespace)


def number(query: dict[str, str], name: str) -> int:
    """Return a parameter that is a number; one that is absent or empty is 0."""
    text = query.get(name) or "0"
    if not text.isascii() or not text.isdigit():
        raise Refusal(400, f'{name}: Invalid value: "{text}": not a number')
    return int(text)


def flag(query: dict[str, str], name: str) -> bool:
    # Kubernetes' reading of booleans in queries: anything there that is not "false" or "0".
    return query.get(name, "false").lower() not in ("false", "0")


def accepts_json(request: api_http.Request) -> bool:
    accepted = request.headers.get("Accept") or "*/*"
    types = {part.partition(";")[0].strip() for part in accepted.split(",")}
    return bool(types & {"*/*", "application/*", "application/json"})


def make_token(version: int, start: str) -> str:
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": start})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def parse_token(token: str) -> tuple[int, str]:
    try:
        content = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        return int(content["rv"]), str(content["start"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(400, f"continue key is not valid: {error}") from error


def parse_json(request: api_http.Request, types: frozenset[str]) -> api_store.Json:
    content_type = (request.headers.get("Content-Type") or "").partition(";")[0].strip()
    if content_type not in types:
        raise Refusal(415)
    try:
        obj = json.loads(request.body)
    except ValueError as error:
        raise Refusal(400, f"the object provided is unrecognized: {error}") from error
    if not isinstance(obj, dict):
        raise Refusal(400, "the object provided is unrecognized: not a JSON object")
    return obj


def parse_object(request: api_http.Request, route: Route) -> api_store.Json:
    resource = route.resource
    obj = parse_json(request, frozenset(["application/json"]))
    # A body that names neither is taken for what the URL says, as the real server does.
    kind = obj.get("kind", resource.kind)
    group_version = obj.get("apiVersion", resource.group_version)
    if (kind, group_version) != (resource.kind, resource.group_version):
        raise Refusal(400, f"{group_version} {kind} does not match {resource.kind} on the URL")
    if not isinstance(obj.setdefault("metadata", {}), dict):
        raise Refusal(400, "metadata: not an object")
    if route.namespace:
        if obj["metadata"].setdefault("namespace", route.namespace) != route.namespace:
            raise Refusal(
                400,
                "the namespace of the provided object does not match the namespace sent on the "
                "request",
            )
    elif resource.is_namespaced:
        raise Refusal(405)
    return obj


def checked_key(route: Route, obj: api_store.Json) -> str:
    """Return the key under which *obj* is stored; the client may have left the name out."""
    try:
        return api_store.key_of(route.resource, obj)
    except ValueError as error:
        raise Refusal(
            422,
            f'{route.resource.kind} "" is invalid: metadata.name: Required value: '
            "name or generateName is required",
        ) from error


def qualified(resource: api_store.Resource) -> str:
    return f"{resource.plural}.{resource.group}" if resource.group else resource.plural


def details(resource: api_store.Resource, name: str) -> dict[str, Any]:
    """Return the details of a Status about one object."""
    group = {"group": resource.group} if resource.group else {}
    return {"name": name, "kind": resource.plural, **group}


def not_found(route: Route) -> Refusal:
    return Refusal(
        404,
        f'{qualified(route.resource)} "{route.name}" not found',
        details=details(route.resource, route.name),
    )


def forbidden(request: api_http.Request, route: Route | None) -> Refusal:
    user = "system:serviceaccount:kube-system:kube-proxy"
    if route is None:
        return Refusal(403, f'forbidden: User "{user}" cannot get path "{request.path}"')
    where = f'in the namespace "{route.namespace}"' if route.namespace else "at the cluster scope"
    return Refusal(
        403,
        f'{qualified(route.resource)} is forbidden: User "{user}" cannot {request.verb} resource '
        f'"{route.resource.plural}" in API group "{route.resource.group}" {where}',
        details=details(route.resource, route.name),
    )
