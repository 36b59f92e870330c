"""
Clusters with as many Services as a tree of chains needs to have branches.

All is chosen by a number, not drawn one by one: a hundred Services would be too much to draw, and a
smaller crowd is not a simpler example. Same number, same crowd.
"""

import functools
import random
from typing import Any, Final

from hypothesis import strategies as st

from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    PortKey,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)
from tests.support.addresses import PLANS
from tests.support.lookups import Packet

Crowd = dict[ServiceName, ServiceState]

#: Services are numbered below this; small, so that two crowds have many in common.
UNIVERSE: Final = 128
KEY: Final = PortKey("", "tcp")
# Around the thresholds of dispatch, and few: empty trees, trees without branches.
_SIZES: Final = (0, 1, 5, 12, 31, 40, 66, 90)

_LOCAL: Final = (Endpoint("10.180.1.1", 8080, is_local=True), Endpoint("10.180.2.1", 8080))
_REMOTE: Final = (Endpoint("10.180.2.1", 8080), Endpoint("10.180.2.2", 8080))
# More than are chosen among in one step.
_MANY: Final = tuple(Endpoint(f"10.180.3.{number}", 8080) for number in range(100, 133))
_BALANCER: Final = ("node_port", "external_ips", "lb_vips")

#: Endpoints and fields by kind of Service. Addresses and node ports follow from its number.
_KINDS: Final[dict[str, tuple[tuple[Endpoint, ...], tuple[str, ...], dict[str, Any]]]] = {
    "cluster IP": (_LOCAL, (), {}),
    "no endpoints": ((), (), {}),
    "many endpoints": (_MANY, (), {}),
    "affinity": (_MANY, (), {"affinity_timeout_s": 60}),
    "node port": (_LOCAL, ("node_port",), {}),
    "node port without endpoints": ((), ("node_port",), {}),
    "balancer": (_LOCAL, _BALANCER, {}),
    "balancer with source ranges": (_LOCAL, _BALANCER, {"source_ranges": ("203.0.113.0/25",)}),
    "balancer without endpoints": ((), _BALANCER, {"health_check_node_port": 1}),
    "balancer without local endpoints": (
        _REMOTE,
        _BALANCER,
        {"is_external_local": True, "health_check_node_port": 1},
    ),
    "internal policy Local without endpoints here": (_REMOTE, (), {"is_internal_local": True}),
}
KINDS: Final = tuple(_KINDS)
# So many rules that more of them would only take time.
_RARE: Final = frozenset({"many endpoints", "affinity"})
_WEIGHTS: Final = tuple(0.1 if kind in _RARE else 1 for kind in KINDS)


def name(number: int) -> ServiceName:
    return ServiceName("ns", f"svc{number}")


def cluster_ip(number: int, family: IPFamily = IPFamily.V4) -> str:
    """Return an address: in groups of sixteen, and every eighth far from all others."""
    if family is IPFamily.V6:
        return f"fd00:{172 if number % 8 else 96}:30::{number // 16:x}:{number % 16 + 1:x}"
    return f"{'172.30' if number % 8 else '10.96'}.{number // 16}.{number % 16 + 1}"


def external_ip(number: int) -> str:
    return f"192.168.99.{number + 1}"


def lb_vip(number: int) -> str:
    return f"1.2.{number // 100}.{number % 100 + 1}"


def node_port(number: int) -> int:
    return 30000 + number * 7


@functools.cache
def state(number: int, kind: str) -> ServiceState:
    """Return the IPv4 Service *number* as one of KINDS."""
    endpoints, published, fields = _KINDS[kind]
    health_check = {"health_check_node_port": 32000 + number} if "health" in str(fields) else {}
    front_doors: dict[str, Any] = {
        "node_port": node_port(number),
        "external_ips": (external_ip(number),),
        "lb_vips": (lb_vip(number),),
    }
    port = ServicePort(
        name=ServicePortName(*name(number), *KEY),
        cluster_ip=cluster_ip(number),
        port=80,
        is_externally_accessible=bool(published),
        **{field: front_doors[field] for field in published},
        **fields | health_check,
    )
    return ServiceState({KEY: port}, {KEY: endpoints})


def front_doors(number: int) -> list[Packet]:
    """Return a packet for each address and port that the Service *number* may be found at."""
    return [
        Packet(cluster_ip(number), 80),
        Packet(external_ip(number), 80),
        Packet(lb_vip(number), 80),
        Packet(PLANS[IPFamily.V4].node, node_port(number), is_local=True),
    ]


@st.composite
def crowds(draw: st.DrawFn) -> Crowd:
    """Draw all Services there are."""
    choice = random.Random(draw(st.integers(0, 1 << 32)))
    numbers = choice.sample(range(UNIVERSE), draw(st.sampled_from(_SIZES)))
    kinds = choice.choices(KINDS, _WEIGHTS, k=len(numbers))
    return {name(number): state(number, kind) for number, kind in zip(numbers, kinds, strict=True)}


@st.composite
def changed_crowds(draw: st.DrawFn) -> tuple[Crowd, Crowd]:
    """Draw all Services before and after a change; of those there are before and after, most stay."""
    before, after = draw(crowds()), draw(crowds())
    choice = random.Random(draw(st.integers(0, 1 << 32)))
    kept = {key for key in after if key in before and choice.random() < 0.7}
    return before, {key: before[key] if key in kept else found for key, found in after.items()}
