"""What is found between this host, the API server and the objects."""

import pytest

from kubeproxy_py import config, options
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.external import ApiAddress, Refusal
from kubeproxy_py.model import (
    IPFamily,
    Node,
    PortKey,
    Problem,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)
from kubeproxy_py.node_ports import Listener
from kubeproxy_py.preflight import cluster
from kubeproxy_py.preflight.facts import ApiFacts, ClusterFacts, HostFacts

V4, V6 = IPFamily.V4, IPFamily.V6
TCP = PortKey("", "tcp")
WEB = ServiceName("default", "web")
NODE = Node(name="node1", ips=("192.168.0.2",), pod_cidrs=("10.180.1.0/24",))
HOST = HostFacts(
    addresses=frozenset({"192.168.0.2", "127.0.0.1"}), interfaces=("lo", "cni0", "veth1")
)
IPS = options.node_ips("", NODE.ips)
API = ApiFacts(
    server="https://192.0.2.1:6443",
    addresses=(ApiAddress("192.0.2.1", 6443),),
    version="v1.36.2",
    clock_ahead_s=0.5,
    permissions={"list services": True, "create events": True},
)


def state(**fields):
    port = {"cluster_ip": "172.30.0.1", "port": 80, **fields}
    return ServiceState({TCP: ServicePort(name=ServicePortName(*WEB, *TCP), **port)}, {})


def objects(*, services=None, **changes):
    facts = {
        "node_name": "node1",
        "node": NODE,
        "services": {V4: services or {WEB: state()}, V6: {}},
    }
    return ClusterFacts(**facts | changes)


def configured(**fields):
    built = config.replace(KubeProxyConfiguration(), "cluster_cidr", "10.180.0.0/16")
    for path, value in fields.items():
        built = config.replace(built, path.replace("__", "."), value)
    return built


def judged(found=None, *, host=HOST, api=API, ips=IPS, **fields):
    findings = cluster.judge(found or objects(), host, api, configured(**fields), ips)
    return [finding for finding in findings if finding.severity != "ok"]


def brief(found):
    return [(finding.topic, finding.severity) for finding in found]


def asked(**changes):
    fields = {name: getattr(API, name) for name in API.__struct_fields__}
    return [f for f in cluster.judge_api(ApiFacts(**fields | changes)) if f.severity != "ok"]


# The API server ----------------------------------------------------------------------------------


def test_an_api_server_that_lets_us_in_is_well():
    assert asked() == []
    assert {f.topic for f in cluster.judge_api(API)} == {
        "api-config", "api-reachable", "api-version", "api-permissions", "clock",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"config_failure": "no such file"}, [("api-config", "error")]),
        ({"failure": "timed out"}, [("api-reachable", "error")]),
        ({"version": "v1.20.9"}, [("api-version", "error")]),
        ({"version": "v1.21.0+k3s1"}, []),
        ({"version": "devel"}, [("api-version", "info")]),
        ({"permissions": {"list services": False}}, [("api-permissions", "error")]),
        ({"permissions": {"create events": False}}, [("api-permissions", "warning")]),
        (
            {"permissions": {"create events": False, "watch nodes": False}},
            [("api-permissions", "error"), ("api-permissions", "warning")],
        ),
        ({"permissions_failure": "404", "permissions": {}}, [("unchecked", "info")]),
        ({"listing_failure": "cannot list objects"}, [("api-reachable", "error")]),
        ({"clock_ahead_s": 31.0}, [("clock", "warning")]),
        ({"clock_ahead_s": -300.0}, [("clock", "warning")]),
        ({"clock_ahead_s": None}, []),
    ],
)
def test_what_is_wrong_with_the_api_server(changes, wanted):
    assert brief(asked(**changes)) == wanted


def test_clocks_are_compared_in_words():
    assert [asked(clock_ahead_s=seconds)[0].found for seconds in (60.0, -60.0)] == [
        "the API server's is 60 s ahead of this host's",
        "the API server's is 60 s behind this host's",
    ]


def test_inside_the_cluster_an_unreachable_server_may_be_a_cluster_ip():
    assert "cluster IP" in asked(failure="timed out", is_in_cluster=True)[0].found
    assert "cluster IP" not in asked(failure="timed out")[0].found


@pytest.mark.parametrize(("ip", "is_cluster_ip"), [("172.30.0.1", True), ("192.0.2.1", False)])
def test_a_proxy_must_not_depend_on_itself(ip, is_cluster_ip):
    api = ApiFacts(server=f"https://{ip}:443", addresses=(ApiAddress(ip, 443),))

    assert brief(judged(api=api)) == ([("api-cluster-ip", "error")] if is_cluster_ip else [])


# Configuration -----------------------------------------------------------------------------------


def doubted(pod_cidrs=(), families=(V4, V6), **fields):
    return list(cluster.judge_doubts(configured(**fields), IPS, pod_cidrs, families))


def test_unset_node_port_addresses_are_the_default_of_nearly_everybody():
    assert brief(doubted()) == [("node-port-addresses", "info")]


def test_node_port_addresses_that_are_set_are_well():
    assert brief(doubted(node_port_addresses=("primary",))) == [("node-port-addresses", "ok")]


