"""
All front doors of one Service, and what becomes of those who come to them.

Pure. Doors are read from the rules themselves, by the comments that kube-proxy and we write, so that a
Service is explained in the same way from desired rules and from those of a live host.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import msgspec

from kubeproxy_py import addresses, explain, rules
from kubeproxy_py.explain_match import Rule, parse_rule
from kubeproxy_py.iptables.chains import Chains, Tables
from kubeproxy_py.model import IPFamily, ServiceName

# A comment of a ServicePort: NAMESPACE/NAME[:PORT][ what the rule is for].
_COMMENT: Final = re.compile(r"(?P<service>[^ :/]+/[^ :/]+)(?::(?P<port>[^ ]+))?(?: (?P<said>.+))?")
_AFFINITY: Final = re.compile(r"--rcheck --seconds (\d+)")

_NODE_PORT: Final = "node port"
_HEALTH_CHECK: Final = "health check node port"
_EXTERNAL: Final = "external or load balancer IP"
_NO_ENDPOINTS: Final = ("has no endpoints", "has no local endpoints")
#: Where doors are found, and what a comment there says of them; the first finding of a door counts.
_DOORS: Final[tuple[tuple[str, str, Mapping[str, str]], ...]] = (
    (
        rules.NAT,
        rules.SERVICES,
        {
            "cluster IP": "cluster IP",
            "external IP": "external IP",
            "loadbalancer IP": "load balancer IP",
        },
    ),
    (rules.FILTER, rules.SERVICES, dict.fromkeys(_NO_ENDPOINTS, "cluster IP")),
    (rules.NAT, rules.NODE_PORTS, {"": _NODE_PORT}),
    (rules.FILTER, rules.EXTERNAL_SERVICES, dict.fromkeys(_NO_ENDPOINTS, _EXTERNAL)),
    (rules.FILTER, rules.NODE_PORTS, {_HEALTH_CHECK: _HEALTH_CHECK}),
)

# The interface of those who are no pods, where pods are told by theirs and nobody said.
_NO_POD_INTERFACE: Final = "outside0"
#: In the order in which people look for them.
_KINDS: Final = (
    "cluster IP",
    "external IP",
    "load balancer IP",
    _EXTERNAL,
    _NODE_PORT,
    _HEALTH_CHECK,
)
# Documentation addresses (RFC 5737, RFC 3849): nobody's pods, nodes or clients.
_OUTSIDE: Final = {
    IPFamily.V4: ("203.0.113.7", "198.51.100.7", "192.0.2.7"),
    IPFamily.V6: ("2001:db8::7", "2001:db8:ffff::7"),
}


class Visit(msgspec.Struct, frozen=True):
    """What becomes of one who comes to a door."""

    who: str
    trace: explain.Trace


class Door(msgspec.Struct, frozen=True):
    """An address, port and protocol at which a Service is reached."""

    kind: str
    port_name: str  # of the Service's port; "" if it has none
    address: str
    port: int
    protocol: str
    visits: tuple[Visit, ...]


class ServiceView(msgspec.Struct, frozen=True):
    """A Service as its rules on this host have it."""

    name: ServiceName
    doors: tuple[Door, ...]
    affinity_timeout_s: int | None
    #: How the rules tell pods from others, as iptables flags; "" if they do not.
    pods_are: str


class Viewpoint(NamedTuple):
    """From where a Service is looked at."""

    facts: explain.Facts
    node_ip: str
    #: By which interface outside clients come.
    outside_interface: str = explain.UNKNOWN_INTERFACE
    policies: Mapping[tuple[str, str], str] | None = None


class _Found(NamedTuple):
    kind: str
    port_name: str
    address: str
    port: int
    protocol: str
    chain: str  # where it leads to


def view(tables: Tables, name: ServiceName, viewpoint: Viewpoint) -> ServiceView | None:
    """Explain every door of Service *name*, or return None where no rule tells of it.

    *tables* hold built-in chains, and no door of another family than ``viewpoint.node_ip``.
    """
    # Trees of chains have them in the order of addresses.
    found = sorted(_doors(tables, name, viewpoint), key=lambda door: _KINDS.index(door.kind))
    if not found:
        return None
    own = list(_own_rules(tables, {door.chain for door in found}))
    endpoints = {rule.nat_to.ip for _, rule in own if rule.nat_to.ip}
    callers = _Callers(tables.get(rules.NAT, {}), endpoints, viewpoint)
    doors = []
    for door in found:
        visits = tuple(
            Visit(who, explain.trace(tables, packet, viewpoint.facts, viewpoint.policies))
            for who, packet in callers.packets(door, list(_ranges(tables, door)))
        )
        if door.kind == _HEALTH_CHECK or any(map(_is_noticed, visits)):
            doors.append(Door(*door[:-1], visits))
    seconds = next((int(age[1]) for text, _ in own if (age := _AFFINITY.search(text))), None)
    return ServiceView(name, tuple(doors), seconds, callers.pods_are)


def _doors(tables: Tables, name: ServiceName, viewpoint: Viewpoint) -> Iterator[_Found]:
    seen = set()
    for table, chain, kinds in _DOORS:
        for text in _texts(tables.get(table, {}), chain):
            if str(name) not in text:
                continue  # by far the most of a big chain, and parsing takes time
            rule = parse_rule(text)
            said = _COMMENT.fullmatch(rule.comment)
            if said is None or said["service"] != str(name):
                continue
            kind = kinds.get(said["said"] or "")
            protocol, port = rule.values.get("-p", ""), rule.values.get("--dport", "")
            if kind is None or not protocol or not port.isdigit():
                continue
            # The rule that counts node ports on loopback has an address, but is no door of its own.
            address = "" if kind == _NODE_PORT else rule.values.get("-d", "")
            if not address and kind == _EXTERNAL:
                kind = _NODE_PORT
            key = (address, port, protocol)
            if key in seen:
                continue
            seen.add(key)
            for ip in _addresses(tables, kind, address, viewpoint):
                yield _Found(kind, said["port"] or "", ip, int(port), protocol, rule.target)


def _is_noticed(visit: Visit) -> bool:
    """Tell whether any rule delivers or refuses the packet."""
    return any(outcome.verdict != "accepted" for outcome in visit.trace.outcomes)


def _addresses(tables: Tables, kind: str, address: str, viewpoint: Viewpoint) -> list[str]:
    if address:
        return [address.partition("/")[0]]
    if kind == _HEALTH_CHECK:
        return [viewpoint.node_ip]
    return _node_port_addresses(tables, viewpoint.node_ip)


def _node_port_addresses(tables: Tables, node_ip: str) -> list[str]:
    """Return where node ports may be: addresses that rules name, or the node's and loopback."""
    named = [
        rule.values["-d"].partition("/")[0]
        for text in _texts(tables.get(rules.NAT, {}), rules.SERVICES)
        if text.endswith(f"-j {rules.NODE_PORTS}") and "-d" in (rule := parse_rule(text)).values
    ]
    # Loopback is tried: where its packets are not taken up, it is no door.
    tried = named or [node_ip, "::1" if ":" in node_ip else "127.0.0.1"]
    return list(dict.fromkeys(tried))


