"""Scenarios of endpoints and how they are chosen, and of a node that others have rules on as well."""

from collections.abc import Callable, Iterator
from typing import Final

from kubeproxy_py.model import IPFamily
from tests.support.addresses import AddressPlan
from tests.support.builders import Json
from tests.support.scenario import (
    DROPPED,
    LOCAL,
    NODE_PORT,
    NODE_SERVER_PORT,
    PRIVATE_PORT,
    REFUSED,
    UNTOUCHED,
    Flow,
    Place,
    Scenario,
    endpoint,
    load_balancer,
    reaches,
    service,
)

_TERMINATING: Final[dict[str, bool]] = {"ready": False, "serving": True, "terminating": True}


# Endpoints ---------------------------------------------------------------------------------------


def _no_endpoints(plan: AddressPlan) -> Iterator[Scenario]:
    tries: list[tuple[Place, str, int]] = [
        ("pod1", plan.cluster_ip, 80),
        ("node", plan.cluster_ip, 80),
        ("outside", plan.cluster_ip, 80),
        ("outside", plan.node, NODE_PORT),
        ("pod1", plan.node, NODE_PORT),
        ("outside", plan.external_ip, 80),
        ("outside", plan.lb_vip, 80),
    ]
    for protocol in ("tcp", "udp", "sctp"):
        yield Scenario(
            name=f"a Service without endpoints refuses {protocol.upper()}",
            plan=plan,
            objects=service(plan, protocol=protocol.upper(), **load_balancer(plan)),
            flows=[
                Flow(source, to, port, REFUSED, protocol=protocol) for source, to, port in tries
            ],
        )
    yield Scenario(
        name="a Service without endpoints refuses the node before its packets leave",
        plan=plan,
        objects=service(plan),
        beyond=(plan.cluster_ip,),
        flows=[
            Flow("node", plan.cluster_ip, 80, REFUSED),
            Flow("node", plan.cluster_ip, 81, UNTOUCHED),
        ],
    )
    yield Scenario(
        name="an endpoint that neither is ready nor serves is none",
        plan=plan,
        objects=service(
            plan,
            endpoint(plan, "pod1", ready=False, serving=False),
            endpoint(plan, "remote1", ready=False, serving=False, terminating=True),
        ),
        flows=[Flow("pod2", plan.cluster_ip, 80, REFUSED)],
    )


def _endpoint_states(plan: AddressPlan) -> Iterator[Scenario]:
    ip = plan.cluster_ip
    leaving = [endpoint(plan, place, **_TERMINATING) for place in ("pod1", "remote1")]

    def from_pod(name: str, wanted: tuple[str, ...], *endpoints: Json) -> Scenario:
        return Scenario(
            name=name,
            plan=plan,
            objects=service(plan, *endpoints),
            flows=[Flow("pod2", ip, 80, reaches(*wanted), "hairpin")],
        )

    yield from_pod(
        "terminating endpoints are used when there are no others", ("pod1", "remote1"), *leaving
    )
    yield from_pod(
        "terminating endpoints are not used when one is ready",
        ("pod2",),
        *leaving,
        endpoint(plan, "pod2"),
    )
    yield from_pod(
        "a ready endpoint may be terminating (publishNotReadyAddresses)",
        ("pod1", "pod2"),
        endpoint(plan, "pod1", ready=True, serving=False, terminating=True),
        endpoint(plan, "pod2"),
    )
    yield from_pod(
        "an address in two slices is one endpoint",
        ("pod1", "remote1"),
        endpoint(plan, "pod1"),
        endpoint(plan, "pod1", **_TERMINATING),
        endpoint(plan, "remote1"),
    )
    yield Scenario(
        name="local terminating endpoints are used when there are no other local ones",
        plan=plan,
        objects=service(
            plan,
            endpoint(plan, "pod1", **_TERMINATING),
            "remote1",
            **load_balancer(plan, **LOCAL),
        ),
        flows=[
            Flow("outside", plan.lb_vip, 80, reaches("pod1"), "kept"),
            Flow("pod2", plan.lb_vip, 80, reaches("remote1"), "kept"),
            Flow("pod2", ip, 80, reaches("remote1"), "kept"),
        ],
    )


