"""
API objects, reduced to the fields that are read.

Decoding straight into these keeps an object's unread nine tenths (managedFields, templates,
conditions) out of memory. Field names are the API's own, so that msgspec needs no table of names.
Absent and null mean the same, as they do to Go's decoder. No rule of behaviour belongs here.
"""

from typing import Final, Protocol

import msgspec

from kubeproxy_py.model import Kind

# ruff: noqa: N815 - the API's field names


class _Object(msgspec.Struct, gc=False):
    """Base of all: a Struct without reference cycles, so the collector may skip it."""


class ObjectMeta(_Object):
    name: str = ""
    namespace: str = ""
    resourceVersion: str = ""
    deletionTimestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class ServicePortSpec(_Object):
    port: int | None = None
    name: str | None = None
    protocol: str | None = None
    nodePort: int | None = None
    # Read only where there is no endpoint controller (manifests.py).
    targetPort: int | str | None = None


class ClientIPConfig(_Object):
    timeoutSeconds: int | None = None


class SessionAffinityConfig(_Object):
    clientIP: ClientIPConfig | None = None


class ServiceSpec(_Object):
    type: str | None = None
    clusterIP: str | None = None
    clusterIPs: list[str] | None = None
    ipFamilies: list[str] | None = None
    ports: list[ServicePortSpec] | None = None
    sessionAffinity: str | None = None
    sessionAffinityConfig: SessionAffinityConfig | None = None
    externalIPs: list[str] | None = None
    loadBalancerSourceRanges: list[str] | None = None
    externalTrafficPolicy: str | None = None
    internalTrafficPolicy: str | None = None
    healthCheckNodePort: int | None = None
    # Read only where there is no endpoint controller (manifests.py).
    selector: dict[str, str] | None = None
    publishNotReadyAddresses: bool | None = None


class LoadBalancerIngress(_Object):
    ip: str | None = None
    ipMode: str | None = None


class LoadBalancerStatus(_Object):
    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(_Object):
    loadBalancer: LoadBalancerStatus | None = None


class Service(_Object):
    metadata: ObjectMeta
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class EndpointConditions(_Object):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForHint(_Object):
    name: str = ""


class EndpointHints(_Object):
    forZones: list[ForHint] | None = None
    forNodes: list[ForHint] | None = None


class SliceEndpoint(_Object):
    addresses: list[str] | None = None
    nodeName: str | None = None
    conditions: EndpointConditions | None = None
    hints: EndpointHints | None = None


class SlicePort(_Object):
    port: int | None = None
    name: str | None = None
    protocol: str | None = None


class EndpointSlice(_Object):
    metadata: ObjectMeta
    addressType: str = ""
    ports: list[SlicePort] | None = None
    endpoints: list[SliceEndpoint] | None = None


class Taint(_Object):
    key: str = ""


class NodeSpec(_Object):
    podCIDR: str | None = None
    podCIDRs: list[str] | None = None
    taints: list[Taint] | None = None


class NodeAddress(_Object):
    type: str = ""
    address: str = ""


class NodeStatus(_Object):
    addresses: list[NodeAddress] | None = None


class Node(_Object):
    metadata: ObjectMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


Object = Service | EndpointSlice | Node

TYPES: Final[dict[Kind, type[Service] | type[EndpointSlice] | type[Node]]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Node": Node,
}


class Sink(Protocol):
    """Where sources of objects (watch.py, manifests.py) put what they learn; store.py is one.

    All methods may be called from any thread.
    """

    def upsert(self, kind: Kind, obj: Object) -> None:
        """Add *obj*, or put it in the place of the one with its namespace and name."""

    def delete(self, kind: Kind, namespace: str, name: str) -> None:
        """Remove the object; one that is not known is no error."""

    def listed(self, kind: Kind) -> None:
        """Take note that all objects of *kind* there are have now been given."""
