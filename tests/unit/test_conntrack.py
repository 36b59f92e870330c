"""Which entries are stale, and how they are removed, against a table that is a list."""

import errno
import itertools
import queue
import socket
import struct
import threading

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kubeproxy_py import conntrack, netlink
from kubeproxy_py.conntrack import Frontends, Outcome
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    PortKey,
    ServicePort,
    ServicePortName,
    ServiceState,
)

UDP, TCP, ICMP = 17, 6, 1
NODE_PORT = 30053

# One address plan in both families, so that a case reads the same in either.
V4 = {
    "client": "203.0.113.2", "vip": "172.30.0.10", "old": "10.180.1.11", "new": "10.180.1.12",
    "node": "192.168.0.2", "elsewhere": "198.51.100.7", "loopback": "127.0.0.53",
}  # fmt: skip
V6 = {
    "client": "2001:db8::2", "vip": "fd00:30::10", "old": "fd00:180:1::11", "new": "fd00:180:1::12",
    "node": "fd00:168::2", "elsewhere": "2001:db8:1::7", "loopback": "::1",
}  # fmt: skip
PLANS = {IPFamily.V4: V4, IPFamily.V6: V6}


def direction(kind, source, destination, *, protocol, zone=None):
    is_v6 = ":" in source[0]
    family, first = (socket.AF_INET6, 3) if is_v6 else (socket.AF_INET, 1)
    ports = (
        (netlink.attribute(2, struct.pack(">H", source[1])),
         netlink.attribute(3, struct.pack(">H", destination[1])))
        if protocol != ICMP
        else (netlink.attribute(4, b"\0\1"), netlink.attribute(5, b"\x08"))
    )  # fmt: skip
    return netlink.nested(
        kind,
        netlink.nested(
            1,
            netlink.attribute(first, socket.inet_pton(family, source[0])),
            netlink.attribute(first + 1, socket.inet_pton(family, destination[0])),
        ),
        netlink.nested(2, netlink.attribute(1, bytes([protocol])), *ports),
        *(() if zone is None else (netlink.attribute(3, struct.pack(">H", zone)),)),
    )


def entry(client, destination, answerer, *, protocol=UDP, zone=None, number=1):
    """Return what the kernel lists for a flow from *client*, answered by *answerer*."""
    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    return b"".join(
        (
            struct.pack("=BBH", family, 0, 0),
            direction(1, client, destination, protocol=protocol, zone=zone),
            direction(2, answerer, client, protocol=protocol),
            netlink.attribute(3, struct.pack(">I", 0x188)),
            netlink.attribute(7, struct.pack(">I", 120)),
            netlink.attribute(12, struct.pack(">I", number)),
        )
    )


class FakeTable:
    """A conntrack table with the manners of the kernel's.

    Args:
        entries: what it holds.
        interruptions: how many listings are told to have been disturbed.
        refuses_filter: it is older than the filter, and says so.
        refusal: errno of every listing.
        missing: how many entries vanish before they are deleted.
    """

    def __init__(self, entries, *, interruptions=0, refuses_filter=False, refusal=0, missing=0):
        self.entries = list(entries)
        self.interruptions = interruptions
        self.refuses_filter = refuses_filter
        self.refusal = refusal
        self.missing = missing
        self.listings = 0

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def dump(self, kind, payload):
        assert kind == 0x101
        if self.refusal:
            raise netlink.NetlinkError(self.refusal, "tests")
        if self.refuses_filter and len(payload) > 4:
            raise netlink.NetlinkError(errno.EINVAL, "tests")
        self.listings += 1
        for each in list(self.entries):
            yield 0x100, 0, memoryview(each)
        if self.interruptions:
            self.interruptions -= 1
            raise netlink.NetlinkError(errno.EINTR, "tests")

    def request_all(self, kind, payloads):
        assert kind == 0x102
        return [self._delete(payload) for payload in payloads]

    def _delete(self, payload):
        if self.missing:
            self.missing -= 1
            return errno.ENOENT
        wanted = [bytes(value) for _, value in netlink.attributes(memoryview(payload)[4:])]
        assert len(wanted) == 3  # both tuples and the id: the kernel clears all without tuples
        for each in self.entries:
            has = [bytes(value) for _, value in netlink.attributes(memoryview(each)[4:])]
            if all(value in has for value in wanted):
                self.entries.remove(each)
                return 0
        return errno.ENOENT


