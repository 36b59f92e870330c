"""
The behaviour of a service proxy, as data: one table for the tracer and for the kernel.

A behaviour is added here once; tests/unit/test_flows.py and tests/packet/test_flows.py run all there
are. What is wanted is kube-proxy's documented behaviour, not what our rules happen to do.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS, AddressPlan
from tests.support.builders import Json, make_port, make_service, make_slice
from tests.support.scenario import (
    DROPPED,
    NODE_PORT,
    NODE_SERVER_PORT,
    PRIVATE_PORT,
    REFUSED,
    UNTOUCHED,
    Flow,
    Scenario,
    endpoint,
    reaches,
    service,
)

_LOCAL: Final = {"externalTrafficPolicy": "Local"}
_TERMINATING: Final = {"ready": False, "serving": True, "terminating": True}


def _load_balancer(plan: AddressPlan, **fields: Any) -> dict[str, Any]:
    """Return a LoadBalancer's fields: a VIP, a node port, an external IP."""
    return {
        "type": "LoadBalancer",
        "lb_ips": [plan.lb_vip],
        "externalIPs": [plan.external_ip],
        "node_port": NODE_PORT,
        **fields,
    }


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
        objects=service(plan, "pod1", **_load_balancer(plan, **_LOCAL)),
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
    names = {"http": (80, 80), "admin": (81, 8080)}
    yield Scenario(
        name="each port of a Service has endpoints of its own",
        plan=plan,
        objects=[
            make_service(
                "web",
                cluster_ip=ip,
                ports=[make_port(port, name=name) for name, (port, _) in names.items()],
            ),
            *(
                make_slice(
                    "web", name=f"web-{name}", endpoints=[endpoint(plan, place)], ports=[port]
                )
                for place, name, port in (
                    ("pod1", "http", make_port(80, name="http")),
                    ("pod2", "admin", make_port(8080, name="admin")),
                )
            ),
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
            make_service("web", cluster_ip=ip, ports=[make_port(80, name="http")]),
            *(
                make_slice(
                    "web",
                    name=f"web-{port}",
                    endpoints=[endpoint(plan, place)],
                    ports=[make_port(port, name="http")],
                )
                for place, port in (("pod1", 80), ("remote1", 8080))
            ),
        ],
        flows=[Flow("pod2", ip, 80, reaches("pod1:80", "remote1:8080"), "kept")],
    )
    yield Scenario(
        name="TCP and UDP share a port number and a node port",
        plan=plan,
        objects=[
            make_service(
                "web",
                cluster_ip=ip,
                type="NodePort",
                ports=[
                    make_port(80, name="tcp", nodePort=NODE_PORT),
                    make_port(80, name="udp", protocol="UDP", nodePort=NODE_PORT),
                ],
            ),
            make_slice(
                "web",
                name="web-tcp",
                endpoints=[endpoint(plan, "pod1")],
                ports=[make_port(80, name="tcp")],
            ),
            make_slice(
                "web",
                name="web-udp",
                endpoints=[endpoint(plan, "pod2")],
                ports=[make_port(81, name="udp", protocol="UDP")],
            ),
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
            **_load_balancer(plan),
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
            objects=service(plan, "remote1", **_load_balancer(plan, **_LOCAL)),
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
        objects=service(plan, "pod1", "pod2", **_load_balancer(plan, **_LOCAL)),
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
        objects=service(plan, "pod1", "remote1", externalIPs=[ip], **_LOCAL),
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
        objects=service(plan, "pod1", "remote1", **_load_balancer(plan)),
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
            **_load_balancer(plan, lb_ips=[{"ip": vip, "ipMode": "Proxy"}]),
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
            **_load_balancer(plan, loadBalancerSourceRanges=[plan.outside_allowed_cidr]),
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
            **_load_balancer(
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
            **_load_balancer(plan, loadBalancerSourceRanges=[plan.outside_allowed_cidr]),
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
            **_load_balancer(
                plan, loadBalancerSourceRanges=[plan.outside_allowed_cidr, plan.pod_cidr], **_LOCAL
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
        objects=service(plan, "pod1", "remote1", **_load_balancer(plan, **_LOCAL)),
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
        objects=service(plan, "remote1", **_load_balancer(plan, **_LOCAL)),
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
        objects=service(plan, "remote1", **_load_balancer(plan, **_LOCAL)),
        settings={"cluster_cidr": ""},
        flows=[
            Flow("pod2", vip, 80, DROPPED),
            Flow("node", vip, 80, reaches("remote1")),
        ],
    )
    internal = {"internalTrafficPolicy": "Local"}
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


# Endpoints ---------------------------------------------------------------------------------------


def _no_endpoints(plan: AddressPlan) -> Iterator[Scenario]:
    for protocol in ("tcp", "udp", "sctp"):
        yield Scenario(
            name=f"a Service without endpoints refuses {protocol.upper()}",
            plan=plan,
            objects=service(plan, protocol=protocol.upper(), **_load_balancer(plan)),
            flows=[
                Flow(source, to, port, REFUSED, protocol=protocol)
                for source, to, port in (
                    ("pod1", plan.cluster_ip, 80),
                    ("node", plan.cluster_ip, 80),
                    ("outside", plan.cluster_ip, 80),
                    ("outside", plan.node, NODE_PORT),
                    ("pod1", plan.node, NODE_PORT),
                    ("outside", plan.external_ip, 80),
                    ("outside", plan.lb_vip, 80),
                )
            ],
        )
    yield Scenario(
        name="a Service without endpoints refuses the node before its packets leave",
        plan=plan,
        objects=service(plan, protocol="TCP"),
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
            **_load_balancer(plan, **_LOCAL),
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
                **_load_balancer(plan),
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
            **_load_balancer(plan, **_LOCAL),
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
        objects=service(
            plan, **_load_balancer(plan, healthCheckNodePort=NODE_SERVER_PORT, **_LOCAL)
        ),
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


_GROUPS: Final[tuple[Callable[[AddressPlan], Iterator[Scenario]], ...]] = (
    _cluster_ips,
    _ports,
    _ignored,
    _masquerading,
    _node_ports,
    _external_ips,
    _load_balancers,
    _local_policies,
    _no_endpoints,
    _endpoint_states,
    _hints,
    _affinity,
    _foreign_rules,
    _guards,
)

#: Every scenario, by family and name.
SCENARIOS: Final = {
    family: {scenario.name: scenario for group in _GROUPS for scenario in group(plan)}
    for family, plan in PLANS.items()
}
ALL: Final = tuple(scenario for found in SCENARIOS.values() for scenario in found.values())