def _texts(chains: Chains, root: str) -> Iterator[str]:
    """Yield the rules of a shared chain and of those that it is divided into."""
    pending = [root]
    seen = {root}
    while pending:
        for text in chains.get(pending.pop(), ()):
            yield text
            # What leads to a Service or to node ports has a comment; what leads to a part, none.
            target = "" if "--comment" in text else text.rpartition("-j ")[2]
            if target in chains and target not in seen:
                seen.add(target)
                pending.append(target)


def _own_rules(tables: Tables, chains: Iterable[str]) -> Iterator[tuple[str, Rule]]:
    """Yield all rules of the chains that belong to the Service, with their texts."""
    nat = tables.get(rules.NAT, {})
    pending = list(chains)
    seen = {*pending, rules.MARK_MASQ}
    while pending:
        for text in nat.get(pending.pop(), ()):
            rule = parse_rule(text)
            yield text, rule
            if rule.target not in seen:
                seen.add(rule.target)
                pending.append(rule.target)


def _ranges(tables: Tables, door: _Found) -> Iterator[str]:
    """Yield the source ranges that a load balancer door is limited to."""
    if door.chain.startswith("KUBE-FW-"):
        for text in tables[rules.NAT].get(door.chain, ()):
            source = parse_rule(text).values.get("-s")
            if source is not None:
                yield source


