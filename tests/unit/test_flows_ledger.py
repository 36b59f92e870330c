"""Whose a connection is, and what it adds, against a connection table that is a dict."""

import ipaddress
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeproxy_py.flows import FlowLedger, Fronts
from kubeproxy_py.model import IPFamily, ServicePort, ServicePortName

V4, V6 = IPFamily.V4, IPFamily.V6
TCP, UDP = 6, 17
WEB = ServicePortName("default", "web", "http", "tcp")
DNS = ServicePortName("kube-system", "dns", "", "udp")


def wire(text):
    return ipaddress.ip_address(text).packed


def port(name=WEB, **fields):
    return ServicePort(**{"name": name, "cluster_ip": "172.30.0.1", "port": 80} | fields)


def found(fronts, destination, number, protocol=TCP):
    return fronts.find(protocol, number.to_bytes(2, "big"), wire(destination))


# Fronts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", ["172.30.0.1", "192.168.99.1", "192.168.99.2"])
def test_a_service_is_found_by_each_of_its_addresses(destination):
    fronts = Fronts(V4, [port(lb_vips=("192.168.99.1",), external_ips=("192.168.99.2",))])

    assert found(fronts, destination, 80) == WEB
    assert found(fronts, destination, 81) is None
    assert found(fronts, destination, 80, UDP) is None


def test_an_address_that_two_services_claim_is_the_first_one_s():
    other = ServicePortName("default", "other", "", "tcp")
    fronts = Fronts(
        V4,
        [
            port(external_ips=("192.168.99.2",)),
            port(other, cluster_ip="172.30.0.2", external_ips=("192.168.99.2",)),
        ],
    )

    assert found(fronts, "192.168.99.2", 80) == WEB


def test_a_node_port_is_one_on_this_host_s_addresses_only():
    fronts = Fronts(V4, [port(node_port=30080)], ["192.168.0.2"])

    assert found(fronts, "192.168.0.2", 30080) == WEB
    assert found(fronts, "127.0.0.9", 30080) == WEB
    assert found(fronts, "192.168.0.3", 30080) is None
    assert found(fronts, "192.168.0.2", 30081) is None


def test_ipv6_has_one_address_of_its_own():
    fronts = Fronts(V6, [port(cluster_ip="fd00:30::1", node_port=30080)], ["fd00::2", "::1"])

    assert found(fronts, "fd00:30::1", 80) == WEB
    assert found(fronts, "fd00::2", 30080) == WEB
    assert found(fronts, "::1", 30080) == WEB
    assert found(fronts, "7f00::1", 30080) is None


def test_only_the_namespaces_asked_for_are_found():
    fronts = Fronts(
        V4, [port(), port(DNS, cluster_ip="172.30.0.10", port=53)], namespaces=["kube-system"]
    )

    assert found(fronts, "172.30.0.1", 80) is None
    assert found(fronts, "172.30.0.10", 53, UDP) == DNS


# Ledger ------------------------------------------------------------------------------------------


def look(ledger, *entries, now=0.0, is_complete=True):
    ledger.begin()
    for key, counts in entries:
        ledger.see(key, "web", counts)
    ledger.finish(now, is_complete=is_complete)


@pytest.fixture
def ledger():
    """Give one whose first look has found nothing."""
    ledger = FlowLedger(room=3)
    look(ledger)
    return ledger


def taken(ledger):
    return ledger.take().get("web", (0, 0, 0, 0))


def test_a_connection_that_no_look_found_counts_as_a_whole_when_it_ends(ledger):
    ledger.end("a", "web", (5, 500, 3, 300))

    assert taken(ledger) == (5, 500, 3, 300)
    assert taken(ledger) == (0, 0, 0, 0)


def test_a_living_connection_adds_its_progress_and_at_its_end_the_rest(ledger):
    look(ledger, ("a", (1, 100, 1, 60)))
    assert taken(ledger) == (1, 100, 1, 60)
    look(ledger, ("a", (1, 100, 1, 60)))
    assert taken(ledger) == (0, 0, 0, 0)
    look(ledger, ("a", (4, 400, 2, 120)))
    assert taken(ledger) == (3, 300, 1, 60)
    assert ledger.standing == {"web": (4, 400, 2, 120)}
    ledger.end("a", "web", (5, 450, 2, 120))

    assert taken(ledger) == (1, 50, 0, 0)
    assert len(ledger) == 0