@pytest.fixture(params=list(IPFamily), ids=lambda family: family.value)
def family(request):
    return request.param


@pytest.fixture
def at(family):
    return PLANS[family]


def wanted(at):
    """Return a service at vip:53 and at a node port, with its endpoint at new:5353."""
    endpoints = frozenset({(at["new"], 5353)})
    return Frontends(services={(at["vip"], 53): endpoints}, node_ports={NODE_PORT: endpoints})


def left(family, table, front_ends, **options):
    conntrack.reconcile(family, front_ends, opener=table, **options)
    return table.entries


@pytest.mark.parametrize(
    ("destination", "answerer", "is_stale"),
    [
        pytest.param(("vip", 53), ("old", 5353), True, id="endpoint that is gone"),
        pytest.param(("vip", 53), ("new", 5353), False, id="endpoint that serves"),
        pytest.param(("vip", 53), ("new", 5354), True, id="endpoint that changed only its port"),
        pytest.param(("vip", 53), ("vip", 53), True, id="never translated"),
        pytest.param(("vip", 54), ("old", 5353), False, id="a port that is no front end"),
        pytest.param(("elsewhere", 53), ("old", 5353), False, id="an address that is none"),
        pytest.param(("node", NODE_PORT), ("old", 5353), True, id="node port, endpoint gone"),
        pytest.param(("node", NODE_PORT), ("new", 5353), False, id="node port, endpoint serves"),
        pytest.param(("elsewhere", NODE_PORT), ("elsewhere", NODE_PORT), True, id="node port's number elsewhere"),
    ],
)  # fmt: skip
def test_udp_entries_are_stale_by_kube_proxys_rule(family, at, destination, answerer, is_stale):
    one = entry(
        (at["client"], 40000),
        (at[destination[0]], destination[1]),
        (at[answerer[0]], answerer[1]),
    )

    assert left(family, FakeTable([one]), wanted(at)) == ([] if is_stale else [one])


@pytest.mark.parametrize(
    ("destination", "is_stale"),
    [
        pytest.param("node", True, id="this host"),
        pytest.param("loopback", True, id="loopback"),
        pytest.param("elsewhere", False, id="another host"),
    ],
)
def test_with_local_addresses_a_node_port_counts_only_on_them(family, at, destination, is_stale):
    one = entry((at["client"], 40000), (at[destination], NODE_PORT), (at["old"], 5353))
    local = {at["node"], "127.0.0.1" if family is IPFamily.V4 else "::1"}

    remaining = left(family, FakeTable([one]), wanted(at), local_addresses=local)

    assert remaining == ([] if is_stale else [one])


def test_a_front_end_decides_before_the_node_port_of_its_number(family, at):
    # vip:30053 is a front end of another service, whose endpoint is the old one.
    front_ends = wanted(at)
    front_ends.services[(at["vip"], NODE_PORT)] = frozenset({(at["old"], 5353)})
    one = entry((at["client"], 40000), (at["vip"], NODE_PORT), (at["old"], 5353))

    assert left(family, FakeTable([one]), front_ends) == [one]


@pytest.mark.parametrize(
    "protocol", [pytest.param(TCP, id="TCP"), pytest.param(ICMP, id="ICMP without ports")]
)
def test_other_protocols_are_left_alone(family, at, protocol):
    one = entry((at["client"], 4), (at["vip"], 53), (at["old"], 5353), protocol=protocol)

    assert left(family, FakeTable([one]), wanted(at)) == [one]


def test_an_entry_that_the_kernel_writes_otherwise_is_understood(family, at):
    tcp = entry((at["client"], 3), (at["vip"], 53), (at["old"], 5353), protocol=TCP, zone=7)
    kept = entry((at["client"], 1), (at["vip"], 53), (at["new"], 5353), zone=7)
    stale = entry((at["client"], 2), (at["vip"], 53), (at["old"], 5353), zone=7)

    assert left(family, FakeTable([tcp, kept, stale]), wanted(at)) == [tcp, kept]