def test_what_run_would_warn_of_is_a_warning():
    found = doubted(["fd00::/64"], node_port_addresses=("192.168.0.0/24",))

    assert brief(found) == [("config-doubts", "warning"), ("node-port-addresses", "ok")]


def test_what_run_would_refuse_is_an_error():
    assert brief(doubted(["fd00::/64"], detect_local_mode="NodeCIDR")) == [("config", "error")]


# Node and CIDRs ----------------------------------------------------------------------------------


def test_a_cluster_that_fits_is_well():
    assert judged() == []
    assert judged(api=None) == []


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"node": None}, "error"),
        ({"node": None, "are_files": True}, "info"),
        ({"node": Node(name="node1")}, "warning"),
        ({"node": Node(name="node1", ips=("192.168.0.9",))}, "warning"),
    ],
)
def test_the_node_must_be_this_host(changes, severity):
    assert brief(judged(objects(**changes))) == [("node-object", severity)]


def test_without_addresses_the_node_is_believed():
    assert judged(host=HostFacts()) == []


@pytest.mark.parametrize(
    ("fields", "changes", "wanted"),
    [
        ({"cluster_cidr": ""}, {}, "warning"),
        ({"cluster_cidr": "10.180.0.0/24"}, {}, "warning"),
        ({"cluster_cidr": "fd00::/48"}, {}, None),
        ({"cluster_cidr": "fd00::/48,10.180.0.0/16"}, {}, None),
        ({"detect_local_mode": "NodeCIDR"}, {}, None),
        ({"detect_local_mode": "NodeCIDR"}, {"node": Node(name="node1", ips=NODE.ips)}, "error"),
        ({"detect_local_mode": "BridgeInterface", "detect_local__bridge_interface": "cni0"}, {}, None),
        ({"detect_local_mode": "BridgeInterface", "detect_local__bridge_interface": "cbr0"}, {}, "warning"),
        ({"detect_local_mode": "InterfaceNamePrefix", "detect_local__interface_name_prefix": "veth"}, {}, None),
        ({"detect_local_mode": "InterfaceNamePrefix", "detect_local__interface_name_prefix": "cali"}, {}, "info"),
    ],
)  # fmt: skip
def test_how_pods_are_told_must_fit_this_node(fields, changes, wanted):
    assert brief(judged(objects(**changes), **fields)) == (
        [("cluster-cidr", wanted)] if wanted else []
    )


@pytest.mark.parametrize(
    ("are_files", "wanted"), [(False, ("objects", "warning")), (True, ("manifests", "error"))]
)
def test_what_is_invalid_is_named(are_files, wanted):
    problem = Problem(kind="Service", namespace="a", name="b", field="spec.x", message="is wrong")
    (found,) = judged(objects(problems=(problem,), are_files=are_files))

    assert ((found.topic, found.severity), found.found) == (
        wanted, "Service 'a/b': spec.x: is wrong",
    )  # fmt: skip


# Addresses and node ports ------------------------------------------------------------------------


def test_refused_addresses_are_named():
    refusal = Refusal(WEB, "spec.externalIPs", "172.30.0.9", 0, "cluster_ip", "is taken")
    (found,) = judged(objects(refusals=(refusal,)))

    assert (found.topic, found.severity, found.found) == (
        "external-addresses", "warning", str(refusal),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "severity", "whose"),
    [
        ({"lb_vips": ("192.168.0.2",)}, "info", "the Node's own"),
        ({"external_ips": ("192.0.2.1",), "port": 6443}, "warning", "the API server's"),
    ],
)
def test_shadowed_addresses_are_named(fields, severity, whose):
    (found,) = judged(objects(services={WEB: state(**fields)}))

    assert (found.topic, found.severity) == ("shadowed-addresses", severity)
    assert found.found.endswith(f"is {whose}")


def test_addresses_shadow_nothing_where_nothing_is_known():
    services = {WEB: state(lb_vips=("127.0.0.1",))}
    facts = objects(services=services, node=None, are_files=True)

    assert brief(judged(facts, api=None, ips=options.node_ips("", ()))) == [("node-object", "info")]


@pytest.mark.parametrize("owner", [{}, {7: (9, "nginx")}], ids=["hidden", "seen"])
def test_a_listener_on_a_node_port_is_named(owner):
    listeners = (Listener("tcp", V6, "::", 30080, 7, is_dual=True),)
    host = HostFacts(addresses=HOST.addresses, listeners=listeners, owners=owner)
    facts = objects(services={WEB: state(node_port=30080)})
    (found,) = judged(facts, host=host)

    who = "nginx (pid 9)" if owner else "a process that cannot be seen"
    assert found.found == f"node port 30080/TCP of Service 'default/web': {who} listens on ::"
    assert cluster.node_ports_of(facts) == {30080}


def test_a_listener_where_node_ports_are_not_served_loses_nothing():
    listeners = (Listener("tcp", V4, "127.0.0.1", 30080, 7),)
    host = HostFacts(addresses=HOST.addresses, listeners=listeners)
    facts = objects(services={WEB: state(node_port=30080)})

    assert judged(facts, host=host, node_port_addresses=("192.168.0.0/24",)) == []


def test_services_without_node_ports_have_none():
    assert cluster.node_ports_of(objects()) == set()
