"""Whose traffic a node port takes."""

import pytest

from kubeproxy_py import node_ports
from kubeproxy_py.model import IPFamily, PortKey, ServiceName, ServicePort, ServicePortName
from kubeproxy_py.node_ports import Collision, Listener, Reach

V4, V6 = IPFamily.V4, IPFamily.V6
WEB = ServiceName("default", "web")
EVERYWHERE = Reach(None, loopback=True)


def services(node_port=30080, protocol="tcp"):
    key = PortKey("", protocol)
    port = ServicePort(
        name=ServicePortName(*WEB, *key), cluster_ip="172.30.0.1", port=80, node_port=node_port
    )
    return {WEB: {key: port}}


def found(*given, family=V4, reach=EVERYWHERE, **fields):
    return list(node_ports.collisions(services(**fields), given, family, reach))


def listener(address="0.0.0.0", port=30080, protocol="tcp", **fields):
    family = V6 if ":" in address else V4
    return Listener(protocol, family, address, port, 7, **fields)


def test_a_node_port_takes_what_a_process_listens_for():
    assert found(listener()) == [Collision(ServicePortName(*WEB, "", "tcp"), 30080, "0.0.0.0", 7)]


@pytest.mark.parametrize(
    "other",
    [
        listener(port=30081),
        listener(protocol="udp"),
        listener("::1"),
        listener("::", is_dual=False),
    ],
    ids=["port", "protocol", "family", "IPv6 only"],
)
def test_another_port_protocol_or_family_does_not_collide(other):
    assert found(other) == []


def test_a_dual_wildcard_collides_in_both_families():
    dual = listener("::", is_dual=True)

    assert [len(found(dual, family=family)) for family in IPFamily] == [1, 1]


def test_several_processes_on_one_port_are_one_collision():
    assert len(found(listener(), listener())) == 1


@pytest.mark.parametrize(
    ("address", "reach", "is_hit"),
    [
        ("192.168.0.2", EVERYWHERE, True),
        ("127.0.0.1", EVERYWHERE, True),
        ("127.0.0.1", Reach(None, loopback=False), False),
        ("192.168.0.2", Reach(("192.168.0.2",), loopback=True), True),
        ("192.168.0.3", Reach(("192.168.0.2",), loopback=True), False),
        ("0.0.0.0", Reach(("192.168.0.2",), loopback=False), True),
    ],
)
def test_where_node_ports_are_not_served_nobody_is_robbed(address, reach, is_hit):
    assert bool(found(listener(address), reach=reach)) is is_hit