@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param(1, id="the original direction"),
        pytest.param(2, id="the reply"),
    ],
)
def test_an_entry_without_both_directions_is_left_alone(family, at, left_out):
    # To delete by a request without tuples would be to clear the whole table.
    whole = entry((at["client"], 1), (at["vip"], 53), (at["old"], 5353))
    parts = [
        netlink.attribute(kind, bytes(value))
        for kind, value in netlink.attributes(memoryview(whole)[4:])
        if kind != left_out
    ]
    part = whole[:4] + b"".join(parts) + netlink.attribute(99, bytes(100))

    assert left(family, FakeTable([part]), wanted(at)) == [part]


def test_an_entry_without_addresses_is_left_alone(family):
    proto = netlink.nested(2, netlink.attribute(1, bytes([UDP])))
    tuples = netlink.nested(1, proto) + netlink.nested(2, proto)
    one = bytes(4) + tuples + netlink.attribute(99, bytes(200))

    assert left(family, FakeTable([one]), wanted(PLANS[family])) == [one]


def test_a_shortened_entry_is_left_alone(family, at):
    short = entry((at["client"], 1), (at["vip"], 53), (at["old"], 5353))[:60]

    assert left(family, FakeTable([short]), wanted(at)) == [short]


def test_without_front_ends_nothing_is_listed():
    table = FakeTable([])

    conntrack.reconcile(IPFamily.V4, Frontends(services={}, node_ports={}), opener=table)

    assert table.listings == 0


def test_a_kernel_without_the_filter_is_asked_without_it(family, at):
    stale = entry((at["client"], 1), (at["vip"], 53), (at["old"], 5353))

    assert left(family, FakeTable([stale], refuses_filter=True), wanted(at)) == []


def test_more_entries_than_one_batch_are_all_deleted(family, at):
    stale = [
        entry((at["client"], 1000 + n), (at["vip"], 53), (at["old"], 5353), number=n)
        for n in range(600)
    ]

    outcome = conntrack.reconcile(family, wanted(at), opener=FakeTable(stale))

    assert (outcome.deleted, outcome.failed, outcome.complete) == (600, 0, True)


def test_a_disturbed_listing_is_read_again():
    table = FakeTable([], interruptions=2)

    outcome = conntrack.reconcile(IPFamily.V4, wanted(V4), opener=table)

    assert (table.listings, outcome.complete) == (3, True)


def test_a_table_that_never_holds_still_is_given_up_with_what_was_found():
    stale = entry((V4["client"], 1), (V4["vip"], 53), (V4["old"], 5353))
    table = FakeTable([stale], interruptions=99)

    outcome = conntrack.reconcile(IPFamily.V4, wanted(V4), opener=table)

    assert (table.listings, outcome.deleted, outcome.complete) == (5, 1, False)


def test_an_entry_that_vanished_by_itself_is_no_failure():
    stale = [entry((V4["client"], n), (V4["vip"], 53), (V4["old"], 5353), number=n) for n in (1, 2)]

    outcome = conntrack.reconcile(IPFamily.V4, wanted(V4), opener=FakeTable(stale, missing=1))

    assert (outcome.deleted, outcome.failed) == (1, 0)


def test_a_refused_deletion_is_counted_and_does_not_stop_the_rest():
    stale = [entry((V4["client"], n), (V4["vip"], 53), (V4["old"], 5353), number=n) for n in (1, 2)]
    table = FakeTable(stale)
    table.request_all = lambda _kind, payloads: [errno.EBUSY] + [0] * (len(payloads) - 1)

    outcome = conntrack.reconcile(IPFamily.V4, wanted(V4), opener=table)

    assert (outcome.deleted, outcome.failed) == (1, 1)


def test_a_refused_listing_is_raised():
    with pytest.raises(netlink.NetlinkError):
        conntrack.reconcile(IPFamily.V4, wanted(V4), opener=FakeTable([], refusal=errno.EPERM))


def test_the_time_taken_is_told():
    ticks = itertools.count(10.0, 0.5)

    outcome = conntrack.reconcile(
        IPFamily.V4, wanted(V4), opener=FakeTable([]), clock=lambda: next(ticks)
    )

    assert outcome.seconds == 0.5


# Front ends --------------------------------------------------------------------------------------


