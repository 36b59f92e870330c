"""
One ServicePort and its endpoints → the chains and dispatch entries of that ServicePort.

Pure: same arguments in, same Fragment out. Rules are written exactly as ``iptables-save`` prints
them, so that comparing desired with live state is plain equality of text (tests/packet/
test_round_trip.py holds that against both backends). Chain names, comments and the meaning of every
rule are kube-proxy's: people's eyes and tools know them.

Every string that reaches a rule was validated where its record was made (``records.py``).
"""

import functools
import hashlib
import itertools
import math
import zlib
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

from kubeproxy_py import addresses, topology
from kubeproxy_py.model import Endpoint, IPFamily, Protocol, ServicePort, ServicePortName

#: How much of what kube-proxy writes one after the other becomes trees of chains: nothing, where there
#: is much of it, or everything.
Layout = Literal["flat", "auto", "tree"]

FILTER: Final = "filter"
NAT: Final = "nat"
MANGLE: Final = "mangle"

SERVICES: Final = "KUBE-SERVICES"
EXTERNAL_SERVICES: Final = "KUBE-EXTERNAL-SERVICES"
NODE_PORTS: Final = "KUBE-NODEPORTS"
PROXY_FIREWALL: Final = "KUBE-PROXY-FIREWALL"
FORWARD: Final = "KUBE-FORWARD"
FIREWALL: Final = "KUBE-FIREWALL"
POSTROUTING: Final = "KUBE-POSTROUTING"
MARK_MASQ: Final = "KUBE-MARK-MASQ"
CANARY: Final = "KUBE-PROXY-CANARY"

#: Prefixes of the chains that belong to one ServicePort.
PORT_CHAIN_PREFIXES: Final = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-")

LOCALHOST_NODE_PORTS_COUNTER: Final = "localhost_nps_accepted_pkts"
INVALID_DROPPED_COUNTER: Final = "ct_state_invalid_dropped_pkts"

# iptables limits chain names to 28 characters, and kube-proxy's own are 16 base32 characters of a
# SHA-256: keeping them lets an operator read our rules with the habits and tools there are.
_HASH_BYTES: Final = 10
# RFC 4648: what ten bits are in base32.
_BASE32_PAIRS: Final = tuple(
    map("".join, itertools.product("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", repeat=2))
)
# Above this many endpoints kube-proxy leaves the per-endpoint comments out, for speed.
LARGE_CLUSTER_ENDPOINTS: Final = 1000
# With more endpoints than this the choice is made in two steps, where kube-proxy's layout is not
# asked for: one chain of them takes every new connection past half of them.
_MAX_FLAT_ENDPOINTS: Final = 32
# The kernel keeps the probability of `statistic` as a 31-bit fixed-point number.
_PROBABILITY_ONE: Final = 1 << 31


