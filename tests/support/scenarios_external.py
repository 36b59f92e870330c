"""Scenarios of addresses for clients outside of the cluster, and of traffic policies."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from kubeproxy_py.model import IPFamily
from tests.support.addresses import AddressPlan
from tests.support.scenario import (
    DROPPED,
    LOCAL,
    NODE_PORT,
    UNTOUCHED,
    Flow,
    Scenario,
    load_balancer,
    reaches,
    service,
)

# External addresses ------------------------------------------------------------------------------


def _node_ports(plan: AddressPlan) -> Iterator[Scenario]:
    both = reaches("pod1", "remote1")
    loopback = both if plan.family is IPFamily.V4 else UNTOUCHED
    objects = service(plan, "pod1", "remote1", type="NodePort", node_port=NODE_PORT)
    yield Scenario(
        name="a node port is served on every address of the node",
        plan=plan,
        objects=objects,
        flows=[
            Flow("outside", plan.node, NODE_PORT, both, "masqueraded"),
            Flow("outside", plan.node_alternate, NODE_PORT, both, "masqueraded"),
            Flow("node2", plan.node, NODE_PORT, both, "masqueraded"),
            Flow("pod1", plan.node, NODE_PORT, both, "masqueraded"),
            Flow("pod2", plan.pod_gateway, NODE_PORT, both, "masqueraded"),
            Flow("remote1", plan.node, NODE_PORT, both, "masqueraded"),
            Flow("node", plan.node, NODE_PORT, both, "masqueraded"),
            Flow("node", plan.loopback, NODE_PORT, loopback),
            Flow("outside", plan.node, NODE_PORT + 1, UNTOUCHED),
        ],
    )
    for protocol in ("udp", "sctp"):
        yield Scenario(
            name=f"a node port serves {protocol.upper()}",
            plan=plan,
            objects=service(
                plan,
                "pod1",
                "remote1",
                type="NodePort",
                node_port=NODE_PORT,
                protocol=protocol.upper(),
            ),
            flows=[
                Flow("outside", plan.node, NODE_PORT, both, "masqueraded", protocol=protocol),
                Flow("pod2", plan.node, NODE_PORT, both, "masqueraded", protocol=protocol),
                Flow("node", plan.node, NODE_PORT, both, "masqueraded", protocol=protocol),
            ],
        )
    yield Scenario(
        name="nodePortAddresses restrict where node ports are served",
        plan=plan,
        objects=objects,
        settings={"node_port_addresses": (f"{plan.node_alternate}/{plan.host_bits}",)},
        flows=[
            Flow("outside", plan.node_alternate, NODE_PORT, both, "masqueraded"),
            Flow("outside", plan.node, NODE_PORT, UNTOUCHED),
            Flow("pod1", plan.pod_gateway, NODE_PORT, UNTOUCHED),
            Flow("node", plan.loopback, NODE_PORT, UNTOUCHED),
        ],
    )
    yield Scenario(
        name="primary is the node's own address",
        plan=plan,
        objects=objects,
        settings={"node_port_addresses": ("primary",)},
        flows=[
            Flow("outside", plan.node, NODE_PORT, both),
            Flow("outside", plan.node_alternate, NODE_PORT, UNTOUCHED),
        ],
    )
    yield Scenario(
        name="localhost node ports can be switched off",
        plan=plan,
        objects=objects,
        settings={"iptables.localhost_node_ports": False},
        flows=[
            Flow("outside", plan.node, NODE_PORT, both),
            Flow("node", plan.loopback, NODE_PORT, UNTOUCHED),
        ],
    )


def _external_ips(plan: AddressPlan) -> Iterator[Scenario]:
    ip, both = plan.external_ip, reaches("pod1", "remote1")
    yield Scenario(
        name="an external IP leads to every endpoint",
        plan=plan,
        objects=service(plan, "pod1", "remote1", externalIPs=[ip]),
        flows=[
            Flow("outside", ip, 80, both, "masqueraded"),
            Flow("pod2", ip, 80, both, "masqueraded"),
            Flow("node", ip, 80, both, "masqueraded"),
            Flow("node2", ip, 80, both, "masqueraded"),
        ],
    )
    yield Scenario(
        name="an external IP with the Local policy stays on the node",
        plan=plan,
        objects=service(plan, "pod1", "remote1", externalIPs=[ip], **LOCAL),
        flows=[
            Flow("outside", ip, 80, reaches("pod1"), "kept"),
            Flow("pod2", ip, 80, both, "kept"),
            Flow("node", ip, 80, both, "masqueraded"),
        ],
    )


def _load_balancers(plan: AddressPlan) -> Iterator[Scenario]:
    vip, both = plan.lb_vip, reaches("pod1", "remote1")
    yield Scenario(
        name="a load balancer VIP leads to every endpoint",
        plan=plan,
        objects=service(plan, "pod1", "remote1", **load_balancer(plan)),
        flows=[
            Flow("outside", vip, 80, both, "masqueraded"),
            Flow("pod2", vip, 80, both, "masqueraded"),
            Flow("node", vip, 80, both, "masqueraded"),
        ],
    )
    yield Scenario(
        name="a VIP in ipMode Proxy is left to the load balancer",
        plan=plan,
        objects=service(
            plan,
            "pod1",
            "remote1",
            **load_balancer(plan, lb_ips=[{"ip": vip, "ipMode": "Proxy"}]),
        ),
        flows=[
            Flow("outside", vip, 80, UNTOUCHED),
            Flow("pod2", vip, 80, UNTOUCHED),
            Flow("outside", plan.node, NODE_PORT, both),
        ],
    )
    yield Scenario(
        name="source ranges restrict the VIP and nothing else",
        plan=plan,
        objects=service(
            plan,
            "pod1",
            "remote1",
            **load_balancer(plan, loadBalancerSourceRanges=[plan.outside_allowed_cidr]),
        ),
        flows=[
            Flow("outside", vip, 80, both, "masqueraded"),
            Flow("blocked", vip, 80, DROPPED),
            Flow("pod2", vip, 80, DROPPED),
            Flow("node", vip, 80, DROPPED),
            Flow("blocked", plan.node, NODE_PORT, both),
            Flow("blocked", plan.external_ip, 80, both),
            Flow("pod2", plan.cluster_ip, 80, both, "kept"),
        ],
    )
    yield Scenario(
        name="a node within the source ranges may use a VIP that is bound to it",
        plan=plan,
        objects=service(
            plan,
            "pod1",
            "remote1",
            **load_balancer(
                plan, loadBalancerSourceRanges=[plan.outside_allowed_cidr, plan.node_cidr]
            ),
        ),
        bound=(vip,),
        flows=[
            Flow("node", vip, 80, both, "masqueraded"),
            Flow("outside", vip, 80, both),
            Flow("blocked", vip, 80, DROPPED),
        ],
    )
    yield Scenario(
        name="a node outside of the source ranges is dropped before its packets leave",
        plan=plan,
        objects=service(
            plan,
            "pod1",
            **load_balancer(plan, loadBalancerSourceRanges=[plan.outside_allowed_cidr]),
        ),
        beyond=(vip,),
        flows=[
            Flow("node", vip, 80, DROPPED),
            Flow("node", vip, 81, UNTOUCHED),
        ],
    )
    yield Scenario(
        name="source ranges and the Local policy hold together",
        plan=plan,
        objects=service(
            plan,
            "pod1",
            "remote1",
            **load_balancer(
                plan, loadBalancerSourceRanges=[plan.outside_allowed_cidr, plan.pod_cidr], **LOCAL
            ),
        ),
        flows=[
            Flow("outside", vip, 80, reaches("pod1"), "kept"),
            Flow("blocked", vip, 80, DROPPED),
            Flow("pod2", vip, 80, both, "kept"),
        ],
    )


# Traffic policies --------------------------------------------------------------------------------


def _local_policies(plan: AddressPlan) -> Iterator[Scenario]:
    vip, both = plan.lb_vip, reaches("pod1", "remote1")
    yield Scenario(
        name="externalTrafficPolicy Local keeps outside traffic here and its address",
        plan=plan,
        objects=service(plan, "pod1", "remote1", **load_balancer(plan, **LOCAL)),
        flows=[
            Flow("outside", vip, 80, reaches("pod1"), "kept"),
            Flow("outside", plan.node, NODE_PORT, reaches("pod1"), "kept"),
            Flow("node2", plan.node, NODE_PORT, reaches("pod1"), "kept"),
            Flow("pod2", vip, 80, both, "kept"),
            Flow("pod2", plan.node, NODE_PORT, both, "kept"),
            Flow("node", vip, 80, both, "masqueraded"),
            Flow("node", plan.node, NODE_PORT, both, "masqueraded"),
            Flow("pod2", plan.cluster_ip, 80, both, "kept"),
        ],
    )
    yield Scenario(
        name="externalTrafficPolicy Local without local endpoints drops outside traffic alone",
        plan=plan,
        objects=service(plan, "remote1", **load_balancer(plan, **LOCAL)),
        flows=[
            Flow("outside", vip, 80, DROPPED),
            Flow("outside", plan.external_ip, 80, DROPPED),
            Flow("outside", plan.node, NODE_PORT, DROPPED),
            Flow("pod2", vip, 80, reaches("remote1"), "kept"),
            Flow("node", vip, 80, reaches("remote1")),
            Flow("pod2", plan.node, NODE_PORT, reaches("remote1"), "kept"),
            Flow("pod2", plan.cluster_ip, 80, reaches("remote1"), "kept"),
        ],
    )
    yield Scenario(
        name="without a way to tell local pods the Local policy holds for them, too",
        plan=plan,
        objects=service(plan, "remote1", **load_balancer(plan, **LOCAL)),
        settings={"cluster_cidr": ""},
        flows=[
            Flow("pod2", vip, 80, DROPPED),
            Flow("node", vip, 80, reaches("remote1")),
        ],
    )
    internal: dict[str, Any] = {"internalTrafficPolicy": "Local"}
    yield Scenario(
        name="internalTrafficPolicy Local keeps inside traffic here",
        plan=plan,
        objects=service(plan, "pod1", "remote1", type="NodePort", node_port=NODE_PORT, **internal),
        flows=[
            Flow("pod2", plan.cluster_ip, 80, reaches("pod1"), "kept"),
            Flow("node", plan.cluster_ip, 80, reaches("pod1"), "masqueraded"),
            Flow("outside", plan.node, NODE_PORT, both, "masqueraded"),
        ],
    )
    yield Scenario(
        name="internalTrafficPolicy Local without local endpoints drops inside traffic",
        plan=plan,
        objects=service(plan, "remote1", type="NodePort", node_port=NODE_PORT, **internal),
        flows=[
            Flow("pod2", plan.cluster_ip, 80, DROPPED),
            Flow("node", plan.cluster_ip, 80, DROPPED),
            Flow("outside", plan.node, NODE_PORT, reaches("remote1")),
        ],
    )


#: Each yields its scenarios for one address plan.
GROUPS: Final[tuple[Callable[[AddressPlan], Iterator[Scenario]], ...]] = (
    _node_ports,
    _external_ips,
    _load_balancers,
    _local_policies,
)