def state(*endpoints, protocol="udp", **fields):
    key = PortKey("dns", protocol)
    port = ServicePort(
        name=ServicePortName("ns", "svc", "dns", protocol),
        cluster_ip="172.30.0.10",
        port=53,
        **fields,
    )
    return ServiceState(ports={key: port}, endpoints={key: endpoints})


def test_a_service_is_reached_at_all_its_addresses():
    service = state(
        Endpoint("10.0.0.1", 5353),
        external_ips=("192.168.99.1",),
        lb_vips=("1.2.3.4",),
        node_port=NODE_PORT,
    )

    front_ends = conntrack.frontends([service])

    endpoints = frozenset({("10.0.0.1", 5353)})
    assert front_ends == Frontends(
        services={(ip, 53): endpoints for ip in ("172.30.0.10", "192.168.99.1", "1.2.3.4")},
        node_ports={NODE_PORT: endpoints},
    )


def test_only_the_serving_condition_decides_which_endpoints_keep_their_flows():
    service = state(
        Endpoint("10.0.0.1", 53, ready=False, serving=True, terminating=True),
        Endpoint("10.0.0.2", 53, ready=False, serving=False),
    )

    assert conntrack.frontends([service]).services == {
        ("172.30.0.10", 53): frozenset({("10.0.0.1", 53)})
    }


@pytest.mark.parametrize(
    "service",
    [
        pytest.param(state(), id="no endpoints"),
        pytest.param(state(Endpoint("10.0.0.1", 53, serving=False)), id="none that serves"),
        pytest.param(state(Endpoint("10.0.0.1", 53), protocol="tcp"), id="TCP"),
        pytest.param(state(Endpoint("10.0.0.1", 53), protocol="sctp"), id="SCTP"),
    ],
)
def test_services_whose_entries_are_left_alone_have_no_front_end(service):
    assert conntrack.frontends([service]) == Frontends(services={}, node_ports={})


def test_services_that_share_an_address_keep_the_flows_of_both():
    services = [
        state(Endpoint("10.0.0.1", 53), external_ips=("1.1.1.1",)),
        state(Endpoint("10.0.0.2", 53), external_ips=("1.1.1.1",)),
    ]

    assert conntrack.frontends(services).services[("1.1.1.1", 53)] == frozenset(
        {("10.0.0.1", 53), ("10.0.0.2", 53)}
    )


# The thread --------------------------------------------------------------------------------------

DONE = Outcome(deleted=0, failed=0, seconds=0.25, complete=True)
EMPTY = Frontends(services={}, node_ports={})


class Work:
    """Stands for ``reconcile``: says when it begins, and ends when it is told how."""

    def __init__(self):
        self.begun = queue.Queue()
        self.results = queue.Queue()

    def __call__(self, family, front_ends):
        self.begun.put((family, front_ends))
        result = self.results.get(timeout=5)
        if isinstance(result, Exception):
            raise result
        return result

    def next(self):
        return self.begun.get(timeout=5)


def front(port):
    return Frontends(services={("172.30.0.10", port): frozenset()}, node_ports={})


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def reconciler(metrics, work):
    with capture_logs() as logs:
        running = conntrack.Reconciler(metrics, work)
        running.logs = logs
        running.start()
        yield running
        work.results.put(DONE)  # for a run that a failed test left
        running.stop(5)


def test_a_request_is_carried_out_with_what_it_builds(reconciler, work):
    reconciler.request(IPFamily.V6, lambda: front(53))

    assert work.next() == (IPFamily.V6, front(53))


def test_a_request_does_not_wait_for_the_work(reconciler, work):
    built_by = []

    def build():
        built_by.append(threading.current_thread().name)
        return EMPTY

    reconciler.request(IPFamily.V4, build)
    work.next()

    assert built_by == ["conntrack"]


def test_requests_during_a_run_become_one_more_run_with_the_latest(reconciler, work):
    reconciler.request(IPFamily.V4, lambda: front(1))
    work.next()
    reconciler.request(IPFamily.V4, lambda: front(2))
    reconciler.request(IPFamily.V4, lambda: front(3))
    work.results.put(DONE)

    assert work.next() == (IPFamily.V4, front(3))
    work.results.put(DONE)
    assert work.begun.empty()