def _hints(plan: AddressPlan) -> Iterator[Scenario]:
    ip = plan.cluster_ip
    here = endpoint(plan, "pod1", zone_hints=["zone-a"], node_hints=["node1"])
    same_zone = endpoint(plan, "remote1", zone_hints=["zone-a"], node_hints=["node2"])
    far = endpoint(plan, "remote2", zone_hints=["zone-b"])
    unhinted = endpoint(plan, "remote2")

    def hinted(
        name: str, wanted: tuple[str, ...], *endpoints: Json, zone: str = "zone-a"
    ) -> Scenario:
        return Scenario(
            name=name,
            plan=plan,
            objects=service(plan, *endpoints),
            zone=zone,
            flows=[Flow("pod2", ip, 80, reaches(*wanted), "kept")],
        )

    yield hinted("node hints prefer this node", ("pod1",), here, same_zone)
    yield hinted(
        "an endpoint without a node hint leaves the zone to decide",
        ("pod1", "remote1"),
        here,
        same_zone,
        far,
    )
    yield hinted(
        "an endpoint without any hint switches hints off", ("pod1", "remote2"), here, unhinted
    )
    yield hinted(
        "a zone without endpoints is given all of them",
        ("remote1", "remote2"),
        same_zone,
        far,
        zone="zone-c",
    )
    yield hinted(
        "a node without a zone is given all of them",
        ("remote1", "remote2"),
        same_zone,
        far,
        zone="",
    )


def _affinity(plan: AddressPlan) -> Iterator[Scenario]:
    both = reaches("pod1", "remote1")
    for protocol in ("tcp", "udp"):
        yield Scenario(
            name=f"session affinity holds a client of {protocol.upper()}",
            plan=plan,
            objects=service(
                plan,
                "pod1",
                "remote1",
                protocol=protocol.upper(),
                sessionAffinity="ClientIP",
                sessionAffinityConfig={"clientIP": {"timeoutSeconds": 3600}},
                **load_balancer(plan),
            ),
            flows=[
                Flow("pod2", plan.cluster_ip, 80, both, "kept", protocol=protocol, is_sticky=True),
                Flow("outside", plan.node, NODE_PORT, both, protocol=protocol, is_sticky=True),
                Flow("blocked", plan.lb_vip, 80, both, protocol=protocol, is_sticky=True),
            ],
        )
    yield Scenario(
        name="session affinity holds with the Local policy",
        plan=plan,
        objects=service(
            plan,
            "pod1",
            "pod2",
            sessionAffinity="ClientIP",
            **load_balancer(plan, **LOCAL),
        ),
        flows=[
            Flow("outside", plan.lb_vip, 80, reaches("pod1", "pod2"), "kept", is_sticky=True),
        ],
    )


# The node ----------------------------------------------------------------------------------------


def _foreign_rules(plan: AddressPlan) -> Iterator[Scenario]:
    both = reaches("pod1", "remote1")
    yield Scenario(
        name="Services work where the node forwards nothing else",
        plan=plan,
        objects=service(plan, "pod1", "remote1", type="NodePort", node_port=NODE_PORT),
        foreign={"filter": {"FORWARD": ("-j DROP",)}},
        flows=[
            Flow("outside", plan.node, NODE_PORT, both, "masqueraded"),
            Flow("outside", plan.cluster_ip, 80, both, "masqueraded"),
            Flow("outside", plan.local_pod(1), 80, DROPPED),
        ],
    )
    yield Scenario(
        name="a health check node port is open where the node closes its ports",
        plan=plan,
        objects=service(plan, **load_balancer(plan, healthCheckNodePort=NODE_SERVER_PORT, **LOCAL)),
        foreign={
            "filter": {"INPUT": (f"-p tcp -m tcp --dport {NODE_SERVER_PORT} -j DROP",)},
        },
        flows=[
            Flow(
                "outside", plan.node, NODE_SERVER_PORT, reaches(f"node:{NODE_SERVER_PORT}"), "kept"
            ),
        ],
    )


def _guards(plan: AddressPlan) -> Iterator[Scenario]:
    yield Scenario(
        name="a segment of no connection is not forwarded",
        plan=plan,
        objects=(),
        flows=[
            Flow("pod1", plan.remote_pod(1), 80, DROPPED, is_invalid=True),
            Flow("pod1", plan.remote_pod(1), 80, reaches("remote1"), "kept"),
        ],
    )
    if plan.family is IPFamily.V4:
        yield Scenario(
            name="a neighbour does not reach what listens on loopback",
            plan=plan,
            objects=(),
            flows=[
                Flow("node2", plan.loopback, PRIVATE_PORT, DROPPED),
                Flow("node", plan.loopback, PRIVATE_PORT, reaches(f"node:{PRIVATE_PORT}")),
            ],
        )


#: Each yields its scenarios for one address plan.
GROUPS: Final[tuple[Callable[[AddressPlan], Iterator[Scenario]], ...]] = (
    _no_endpoints,
    _endpoint_states,
    _hints,
    _affinity,
    _foreign_rules,
    _guards,
)
