"""
Which external IPs and load balancer VIPs of Services are served, and which are refused, and why.

Pure. Whoever may write a Service chooses its external addresses, and with them whose traffic every
node takes (CVE-2020-8554). kube-proxy programs all of them. Here those that nobody can mean well are
left out: another Service's cluster IP, an API server's own address and port, and what is outside of
the list of allowed CIDRs. The invariant it guards: the verdicts depend on what there is, never on the
order in which it came.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from kubeproxy_py import addresses
from kubeproxy_py.model import PortKey, ServiceName, ServicePort

#: The Service whose EndpointSlices are the API servers themselves.
API_SERVICE: Final = ServiceName("default", "kubernetes")

#: Why an address is refused: the feature gate AllowServiceExternalIPs is off, it is outside of the
#: allowed CIDRs, it is another Service's cluster IP, or it is where an API server listens.
Reason = Literal["disabled", "not_allowed", "cluster_ip", "api_server"]
#: Why an address that is served is worth a look: it is one of the Node's own, or the one by which the API
#: server is reached. Both are practice somewhere: ServiceLB and MetalLB on a single node hand out the
#: node's own IP, and a control plane may stand behind a Service of the cluster.
Doubt = Literal["node_address", "api_address"]
Field = Literal["spec.externalIPs", "status.loadBalancer.ingress"]
Ports = Mapping[PortKey, ServicePort]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a person has decided about external addresses."""

    #: Feature gate AllowServiceExternalIPs. It is about spec.externalIPs alone.
    allows_external_ips: bool = True
    #: Canonical CIDRs; empty: everywhere.
    allowed: tuple[str, ...] = ()


class ApiAddress(msgspec.Struct, frozen=True):
    """Where an API server listens (TCP)."""

    ip: str
    port: int


class Refusal(msgspec.Struct, frozen=True):
    """One address of one Service that gets no rules."""

    service: ServiceName
    field: Field
    ip: str
    port: int  # 0: on all its ports
    reason: Reason
    message: str  # goes on after the address: "10.96.0.1 is ..."

    @property
    def where(self) -> str:
        """Return the address and what is wrong with it."""
        port = f" port {self.port}" if self.port else ""
        return f"{self.field}: {self.ip}{port} {self.message}"

    def __str__(self) -> str:
        return f"Service '{self.service}': {self.where}"


class Shadow(msgspec.Struct, frozen=True):
    """One address of one Service that is served, though others may miss their traffic."""

    service: ServiceName
    field: Field
    ip: str
    port: int
    doubt: Doubt


