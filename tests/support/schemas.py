"""
The Kubernetes API's own schemas: is this object what the API server would accept?

Unknown fields are errors. What schemas do not know (names, ports in range, references inside a Pod)
is checked here as far as our manifests depend on it.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import kubernetes_validate

Json = dict[str, Any]

# The release this program behaves as, and the oldest that the chart admits.
VERSIONS: Final = ("1.36.0", "1.25.0")

_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
# ClusterRoles and the like may have colons in their names.
_RBAC: Final = "rbac.authorization.k8s.io"


def problems(obj: Json, version: str = VERSIONS[0]) -> list[str]:
    """Return what is wrong with *obj*; nothing if the API server would take it."""
    try:
        kubernetes_validate.validate(obj, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = "/".join(map(str, error.absolute_path))
        return [f"{_name(obj)}: {where}: {error.message}"]
    except (kubernetes_validate.SchemaNotFoundError, KeyError) as error:
        return [f"{_name(obj)}: no such kind: {getattr(error, 'message', error)}"]
    return [f"{_name(obj)}: {problem}" for problem in _beyond_the_schema(obj)]


def pod_templates(objects: list[Json]) -> list[Json]:
    """Return the Pods, and what Pods are made from."""
    found = []
    for obj in objects:
        if obj["kind"] == "Pod":
            found.append(obj)
        elif "template" in obj.get("spec", {}):
            found.append(obj["spec"]["template"])
    return found


def _name(obj: Json) -> str:
    return f"{obj.get('kind')} {obj.get('metadata', {}).get('name')}"


def _beyond_the_schema(obj: Json) -> Iterator[str]:
    metadata = obj.get("metadata", {})
    name = metadata.get("name", "")
    if not obj["apiVersion"].startswith(_RBAC) and not _NAME.fullmatch(name):
        yield f"metadata.name: {name!r}"
    for value in metadata.get("labels", {}).values():
        if not _LABEL_VALUE.fullmatch(value):
            yield f"metadata.labels: {value!r}"
    for template in pod_templates([obj]):
        yield from _in_pod(template)
    selector = obj.get("spec", {}).get("selector", {})
    if obj["kind"] in {"DaemonSet", "Deployment"}:
        labels = obj["spec"]["template"]["metadata"]["labels"]
        if not selector["matchLabels"].items() <= labels.items():
            yield "spec.selector: does not match the template's labels"


def _in_pod(template: Json) -> Iterator[str]:
    pod = template["spec"]
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    names = [container["name"] for container in containers]
    if len(names) != len(set(names)):
        yield "spec.containers: names are not unique"
    for container in containers:
        where = f"container {container['name']}"
        variables = [variable["name"] for variable in container.get("env", ())]
        if len(variables) != len(set(variables)):
            yield f"{where}: env: names are not unique"
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"{where}: volumeMounts: no volume {mount['name']!r}"
        ports = {port.get("name") for port in container.get("ports", ())}
        for port in container.get("ports", ()):
            if not 0 < port["containerPort"] < 1 << 16:
                yield f"{where}: ports: {port['containerPort']}"
            if (
                pod.get("hostNetwork")
                and port.get("hostPort", port["containerPort"]) != (port["containerPort"])
            ):
                yield f"{where}: ports: hostPort differs from containerPort on the host's network"
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container.get(kind, {}).get("httpGet", {}).get("port")
            if isinstance(asked, str) and asked not in ports:
                yield f"{where}: {kind}: no port {asked!r}"
