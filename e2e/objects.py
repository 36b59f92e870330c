"""The objects that tests create. Pure: what is returned is what would be sent to the API server."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from e2e import agnhost

Json = dict[str, Any]

#: On everything that tests make, so that what a killed run left behind can be found.
LABEL: Final = "kubeproxy-py-e2e"


def namespace(name: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": name,
            "labels": {
                LABEL: "true",
                # Clients on the host's network are part of the tests.
                "pod-security.kubernetes.io/enforce": "privileged",
            },
        },
    }


def pod(
    name: str,
    *,
    namespace: str,
    arguments: Sequence[str],
    node: str = "",
    labels: Mapping[str, str] | None = None,
    ports: Sequence[Json] = (),
    host_network: bool = False,
    ready_by_file: bool = False,
    grace_s: int = 1,
    image: str = agnhost.IMAGE,
) -> Json:
    """Return a Pod of agnhost.

    Args:
        name: its name, and its host name if it is not on the host's network
        namespace: where it stands
        arguments: agnhost's
        node: where it runs; "": the scheduler chooses
        labels: for Services to select
        ports: containerPorts, for named target ports
        host_network: run on the node's network
        ready_by_file: ready while agnhost.READY_FILE exists, instead of as soon as it runs
        grace_s: how long it may take to end
        image: agnhost's
    """
    container: Json = {"name": "agnhost", "image": image, "args": list(arguments)}
    if ports:
        container["ports"] = list(ports)
    if ready_by_file:
        container["readinessProbe"] = {
            "exec": {"command": ["test", "-f", agnhost.READY_FILE]},
            "periodSeconds": 1,
            "failureThreshold": 1,
        }
    spec: Json = {
        "containers": [container],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s,
        "tolerations": [{"operator": "Exists"}],
    }
    if node:
        spec["nodeName"] = node
    if host_network:
        spec["hostNetwork"] = True
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {LABEL: "true", **(labels or {})},
        },
        "spec": spec,
    }


def service(
    name: str,
    *,
    namespace: str,
    selector: Mapping[str, str] | None,
    ports: Sequence[Json] = (),
    labels: Mapping[str, str] | None = None,
    family: str = "",
    **spec: Any,
) -> Json:
    """Return a Service; *spec* has any further field by its API name."""
    made: Json = {"ports": list(ports)} if ports else {}
    if selector is not None:
        made["selector"] = dict(selector)
    if family:
        made |= {"ipFamilyPolicy": "SingleStack", "ipFamilies": [family]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {LABEL: "true", **(labels or {})},
        },
        "spec": made | spec,
    }


def port(number: int, **fields: Any) -> Json:
    """Return a Service's port; *fields* by their API names."""
    return {"port": number, "protocol": "TCP", **fields}


def endpoint_slice(
    name: str,
    service_name: str,
    *,
    namespace: str,
    ports: Sequence[Json],
    addresses: Sequence[str],
    labels: Mapping[str, str] | None = None,
) -> Json:
    """Return an EndpointSlice that no controller manages; all endpoints are ready."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {
                LABEL: "true",
                "kubernetes.io/service-name": service_name,
                "endpointslice.kubernetes.io/managed-by": LABEL,
                **(labels or {}),
            },
        },
        "addressType": "IPv6" if ":" in addresses[0] else "IPv4",
        "ports": list(ports),
        "endpoints": [
            {"addresses": [address], "conditions": {"ready": True}} for address in addresses
        ],
    }
