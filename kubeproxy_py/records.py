"""
API objects → records: which objects count, which of their fields, with which defaults.

Pure. What cannot be used is left out at the finest grain that still makes sense (a port, an address,
an endpoint, else the object) and described by a Problem. Everything that later becomes part of a rule
is validated here, so that no string of an object can end a quoted comment or begin another rule.
"""

import datetime as dt
import functools
import re
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Final, cast

import msgspec

from kubeproxy_py import addresses, objects
from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    Kind,
    Node,
    PortKey,
    Problem,
    Protocol,
    ServiceName,
    ServicePort,
    ServicePortName,
)

SERVICE_NAME_LABEL: Final = "kubernetes.io/service-name"
HEADLESS_LABEL: Final = "service.kubernetes.io/headless"
PROXY_NAME_LABEL: Final = "service.kubernetes.io/service-proxy-name"
ZONE_LABEL: Final = "topology.kubernetes.io/zone"
TRIGGER_ANNOTATION: Final = "endpoints.kubernetes.io/last-change-trigger-time"
# Set by the cluster autoscaler on a node that it is about to remove.
TO_BE_DELETED_TAINT: Final = "ToBeDeletedByClusterAutoscaler"
# The API's default (three hours) for ClientIP affinity.
DEFAULT_AFFINITY_S: Final = 10800
# What the kernel's `recent` match can count in jiffies without overflow at HZ=1000, and far above
# the API's own limit of one day.
MAX_AFFINITY_S: Final = 2_000_000

_PROTOCOLS: Final[dict[str, Protocol]] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
# An object may have 100,000 ports, all wrong: whoever reads the log has understood by then.
_MAX_PROBLEMS: Final = 20
# DNS-1123 label: namespaces, Services (since they became DNS-1123) and port names. 63 + 63 + 63
# characters also keep every comment below the kernel's limit of 255.
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)

Note = Callable[[str, str], None]  # (field, message)


class _Problems:
    """Collects Problems of one object."""

    def __init__(self, kind: Kind, meta: objects.ObjectMeta) -> None:
        self._kind = kind
        self._meta = meta
        self._found: list[Problem] = []
        self._untold = 0

    def note(self, field: str, message: str) -> None:
        if len(self._found) < _MAX_PROBLEMS:
            self._found.append(self._problem(field, message))
        else:
            self._untold += 1

    def found(self) -> tuple[Problem, ...]:
        """Return them, the first few one by one."""
        if not self._untold:
            return tuple(self._found)
        more = self._problem("", f"and {self._untold} more problems of this object")
        return (*self._found, more)

    def _problem(self, field: str, message: str) -> Problem:
        return Problem(
            kind=self._kind,
            namespace=self._meta.namespace,
            name=self._meta.name,
            field=field,
            message=message,
        )


class ServiceRecord(msgspec.Struct, frozen=True):
    """A Service, per family. A family in which it has no cluster IP is absent."""

    name: ServiceName
    ports: dict[IPFamily, dict[PortKey, ServicePort]]
    problems: tuple[Problem, ...] = ()


