"""Scenarios of cluster IPs: who is reached, who is not served, and whose address is kept."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS, AddressPlan
from tests.support.builders import make_port, make_service, make_slice
from tests.support.scenario import (
    DROPPED,
    LOCAL,
    NODE_PORT,
    REFUSED,
    UNTOUCHED,
    Flow,
    Scenario,
    endpoint,
    load_balancer,
    reaches,
    service,
    slice_with_port,
)

# Cluster IPs -------------------------------------------------------------------------------------


def _cluster_ips(plan: AddressPlan) -> Iterator[Scenario]:
    ip, both = plan.cluster_ip, reaches("pod1", "remote1")
    yield Scenario(
        name="a cluster IP leads to every endpoint",
        plan=plan,
        objects=service(plan, "pod1", "remote1"),
        flows=[
            Flow("pod2", ip, 80, both, "kept"),
            Flow("pod1", ip, 80, both, "hairpin"),
            Flow("node", ip, 80, both, "masqueraded"),
            Flow("outside", ip, 80, both, "masqueraded"),
            Flow("pod2", ip, 81, UNTOUCHED),
        ],
    )
    for protocol in ("udp", "sctp"):
        yield Scenario(
            name=f"a cluster IP serves {protocol.upper()}",
            plan=plan,
            objects=service(plan, "pod1", "remote1", protocol=protocol.upper()),
            flows=[
                Flow("pod2", ip, 80, both, "kept", protocol=protocol),
                Flow("pod1", ip, 80, both, "hairpin", protocol=protocol),
                Flow("node", ip, 80, both, "masqueraded", protocol=protocol),
                Flow("outside", ip, 80, both, "masqueraded", protocol=protocol),
            ],
        )
    yield Scenario(
        name="the only endpoint reaches itself through its Service",
        plan=plan,
        objects=service(plan, "pod1", **load_balancer(plan, **LOCAL)),
        flows=[
            Flow("pod1", ip, 80, reaches("pod1"), "masqueraded"),
            Flow("pod1", plan.lb_vip, 80, reaches("pod1"), "masqueraded"),
            Flow("pod1", plan.node, NODE_PORT, reaches("pod1"), "masqueraded"),
            Flow("pod2", ip, 80, reaches("pod1"), "kept"),
        ],
    )
    yield Scenario(
        name="an endpoint in the node's own network is served",
        plan=plan,
        objects=service(plan, "node"),
        flows=[
            Flow("pod1", ip, 80, reaches("node"), "kept"),
            Flow("node", ip, 80, reaches("node")),
            Flow("remote1", ip, 80, reaches("node"), "kept"),
        ],
    )


def _ports(plan: AddressPlan) -> Iterator[Scenario]:
    ip = plan.cluster_ip
    http, admin = make_port(80, name="http"), make_port(81, name="admin")
    yield Scenario(
        name="each port of a Service has endpoints of its own",
        plan=plan,
        objects=[
            make_service("web", cluster_ip=ip, ports=[http, admin]),
            slice_with_port(plan, "pod1", make_port(80, name="http")),
            slice_with_port(plan, "pod2", make_port(8080, name="admin")),
        ],
        flows=[
            Flow("remote1", ip, 80, reaches("pod1:80")),
            Flow("remote1", ip, 81, reaches("pod2:8080")),
        ],
    )
    yield Scenario(
        name="a named port may be another number on each endpoint",
        plan=plan,
        objects=[
            make_service("web", cluster_ip=ip, ports=[http]),
            slice_with_port(plan, "pod1", make_port(80, name="http")),
            slice_with_port(plan, "remote1", make_port(8080, name="http")),
        ],
        flows=[Flow("pod2", ip, 80, reaches("pod1:80", "remote1:8080"), "kept")],
    )
    tcp = make_port(80, name="tcp", nodePort=NODE_PORT)
    udp = make_port(80, name="udp", protocol="UDP", nodePort=NODE_PORT)
    yield Scenario(
        name="TCP and UDP share a port number and a node port",
        plan=plan,
        objects=[
            make_service("web", cluster_ip=ip, type="NodePort", ports=[tcp, udp]),
            slice_with_port(plan, "pod1", make_port(80, name="tcp")),
            slice_with_port(plan, "pod2", make_port(81, name="udp", protocol="UDP")),
        ],
        flows=[
            Flow("remote1", ip, 80, reaches("pod1:80")),
            Flow("remote1", ip, 80, reaches("pod2:81"), protocol="udp"),
            Flow("outside", plan.node, NODE_PORT, reaches("pod1:80")),
            Flow("outside", plan.node, NODE_PORT, reaches("pod2:81"), protocol="udp"),
        ],
    )


def _ignored(plan: AddressPlan) -> Iterator[Scenario]:
    ip = plan.cluster_ip
    yield Scenario(
        name="a Service with another proxy's name is not served",
        plan=plan,
        objects=service(
            plan,
            "pod1",
            labels={"service.kubernetes.io/service-proxy-name": ""},
            **load_balancer(plan),
        ),
        flows=[
            Flow("pod2", ip, 80, UNTOUCHED),
            Flow("outside", plan.node, NODE_PORT, UNTOUCHED),
            Flow("outside", plan.lb_vip, 80, UNTOUCHED),
        ],
    )
    web, of_web = service(plan, "pod1")
    of_web["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
    yield Scenario(
        name="a slice of a headless Service is not used",
        plan=plan,
        objects=[web, of_web],
        flows=[Flow("pod2", ip, 80, REFUSED)],
    )
    yield Scenario(
        name="a Service without a cluster IP is not served",
        plan=plan,
        objects=service(plan, "pod1", cluster_ip="None", externalIPs=[plan.external_ip]),
        flows=[Flow("outside", plan.external_ip, 80, UNTOUCHED)],
    )
    other = next(each for each in PLANS.values() if each is not plan)
    yield Scenario(
        name="a Service of the other family is not served in this one",
        plan=plan,
        objects=service(other, "pod1", node_port=NODE_PORT, type="NodePort"),
        flows=[Flow("outside", plan.node, NODE_PORT, UNTOUCHED)],
    )
    both = list(PLANS.values())
    yield Scenario(
        name="a dual-stack Service has endpoints of its own in each family",
        plan=plan,
        objects=[
            make_service(
                "web",
                cluster_ip=both[0].cluster_ip,
                clusterIPs=[each.cluster_ip for each in both],
                ipFamilies=[each.family.value for each in both],
                ipFamilyPolicy="RequireDualStack",
            ),
            make_slice("web", name="web-4", endpoints=[endpoint(both[0], "pod1")], ports=[80]),
            make_slice("web", name="web-6", endpoints=[endpoint(both[1], "pod2")], ports=[80]),
        ],
        flows=[
            Flow(
                "remote1", ip, 80, reaches("pod1" if plan.family is IPFamily.V4 else "pod2"), "kept"
            )
        ],
    )


# Masquerading ------------------------------------------------------------------------------------


def _masquerading(plan: AddressPlan) -> Iterator[Scenario]:
    ip, both = plan.cluster_ip, reaches("pod1", "pod2")
    objects = service(plan, "pod1", "pod2")
    node_wide: dict[str, dict[str, Any]] = {
        "NodeCIDR": {"detect_local_mode": "NodeCIDR"},
        "BridgeInterface": {
            "detect_local_mode": "BridgeInterface",
            "detect_local.bridge_interface": "cni0",
        },
        "InterfaceNamePrefix": {
            "detect_local_mode": "InterfaceNamePrefix",
            "detect_local.interface_name_prefix": "cn",
        },
    }
    yield Scenario(
        name="by ClusterCIDR pods of all nodes keep their address",
        plan=plan,
        objects=objects,
        flows=[
            Flow("pod1", ip, 80, both, "hairpin"),
            Flow("remote1", ip, 80, both, "kept"),
            Flow("outside", ip, 80, both, "masqueraded"),
            Flow("node", ip, 80, both, "masqueraded"),
        ],
    )
    for mode, settings in node_wide.items():
        yield Scenario(
            name=f"by {mode} pods of this node keep their address",
            plan=plan,
            objects=objects,
            settings=settings,
            flows=[
                Flow("pod1", ip, 80, both, "hairpin"),
                Flow("remote1", ip, 80, both, "masqueraded"),
                Flow("outside", ip, 80, both, "masqueraded"),
                Flow("node", ip, 80, both, "masqueraded"),
            ],
        )
        yield Scenario(
            name=f"by {mode} pods of this node are inside for external addresses",
            plan=plan,
            objects=service(plan, "remote1", **load_balancer(plan, **LOCAL)),
            settings=settings,
            flows=[
                Flow("pod1", plan.lb_vip, 80, reaches("remote1"), "kept"),
                Flow("outside", plan.lb_vip, 80, DROPPED),
            ],
        )
    yield Scenario(
        name="without a way to tell local pods everybody keeps their address",
        plan=plan,
        objects=objects,
        settings={"cluster_cidr": ""},
        flows=[
            Flow("pod1", ip, 80, both, "hairpin"),
            Flow("outside", ip, 80, both, "kept"),
            Flow("node", ip, 80, both, "kept"),
        ],
    )
    yield Scenario(
        name="with masqueradeAll nobody keeps their address at a cluster IP",
        plan=plan,
        objects=service(plan, "pod1", "pod2", **load_balancer(plan, **LOCAL)),
        settings={"iptables.masquerade_all": True},
        flows=[
            Flow("pod1", ip, 80, both, "masqueraded"),
            Flow("remote1", ip, 80, both, "masqueraded"),
            Flow("node", ip, 80, both, "masqueraded"),
            Flow("outside", plan.lb_vip, 80, both, "kept"),
        ],
    )
    yield Scenario(
        name="another masquerade bit works the same",
        plan=plan,
        objects=objects,
        settings={"iptables.masquerade_bit": 5},
        flows=[
            Flow("pod1", ip, 80, both, "hairpin"),
            Flow("outside", ip, 80, both, "masqueraded"),
        ],
    )


#: Each yields its scenarios for one address plan.
GROUPS: Final[tuple[Callable[[AddressPlan], Iterator[Scenario]], ...]] = (
    _cluster_ips,
    _ports,
    _ignored,
    _masquerading,
)
