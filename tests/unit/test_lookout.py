"""What is told of Services and this host, once, and counted as long as it lasts."""

import threading

import pytest
import structlog

from kubeproxy_py import lookout
from kubeproxy_py.external import ApiAddress
from kubeproxy_py.listeners import Owner
from kubeproxy_py.lookout import Notice
from kubeproxy_py.model import IPFamily, PortKey, ServiceName, ServicePort, ServicePortName
from kubeproxy_py.node_ports import Collision, Listener, Reach

V4, V6 = IPFamily.V4, IPFamily.V6
TCP = PortKey("", "tcp")
WEB = ServiceName("default", "web")
PORT = ServicePort(
    name=ServicePortName(*WEB, *TCP), cluster_ip="172.30.0.1", port=443, node_port=30080
)
LISTENER = Listener("tcp", V6, "::", 30080, 0, is_dual=True)


class World:
    """A Lookout, what it sees and what it told."""

    def __init__(self, metrics, **options):
        self.metrics = metrics
        self.services = {}
        self.listeners = []
        self.told = []
        self.is_ready = True
        self.lookout = lookout.Lookout(
            {
                family: lookout.Family(lambda: self.services, lambda: Reach(None, loopback=False))
                for family in IPFamily
            },
            is_ready=lambda: self.is_ready,
            metrics=metrics,
            tell=self.told.append,
            node_ips=lambda: ("192.168.0.2",),
            api=ApiAddress("192.0.2.1", 443),
            listening=self.listen,
            **options,
        )

    def listen(self):
        if isinstance(self.listeners, OSError):
            raise self.listeners
        return self.listeners

    def look(self):
        self.told.clear()
        self.lookout.look()
        return sorted(self.told)

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"kubeproxy_{name}", labels)


@pytest.fixture
def world(metrics):
    return World(metrics)


def exposed(**fields):
    return {
        WEB: {
            TCP: ServicePort(name=PORT.name, cluster_ip=PORT.cluster_ip, port=PORT.port, **fields)
        }
    }


def test_a_quiet_host_is_not_told_of(world):
    world.services = {WEB: {TCP: PORT}}

    assert world.look() == []
    assert world.value("node_port_collisions") == 0


def test_a_taken_node_port_is_told_once_and_again_after_it_was_free(world):
    world.services = {WEB: {TCP: PORT}}
    world.listeners = [LISTENER]

    # One notice, though both families are concerned.
    assert world.look() == [
        Notice(
            service=WEB,
            event_type="Warning",
            reason="NodePortTaken",
            action="Look",
            note="node port 30080/TCP takes the connections for which a process listens on ::",
        )
    ]
    assert world.value("node_port_collisions") == 1
    (notice,) = world.lookout.notices
    assert str(notice).startswith("Service 'default/web': node port 30080/TCP takes ")
    assert world.look() == []

    world.listeners = []
    assert world.look() == []
    assert world.value("node_port_collisions") == 0
    world.listeners = [LISTENER]
    assert len(world.look()) == 1


def test_addresses_that_shadow_are_told_and_counted_by_kind(world):
    world.services = exposed(external_ips=("192.168.0.2",), lb_vips=("192.0.2.1",))

    assert [(notice.reason, notice.note.split(" is ")[0]) for notice in world.look()] == [
        ("AddressShadowed", "spec.externalIPs: 192.168.0.2"),
        ("AddressShadowed", "status.loadBalancer.ingress: 192.0.2.1"),
    ]
    for reason in ("node_address", "api_address"):
        assert world.value("shadowing_services", ip_family="IPv4", reason=reason) == 1
    world.services = {}
    world.look()
    assert world.value("shadowing_services", ip_family="IPv4", reason="node_address") == 0


def test_a_kernel_that_does_not_tell_is_logged_and_asked_again(world):
    world.services = {WEB: {TCP: PORT}}
    world.listeners = OSError(95, "no such thing")
    with structlog.testing.capture_logs() as logs:
        world.look()
    assert [entry["event"] for entry in logs] == ["lookout.failed"]

    world.listeners = [LISTENER]
    assert len(world.look()) == 1


def test_the_owner_is_named_if_it_is_known():
    collision = Collision(PORT.name, 30080, "0.0.0.0", 7)

    assert "for which nginx listens" in lookout._taken(collision, Owner(9, "nginx"))


def test_it_looks_once_there_is_something_to_look_at_and_ends_when_told(metrics):
    world = World(metrics, start_s=0.001, period_s=0.001)
    world.services = {WEB: {TCP: PORT}}
    world.listeners = [LISTENER]
    world.is_ready = False
    asked = threading.Event()
    told = threading.Event()
    world.lookout._is_ready = lambda: asked.set() or world.is_ready
    world.lookout._tell = lambda notice: told.set()
    thread = threading.Thread(target=world.lookout.run)
    thread.start()
    try:
        assert asked.wait(10)
        assert not told.is_set()
        world.is_ready = True
        assert told.wait(10)
    finally:
        world.lookout.stop()
        thread.join(10)
    assert not thread.is_alive()
