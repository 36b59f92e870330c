"""
Make EndpointSlices from Pods, selectors and Endpoints, as a cluster's controllers do.

Pure. Follows Kubernetes' EndpointSlice controller and EndpointSlice mirroring controller in all
that a service proxy reads, and in nothing else: no targetRef, no zone, no hints (so a Service's
trafficDistribution has no effect), no limit of 100 endpoints a slice. Equal input gives equal
slices, name and order included, so one changed Pod changes only the slices it is in.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from kubeproxy_py import objects
from kubeproxy_py.model import IPFamily, ServiceName

# ruff: noqa: N815 - the API's field names

_SERVICE_NAME_LABEL: Final = "kubernetes.io/service-name"
_MANAGED_BY_LABEL: Final = "endpointslice.kubernetes.io/managed-by"
_SKIP_MIRROR_LABEL: Final = "endpointslice.kubernetes.io/skip-mirror"
# Endpoints that carry it are a lock of old leader elections and list no endpoints.
_LEADER_ANNOTATION: Final = "control-plane.alpha.kubernetes.io/leader"


class _Object(msgspec.Struct, gc=False):
    """Base of all: a Struct without reference cycles, so the collector may skip it."""


class ContainerPort(_Object):
    containerPort: int | None = None
    name: str | None = None
    protocol: str | None = None


class Container(_Object):
    ports: list[ContainerPort] | None = None
    restartPolicy: str | None = None


class PodSpec(_Object):
    nodeName: str | None = None
    hostNetwork: bool | None = None
    containers: list[Container] | None = None
    initContainers: list[Container] | None = None


class IPEntry(_Object):
    ip: str | None = None


class PodCondition(_Object):
    type: str = ""
    status: str = ""


class PodStatus(_Object):
    phase: str | None = None
    podIP: str | None = None
    podIPs: list[IPEntry] | None = None
    hostIP: str | None = None
    hostIPs: list[IPEntry] | None = None
    conditions: list[PodCondition] | None = None


class Pod(_Object):
    metadata: objects.ObjectMeta
    spec: PodSpec | None = None
    status: PodStatus | None = None


class EndpointAddress(_Object):
    ip: str | None = None
    nodeName: str | None = None


class EndpointPort(_Object):
    port: int | None = None
    name: str | None = None
    protocol: str | None = None


class EndpointSubset(_Object):
    addresses: list[EndpointAddress] | None = None
    notReadyAddresses: list[EndpointAddress] | None = None
    ports: list[EndpointPort] | None = None


class Endpoints(_Object):
    metadata: objects.ObjectMeta
    subsets: list[EndpointSubset] | None = None


# (name, port, protocol) of each port: what all endpoints of one slice have in common.
_Ports = tuple[tuple[str, int, str], ...]


def build_slices(
    services: Iterable[objects.Service],
    pods: Iterable[Pod],
    endpoints: Iterable[Endpoints],
    existing_slices: Iterable[objects.EndpointSlice],
) -> list[objects.EndpointSlice]:
    """
    Return the slices a cluster's controllers would add to *existing_slices*.

    Services without a cluster IP (headless, ExternalName) get none, since a service proxy ignores
    them. A Service with a selector gets slices of its Pods beside any existing ones. Endpoints
    are mirrored only for a Service that has neither a selector nor an existing slice.
    """
    by_label = _Pods(pods)
    selectorless: set[ServiceName] = set()
    slices: list[objects.EndpointSlice] = []
    for service in services:
        if not _has_cluster_ip(service):
            continue
        name = ServiceName(service.metadata.namespace, service.metadata.name)
        # To the API server, an empty selector is an absent one: it does not select every Pod.
        if service.spec and service.spec.selector:
            slices += _slices_of_pods(
                name, service.spec, by_label.select(name.namespace, service.spec.selector)
            )
        else:
            selectorless.add(name)
    has_slices = {
        ServiceName(
            item.metadata.namespace, (item.metadata.labels or {}).get(_SERVICE_NAME_LABEL, "")
        )
        for item in existing_slices
    }
    for item in endpoints:
        name = ServiceName(item.metadata.namespace, item.metadata.name)
        if name in selectorless and name not in has_slices and _is_mirrored(item):
            slices += _slices_of_subsets(name, item.subsets or [])
    return slices


class _Pods:
    """Pods that can be endpoints, found by their labels."""

    def __init__(self, pods: Iterable[Pod]) -> None:
        self._by_label: defaultdict[tuple[str, str, str], list[Pod]] = defaultdict(list)
        for pod in sorted(pods, key=lambda pod: (pod.metadata.namespace, pod.metadata.name)):
            if _pod_ips(pod) and not _is_terminal(pod):
                for key, value in (pod.metadata.labels or {}).items():
                    self._by_label[pod.metadata.namespace, key, value].append(pod)

    def select(self, namespace: str, selector: dict[str, str]) -> list[Pod]:
        # The rarest label leaves the fewest Pods to compare; comparing each Service with each
        # Pod would make a directory of thousands of objects take seconds.
        candidates = min(
            (self._by_label.get((namespace, key, value), []) for key, value in selector.items()),
            key=len,
        )
        return [
            pod for pod in candidates if selector.items() <= (pod.metadata.labels or {}).items()
        ]


def _is_terminal(pod: Pod) -> bool:
    return pod.status is not None and pod.status.phase in ("Succeeded", "Failed")


def _has_cluster_ip(service: objects.Service) -> bool:
    spec = service.spec
    return bool(
        spec and spec.type != "ExternalName" and spec.clusterIP and spec.clusterIP != "None"
    )


def _slices_of_pods(
    service: ServiceName, spec: objects.ServiceSpec, pods: Sequence[Pod]
) -> list[objects.EndpointSlice]:
    slices = []
    families = spec.ipFamilies or [_family(spec.clusterIP or "").value]
    for family in IPFamily:
        if family.value not in families:
            continue
        by_ports: defaultdict[_Ports, list[objects.SliceEndpoint]] = defaultdict(list)
        for pod in pods:
            addresses = [ip for ip in _pod_ips(pod) if _family(ip) is family]
            ports = _ports_of(spec, pod)
            if addresses and ports:
                by_ports[ports].append(_endpoint(pod, addresses, spec))
        slices += [
            _slice(service, family, ports, members) for ports, members in sorted(by_ports.items())
        ]
    return slices


def _endpoint(pod: Pod, addresses: list[str], spec: objects.ServiceSpec) -> objects.SliceEndpoint:
    conditions = (pod.status.conditions if pod.status else None) or []
    is_serving = any(item.type == "Ready" and item.status == "True" for item in conditions)
    is_terminating = pod.metadata.deletionTimestamp is not None
    return objects.SliceEndpoint(
        addresses=addresses,
        nodeName=(pod.spec.nodeName or None) if pod.spec else None,
        conditions=objects.EndpointConditions(
            # Never ready while terminating, unless the Service asks for all there are.
            ready=bool(spec.publishNotReadyAddresses) or (is_serving and not is_terminating),
            serving=is_serving,
            terminating=is_terminating,
        ),
    )


def _ports_of(spec: objects.ServiceSpec, pod: Pod) -> _Ports:
    ports = []
    for port in spec.ports or []:
        protocol = port.protocol or "TCP"
        # 0 and "" mean absent, as they do to the API server.
        target = port.targetPort or port.port
        if isinstance(target, str):
            target = _named_port(pod, target, protocol)
        # A Pod that lacks a named port still serves the Service's other ports.
        if target is not None:
            ports.append((port.name or "", target, protocol))
    return tuple(ports)


def _named_port(pod: Pod, name: str, protocol: str) -> int | None:
    if pod.spec is None:
        return None
    sidecars = [item for item in pod.spec.initContainers or [] if item.restartPolicy == "Always"]
    for container in [*(pod.spec.containers or []), *sidecars]:
        for port in container.ports or []:
            if port.name == name and (port.protocol or "TCP") == protocol:
                return port.containerPort
    return None


def _pod_ips(pod: Pod) -> list[str]:
    status, spec = pod.status, pod.spec
    if status is None:
        return []
    ips = _ips(status.podIPs, status.podIP)
    if not ips and spec and spec.hostNetwork:
        # The kubelet copies the node's addresses to podIPs; what people write often lacks that.
        ips = _ips(status.hostIPs, status.hostIP)
    return ips


def _ips(entries: list[IPEntry] | None, single: str | None) -> list[str]:
    return [entry.ip for entry in entries or [] if entry.ip] or ([single] if single else [])


def _family(ip: str) -> IPFamily:
    return IPFamily.V6 if ":" in ip else IPFamily.V4


def _is_mirrored(endpoints: Endpoints) -> bool:
    labels, annotations = endpoints.metadata.labels or {}, endpoints.metadata.annotations or {}
    return labels.get(_SKIP_MIRROR_LABEL) != "true" and _LEADER_ANNOTATION not in annotations


def _slices_of_subsets(
    service: ServiceName, subsets: Sequence[EndpointSubset]
) -> list[objects.EndpointSlice]:
    members: defaultdict[tuple[str, _Ports], list[objects.SliceEndpoint]] = defaultdict(list)
    for subset in subsets:
        ports = tuple(
            (port.name or "", port.port, port.protocol or "TCP")
            for port in subset.ports or []
            if port.port
        )
        if not ports:
            continue
        for is_ready, addresses in ((True, subset.addresses), (False, subset.notReadyAddresses)):
            for address in addresses or []:
                if address.ip:
                    members[_family(address.ip).value, ports].append(
                        objects.SliceEndpoint(
                            addresses=[address.ip],
                            nodeName=address.nodeName or None,
                            conditions=objects.EndpointConditions(ready=is_ready),
                        )
                    )
    return [
        _slice(service, IPFamily(family), ports, endpoints)
        for (family, ports), endpoints in sorted(members.items())
    ]


def _slice(
    service: ServiceName,
    family: IPFamily,
    ports: _Ports,
    endpoints: list[objects.SliceEndpoint],
) -> objects.EndpointSlice:
    # Named by what sets it apart from the Service's other slices, never by its endpoints: a Pod
    # that comes or goes then changes a slice instead of replacing it.
    digest = hashlib.sha256(repr((family.value, ports)).encode()).hexdigest()[:10]
    return objects.EndpointSlice(
        metadata=objects.ObjectMeta(
            name=f"{service.name}-{digest}",
            namespace=service.namespace,
            labels={_SERVICE_NAME_LABEL: service.name, _MANAGED_BY_LABEL: "kubeproxy-py"},
        ),
        addressType=family.value,
        ports=[
            objects.SlicePort(port=port, name=name, protocol=protocol)
            for name, port, protocol in ports
        ],
        endpoints=endpoints,
    )
