"""Interface addresses, against scripted answers."""

import errno
import os
import queue
import socket
import struct

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import hostnet, netlink
from kubeproxy_py.hostnet import InterfaceAddress
from kubeproxy_py.model import IPFamily

NEWADDR = 20
LOCAL, ADDRESS = 2, 1


def item(ip, prefix, index, *, peer=None):
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    packed = socket.inet_pton(family, ip)
    attributes = netlink.attribute(ADDRESS, socket.inet_pton(family, peer) if peer else packed)
    if family == socket.AF_INET:
        attributes += netlink.attribute(LOCAL, packed)
    return NEWADDR, 0, memoryview(struct.pack("=BBBBI", family, prefix, 0, 0, index) + attributes)


class ScriptedDumps:
    """Answers each dump with the next of *dumps*; an errno at the end of one is raised."""

    def __init__(self, *dumps):
        self.dumps = list(dumps)

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def dump(self, kind, payload):
        for entry in self.dumps.pop(0):
            if isinstance(entry, int):
                raise netlink.NetlinkError(entry, "tests")
            yield entry


def devices():
    return [(1, "lo"), (2, "eth0")]


def listed(family, *dumps):
    return hostnet.local_addresses(family, ScriptedDumps(*dumps), devices)


def test_addresses_come_with_device_and_prefix_length():
    found = listed(IPFamily.V4, [item("127.0.0.1", 8, 1), item("192.168.0.2", 24, 2)])

    assert found == (
        InterfaceAddress("lo", "127.0.0.1", 8),
        InterfaceAddress("eth0", "192.168.0.2", 24),
    )


def test_ipv6_addresses_are_canonical_text():
    found = listed(IPFamily.V6, [item("fd00:0:0:0:0:0:0:1", 64, 2)])

    assert found == (InterfaceAddress("eth0", "fd00::1", 64),)


def test_the_address_of_a_point_to_point_link_is_this_end():
    found = listed(IPFamily.V4, [item("10.0.0.1", 32, 2, peer="10.0.0.2")])

    assert found == (InterfaceAddress("eth0", "10.0.0.1", 32),)


def test_addresses_of_the_other_family_are_left_out():
    found = listed(IPFamily.V6, [item("127.0.0.1", 8, 1), item("::1", 128, 1)])

    assert found == (InterfaceAddress("lo", "::1", 128),)


def test_an_interface_without_a_name_yet_is_told_by_its_number():
    found = listed(IPFamily.V4, [item("10.0.0.1", 32, 9)])

    assert found == (InterfaceAddress("9", "10.0.0.1", 32),)


def test_a_list_that_changed_while_it_was_read_is_read_again():
    found = listed(IPFamily.V4, [item("10.0.0.1", 32, 2), errno.EINTR], [item("10.0.0.2", 32, 2)])

    assert found == (InterfaceAddress("eth0", "10.0.0.2", 32),)


def test_a_list_that_never_holds_still_is_an_error():
    with pytest.raises(netlink.NetlinkError):
        listed(IPFamily.V4, *[[errno.EINTR]] * 5)


def test_a_refusal_is_not_tried_again():
    dumps = ScriptedDumps([errno.EPERM], [])

    with pytest.raises(netlink.NetlinkError):
        hostnet.local_addresses(IPFamily.V4, dumps, devices)

    assert len(dumps.dumps) == 1


def _host(root, *, if_inet6, disable_ipv6):
    (root / "proc/net").mkdir(parents=True)
    (root / "proc/sys/net/ipv6/conf/all").mkdir(parents=True)
    if if_inet6:
        (root / "proc/net/if_inet6").touch()
    if disable_ipv6 is not None:
        (root / "proc/sys/net/ipv6/conf/all/disable_ipv6").write_text(disable_ipv6 + "\n")
    return root


@pytest.mark.parametrize(
    ("if_inet6", "disable_ipv6", "wanted"),
    [
        pytest.param(True, "0", True, id="on"),
        pytest.param(True, "1", False, id="switched off"),
        pytest.param(False, None, False, id="not in the kernel"),
        pytest.param(True, None, True, id="no switch"),
    ],
)
def test_ipv6_is_found_as_by_kube_proxy(tmp_path, if_inet6, disable_ipv6, wanted):
    root = _host(tmp_path, if_inet6=if_inet6, disable_ipv6=disable_ipv6)

    assert hostnet.has_ipv6(root) is wanted


