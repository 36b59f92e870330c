"""Packets and bytes of Services, from a kernel whose connections are a dict."""

import errno
import os
import struct
import threading

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import netlink
from kubeproxy_py.flow_meter import FlowMeter
from kubeproxy_py.flows import FROM_SERVICE, TO_SERVICE
from kubeproxy_py.model import IPFamily, ServicePort, ServicePortName
from kubeproxy_py.traffic import Series
from tests.unit.test_conntrack import PLANS, TCP, direction
from tests.unit.test_ctnetlink import counters
from tests.unit.test_netlink import ScriptedSocket

V4, V6 = IPFamily.V4, IPFamily.V6
WEB = ServicePortName("default", "web", "", "tcp")
ITEM, ENDED, DONE = 0x100, 0x102, 3


class Kernel:
    """A connection table, and sockets to it."""

    def __init__(self):
        self.entries = {}
        self.events = []
        self.looks = 0
        self.error = None  # of the next dumps
        self.is_interrupted = 0  # so many dumps
        self.before_answer = lambda: None
        self.ear = os.eventfd(0)

    def close(self):
        os.close(self.ear)

    def count(self, number, octets, *, family=V4, destination="vip", port=80):
        """Let a connection have sent so many bytes, and half of them have come back."""
        self.entries[number] = (family, destination, port, octets)

    def end(self, number):
        self.tell(self._message(ENDED, number, self.entries.pop(number)))

    def tell(self, datagram):
        self.events.append(datagram)
        os.eventfd_write(self.ear, 1)

    def connect(self):
        return netlink.NetlinkSocket(Dump(self), "connections")

    def connect_events(self):
        return netlink.NetlinkSocket(Events(self), "events")

    def listed(self, sequence):
        self.looks += 1
        self.before_answer()
        if self.error is not None:
            raise self.error
        flags = 0x12 if self.is_interrupted else 2
        self.is_interrupted = max(0, self.is_interrupted - 1)
        for number, entry in list(self.entries.items()):
            yield self._message(ITEM, number, entry, sequence, flags)
        yield struct.pack("=IHHIIi", 20, DONE, flags, sequence, 0, 0)

    @staticmethod
    def _message(kind, number, entry, sequence=0, flags=0):
        family, destination, port, octets = entry
        plan = PLANS[family]
        client = (plan["client"], 1000 + number)
        payload = b"".join(
            (
                bytes([2 if family is V4 else 10, 0, 0, 0]),
                direction(1, client, (plan[destination], port), protocol=TCP),
                direction(2, (plan["new"], 8080), client, protocol=TCP),
                netlink.attribute(12, struct.pack(">I", number)),
                b"" if octets is None else counters(9, octets // 100, octets),
                b"" if octets is None else counters(10, octets // 100, octets // 2),
            )
        )
        return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


class Dump(ScriptedSocket):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def send(self, data):
        sequence = struct.unpack_from("=IHHI", data)[3]
        self.datagrams = list(self.kernel.listed(sequence))
        return len(data)


class Events(ScriptedSocket):
    def __init__(self, kernel):
        super().__init__()
        self.datagrams = kernel.events
        self.ear = kernel.ear

    def fileno(self):
        return self.ear

    def recvmsg_into(self, buffers):
        if not self.datagrams:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        os.eventfd_read(self.ear)
        if self.datagrams:
            os.eventfd_write(self.ear, 1)
        return super().recvmsg_into(buffers)


class Stage:
    """A meter on a thread of its own, and the world that it asks."""

    def __init__(self, metrics, **options):
        self.kernel = Kernel()
        self.now = 0.0
        self.asked = 0
        self.node = {V4: ["192.168.0.2"], V6: ["fd00:168::2"]}
        self.ports = {
            family: [
                ServicePort(name=WEB, cluster_ip=PLANS[family]["vip"], port=80, node_port=30080)
            ]
            for family in IPFamily
        }
        self.meter = FlowMeter(
            self._ask,
            lambda family: self.node[family],
            **{
                "families": list(IPFamily),
                "metrics": metrics,
                "opener": self.kernel.connect,
                "events_opener": self.kernel.connect_events,
                "clock": lambda: self.now,
            }
            | options,
        )

    def _ask(self, family):
        self.asked += 1
        return self.ports[family]

    def look(self, family=V4):
        """Look, and return bytes to the Service since the last time."""
        assert self.meter.look(30.0)
        return self.taken(family)

    def taken(self, family=V4):
        return self.meter.take(family)[0][Series("bytes", WEB, TO_SERVICE)]


@pytest.fixture
def build(metrics, monkeypatch):
    monkeypatch.setattr("kubeproxy_py.flow_meter._PAUSE_S", 0.0)
    stages = []

    def build(**options):
        stage = Stage(metrics, **options)
        stages.append(stage)
        stage.meter.start()
        return stage

    yield build
    for stage in stages:
        stage.meter.stop()
        stage.kernel.close()


@pytest.fixture
def stage(build):
    """Give one that has looked once."""
    built = build()
    assert built.look() == 0
    return built


def test_living_and_ended_connections_count_in_both_directions(stage):
    stage.kernel.count(1, 1000)
    stage.kernel.count(2, 500)
    stage.kernel.end(2)
    assert stage.meter.look(30.0)
    taken, standing = stage.meter.take(V4)

    assert taken == {
        Series("packets", WEB, TO_SERVICE): 15,
        Series("bytes", WEB, TO_SERVICE): 1500,
        Series("packets", WEB, FROM_SERVICE): 15,
        Series("bytes", WEB, FROM_SERVICE): 750,
    }
    assert standing[Series("bytes", WEB, TO_SERVICE)] == 1000
    stage.kernel.count(1, 1100)
    stage.kernel.end(1)
    assert stage.look() == 100


def test_each_family_has_its_own(stage):
    stage.kernel.count(1, 1000)
    stage.kernel.count(2, 500, family=V6)

    assert stage.look() == 1000
    assert stage.taken(V6) == 500


def test_a_family_that_is_not_used_is_left_alone(build):
    stage = build(families=[V4])
    stage.look()
    stage.kernel.count(1, 500, family=V6)
    stage.kernel.count(2, 1000)

    assert stage.look() == 1000
    assert stage.asked == 1


def test_before_the_first_look_nothing_has_begun(build):
    stage = build()
    stage.kernel.count(1, 1000)
    assert not stage.meter.has_begun

    assert stage.look() == 0
    assert stage.meter.has_begun
    assert stage.meter.take(V4)[1][Series("bytes", WEB, TO_SERVICE)] == 1000


def test_nothing_begins_before_services_are_known(build):
    listed = []
    stage = build(is_ready=lambda: bool(listed))
    stage.kernel.count(1, 1000)
    ports, stage.ports[V4] = stage.ports[V4], []
    assert not stage.meter.look(30.0)
    assert not stage.meter.has_begun
    listed.append("Service")
    stage.ports[V4] = ports

    # It was there before: nobody knows since when, and who has counted it.
    assert stage.look() == 0


def test_node_ports_count_on_this_host_s_addresses_as_they_are_now(stage):
    stage.kernel.count(1, 1000, destination="node", port=30080)
    stage.kernel.count(2, 500, destination="elsewhere", port=30080)
    assert stage.look() == 1000
    stage.node[V4] = ["192.168.0.2", PLANS[V4]["elsewhere"]]

    assert stage.look() == 500


def test_what_is_no_service_s_or_does_not_count_is_left_out(stage):
    stage.kernel.count(1, 1000, destination="elsewhere")
    stage.kernel.count(2, None)
    stage.kernel.count(3, 7)

    assert stage.look() == 7


def test_a_new_service_is_known_when_its_connection_ends(stage, metrics):
    stage.kernel.count(1, 1000, port=81)
    stage.kernel.count(2, 50, port=81)
    stage.ports[V4] = [ServicePort(name=WEB, cluster_ip=PLANS[V4]["vip"], port=81)]
    stage.now += 10
    stage.meter.outdate()
    stage.kernel.end(1)
    stage.kernel.end(2)

    assert stage.look() == 1050


def test_unknown_addresses_do_not_ask_all_the_time(stage):
    asked = stage.asked
    stage.kernel.count(1, 1000)
    for number in range(10, 20):
        stage.kernel.count(number, 1000, port=81)
    # In the middle of the look, within a second of the last asking.
    stage.kernel.before_answer = stage.meter.outdate
    stage.look()
    assert stage.asked == asked
    stage.kernel.before_answer = lambda: None
    stage.look()

    assert stage.asked == asked + 2


def test_only_namespaces_that_are_asked_for_count(build):
    stage = build(namespaces=["elsewhere"])
    stage.look()
    stage.kernel.count(1, 1000)

    assert stage.look() == 0


def test_lost_events_are_told_and_the_rest_is_counted(stage, metrics):
    stage.kernel.count(1, 1000)
    stage.kernel.tell(OSError(errno.ENOBUFS, "no room"))
    stage.kernel.end(1)

    assert stage.look() == 1000
    assert metrics.registry.get_sample_value("kubeproxy_traffic_flow_events_lost_total") == 1


def test_a_look_that_fails_is_told_and_the_next_makes_up_for_it(stage, metrics):
    stage.kernel.count(1, 1000)
    stage.kernel.error = OSError(errno.EPERM, "refused")
    with capture_logs() as logs:
        assert not stage.meter.look(30.0)
    assert [entry["event"] for entry in logs] == ["traffic.flow_look_failed"]
    assert metrics.registry.get_sample_value("kubeproxy_traffic_flow_look_failures_total") == 1
    stage.kernel.error = None

    assert stage.look() == 1000


def test_a_table_that_changes_is_read_again(stage, metrics):
    stage.kernel.count(1, 1000)
    stage.kernel.is_interrupted = 2

    assert stage.look() == 1000
    assert stage.kernel.looks == 4


def test_a_table_that_changes_all_the_time_fails_the_look(stage):
    stage.kernel.count(1, 1000)
    stage.kernel.is_interrupted = 5
    with capture_logs():
        assert not stage.meter.look(30.0)

    assert stage.look() == 1000


def test_a_bug_ends_neither_thread_nor_wait(stage, metrics):
    def fail(_family):
        raise ValueError("a bug")

    ask, stage.meter._ports = stage.meter._ports, fail
    stage.meter.outdate()
    with capture_logs() as logs:
        assert not stage.meter.look(30.0)
    assert [entry["event"] for entry in logs] == ["traffic.failed"]
    stage.meter._ports = ask
    stage.meter.outdate()
    stage.kernel.count(1, 1000)

    assert stage.look() == 1000


def test_events_that_cannot_be_read_do_not_stop_the_looks(stage):
    stage.kernel.count(1, 1000)
    with capture_logs():
        stage.kernel.tell(OSError(errno.EIO, "broken"))

        assert stage.meter.look(30.0)
    assert stage.look() == 1000


def test_above_the_limit_one_says_so_once(build, metrics):
    stage = build(room=2)
    stage.look()
    for number in range(3):
        stage.kernel.count(number, 1000)
    with capture_logs() as logs:
        assert stage.look() == 2000
        assert stage.look() == 0

    assert [entry["event"] for entry in logs] == ["traffic.flows_untracked"]
    value = metrics.registry.get_sample_value
    assert value("kubeproxy_traffic_flows", {"state": "tracked"}) == 2
    assert value("kubeproxy_traffic_flows", {"state": "untracked"}) == 1
    stage.kernel.end(0)
    stage.kernel.end(1)
    stage.kernel.end(2)
    assert stage.look() == 1000
    assert value("kubeproxy_traffic_flows", {"state": "untracked"}) == 0


def test_events_are_read_during_a_long_look(stage, monkeypatch):
    monkeypatch.setattr("kubeproxy_py.flow_meter._ENTRIES_BETWEEN_EVENTS", 2)
    for number in range(10):
        stage.kernel.count(number, 100)
    # It is in the answer, and its end is told before the answer has been read.
    stage.kernel.before_answer = lambda: stage.kernel.tell(
        stage.kernel._message(ENDED, 9, (V4, "vip", 80, 150))
    )
    assert stage.look() == 1050
    stage.kernel.before_answer = lambda: None
    stage.kernel.entries.clear()

    assert stage.look() == 0


def test_stopping_ends_a_wait_and_the_thread(stage):
    is_asked = threading.Event()
    go_on = threading.Event()

    def hang():
        is_asked.set()
        go_on.wait(30)

    stage.kernel.before_answer = hang
    found = []
    waiter = threading.Thread(target=lambda: found.append(stage.meter.look(30.0)))
    waiter.start()
    assert is_asked.wait(30)
    stopper = threading.Thread(target=stage.meter.stop)
    stopper.start()
    waiter.join(30)
    go_on.set()
    stopper.join(30)

    assert found == [False]
    assert not stage.meter.look(30.0)
    stage.meter.stop()


def test_a_kernel_that_tells_nothing_is_said_at_the_start(metrics):
    def refuse():
        raise OSError(errno.EPROTONOSUPPORT, "no ctnetlink")

    stage = Stage(metrics, events_opener=refuse)

    with pytest.raises(OSError, match="no ctnetlink"):
        stage.meter.start()
    stage.meter.stop()
    stage.kernel.close()