def test_what_there_was_before_the_first_look_is_not_counted():
    ledger = FlowLedger(room=3)
    ledger.end("old", "web", (9, 900, 9, 900))
    look(ledger, ("a", (4, 400, 2, 120)))

    assert taken(ledger) == (0, 0, 0, 0)
    assert ledger.standing == {"web": (4, 400, 2, 120)}
    ledger.end("a", "web", (5, 450, 2, 120))
    assert taken(ledger) == (1, 50, 0, 0)


def test_a_first_look_that_is_not_complete_is_not_the_first():
    ledger = FlowLedger(room=3)
    look(ledger, ("a", (4, 400, 2, 120)), is_complete=False)
    assert not ledger.has_begun
    look(ledger, ("a", (5, 500, 2, 120)), ("b", (1, 1, 1, 1)))

    assert ledger.has_begun
    # What "a" has sent between the two is known to be new.
    assert taken(ledger) == (1, 100, 0, 0)


def test_an_entry_that_was_read_before_its_end_was_told_does_not_come_back(ledger):
    ledger.begin()
    ledger.end("a", "web", (5, 500, 3, 300))
    ledger.see("a", "web", (4, 400, 3, 300))
    ledger.finish(0.0, is_complete=True)

    assert taken(ledger) == (5, 500, 3, 300)
    assert len(ledger) == 0


def test_an_entry_outside_of_a_look_is_none(ledger):
    ledger.see("a", "web", (4, 400, 3, 300))

    assert taken(ledger) == (0, 0, 0, 0)


def test_without_room_connections_count_when_they_end(ledger):
    look(ledger, *((key, (1, 10, 1, 10)) for key in "abcd"))

    assert taken(ledger) == (3, 30, 3, 30)
    assert (len(ledger), ledger.untracked) == (3, 1)
    # Where resuming goes on from is what was counted, not what there is.
    assert ledger.standing == {"web": (3, 30, 3, 30)}
    ledger.end("d", "web", (2, 20, 2, 20))
    assert taken(ledger) == (2, 20, 2, 20)
    ledger.end("a", "web", (2, 20, 2, 20))
    assert taken(ledger) == (1, 10, 1, 10)
    look(ledger, *((key, (1, 10, 1, 10)) for key in "bce"))
    assert ledger.untracked == 0


def test_a_connection_that_no_look_finds_any_more_still_counts_its_rest_only(ledger):
    look(ledger, ("a", (1, 100, 1, 60)))
    look(ledger, now=10.0)
    look(ledger, now=609.0)
    ledger.end("a", "web", (2, 200, 1, 60))

    assert taken(ledger) == (2, 200, 1, 60)


def test_it_may_be_found_again(ledger):
    look(ledger, ("a", (1, 100, 1, 60)))
    look(ledger, now=10.0)
    look(ledger, ("a", (2, 200, 1, 60)), now=20.0)
    look(ledger, ("a", (2, 200, 1, 60)), now=1000.0)

    assert taken(ledger) == (2, 200, 1, 60)
    assert len(ledger) == 1


def test_it_is_forgotten_in_the_end_since_its_event_was_lost(ledger):
    look(ledger, ("a", (1, 100, 1, 60)))
    look(ledger, now=10.0)
    look(ledger, now=610.0)

    assert len(ledger) == 0


def test_a_look_that_is_not_complete_misses_nothing(ledger):
    look(ledger, ("a", (1, 100, 1, 60)), ("b", (1, 100, 1, 60)))
    look(ledger, ("b", (1, 100, 1, 60)), now=10.0, is_complete=False)
    look(ledger, ("b", (1, 100, 1, 60)), now=1000.0)
    look(ledger, ("a", (1, 100, 1, 60)), ("b", (1, 100, 1, 60)), now=1500.0)

    assert taken(ledger) == (2, 200, 2, 120)
    assert len(ledger) == 2