class ScriptedEvents:
    """Announces events when told to; each of them may be a failure. Can be opened again."""

    def __init__(self, *, failure=None):
        self.failure = failure
        self.is_unavailable = False
        self.is_closed = True
        self.openings = 0

    def __call__(self, groups):
        if self.is_unavailable:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.descriptor = os.eventfd(0)
        self.is_closed = False
        self.openings += 1
        return self

    def announce(self):
        os.eventfd_write(self.descriptor, 1)

    def fileno(self):
        return self.descriptor

    def events(self):
        os.eventfd_read(self.descriptor)
        if self.failure is not None:
            raise netlink.NetlinkError(self.failure, "tests")
        yield NEWADDR, 0, memoryview(b"")

    def close(self):
        os.close(self.descriptor)
        self.is_closed = True


class Watched:
    """A watcher of addresses that the test sets; counts callbacks and listings."""

    def __init__(self, events):
        self.events = events
        self.addresses = [InterfaceAddress("eth0", "10.0.0.1", 24)]
        self.listings = queue.Queue()
        self.callbacks = queue.Queue()
        self.failure = None
        self.watcher = hostnet.AddressWatcher(
            lambda: self.callbacks.put("changed"), self.listed, events, retry_s=0.01
        )

    def listed(self, family):
        if self.failure is not None:
            self.listings.put("refused")
            raise netlink.NetlinkError(self.failure, "tests")
        if family is IPFamily.V4:
            return self.addresses
        self.listings.put("listed")
        return []

    def __enter__(self):
        self.watcher.start()
        self.listings.get(timeout=5)
        return self

    def __exit__(self, *_):
        self.watcher.stop()


def test_a_changed_address_calls_back():
    with Watched(ScriptedEvents()) as watched:
        watched.addresses = [InterfaceAddress("eth0", "10.0.0.2", 24)]
        watched.events.announce()

        assert watched.callbacks.get(timeout=5) == "changed"


def test_an_event_that_changes_no_address_does_not_call_back():
    with Watched(ScriptedEvents()) as watched:
        watched.events.announce()
        watched.listings.get(timeout=5)

    assert watched.callbacks.empty()


def test_lost_events_are_a_reason_to_look():
    with Watched(ScriptedEvents(failure=errno.ENOBUFS)) as watched:
        watched.addresses = []
        watched.events.announce()

        assert watched.callbacks.get(timeout=5) == "changed"


def test_addresses_that_cannot_be_listed_are_those_of_before_until_they_can():
    with capture_logs() as logs, Watched(ScriptedEvents()) as watched:
        watched.failure = errno.EMFILE
        watched.addresses = [InterfaceAddress("eth0", "10.0.0.2", 24)]
        watched.events.announce()
        for _ in range(2):
            assert watched.listings.get(timeout=5) == "refused"
        before = watched.watcher.addresses_of(IPFamily.V4)
        assert watched.callbacks.empty()
        watched.failure = None

        assert watched.callbacks.get(timeout=5) == "changed"
        assert before == ("10.0.0.1",)
        assert watched.watcher.addresses_of(IPFamily.V4) == ("10.0.0.2",)
        assert watched.watcher.addresses_of(IPFamily.V6) == ()

    assert [log["event"] for log in logs] == ["addresses.watch_failed", "addresses.watch_recovered"]


def test_events_that_fail_are_asked_for_again():
    with Watched(ScriptedEvents()) as watched:
        watched.events.failure = errno.EIO
        watched.addresses = []
        watched.events.announce()
        assert watched.callbacks.get(timeout=5) == "changed"
        watched.events.failure = None
        while watched.events.openings < 2:
            watched.listings.get(timeout=5)
        watched.addresses = [InterfaceAddress("eth0", "10.0.0.2", 24)]
        watched.events.announce()

        assert watched.callbacks.get(timeout=5) == "changed"


def test_without_events_addresses_are_looked_at_again_and_again():
    events = ScriptedEvents()
    events.is_unavailable = True
    with Watched(events) as watched:
        watched.addresses = []

        assert watched.callbacks.get(timeout=5) == "changed"
    assert events.is_closed


def test_addresses_that_cannot_be_listed_at_the_start_are_told_when_they_can():
    watched = Watched(ScriptedEvents())
    watched.failure = errno.EMFILE
    with watched:
        assert watched.watcher.addresses_of(IPFamily.V4) == ()
        assert watched.callbacks.empty()
        watched.failure = None

        assert watched.callbacks.get(timeout=5) == "changed"
        assert watched.watcher.addresses_of(IPFamily.V4) == ("10.0.0.1",)


def test_stopping_closes_the_socket():
    events = ScriptedEvents()
    with Watched(events):
        pass

    assert events.is_closed


def test_a_watcher_that_never_started_can_be_stopped():
    hostnet.AddressWatcher(lambda: None).stop()