class LocalDetector(NamedTuple):
    """How to tell traffic of this node's pods: the flag (-s or -i) and its argument."""

    flag: str
    argument: str


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but Services and endpoints that rules depend on, for one family."""

    family: IPFamily
    node_name: str
    zone: str = ""
    node_ip: str | None = None
    local_detector: LocalDetector | None = None
    masquerade_all: bool = False
    masquerade_bit: int = 14
    has_random_fully: bool = True
    #: Effective value: configured, IPv4 and 127.0.0.1 among the node-port addresses.
    localhost_node_ports: bool = False
    #: nfacct counters exist and the match works.
    has_nfacct: bool = False
    #: False where conntrack is liberal and never calls such packets INVALID.
    drops_invalid: bool = True
    #: What else of ``iptables.probe.CAPABILITIES`` the kernel or iptables does not have.
    lacks: frozenset[str] = frozenset()
    #: Local addresses with node ports; None: all of them.
    node_port_addresses: tuple[str, ...] | None = None
    #: Leave out the per-endpoint comments.
    is_large: bool = False
    layout: Layout = "flat"

    @property
    def host(self) -> str:
        """Return the prefix length of one address, as text."""
        return str(addresses.HOST_PREFIX[self.family])

    @property
    def mark(self) -> str:
        return f"{1 << self.masquerade_bit:#x}"

    @property
    def reject(self) -> str:
        if "REJECT" in self.lacks:
            return "DROP"
        icmp = "icmp" if self.family is IPFamily.V4 else "icmp6"
        return f"REJECT --reject-with {icmp}-port-unreachable"

    @property
    def recent_mask(self) -> str:
        return "255.255.255.255" if self.family is IPFamily.V4 else ":".join(["ffff"] * 8)


class Entry(NamedTuple):
    """A rule that a ServicePort needs in a chain shared by all; key to find it by first."""

    table: str
    chain: str
    address: str  # destination address, "" for a rule that goes by port alone
    protocol: Protocol
    port: int
    rule: str


class Fragment(msgspec.Struct, frozen=True, gc=False):
    """All rules of one ServicePort."""

    chains: dict[str, tuple[str, ...]]  # in nat
    entries: tuple[Entry, ...]
    #: There are endpoints, but none that internal / external traffic may use on this node.
    lacks_internal: bool = False
    lacks_external: bool = False

    @property
    def rule_count(self) -> int:
        return sum(map(len, self.chains.values()))


def hash16(*parts: str) -> str:
    """Return kube-proxy's 16-character hash of the concatenation of *parts*."""
    digest = hashlib.sha256("".join(parts).encode()).digest()
    bits = int.from_bytes(digest[:_HASH_BYTES], "big")
    pairs = _BASE32_PAIRS
    # Eight times ten bits. Half of the time that rules take to build would go into base64.b32encode.
    return (
        pairs[bits >> 70]
        + pairs[bits >> 60 & 1023]
        + pairs[bits >> 50 & 1023]
        + pairs[bits >> 40 & 1023]
        + pairs[bits >> 30 & 1023]
        + pairs[bits >> 20 & 1023]
        + pairs[bits >> 10 & 1023]
        + pairs[bits & 1023]
    )


class _Names:
    """The chain names of one ServicePort."""

    __slots__ = ("_port", "_seps", "ext", "fw", "svc", "svl")

    def __init__(self, name: ServicePortName) -> None:
        self._port = str(name) + name.protocol
        digest = hash16(self._port)
        self.svc = f"KUBE-SVC-{digest}"
        self.svl = f"KUBE-SVL-{digest}"
        self.fw = f"KUBE-FW-{digest}"
        self.ext = f"KUBE-EXT-{digest}"
        # Each is asked for at least three times.
        self._seps: dict[str, str] = {}

    def sep(self, address: str) -> str:
        name = self._seps.get(address)
        if name is None:
            name = self._seps[address] = f"KUBE-SEP-{hash16(self._port, address)}"
        return name


@functools.lru_cache(1024)
def probability(n: int) -> str:
    """Return 1/n as ``iptables-save`` prints what kube-proxy writes for it.

    kube-proxy writes ten decimals, the kernel rounds those to 31 bits, and save prints eleven.
    """
    return _fixed_point(float(f"{1 / n:.10f}"))


def _fixed_point(chance: float) -> str:
    return f"{round(chance * _PROBABILITY_ONE) / _PROBABILITY_ONE:.11f}"


def build(port: ServicePort, endpoints: tuple[Endpoint, ...], options: Options) -> Fragment:
    """Build all rules of *port*; *endpoints* are sorted and without duplicates."""
    if port.name.protocol in options.lacks:
        # SCTP: a rule that names it would be refused.
        return Fragment({}, ())
    choice = topology.choose(endpoints, port, node_name=options.node_name, zone=options.zone)
    return _Builder(port, choice, options).build()