class _Callers:
    """Those who may come to a door, by an example each: a pod, this node, a client from outside."""

    def __init__(self, nat: Chains, endpoints: set[str], viewpoint: Viewpoint) -> None:
        self._viewpoint = viewpoint
        self._endpoints = endpoints
        self._flag, self._argument = _detector(nat)
        self.pods_are = f"{self._flag} {self._argument}".strip()

    def packets(self, door: _Found, ranges: list[str]) -> Iterator[tuple[str, explain.Packet]]:
        if addresses.is_loopback(door.address):
            yield "this node", _packet(door, door.address)
            return
        if self.pods_are:
            yield "a pod", self._pod_packet(door)
        yield "this node", _packet(door, self._viewpoint.node_ip)
        who = "an outside client" if self.pods_are else "anybody else"
        outside = self._viewpoint.outside_interface
        if self._flag == "-i" and outside == explain.UNKNOWN_INTERFACE:
            outside = _NO_POD_INTERFACE
        others = _OUTSIDE[addresses.family_of(door.address)]
        if not ranges:
            yield who, _packet(door, others[0], outside)
            return
        yield f"{who} in {ranges[0]}", _packet(door, _address_in(ranges[0], 1), outside)
        for ip in others:
            if not any(addresses.contains(cidr, ip) for cidr in ranges):
                yield f"{who} in no source range", _packet(door, ip, outside)
                return

    def _pod_packet(self, door: _Found) -> explain.Packet:
        """Return a packet of a pod that is, most likely, no endpoint of this Service."""
        if self._flag == "-s":
            # Pods' addresses are given out from the beginning.
            return _packet(door, _address_in(self._argument, -2), explain.UNKNOWN_INTERFACE)
        known = self._endpoints or {self._viewpoint.node_ip}
        neighbour = max(map(ipaddress.ip_address, known)) + 1
        return _packet(door, str(neighbour), self._argument.replace("+", "0"))


def _packet(door: _Found, source: str, in_interface: str = "") -> explain.Packet:
    return explain.Packet(
        source=source,
        destination=door.address,
        protocol=door.protocol,
        destination_port=door.port,
        in_interface=in_interface,
    )


def _address_in(cidr: str, index: int) -> str:
    network = ipaddress.ip_network(cidr)
    # A network of one address has no other.
    return str(network[index if network.num_addresses > 1 else 0])


def _detector(nat: Chains) -> tuple[str, str]:
    """Return flag (-s or -i) and argument by which the rules tell pods, or two empty texts.

    They are the same for all Services, and one without endpoints has no such rules.
    """
    for chain, texts in nat.items():
        if not chain.startswith(rules.PORT_CHAIN_PREFIXES):
            continue
        for text in texts:
            if f"-j {rules.MARK_MASQ}" not in text and "pod traffic for " not in text:
                continue
            rule = parse_rule(text)
            if rule.comment.endswith(" cluster IP"):
                prefix = "! "
            elif rule.comment.startswith("pod traffic for "):
                prefix = ""
            else:
                continue
            for flag in ("-s", "-i"):
                if f"{prefix}{flag}" in rule.values:
                    return flag, rule.values[f"{prefix}{flag}"]
    return "", ""
