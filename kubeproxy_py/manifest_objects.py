"""
Make API objects of a manifest's documents, with the defaults that the API server would set.

Pure but for debug lines in the log. An object is taken as a whole or not at all, and whatever is
left out is a Problem that names it and the field.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from kubeproxy_py import endpoint_controller, manifest_parser, objects
from kubeproxy_py.model import IPFamily, Problem

log = structlog.get_logger()

# API default of sessionAffinityConfig.clientIP.timeoutSeconds: three hours.
_AFFINITY_TIMEOUT_S: Final = 10800
_NAME: Final = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")  # RFC 1123 subdomain
_NAMESPACE: Final = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123 label
# msgspec's: "Expected `str`, got `int` - at `$.metadata.name`", "... - at `key` in `$.spec`".
_INVALID: Final = re.compile(r"(?P<problem>.*) - at `(?P<key>key` in `)?\$\.?(?P<path>.*)`")
_NOT_TEXT: Final = re.compile(r"Expected `str\b.*got `(?:int|float|bool)`")

AnyObject = objects.Object | endpoint_controller.Pod | endpoint_controller.Endpoints


class Key(NamedTuple):
    """The identity of an object; the namespace of a Node is ""."""

    kind: str
    namespace: str
    name: str


class _Type(NamedTuple):
    api_version: str
    struct: type[AnyObject]
    is_namespaced: bool = True


TYPES: Final = {
    "Service": _Type("v1", objects.Service),
    "EndpointSlice": _Type("discovery.k8s.io/v1", objects.EndpointSlice),
    "Node": _Type("v1", objects.Node, is_namespaced=False),
    "Pod": _Type("v1", endpoint_controller.Pod),
    "Endpoints": _Type("v1", endpoint_controller.Endpoints),
}


def build(
    path: str,
    documents: Iterable[manifest_parser.Document],
    before: Mapping[Key, AnyObject],
) -> tuple[dict[Key, AnyObject], list[Problem]]:
    """
    Return the objects in *documents*, kinds that nothing reads left out.

    Args:
        path: The file they are from, for messages.
        documents: What the file holds now.
        before: What it held when last read; an object that is invalid now stays as it was, and
            all of them stay when there is something that cannot be told to be none of them.
    """
    found: dict[Key, AnyObject] = {}
    problems: list[Problem] = []
    has_unnamed = False
    kept = "; what it held before stays" if before else ""
    for line, raw in _flatten(documents):
        kind = raw.get("kind") if isinstance(raw, dict) else None
        if not isinstance(kind, str):
            has_unnamed = True
            message = f"the object at line {line} has no kind{kept}"
            problems.append(Problem(kind="File", name=path, message=message))
            continue
        known_type = TYPES.get(kind)
        if known_type is None or _is_foreign(raw.get("apiVersion"), known_type.api_version):
            log.debug("manifests.object_ignored", kind=kind, path=path, line=line)
            continue
        key = _key(kind, raw.get("metadata"), known_type)
        obj, field, message = _convert(raw, key, known_type)
        if obj is None:
            is_named = _is_named(raw)
            has_unnamed |= not is_named
            message += f" (line {line} of {path}{'' if is_named else kept})"
            problems.append(problem_of(key, message, field))
            # An edit that went wrong must not take away what worked until now.
            obj = before.get(key)
            if obj is None:
                continue
        elif isinstance(obj, objects.Service) and _lacks_cluster_ip(obj):
            message = f"must be written: there is no API server to allocate one (in {path})"
            problems.append(problem_of(key, message, "spec.clusterIP"))
        if key in found:
            problems.append(problem_of(key, f"is twice in {path}; the latter is used"))
        found[key] = obj
    return ({**before, **found} if has_unnamed else found), problems


def _flatten(documents: Iterable[manifest_parser.Document]) -> Iterator[tuple[int, Any]]:
    """Yield line and value of each object: of documents, and of the items of lists."""
    for line, document in documents:
        pending = [document]
        while pending:
            value = pending.pop()
            if not (isinstance(value, dict) and isinstance(value.get("items"), list)):
                yield line, value
                continue
            kind = value.get("kind")
            if not (isinstance(kind, str) and kind.endswith("List")):
                yield line, value
                continue
            # The API server's own lists do not repeat kind and version for each item.
            common = {"kind": kind.removesuffix("List"), "apiVersion": value.get("apiVersion")}
            if kind == "List":
                common = {}
            pending += [
                common | item if isinstance(item, dict) else item
                for item in reversed(value["items"])
            ]


def _is_foreign(version: Any, wanted: str) -> bool:
    # Other projects have kinds of the same names: serving.knative.dev/v1 has a Service.
    if not isinstance(version, str) or "/" not in version:
        return False
    return version.partition("/")[0] != wanted.partition("/")[0]


def _key(kind: str, metadata: Any, known_type: _Type) -> Key:
    """Return what names the object, as far as it is readable."""
    if not isinstance(metadata, dict):
        return Key(kind, "", "")
    name, namespace = metadata.get("name"), metadata.get("namespace")
    if not known_type.is_namespaced:
        namespace = ""
    elif namespace is None or namespace == "":
        namespace = "default"
    return Key(kind, _text(namespace), _text(name))


def _is_named(raw: dict[Any, Any]) -> bool:
    metadata = raw.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return isinstance(name, str) and bool(name)


def _text(value: Any) -> str:
    # Whatever stands there must not flood the log; no valid name is longer.
    return value if isinstance(value, str) and len(value) <= 253 else str(value or "")[:60]


def _convert(raw: dict[Any, Any], key: Key, known_type: _Type) -> tuple[AnyObject | None, str, str]:
    """Return the object, or else None, the field that is wrong, and how."""
    if raw.get("apiVersion") != known_type.api_version:
        return None, "apiVersion", f"must be {known_type.api_version}"
    try:
        obj = msgspec.convert(raw, known_type.struct)
    except msgspec.ValidationError as error:
        return None, *_explain(str(error), raw)
    metadata = obj.metadata
    if not metadata.name:
        return None, "metadata.name", "is missing"
    if not _NAME.fullmatch(metadata.name):
        return None, "metadata.name", "is not a DNS name (RFC 1123)"
    if known_type.is_namespaced and not _NAMESPACE.fullmatch(key.namespace):
        return None, "metadata.namespace", "is not a DNS label (RFC 1123)"
    metadata.namespace = key.namespace
    _fill_in_defaults(obj)
    return obj, "", ""


def _explain(error: str, raw: dict[Any, Any]) -> tuple[str, str]:
    """Return the field that msgspec complains about, and the complaint."""
    match = _INVALID.fullmatch(error)
    if match is None:
        return "", f"cannot be read: {error}"
    path = match["path"]
    problem = match["problem"].replace("Expected", "expected").replace("`", "")
    if match["key"]:
        return path, f"cannot be read: a key is not text, {problem} (quote it)"
    if _NOT_TEXT.match(match["problem"]):
        problem += " (quote it)"
    # msgspec does not say under which key of a mapping; people need to know.
    if path.endswith("[...]"):
        path = path.removesuffix("[...]")
        values: Any = raw
        for step in path.split("."):
            values = values.get(step) if isinstance(values, dict) else None
        if isinstance(values, dict):
            wrong = next((key for key, value in values.items() if not isinstance(value, str)), "")
            path = f"{path}[{_text(wrong)}]"
    return path, f"cannot be read: {problem}"


def problem_of(key: Key, message: str, field: str = "") -> Problem:
    return Problem(
        kind=key.kind, namespace=key.namespace, name=key.name, field=field, message=message
    )


def _lacks_cluster_ip(service: objects.Service) -> bool:
    spec = service.spec
    return spec is None or (spec.type != "ExternalName" and not spec.clusterIP)


def _fill_in_defaults(obj: AnyObject) -> None:
    """Set what the API server would set, as far as anything reads it."""
    if isinstance(obj, objects.Service) and obj.spec:
        _fill_in_service(obj.spec)
    elif isinstance(obj, objects.EndpointSlice):
        for port in obj.ports or []:
            # kube-proxy skips ports without a name, and the API server leaves none.
            port.name = port.name or ""
            port.protocol = port.protocol or "TCP"


def _fill_in_service(spec: objects.ServiceSpec) -> None:
    spec.type = spec.type or "ClusterIP"
    spec.sessionAffinity = spec.sessionAffinity or "None"
    if spec.sessionAffinity == "ClientIP":
        config = spec.sessionAffinityConfig = (
            spec.sessionAffinityConfig or objects.SessionAffinityConfig()
        )
        config.clientIP = config.clientIP or objects.ClientIPConfig()
        if config.clientIP.timeoutSeconds is None:
            config.clientIP.timeoutSeconds = _AFFINITY_TIMEOUT_S
    for port in spec.ports or []:
        port.protocol = port.protocol or "TCP"
    if spec.clusterIPs and not spec.clusterIP:
        spec.clusterIP = spec.clusterIPs[0]
    if spec.clusterIP and not spec.clusterIPs:
        spec.clusterIPs = [spec.clusterIP]
    if spec.clusterIPs and spec.clusterIP != "None" and not spec.ipFamilies:
        spec.ipFamilies = [
            (IPFamily.V6 if ":" in ip else IPFamily.V4).value for ip in spec.clusterIPs
        ]