class _Builder:
    """The rules of one ServicePort, step by step; built once and thrown away."""

    def __init__(self, port: ServicePort, choice: topology.Choice, options: Options) -> None:
        self._port = port
        self._choice = choice
        self._options = options
        self._text = str(port.name)
        self._names = names = _Names(port.name)
        self._entries: list[Entry] = []
        self._chains: dict[str, tuple[str, ...]] = {}
        has_any = choice.has_any
        self._internal_chain = names.svl if port.is_internal_local else names.svc
        self._external_chain = names.svl if port.is_external_local else names.svc
        self._affinity_s = None if "recent" in options.lacks else port.affinity_timeout_s
        self._has_internal = has_any and (bool(choice.local) or not port.is_internal_local)
        self._has_external = has_any and (bool(choice.local) or not port.is_external_local)
        self._uses_firewall = has_any and bool(port.lb_vips) and bool(port.source_ranges)

    def build(self) -> Fragment:
        self._dispatch_cluster_ip()
        self._dispatch_external_ips()
        self._dispatch_load_balancer_vips()
        self._dispatch_node_port()
        self._open_health_check_port()
        if self._choice.has_any:
            self._chains_of_port()
        port, has_any = self._port, self._choice.has_any
        return Fragment(
            self._chains,
            tuple(self._entries),
            lacks_internal=has_any and port.is_internal_local and not self._has_internal,
            lacks_external=has_any and port.is_external_local and not self._has_external,
        )

    # Dispatch entries --------------------------------------------------------------------------

    def _entry(
        self,
        table: str,
        chain: str,
        rule: str,
        *,
        port: int,
        address: str = "",
        protocol: Protocol | None = None,
    ) -> None:
        protocol = protocol or self._port.name.protocol
        self._entries.append(Entry(table, chain, address, protocol, port, rule))

    def _failure(self, *, has_usable_here: bool) -> tuple[str, str] | None:
        """Return (comment, target) for traffic that cannot be delivered, or None if it can."""
        if not self._choice.has_any:
            # Nobody could serve it: tell the client at once rather than let it wait.
            return f"{self._text} has no endpoints", self._options.reject
        if not has_usable_here:
            # Somebody else could: a load balancer that hears nothing tries another node.
            return f"{self._text} has no local endpoints", "DROP"
        return None

    def _to(self, ip: str, comment: str, target: str, *, before: str = "") -> str:
        port = self._port
        return (
            f"{before}-d {ip}/{self._options.host} -p {port.name.protocol} "
            f"{_comment(comment)} {_dport(port.name.protocol, port.port)} -j {target}"
        )

    def _dispatch_cluster_ip(self) -> None:
        port = self._port
        failure = self._failure(has_usable_here=self._has_internal)
        if failure is None:
            comment, target, table = f"{self._text} cluster IP", self._internal_chain, NAT
        else:
            (comment, target), table = failure, FILTER
        rule = self._to(port.cluster_ip, comment, target)
        self._entry(table, SERVICES, rule, address=port.cluster_ip, port=port.port)

    def _dispatch_external_ips(self) -> None:
        for ip in self._port.external_ips:
            self._dispatch_external(ip, "external IP", self._names.ext)

    def _dispatch_load_balancer_vips(self) -> None:
        port, names = self._port, self._names
        for ip in port.lb_vips:
            if self._uses_firewall:
                # What KUBE-FW- accepts is DNATed there, and no longer goes to this address when it
                # comes to the filter table: what still does, comes from outside the source ranges.
                rule = self._to(ip, f"{self._text} traffic not accepted by {names.fw}", "DROP")
                self._entry(FILTER, PROXY_FIREWALL, rule, address=ip, port=port.port)
            chain = names.fw if self._uses_firewall else names.ext
            self._dispatch_external(ip, "loadbalancer IP", chain)

    def _dispatch_external(self, ip: str, what: str, chain: str) -> None:
        port = self._port
        if self._choice.has_any:
            # Even without local endpoints: pods and the node itself are short-circuited there.
            rule = self._to(ip, f"{self._text} {what}", chain)
            self._entry(NAT, SERVICES, rule, address=ip, port=port.port)
        failure = self._failure(has_usable_here=self._has_external)
        if failure is not None:
            rule = self._to(ip, *failure)
            self._entry(FILTER, EXTERNAL_SERVICES, rule, address=ip, port=port.port)

    def _dispatch_node_port(self) -> None:
        node_port, protocol = self._port.node_port, self._port.name.protocol
        if not node_port:
            return
        dport = _dport(protocol, node_port)
        if self._choice.has_any:
            named = f"-p {protocol} {_comment(self._text)} {dport}"
            if self._options.localhost_node_ports and self._options.has_nfacct:
                # Counts who still uses node ports on loopback, a feature that is to go one day.
                rule = (
                    f"-d 127.0.0.0/8 {named} -m nfacct "
                    f"--nfacct-name {LOCALHOST_NODE_PORTS_COUNTER} -j {self._names.ext}"
                )
                self._entry(NAT, NODE_PORTS, rule, port=node_port)
            self._entry(NAT, NODE_PORTS, f"{named} -j {self._names.ext}", port=node_port)
        failure = self._failure(has_usable_here=self._has_external)
        if failure is not None:
            comment, target = failure
            rule = (
                f"-p {protocol} {_comment(comment)} -m addrtype --dst-type LOCAL "
                f"{dport} -j {target}"
            )
            self._entry(FILTER, EXTERNAL_SERVICES, rule, port=node_port)

    def _open_health_check_port(self) -> None:
        port = self._port.health_check_node_port
        if port:
            # The load balancer must get an answer also, above all, when it is "none here".
            comment = _comment(f"{self._text} health check node port")
            rule = f"-p tcp {comment} {_dport('tcp', port)} -j ACCEPT"
            self._entry(FILTER, NODE_PORTS, rule, port=port, protocol="tcp")

    # The ServicePort's own chains ----------------------------------------------------------------

    def _chains_of_port(self) -> None:
        port, names, choice = self._port, self._names, self._choice
        masquerade = self._cluster_ip_masquerade()
        if port.is_externally_accessible:
            self._chains[names.ext] = tuple(self._external_rules())
        if self._uses_firewall:
            self._chains[names.fw] = tuple(self._firewall_rules())
        if choice.cluster:
            own = masquerade if self._internal_chain == names.svc else ()
            self._chains[names.svc] = (*own, *self._balance(names.svc, choice.cluster))
        if choice.local:
            own = masquerade if self._internal_chain == names.svl else ()
            self._chains[names.svl] = (*own, *self._balance(names.svl, choice.local))
        for endpoint in choice.reachable:
            address = endpoint.address
            sep = names.sep(address)
            self._chains[sep] = self._endpoint_rules(endpoint.ip, address, sep)

    def _cluster_ip_masquerade(self) -> tuple[str, ...]:
        """Return the rule for traffic to the cluster IP that does not come from a pod here.

        Its answers would go past this node, unless they are made to come back to it.
        """
        options, port = self._options, self._port
        if not self._has_internal:
            return ()
        comment = f"{self._text} cluster IP"
        if options.masquerade_all:
            return (self._to(port.cluster_ip, comment, MARK_MASQ),)
        detector = options.local_detector
        if detector is None:
            return ()
        if detector.flag == "-s":
            not_local = f"! -s {detector.argument} "
            return (self._to(port.cluster_ip, comment, MARK_MASQ, before=not_local),)
        # An interface stands after the destination.
        protocol = port.name.protocol
        return (
            f"-d {port.cluster_ip}/{options.host} ! -i {detector.argument} -p {protocol} "
            f"{_comment(comment)} {_dport(protocol, port.port)} -j {MARK_MASQ}",
        )

    def _external_rules(self) -> Iterable[str]:
        text, names = self._text, self._names
        destinations = f"{text} external destinations"
        if not self._port.is_external_local:
            # The endpoint may be on another node, whose answer must come back through this one.
            yield f"{_comment(f'masquerade traffic for {destinations}')} -j {MARK_MASQ}"
        else:
            # Pods and this node are inside: for them the policy for external traffic does not hold,
            # and they may use every endpoint.
            detector = self._options.local_detector
            if detector is not None:
                yield (
                    f"{detector.flag} {detector.argument} "
                    f"{_comment(f'pod traffic for {destinations}')} -j {names.svc}"
                )
            local = "-m addrtype --src-type LOCAL"
            yield (
                f"{_comment(f'masquerade LOCAL traffic for {destinations}')} {local} -j {MARK_MASQ}"
            )
            yield f"{_comment(f'route LOCAL traffic for {destinations}')} {local} -j {names.svc}"
        if self._has_external:
            yield f"-j {self._external_chain}"

    def _firewall_rules(self) -> Iterable[str]:
        port, names = self._port, self._names
        comment = _comment(f"{self._text} loadbalancer IP")
        for cidr in port.source_ranges:
            yield f"-s {cidr} {comment} -j {names.ext}"
        node_ip = self._options.node_ip
        if node_ip and any(addresses.contains(cidr, node_ip) for cidr in port.source_ranges):
            # A node that connects to a VIP which is bound to its own interface has it as source.
            for ip in port.lb_vips:
                yield f"-s {ip}/{self._options.host} {comment} -j {names.ext}"
        yield _comment(f"other traffic to {self._text} will be dropped by {PROXY_FIREWALL}")

    def _balance(self, chain: str, endpoints: tuple[Endpoint, ...]) -> Iterable[str]:
        addressed = [
            (endpoint.address, self._names.sep(endpoint.address)) for endpoint in endpoints
        ]
        seconds = self._affinity_s
        if seconds is not None:
            for address, sep in addressed:
                # Who was here lately goes where it went. These come first, all of them.
                yield (
                    f"{self._arrow(address)}"
                    f"-m recent --rcheck --seconds {seconds} --reap --name {sep} "
                    f"--mask {self._options.recent_mask} --rsource -j {sep}"
                )
        if "statistic" in self._options.lacks:
            # Nothing else can divide connections among several; one is better than none.
            addressed = addressed[:1]
        if self._options.layout != "flat" and len(addressed) > _MAX_FLAT_ENDPOINTS:
            yield from self._choose_group(chain, addressed)
        else:
            yield from self._choose_endpoint(addressed)

    def _choose_endpoint(self, addressed: list[tuple[str, str]]) -> Iterable[str]:
        left = len(addressed)
        for address, sep in addressed:
            # The first of three takes 1/3, the second half of what is left, the last the rest.
            chance = _chance(probability(left)) if left > 1 else ""
            yield f"{self._arrow(address)}{chance}-j {sep}"
            left -= 1

    def _choose_group(self, chain: str, addressed: list[tuple[str, str]]) -> Iterable[str]:
        """Choose a group by its size, and leave the choice of an endpoint to the group's chain.

        A packet passes about twice the square root of their number instead of half of it. The
        groups go by hash, so that an endpoint more or less changes one of them.
        """
        # A power of two, so that it changes seldom: all groups change with it. Two hexadecimal
        # digits are what a chain's name has room for.
        groups = min(1 << math.isqrt(len(addressed)).bit_length(), 256)
        members: dict[int, list[tuple[str, str]]] = {}
        for address, sep in addressed:
            number = zlib.crc32(sep.encode()) % groups
            members.setdefault(number, []).append((address, sep))
        left = len(addressed)
        for number, group in sorted(members.items()):
            name = f"{chain}-{number:02x}"
            self._chains[name] = tuple(self._choose_endpoint(group))
            chance = _chance(_fixed_point(len(group) / left)) if left > len(group) else ""
            yield f"{self._arrow(f'{len(group)} endpoints')}{chance}-j {name}"
            left -= len(group)

    def _endpoint_rules(self, ip: str, address: str, sep: str) -> tuple[str, ...]:
        options, protocol = self._options, self._port.name.protocol
        comment = "" if options.is_large else f"{_comment(self._text)} "
        remember = (
            f"-m recent --set --name {sep} --mask {options.recent_mask} --rsource "
            if self._affinity_s is not None
            else ""
        )
        return (
            # Hairpin: an endpoint that is sent to itself must not see its own address as source.
            f"-s {ip}/{options.host} {comment}-j {MARK_MASQ}",
            f"-p {protocol} {comment}{remember}-m {protocol} -j DNAT --to-destination {address}",
        )

    def _arrow(self, to: str) -> str:
        """Return the comment of a rule that chooses *to*."""
        return "" if self._options.is_large else f"{_comment(f'{self._text} -> {to}')} "


