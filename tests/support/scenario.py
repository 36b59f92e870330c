"""
The words in which behaviour is stated: who connects to what, and what has to become of it.

A Scenario is data: objects of a cluster, settings of a node, and flows with their wanted ends. It
says nothing of how a flow is tried; flows.py has the two engines for that. ``build`` makes a
Scenario's rules with the program's own modules, from objects to restore inputs.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from kubeproxy_py import config as configuration
from kubeproxy_py import options, rules
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.iptables.chains import Tables
from kubeproxy_py.model import IPFamily, Protocol
from kubeproxy_py.ruleset import Ruleset
from tests.support import addresses
from tests.support.addresses import AddressPlan
from tests.support.builders import Json, make_endpoint, make_port, make_service, make_slice
from tests.support.states import service_states

#: The names of the namespaces, and ``blocked``: the outside client with its second address.
Place: TypeAlias = Literal[
    "pod1", "pod2", "remote1", "remote2", "node", "node2", "outside", "blocked"
]
#: What a server sees as the client's address. ``hairpin``: masqueraded for a client that is sent
#: to itself, and else its own.
Seen = Literal["kept", "masqueraded", "hairpin", "whatever"]
Dispatch = Literal["flat", "tree"]

#: How the shared chains can be laid out; every scenario holds for each of them.
DISPATCHES: Final[tuple[Dispatch, ...]] = ("flat", "tree")

NODE_NAME: Final = "node1"  # what the builders call the node under test
NODE_PORT: Final = 30080
#: A server of the node itself, as for a health check node port.
NODE_SERVER_PORT: Final = 32000
#: A server that the node has on 127.0.0.1 alone.
PRIVATE_PORT: Final = 83
#: Enough for every shared chain to become a tree of several levels.
_BYSTANDERS: Final = 40
#: For load_balancer and service: the policy that keeps outside traffic on its node.
LOCAL: Final[dict[str, Any]] = {"externalTrafficPolicy": "Local"}
ENDPOINT_PORT: Final = 80  # of endpoints, unless told


class Wanted(NamedTuple):
    """
    What has to become of a flow.

    ``refused`` is told to the client by ICMP, ``dropped`` is not told at all. An ``untouched`` packet
    goes where it is addressed to, as if there were no Services.
    """

    kind: Literal["reached", "refused", "dropped", "untouched"]
    endpoints: frozenset[str] = frozenset()  # "pod1:80": each of them, and no other

    def __str__(self) -> str:
        return f"{self.kind} {', '.join(sorted(self.endpoints))}".strip()


REFUSED: Final = Wanted("refused")
DROPPED: Final = Wanted("dropped")
UNTOUCHED: Final = Wanted("untouched")


def reaches(*endpoints: str) -> Wanted:
    """Return that each of *endpoints* (``pod1`` or ``pod1:8080``; port 80 unless told) is reached."""
    return Wanted("reached", frozenset(_with_port(name) for name in endpoints))


@dataclass(frozen=True, slots=True)
class Flow:
    """One client's connections to one address and port."""

    source: Place
    to: str
    port: int
    wanted: Wanted
    seen: Seen = "whatever"
    protocol: Protocol = "tcp"
    #: All connections of the client go where the first went.
    is_sticky: bool = False
    #: A segment that belongs to no connection instead of the first packet of one.
    is_invalid: bool = False

    def __str__(self) -> str:
        return f"{self.source} to {self.to} port {self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A cluster, a node, and what becomes of packets."""

    name: str
    plan: AddressPlan
    objects: Sequence[Json]
    flows: Sequence[Flow]
    #: KubeProxyConfiguration fields by path, e.g. {"iptables.masquerade_all": True}.
    settings: Mapping[str, Any] | None = None
    zone: str = "zone-a"
    #: Addresses that the node has beside those of the plan.
    bound: tuple[str, ...] = ()
    #: Addresses that the gateway takes for its own: it answers to what the node lets out, instead of
    #: sending it back as it does with all addresses of rules.
    beyond: tuple[str, ...] = ()
    #: Rules of other programs, by table and built-in chain.
    foreign: Tables | None = None

    @property
    def family(self) -> IPFamily:
        return self.plan.family

    def __str__(self) -> str:
        return f"{self.name} ({self.family.value})"

    def local_addresses(self) -> tuple[str, ...]:
        """Return all addresses of the node, in the scenario's family."""
        own = self.plan
        return (own.loopback, own.node, own.node_alternate, own.pod_gateway, *self.bound)

    def source_address(self, flow: Flow) -> str:
        """Return the address that the client has when it connects."""
        if flow.source == "node":
            # The kernel takes the destination itself for a connection to an own address.
            return flow.to if flow.to in self.local_addresses() else self.plan.node
        return address_of(self.plan, flow.source)

    def place_of(self, address: str) -> str:
        """Return who has *address*; the address itself if nobody has."""
        if address in self.local_addresses():
            return "node"
        known = {address_of(self.plan, place): place for place in _ELSEWHERE}
        return known.get(address, address)


_ELSEWHERE: Final[tuple[Place, ...]] = (
    "pod1", "pod2", "remote1", "remote2", "node2", "outside", "blocked",
)  # fmt: skip


def address_of(own: AddressPlan, place: Place) -> str:
    """Return the address under which *place* is known."""
    if place.startswith("pod"):
        return own.local_pod(int(place.removeprefix("pod")))
    if place.startswith("remote"):
        return own.remote_pod(int(place.removeprefix("remote")))
    found: str = own.outside_blocked if place == "blocked" else getattr(own, place)
    return found