def test_a_look_that_was_never_finished_is_void(ledger):
    look(ledger, ("a", (1, 100, 1, 60)), ("b", (1, 100, 1, 60)))
    ledger.begin()
    ledger.see("b", "web", (2, 200, 1, 60))
    look(ledger, ("a", (1, 100, 1, 60)), ("b", (2, 200, 1, 60)))

    assert taken(ledger) == (3, 300, 2, 120)
    assert ledger.standing == {"web": (3, 300, 2, 120)}


def test_counters_that_somebody_has_set_back_count_from_zero(ledger):
    look(ledger, ("a", (5, 500, 3, 300)))
    look(ledger, ("a", (1, 100, 3, 300)))

    assert taken(ledger) == (6, 600, 3, 300)


# Any order -----------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(0, 5), st.sampled_from("xy")),
        st.tuples(st.just("send"), st.integers(0, 5), st.integers(1, 9)),
        st.tuples(st.just("close"), st.integers(0, 5)),
        st.tuples(st.just("begin")),
        st.tuples(st.just("read"), st.integers(1, 4)),
        st.tuples(st.just("hand in"), st.integers(1, 4)),
        st.tuples(st.just("event"), st.integers(1, 4)),
        st.tuples(st.just("finish"), st.booleans()),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 100.0])),
    ),
    max_size=60,
)


class Table:
    """A connection table with events, and a look that reads ahead of what it hands in."""

    def __init__(self, room):
        self.ledger = FlowLedger(room)
        look(self.ledger)
        self.now = 0.0
        self.alive = {}
        self.number = 0
        self.events = []
        self.unread = self.read = None
        self.truth = Counter()
        self.totals = Counter()

    def step(self, kind, *arguments):
        getattr(self, "step_" + kind.replace(" ", "_"))(*arguments)
        before = dict(self.totals)
        for owner, counts in self.ledger.take().items():
            self.totals[owner] += counts[1]
            assert all(count >= 0 for count in counts)
        assert all(self.totals[owner] >= total for owner, total in before.items())
        assert all(self.totals[owner] <= self.truth[owner] for owner in self.totals)
        assert len(self.ledger) <= max(1, self.ledger._room)

    def step_open(self, slot, owner):
        if slot not in self.alive:
            self.number += 1
            self.alive[slot] = [self.number, owner, 0]

    def step_send(self, slot, octets):
        if slot in self.alive:
            self.alive[slot][2] += octets
            self.truth[self.alive[slot][1]] += octets

    def step_close(self, slot):
        if slot in self.alive:
            self.events.append(tuple(self.alive.pop(slot)))

    def step_begin(self):
        self.ledger.begin()
        self.unread, self.read = sorted(self.alive), []

    def step_read(self, count):
        for _ in range(count):
            if self.unread:
                slot = self.unread.pop(0)
                if slot in self.alive:
                    self.read.append(tuple(self.alive[slot]))

    def step_hand_in(self, count):
        for _ in range(count):
            if self.read:
                key, owner, octets = self.read.pop(0)
                self.ledger.see(key, owner, (1, octets, 1, 1))

    def step_event(self, count):
        for _ in range(count):
            if self.events:
                key, owner, octets = self.events.pop(0)
                self.ledger.end(key, owner, (1, octets, 1, 1))

    def step_finish(self, is_complete):
        if self.read is None:
            return
        if is_complete:
            self.step_read(100)
            self.step_hand_in(100)
            # The kernel tells of an end before it takes the entry from the table, and what was told
            # is read within the time after which a missing connection is forgotten.
        self.ledger.finish(self.now, is_complete=is_complete)
        self.unread = self.read = None

    def step_wait(self, seconds):
        if seconds == 100.0:
            self.step_event(100)
        self.now += seconds


@settings(max_examples=300, deadline=None)
@given(STEPS, st.sampled_from([0, 2, 100]))
def test_in_any_order_totals_never_fall_and_are_exact_in_the_end(steps, room):
    table = Table(room)
    for step in steps:
        table.step(*step)
    for slot in list(table.alive):
        table.step("close", slot)
    table.step("event", 1000)

    assert table.totals == table.truth