def _chance(share: str) -> str:
    return f"-m statistic --mode random --probability {share} "


def _comment(text: str) -> str:
    return f'-m comment --comment "{text}"'


def _dport(protocol: Protocol, port: int) -> str:
    return f"-m {protocol} --dport {port}"


# What every node has, Services or not ------------------------------------------------------------


def fixed_chains(options: Options) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return, by table, the chains whose rules depend on the options alone."""
    mark = options.mark
    nat = {
        MARK_MASQ: (f"-j MARK --set-xmark {mark}/{mark}",),
        POSTROUTING: (
            f"-m mark ! --mark {mark}/{mark} -j RETURN",
            # Cleared, so that a packet that comes through here again (an overlay) is not masqueraded
            # twice.
            f"-j MARK --set-xmark {mark}/0x0",
            f"{_comment('kubernetes service traffic requiring SNAT')} -j MASQUERADE"
            + (" --random-fully" if options.has_random_fully else ""),
        ),
        CANARY: (),
    }
    filters: dict[str, tuple[str, ...]] = {FORWARD: tuple(_forward_rules(options)), CANARY: ()}
    if options.localhost_node_ports:
        # CVE-2020-8558: route_localnet lets neighbours address 127.0.0.1 on this node.
        filters[FIREWALL] = (
            f"! -s 127.0.0.0/8 -d 127.0.0.0/8 {_comment('block incoming localnet connections')} "
            "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        )
    return {FILTER: filters, NAT: nat, MANGLE: {CANARY: ()}}


def _forward_rules(options: Options) -> Iterable[str]:
    mark = options.mark
    if options.drops_invalid:
        # A packet that conntrack cannot assign is not un-NATed; it would reach the client with the
        # endpoint's address, and the client's RST would end a good connection (kubernetes #74839).
        counter = (
            f"-m nfacct --nfacct-name {INVALID_DROPPED_COUNTER} " if options.has_nfacct else ""
        )
        yield f"-m conntrack --ctstate INVALID {counter}-j DROP"
    # Where the FORWARD policy is DROP, Services still work.
    yield f"{_comment('kubernetes forwarding rules')} -m mark --mark {mark}/{mark} -j ACCEPT"
    yield (
        f"{_comment('kubernetes forwarding conntrack rule')} "
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    )


def node_port_jumps(options: Options) -> tuple[str, ...]:
    """Return the last rules of nat KUBE-SERVICES, which send local addresses to the node ports."""
    comment = _comment(
        "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
    )
    if options.node_port_addresses is not None:
        return tuple(
            f"-d {ip}/{options.host} {comment} -j {NODE_PORTS}"
            for ip in options.node_port_addresses
        )
    if options.family is IPFamily.V6:
        # The kernel has no route_localnet for IPv6: node ports on ::1 cannot work.
        but = "! -d ::1/128 "
    else:
        but = "" if options.localhost_node_ports else "! -d 127.0.0.0/8 "
    return (f"{but}{comment} -m addrtype --dst-type LOCAL -j {NODE_PORTS}",)


class Jump(NamedTuple):
    """A rule of ours in a built-in chain."""

    table: str
    builtin: str
    rule: str


def _jump(table: str, builtin: str, target: str, comment: str, *, new: bool = False) -> Jump:
    state = "-m conntrack --ctstate NEW " if new else ""
    said = f"{_comment(comment)} " if comment else ""
    return Jump(table, builtin, f"{state}{said}-j {target}")


#: In the order in which they are inserted, each at the top of its chain: the last stands first.
JUMPS: Final = (
    _jump(FILTER, "INPUT", EXTERNAL_SERVICES, "kubernetes externally-visible service portals", new=True),
    _jump(FILTER, "FORWARD", EXTERNAL_SERVICES, "kubernetes externally-visible service portals", new=True),
    _jump(FILTER, "INPUT", NODE_PORTS, "kubernetes health check service ports"),
    _jump(FILTER, "FORWARD", SERVICES, "kubernetes service portals", new=True),
    _jump(FILTER, "OUTPUT", SERVICES, "kubernetes service portals", new=True),
    _jump(FILTER, "FORWARD", FORWARD, "kubernetes forwarding rules"),
    _jump(FILTER, "INPUT", PROXY_FIREWALL, "kubernetes load balancer firewall", new=True),
    _jump(FILTER, "OUTPUT", PROXY_FIREWALL, "kubernetes load balancer firewall", new=True),
    _jump(FILTER, "FORWARD", PROXY_FIREWALL, "kubernetes load balancer firewall", new=True),
    _jump(NAT, "OUTPUT", SERVICES, "kubernetes service portals"),
    _jump(NAT, "PREROUTING", SERVICES, "kubernetes service portals"),
    _jump(NAT, "POSTROUTING", POSTROUTING, "kubernetes postrouting rules"),
    _jump(FILTER, "INPUT", FIREWALL, ""),
    _jump(FILTER, "OUTPUT", FIREWALL, ""),
)  # fmt: skip