# Objects -----------------------------------------------------------------------------------------


def endpoint(own: AddressPlan, place: Place, **facts: Any) -> Json:
    """Return the EndpointSlice endpoint of a pod, or of the node; *facts* as make_endpoint's."""
    is_local = place.startswith("pod") or place == "node"
    node = NODE_NAME if is_local else "node2"
    return make_endpoint(address_of(own, place), **{"node": node, **facts})


def service(
    own: AddressPlan,
    *endpoints: Place | Json,
    protocol: str = "TCP",
    node_port: int | None = None,
    target_port: int = ENDPOINT_PORT,
    name: str = "web",
    **fields: Any,
) -> tuple[Json, ...]:
    """Return a Service with one port, 80, and its EndpointSlice; *fields* as make_service's."""
    ported: dict[str, Any] = {} if node_port is None else {"nodePort": node_port}
    settled = {
        "cluster_ip": own.cluster_ip,
        "ports": [make_port(80, protocol=protocol, **ported)],
        **fields,
    }
    entries = [endpoint(own, item) if isinstance(item, str) else item for item in endpoints]
    return (
        make_service(name, **settled),
        make_slice(
            name,
            endpoints=entries,
            ports=[make_port(target_port, protocol=protocol)],
            address_type=own.family.value,
        ),
    )


def slice_with_port(own: AddressPlan, place: Place, port: Json) -> Json:
    """Return an EndpointSlice of the Service ``web`` with one endpoint and one port."""
    return make_slice("web", name=f"web-{place}", endpoints=[endpoint(own, place)], ports=[port])


def load_balancer(own: AddressPlan, **fields: Any) -> dict[str, Any]:
    """Return the fields of a Service with every kind of front door, as ``service`` takes them."""
    return {
        "type": "LoadBalancer",
        "lb_ips": [own.lb_vip],
        "externalIPs": [own.external_ip],
        "node_port": NODE_PORT,
        **fields,
    }


# Rules -------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """Restore inputs in their order, and what the tables are afterwards, built-in chains included."""

    inputs: tuple[str, ...]
    tables: Tables


def build(
    scenario: Scenario,
    *,
    dispatch: Dispatch = "flat",
    has_nfacct: bool = True,
    after: Rules | None = None,
) -> Rules:
    """Return the rules that the node would have, and how it comes to have them.

    It starts with those of *after*, or with tables that hold only the foreign rules.
    """
    own = scenario.plan
    built = Ruleset(_options(scenario, dispatch=dispatch, has_nfacct=has_nfacct))
    # A tree of one leaf would be flat.
    crowd = _bystanders(own) if dispatch == "tree" else ()
    built.apply(service_states([*scenario.objects, *crowd], own.family, node_name=NODE_NAME))
    before = (scenario.foreign or {}) if after is None else after.tables
    live: Tables = {table: dict(found) for table, found in before.items()}
    inputs = [render(live)] if live and after is None else []
    for batch in plan.plan(built.tables, live, groups=built.groups()):
        batch.apply_to(live)
        inputs.append(batch.render())
    return Rules(tuple(inputs), live)


def _bystanders(own: AddressPlan) -> Iterator[Json]:
    """Yield Services that nobody asks for, with addresses and ports beside those of scenarios."""
    for number in range(1, _BYSTANDERS + 1):
        endpoints: tuple[Place, ...] = ("remote2",) if number % 2 else ()
        ips = (own.cluster_ip, own.lb_vip, own.external_ip)
        cluster_ip, lb_vip, external_ip = (str(ipaddress.ip_address(ip) + number) for ip in ips)
        yield from service(
            own,
            *endpoints,
            name=f"bystander-{number}",
            type="LoadBalancer",
            cluster_ip=cluster_ip,
            lb_ips=[lb_vip],
            externalIPs=[external_ip],
            node_port=NODE_PORT + 16 * number,
            loadBalancerSourceRanges=[own.outside_allowed_cidr],
            healthCheckNodePort=NODE_SERVER_PORT + 16 * number,
            **LOCAL,
        )


def render(tables: Tables) -> str:
    """Return *tables* as one restore input, for tables that are empty."""
    lines: list[str] = []
    for table, found in tables.items():
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in found if chain not in chains.BUILTIN]
        lines += [f"-A {chain} {text}" for chain, texts in found.items() for text in texts]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def _options(scenario: Scenario, *, dispatch: Dispatch, has_nfacct: bool) -> rules.Options:
    """Derive the rules' options as the daemon does, from configuration and facts."""
    own = scenario.plan
    cidrs = ",".join(each.cluster_cidr for each in addresses.PLANS.values())
    config = KubeProxyConfiguration(cluster_cidr=cidrs)
    for path, value in (scenario.settings or {}).items():
        config = configuration.replace(config, path, value)
    ips = options.node_ips(config.bind_address, (own.node,))
    node_ports = options.node_port_cidrs(config, ips)
    served = options.served_addresses(
        node_ports[own.family],
        scenario.local_addresses(),
        allows_loopback=own.family is IPFamily.V4
        and options.has_localhost_node_ports(config, node_ports),
    )
    facts = options.Facts(
        node_name=NODE_NAME,
        node_ips=ips,
        zone=scenario.zone,
        pod_cidrs=tuple(each.pod_cidr for each in addresses.PLANS.values()),
        has_nfacct=has_nfacct,
    )
    return options.rules_options(
        config, own.family, facts, node_port_addresses=served, layout=dispatch
    )


def _with_port(text: str) -> str:
    return text if ":" in text else f"{text}:{ENDPOINT_PORT}"
