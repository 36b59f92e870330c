"""
Hypothesis strategies for the part of a cluster that rules are made of.

The universe is small on purpose, so that the states of two draws have much in common: what is hard
about a change is not what it adds but what it must not touch.
"""

from typing import Any, Final

from hypothesis import strategies as st

from kubeproxy_py.model import (
    Endpoint,
    PortKey,
    Protocol,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)

_NAMES: Final = [ServiceName("a", "one"), ServiceName("a", "two"), ServiceName("b", "one")]
_KEYS: Final = [PortKey("", "tcp"), PortKey("dns", "udp"), PortKey("dns", "tcp")]
_PROTOCOL_PORTS: Final[dict[Protocol, int]] = {"tcp": 80, "udp": 53, "sctp": 90}


def endpoints() -> st.SearchStrategy[tuple[Endpoint, ...]]:
    """Draw the endpoints of one ServicePort, sorted and without duplicates."""
    one = st.builds(
        Endpoint,
        st.sampled_from([f"10.0.0.{number}" for number in range(1, 5)]),
        st.just(8080),
        is_local=st.booleans(),
        ready=st.booleans(),
        serving=st.booleans(),
        terminating=st.booleans(),
        zone_hints=st.sampled_from(
            [frozenset[str](), frozenset({"zone-a"}), frozenset({"zone-b"})]
        ),
        node_hints=st.sampled_from([frozenset[str](), frozenset({"node1"})]),
    )
    several = st.lists(one, max_size=4, unique_by=lambda ep: ep.address)
    return several.map(lambda found: tuple(sorted(found, key=lambda ep: ep.address)))


@st.composite
def service_state(draw: st.DrawFn, name: ServiceName) -> ServiceState:
    """Draw ports and endpoints of the IPv4 Service *name*."""
    number = _NAMES.index(name) + 1
    shared: dict[str, Any] = {
        "cluster_ip": f"172.30.0.{number}",
        "external_ips": draw(st.sampled_from([(), (f"192.168.99.{number}",)])),
        "lb_vips": draw(
            st.sampled_from([(), (f"1.2.3.{number}",), (f"1.2.3.{number}", "5.6.7.8")])
        ),
        "source_ranges": draw(st.sampled_from([(), ("203.0.113.0/25",), ("192.168.0.0/24",)])),
        "is_external_local": draw(st.booleans()),
        "is_internal_local": draw(st.booleans()),
        "affinity_timeout_s": draw(st.sampled_from([None, 60])),
        "health_check_node_port": draw(st.sampled_from([0, 30000 + number])),
    }
    ports = {}
    for key in draw(st.lists(st.sampled_from(_KEYS), unique=True, max_size=3)):
        node_port = draw(st.sampled_from([0, 31000 + number]))
        is_published = bool(node_port or shared["external_ips"] or shared["lb_vips"])
        ports[key] = ServicePort(
            name=ServicePortName(*name, *key),
            port=_PROTOCOL_PORTS[key.protocol],
            node_port=node_port,
            is_externally_accessible=is_published,
            **shared,
        )
    return ServiceState(ports, draw(st.dictionaries(st.sampled_from(_KEYS), endpoints())))


@st.composite
def service_states(draw: st.DrawFn) -> dict[ServiceName, ServiceState]:
    """Draw all Services there are."""
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True))
    return {name: draw(service_state(name)) for name in names}


@st.composite
def changes(draw: st.DrawFn) -> dict[ServiceName, ServiceState | None]:
    """Draw what changed since the last time; None: gone."""
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True))
    return {name: draw(st.none() | service_state(name)) for name in names}