class SliceRecord(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice that counts: its Service, family and endpoints by port."""

    service: ServiceName
    family: IPFamily
    endpoints: dict[PortKey, tuple[Endpoint, ...]]
    trigger_time: float | None = None  # Unix time of the change that made this slice change

    @property
    def has_udp(self) -> bool:
        return any(key.protocol == "udp" for key in self.endpoints)


def _say_nothing(_field: str, _message: str) -> None:
    pass


def is_label(text: str) -> bool:
    """Tell whether *text* is a DNS-1123 label, which is safe to stand in a rule."""
    return _LABEL.fullmatch(text) is not None


def service_record(service: objects.Service) -> ServiceRecord:
    """Derive what the rules need of a Service; no ports for one that kube-proxy ignores."""
    meta, spec = service.metadata, service.spec or objects.ServiceSpec()
    name = ServiceName(sys.intern(meta.namespace), meta.name)
    problems = _Problems("Service", meta)
    ports: dict[IPFamily, dict[PortKey, ServicePort]] = {}
    if PROXY_NAME_LABEL in (meta.labels or {}) or _is_ignored(spec):
        return ServiceRecord(name, {})
    for field, text in (("metadata.namespace", meta.namespace), ("metadata.name", meta.name)):
        if not is_label(text):
            problems.note(field, f"{text[:80]!r} is not a DNS label")
            return ServiceRecord(name, {}, problems.found())
    # A port that is wrong is wrong in both families, but one Problem says so.
    specs = _checked_ports(spec.ports or [], problems.note)
    for family in IPFamily:
        cluster_ip = _cluster_ip(spec, family, problems.note)
        if cluster_ip is not None:
            # The second family reads the same lists; the first has said what is wrong in them.
            note = problems.note if not ports else _say_nothing
            shared = _FamilyFields(service, family, note)
            ports[family] = {
                key: shared.service_port(name, key, cluster_ip, port) for key, port in specs.items()
            }
    return ServiceRecord(name, ports, problems.found())


def _is_ignored(spec: objects.ServiceSpec) -> bool:
    return spec.type == "ExternalName" or spec.clusterIP in {None, "", "None"}


def _checked_ports(
    specs: Iterable[objects.ServicePortSpec], note: Note
) -> dict[PortKey, objects.ServicePortSpec]:
    checked: dict[PortKey, objects.ServicePortSpec] = {}
    for index, spec in enumerate(specs):
        at = f"spec.ports[{index}]"
        key = _port_key(spec.name, spec.protocol, at, note)
        if key is None:
            continue
        if not _is_port(spec.port):
            note(f"{at}.port", f"{spec.port} is not a port (1-65535)")
        elif spec.nodePort and not _is_port(spec.nodePort):
            note(f"{at}.nodePort", f"{spec.nodePort} is not a port (1-65535)")
        elif key in checked:
            note(f"{at}.name", f"another port is named {key.name!r} with protocol {key.protocol}")
        else:
            checked[key] = spec
    return checked


def _port_key(name: str | None, protocol: str | None, at: str, note: Note) -> PortKey | None:
    if name and not is_label(name):
        note(f"{at}.name", f"{name[:80]!r} is not a DNS label")
        return None
    known = _PROTOCOLS.get(protocol or "TCP")
    if known is None:
        note(f"{at}.protocol", f"{str(protocol)[:80]!r} is not TCP, UDP or SCTP")
        return None
    return _shared_key(name or "", known)


@functools.lru_cache(maxsize=4096)
def _shared_key(name: str, protocol: Protocol) -> PortKey:
    # The ports of nearly all Services and slices have the same few names.
    return PortKey(sys.intern(name), protocol)


def _is_port(number: int | None) -> bool:
    return number is not None and 0 < number < 65536


def _cluster_ip(spec: objects.ServiceSpec, family: IPFamily, note: Note) -> str | None:
    """Return the cluster IP of one family, as kube-proxy picks it, or None."""
    if spec.ipFamilies:
        ips = spec.clusterIPs or []
        index = next((i for i, name in enumerate(spec.ipFamilies) if name == family.value), None)
        if index is None or index >= len(ips):
            return None
        field, text = f"spec.clusterIPs[{index}]", ips[index]
    else:
        # Objects from before dual stack have no ipFamilies: the address itself tells.
        field, text = "spec.clusterIP", spec.clusterIP or ""
    ip = addresses.parse_ip(text)
    if ip is None:
        # Without ipFamilies both families look at the same text; one of them says what is wrong.
        if spec.ipFamilies or family is IPFamily.V4:
            note(field, f"{text[:80]!r} is not an IP address")
        return None
    if addresses.family_of(ip) is not family:
        if spec.ipFamilies:
            note(field, f"{text[:80]!r} is not an {family.value} address")
        return None
    return ip


class _FamilyFields:
    """The fields that all ports of a Service share in one family."""

    def __init__(self, service: objects.Service, family: IPFamily, note: Note) -> None:
        spec = service.spec or objects.ServiceSpec()
        self._family = family
        self._external_ips = self._ips(spec.externalIPs or [], "spec.externalIPs[{}]", note)
        self._lb_vips = self._load_balancer_vips(service.status, note)
        self._source_ranges = self._ranges(spec.loadBalancerSourceRanges or [], note)
        self._is_published = bool(self._external_ips or self._lb_vips)
        # NodePort and LoadBalancer Services have external traffic; a ClusterIP Service has it only
        # through externalIPs. (kube-proxy reads the raw list of both families here.)
        self._is_external_local = spec.externalTrafficPolicy == "Local" and (
            spec.type in {"LoadBalancer", "NodePort"}
            or (spec.type in {None, "", "ClusterIP"} and bool(spec.externalIPs))
        )
        self._is_internal_local = spec.internalTrafficPolicy == "Local"
        self._health_check_node_port = self._health_port(spec, note)
        self._affinity_s = _affinity(spec, note)

    def service_port(
        self, name: ServiceName, key: PortKey, cluster_ip: str, spec: objects.ServicePortSpec
    ) -> ServicePort:
        node_port = spec.nodePort or 0
        return ServicePort(
            name=ServicePortName(name.namespace, name.name, key.name, key.protocol),
            cluster_ip=cluster_ip,
            port=cast("int", spec.port),
            node_port=node_port,
            external_ips=self._external_ips,
            lb_vips=self._lb_vips,
            source_ranges=self._source_ranges,
            is_external_local=self._is_external_local,
            is_internal_local=self._is_internal_local,
            health_check_node_port=self._health_check_node_port,
            affinity_timeout_s=self._affinity_s,
            is_externally_accessible=bool(node_port) or self._is_published,
        )

    def _ips(self, texts: Iterable[str | None], field: str, note: Note) -> tuple[str, ...]:
        ips = []
        for index, text in enumerate(texts):
            if not (text or "").strip():
                continue
            ip = addresses.parse_ip((text or "").strip())
            if ip is None:
                note(field.format(index), f"{(text or '')[:80]!r} is not an IP address")
            elif addresses.family_of(ip) is self._family:
                ips.append(ip)
        return tuple(dict.fromkeys(ips))

    def _load_balancer_vips(
        self, status: objects.ServiceStatus | None, note: Note
    ) -> tuple[str, ...]:
        balancer = status.loadBalancer if status else None
        # ipMode Proxy means that the load balancer delivers to the node port itself, and that
        # traffic to the VIP must not be short-circuited (KEP-1860).
        return self._ips(
            [
                ingress.ip if ingress.ipMode in {None, "", "VIP"} else None
                for ingress in (balancer.ingress if balancer else None) or []
            ],
            "status.loadBalancer.ingress[{}].ip",
            note,
        )

    def _ranges(self, texts: Iterable[str], note: Note) -> tuple[str, ...]:
        ranges = []
        has_invalid = False
        for index, text in enumerate(texts):
            cidr = addresses.parse_cidr(text.strip())
            if cidr is None:
                has_invalid = True
                note(f"spec.loadBalancerSourceRanges[{index}]", f"{text[:80]!r} is not a CIDR")
            elif addresses.family_of(cidr) is self._family:
                ranges.append(cidr)
        if any(map(addresses.is_zero_cidr, ranges)):
            return ()
        if has_invalid and not ranges:
            # An empty list would open the VIP to everybody, which is the contrary of what was
            # meant; without VIPs there is nothing to open.
            self._lb_vips = ()
        return tuple(ranges)

    def _health_port(self, spec: objects.ServiceSpec, note: Note) -> int:
        if spec.type != "LoadBalancer" or not self._is_external_local:
            return 0
        port = spec.healthCheckNodePort or 0
        if not _is_port(port):
            note("spec.healthCheckNodePort", "Service has no healthcheck nodeport")
            return 0
        return port


def _affinity(spec: objects.ServiceSpec, note: Note) -> int | None:
    if spec.sessionAffinity != "ClientIP":
        return None
    client_ip = spec.sessionAffinityConfig.clientIP if spec.sessionAffinityConfig else None
    seconds = client_ip.timeoutSeconds if client_ip else None
    if seconds is None:
        return DEFAULT_AFFINITY_S
    if not 0 < seconds <= MAX_AFFINITY_S:
        note(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            f"{seconds} is not between 1 and {MAX_AFFINITY_S}; {DEFAULT_AFFINITY_S} is used",
        )
        return DEFAULT_AFFINITY_S
    return seconds


def slice_record(
    eps: objects.EndpointSlice, *, node_name: str
) -> tuple[SliceRecord | None, tuple[Problem, ...]]:
    """Derive a slice's endpoints by port; None for a slice that kube-proxy ignores."""
    meta = eps.metadata
    labels = meta.labels or {}
    problems = _Problems("EndpointSlice", meta)
    service = labels.get(SERVICE_NAME_LABEL, "")
    if not service or not meta.name or not meta.namespace or HEADLESS_LABEL in labels:
        return None, ()
    try:
        family = IPFamily(eps.addressType)
    except ValueError:
        # FQDN is valid for the API, and for nobody who writes packet filters.
        problems.note("addressType", f"{eps.addressType[:80]!r} is not supported")
        return None, problems.found()
    ports = [
        (key, port.port)
        for index, port in enumerate(eps.ports or [])
        if (key := _slice_port(port, f"ports[{index}]", problems.note)) is not None
        and port.port is not None
    ]
    known = [
        (ip, _endpoint_facts(endpoint, node_name))
        for index, endpoint in enumerate(eps.endpoints or [])
        if (ip := _endpoint_ip(endpoint, family, f"endpoints[{index}]", problems.note)) is not None
    ]
    endpoints = {
        # Sorted as ``merge_slices`` sorts them, which so need not make another tuple of them.
        key: tuple(sorted((Endpoint(ip, port, *facts) for ip, facts in known), key=_address_of))
        for key, port in ports
    }
    record = SliceRecord(
        ServiceName(sys.intern(meta.namespace), service),
        family,
        endpoints,
        parse_time((meta.annotations or {}).get(TRIGGER_ANNOTATION)),
    )
    return record, problems.found()


def _slice_port(port: objects.SlicePort, at: str, note: Note) -> PortKey | None:
    if port.name is None:
        note(f"{at}.name", "is missing")
        return None
    if not port.port:
        note(f"{at}.port", "is missing or 0; all ports are not supported")
        return None
    if not _is_port(port.port):
        note(f"{at}.port", f"{port.port} is not a port (1-65535)")
        return None
    return _port_key(port.name, port.protocol, at, note)


def _endpoint_ip(
    endpoint: objects.SliceEndpoint, family: IPFamily, at: str, note: Note
) -> str | None:
    if not endpoint.addresses:
        note(f"{at}.addresses", "is empty")
        return None
    # Only the first address has a meaning; the API allows more for reasons of history.
    text = endpoint.addresses[0]
    ip = addresses.parse_ip(text)
    if ip is None or addresses.family_of(ip) is not family:
        note(f"{at}.addresses[0]", f"{text[:80]!r} is not an {family.value} address")
        return None
    return ip


def _endpoint_facts(
    endpoint: objects.SliceEndpoint, node_name: str
) -> tuple[bool, bool, bool, bool, frozenset[str], frozenset[str]]:
    conditions = endpoint.conditions or objects.EndpointConditions()
    hints = endpoint.hints or objects.EndpointHints()
    return (
        endpoint.nodeName is not None and endpoint.nodeName == node_name,
        # Absent means: ready, serving (whatever ready says) and not terminating.
        conditions.ready is not False,
        conditions.serving is not False,
        conditions.terminating is True,
        _names(hints.forZones),
        _names(hints.forNodes),
    )


def _address_of(endpoint: Endpoint) -> str:
    return endpoint.address


_NO_NAMES: Final[frozenset[str]] = frozenset()


def _names(hints: list[objects.ForHint] | None) -> frozenset[str]:
    return frozenset(sys.intern(hint.name) for hint in hints) if hints else _NO_NAMES


def merge_slices(slices: Collection[SliceRecord]) -> dict[PortKey, tuple[Endpoint, ...]]:
    """Merge the slices of one Service and family: no duplicates, sorted by address as text.

    Of two entries for one address that is not terminating wins; of two such, the later. The order
    decides which rule has which probability, so it has to be kube-proxy's: bytewise by ``IP:port``.
    """
    by_port: dict[PortKey, dict[str, Endpoint]] = {}
    for record in slices:
        for key, endpoints in record.endpoints.items():
            by_address = by_port.setdefault(key, {})
            for endpoint in endpoints:
                address = endpoint.address
                if address not in by_address or not endpoint.terminating:
                    by_address[address] = endpoint
    merged = {
        key: tuple(by_address[address] for address in sorted(by_address))
        for key, by_address in by_port.items()
        if by_address
    }
    # Nearly all Services have one slice: what is the same is kept once.
    return next((record.endpoints for record in slices if record.endpoints == merged), merged)


def node_record(node: objects.Node) -> Node:
    """Derive the facts of the own Node; addresses that are not IPs (host names) are left out."""
    spec = node.spec or objects.NodeSpec()
    listed = (node.status.addresses if node.status else None) or []
    by_type = {
        kind: [
            ip
            for address in listed
            if address.type == kind and (ip := addresses.parse_ip(address.address)) is not None
        ]
        for kind in ("InternalIP", "ExternalIP")
    }
    taints = {taint.key for taint in spec.taints or []}
    return Node(
        name=node.metadata.name,
        ips=(*by_type["InternalIP"], *by_type["ExternalIP"]),
        pod_cidrs=tuple(spec.podCIDRs or ([spec.podCIDR] if spec.podCIDR else [])),
        zone=(node.metadata.labels or {}).get(ZONE_LABEL, ""),
        is_eligible=node.metadata.deletionTimestamp is None and TO_BE_DELETED_TAINT not in taints,
    )


def parse_time(text: str | None) -> float | None:
    """Return RFC 3339 *text* as Unix time, or None if it is absent or something else."""
    if not text:
        return None
    try:
        return dt.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None