def test_families_do_not_replace_each_others_requests(reconciler, work):
    reconciler.request(IPFamily.V4, lambda: front(1))
    work.next()
    reconciler.request(IPFamily.V6, lambda: front(2))
    reconciler.request(IPFamily.V4, lambda: front(3))
    work.results.put(DONE)
    work.results.put(DONE)

    assert {work.next()[0], work.next()[0]} == {IPFamily.V4, IPFamily.V6}


def after_another_run(reconciler, work):
    """Wait until everything about the run before is recorded."""
    reconciler.request(IPFamily.V6, lambda: EMPTY)
    work.next()


def test_duration_and_deletions_are_counted_by_family(reconciler, work, metrics):
    work.results.put(Outcome(deleted=3, failed=0, seconds=0.25, complete=True))
    reconciler.request(IPFamily.V4, lambda: EMPTY)
    work.next()
    after_another_run(reconciler, work)

    labels = {"ip_family": "IPv4"}
    sample = metrics.registry.get_sample_value
    name = "kubeproxy_conntrack_reconciler"
    assert sample(f"{name}_deleted_entries_total", labels) == 3
    assert sample(f"{name}_sync_duration_seconds_sum", labels) == 0.25


@pytest.mark.parametrize(
    ("outcome", "level"),
    [
        pytest.param(DONE, "debug", id="nothing to do"),
        pytest.param(Outcome(deleted=1, failed=0, seconds=0, complete=True), "info", id="deleted"),
        pytest.param(Outcome(deleted=1, failed=1, seconds=0, complete=True), "warning", id="failed"),
        pytest.param(Outcome(deleted=0, failed=0, seconds=0, complete=False), "warning", id="partial"),
    ],
)  # fmt: skip
def test_a_run_is_logged_as_loud_as_it_matters(reconciler, work, outcome, level):
    work.results.put(outcome)
    reconciler.request(IPFamily.V4, lambda: EMPTY)
    work.next()
    after_another_run(reconciler, work)

    assert [(log["event"], log["log_level"]) for log in reconciler.logs] == [
        ("conntrack.reconciled", level)
    ]


def failures(metrics):
    return metrics.registry.get_sample_value(
        "kubeproxy_conntrack_reconciler_failures_total", {"ip_family": "IPv4"}
    )


def test_a_missing_capability_is_said_once(reconciler, work, metrics):
    for _ in range(2):
        work.results.put(netlink.NetlinkError(errno.EPERM, "conntrack entries"))
        reconciler.request(IPFamily.V4, lambda: EMPTY)
        work.next()
    after_another_run(reconciler, work)

    assert [log["event"] for log in reconciler.logs] == ["conntrack.refused"]
    assert failures(metrics) == 2


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(netlink.NetlinkError(errno.EIO, "conntrack entries"), id="from the kernel"),
        pytest.param(ValueError("unforeseen"), id="unforeseen"),
    ],
)
def test_an_error_is_logged_and_the_thread_lives_on(reconciler, work, metrics, error):
    work.results.put(error)
    reconciler.request(IPFamily.V4, lambda: EMPTY)
    work.next()
    after_another_run(reconciler, work)

    assert [log["event"] for log in reconciler.logs] == ["conntrack.failed"]
    assert failures(metrics) == 1


def test_stopping_drops_what_waits(metrics, work):
    reconciler = conntrack.Reconciler(metrics, work)
    reconciler.request(IPFamily.V4, lambda: EMPTY)
    reconciler.stop()
    reconciler.start()
    reconciler.stop(5)

    assert work.begun.empty()


@pytest.mark.parametrize("error", [None, PermissionError(1, "not permitted"), ValueError("a bug")])
def test_how_the_last_run_ended_is_told(metrics, error):
    begun = threading.Event()

    def run(*_):
        begun.set()
        if error:
            raise error
        return DONE

    reconciler = conntrack.Reconciler(metrics, run, wall_clock=lambda: 7.0)
    assert reconciler.last == {}
    with capture_logs():
        reconciler.start()
        reconciler.request(IPFamily.V4, lambda: EMPTY)
        assert begun.wait(10)
        reconciler.stop(10)

    assert reconciler.last == {IPFamily.V4: (7.0, str(error) if error else DONE)}