class Exposure:
    """Who is exposed where, in one family, and what of it is refused. Not for several threads."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        # Nearly every address has one owner, and a tuple is the smallest collection there is.
        self._cluster_ips: dict[str, tuple[ServiceName, ...]] = {}
        self._claims: dict[str, tuple[ServiceName, ...]] = {}
        self._api: frozenset[ApiAddress] = frozenset()
        #: Refusals in force, of the Services that have any.
        self.refusals: dict[ServiceName, tuple[Refusal, ...]] = {}
        self._news: list[Refusal] = []

    # In ------------------------------------------------------------------------------------------

    def replace(self, name: ServiceName, old: Ports | None, new: Ports | None) -> set[ServiceName]:
        """Let *new* be the ports of *name*; return the others that must be judged anew for it."""
        before, after = _cluster_ip(old), _cluster_ip(new)
        affected: set[ServiceName] = set()
        if before != after:
            left, taken = (frozenset(filter(None, (ip,))) for ip in (before, after))
            for ip in left | taken:
                affected.update(self._claims.get(ip, ()))
            _move(self._cluster_ips, name, left, taken)
        claimed, claims = _claimed(old), _claimed(new)
        if claimed != claims:
            _move(self._claims, name, claimed, claims)
        affected.discard(name)
        return affected

    def replace_api(self, found: frozenset[ApiAddress]) -> set[ServiceName]:
        """Let *found* be where API servers listen; return who must be judged anew for it."""
        changed = {address.ip for address in found ^ self._api}
        self._api = found
        return {name for ip in changed for name in self._claims.get(ip, ())}

    # Out -----------------------------------------------------------------------------------------

    def admit(
        self, name: ServiceName, ports: dict[PortKey, ServicePort]
    ) -> dict[PortKey, ServicePort]:
        """Return *ports* without the addresses that are refused, and remember these."""
        # Nearly all Services expose nothing.
        refusals = tuple(self._judge(name, ports)) if _claimed(ports) else ()
        known = self.refusals.get(name, ())
        if refusals != known:
            self._news += (refusal for refusal in refusals if refusal not in known)
            self.forget(name)
        if refusals:
            self.refusals[name] = refusals
        return self.without_refused(name, ports)

    def without_refused(
        self, name: ServiceName, ports: dict[PortKey, ServicePort]
    ) -> dict[PortKey, ServicePort]:
        """Return *ports* without the addresses that were refused when they were last judged."""
        refusals = self.refusals.get(name)
        if refusals is None:
            return ports
        return {key: _without(port, refusals) for key, port in ports.items()}

    def forget(self, name: ServiceName) -> None:
        """Take note that *name* is gone, and what was refused of it."""
        self.refusals.pop(name, None)

    def take_news(self) -> list[Refusal]:
        """Return what came to be refused since this was last called."""
        news, self._news = self._news, []
        return news

    def services_by_reason(self) -> dict[Reason, int]:
        """Count, for each reason there is, the Services that have an address refused for it."""
        counts: dict[Reason, int] = dict.fromkeys(get_args(Reason), 0)
        for refusals in self.refusals.values():
            for reason in {refusal.reason for refusal in refusals}:
                counts[reason] += 1
        return counts

    def _judge(self, name: ServiceName, ports: Ports) -> Iterator[Refusal]:
        for field, ip in exposed(ports):
            found = self._reason(name, field, ip)
            if found is not None:
                yield Refusal(name, field, ip, 0, *found)
            elif name != API_SERVICE:
                # By port: where a load balancer hands out the nodes' own addresses, a control plane
                # node's are among them, and only this port of them is the API server's.
                for port in _tcp_ports(ports):
                    if ApiAddress(ip, port) in self._api:
                        text = "is where an API server listens"
                        yield Refusal(name, field, ip, port, "api_server", text)

    def _reason(self, name: ServiceName, field: Field, ip: str) -> tuple[Reason, str] | None:
        policy = self._policy
        if field == "spec.externalIPs" and not policy.allows_external_ips:
            return "disabled", "is left out: the feature gate AllowServiceExternalIPs is off"
        if policy.allowed and not any(addresses.contains(cidr, ip) for cidr in policy.allowed):
            return "not_allowed", "is outside of --external-ips-allow"
        # A Service's own cluster IP takes nothing from anybody.
        owners = [owner for owner in self._cluster_ips.get(ip, ()) if owner != name]
        if owners:
            return "cluster_ip", f"is the cluster IP of Service '{min(owners)}'"
        return None


def exposed(ports: Ports) -> Iterator[tuple[Field, str]]:
    """Yield the external addresses that the ports of one Service share, by the field they are from."""
    for port in ports.values():
        for ip in port.external_ips:
            yield "spec.externalIPs", ip
        for ip in port.lb_vips:
            yield "status.loadBalancer.ingress", ip
        return


def shadows(
    services: Mapping[ServiceName, Ports],
    *,
    node_ips: frozenset[str],
    api: Iterable[ApiAddress],
) -> Iterator[Shadow]:
    """Yield what Services take of the Node's own addresses and of the API server's way in.

    Args:
        services: as they were admitted or not; what is refused is no shadow, so callers leave it out.
        node_ips: the Node's own. Not the interfaces': a load balancer's VIP may stand on one.
        api: where this program reaches the API server, if that is an address.
    """
    ways_in = frozenset(api)
    for name, ports in services.items():
        for field, ip in exposed(ports):
            if ip in node_ips:
                yield Shadow(name, field, ip, 0, "node_address")
            if name == API_SERVICE:
                continue
            for port in _tcp_ports(ports):
                if ApiAddress(ip, port) in ways_in:
                    yield Shadow(name, field, ip, port, "api_address")


def api_address(url: str) -> ApiAddress | None:
    """Return where the server at *url* listens, or None if that takes asking a name server."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    ip = addresses.parse_ip(parts.hostname or "")
    if ip is None:
        return None
    return ApiAddress(ip, port or (80 if parts.scheme == "http" else 443))


# All ports of a Service share its addresses, so the first one tells.


def _cluster_ip(ports: Ports | None) -> str:
    for port in ports.values() if ports else ():
        return port.cluster_ip
    return ""


def _claimed(ports: Ports | None) -> frozenset[str]:
    for port in ports.values() if ports else ():
        return frozenset(port.external_ips + port.lb_vips)
    return frozenset()


def _tcp_ports(ports: Ports) -> Iterator[int]:
    for key, port in ports.items():
        if key.protocol == "tcp":
            yield port.port


def _move(
    index: dict[str, tuple[ServiceName, ...]],
    name: ServiceName,
    old: frozenset[str],
    new: frozenset[str],
) -> None:
    """Take *name* out of the *old* entries of *index* and put it in the *new* ones."""
    for ip in old - new:
        left = tuple(owner for owner in index[ip] if owner != name)
        if left:
            index[ip] = left
        else:
            del index[ip]
    for ip in new - old:
        index[ip] = (*index.get(ip, ()), name)


def _without(port: ServicePort, refusals: Iterable[Refusal]) -> ServicePort:
    # Whether it is externally accessible stays as it is, as with kube-proxy where the feature gate is
    # off: then there may be a KUBE-EXT- chain that nothing leads to.
    is_tcp = port.name.protocol == "tcp"
    out = {
        (refusal.field, refusal.ip)
        for refusal in refusals
        if not refusal.port or (is_tcp and refusal.port == port.port)
    }
    return msgspec.structs.replace(
        port,
        external_ips=tuple(ip for ip in port.external_ips if ("spec.externalIPs", ip) not in out),
        lb_vips=tuple(ip for ip in port.lb_vips if ("status.loadBalancer.ingress", ip) not in out),
    )
