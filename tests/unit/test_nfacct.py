"""Counters, against a kernel that is a dict."""

import errno
import struct

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kubeproxy_py import netlink, nfacct, rules

NEW, GET = 0x700, 0x701


class FakeCounters:
    """Holds counters as the kernel does; *refusal* is the errno of every answer."""

    def __init__(self, counters=(), *, refusal=0):
        self.counters = dict(counters)
        self.refusal = refusal

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def request(self, kind, payload, *, flags=0):
        if self.refusal:
            raise netlink.NetlinkError(self.refusal, "tests")
        ((_, value),) = netlink.attributes(memoryview(payload)[4:])
        name = bytes(value).rstrip(b"\0").decode()
        if kind == GET and name in self.counters:
            packets, size = self.counters[name]
            return [
                bytes(4)
                + netlink.attribute(1, name.encode() + b"\0")
                + netlink.attribute(2, struct.pack(">Q", packets))
                + netlink.attribute(3, struct.pack(">Q", size))
            ]
        if kind == GET:
            raise netlink.NetlinkError(errno.ENOENT, "tests")
        assert kind == NEW
        if name in self.counters:
            raise netlink.NetlinkError(errno.EBUSY, "tests")
        self.counters[name] = (0, 0)
        return []


class LateToCreate(FakeCounters):
    """Another program creates the counter between our look and our creation."""

    def request(self, kind, payload, *, flags=0):
        if kind == GET:
            raise netlink.NetlinkError(errno.ENOENT, "tests")
        raise netlink.NetlinkError(errno.EBUSY, "tests")


def test_a_kernel_that_knows_no_such_counter_supports_counters():
    assert nfacct.supported(FakeCounters())


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(errno.EINVAL, id="not built into the kernel"),
        pytest.param(errno.EPERM, id="not permitted"),
    ],
)
def test_a_kernel_that_refuses_does_not_support_counters(number):
    assert not nfacct.supported(FakeCounters(refusal=number))


def test_a_missing_counter_is_created():
    kernel = FakeCounters()

    assert nfacct.ensure("abc", kernel)
    assert kernel.counters == {"abc": (0, 0)}


def test_an_existing_counter_keeps_its_count():
    kernel = FakeCounters({"abc": (7, 700)})

    assert nfacct.ensure("abc", kernel)
    assert kernel.counters == {"abc": (7, 700)}


def test_a_counter_that_another_program_creates_first_will_do():
    assert nfacct.ensure("abc", LateToCreate())


def test_a_counter_that_cannot_be_created_is_told():
    assert not nfacct.ensure("abc", FakeCounters(refusal=errno.EPERM))


def test_packets_and_bytes_are_read():
    assert nfacct.read("abc", FakeCounters({"abc": (7, 2**40)})) == (7, 2**40)


def test_a_counter_that_does_not_exist_reads_as_none():
    assert nfacct.read("abc", FakeCounters()) is None


def test_a_refusal_to_read_is_raised():
    with pytest.raises(netlink.NetlinkError):
        nfacct.read("abc", FakeCounters(refusal=errno.EPERM))


def test_metrics_are_named_and_described_as_kube_proxys():
    registry = CollectorRegistry()
    counters = {
        rules.INVALID_DROPPED_COUNTER: (3, 300),
        rules.LOCALHOST_NODE_PORTS_COUNTER: (4, 400),
    }

    registry.register(nfacct.NfacctCollector(FakeCounters(counters)))

    dropped = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total"
    accepted = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total"
    assert generate_latest(registry).decode().splitlines() == [
        f"# HELP {dropped} [ALPHA] packets dropped by iptables to work around conntrack problems",
        f"# TYPE {dropped} counter",
        f"{dropped} 3.0",
        f"# HELP {accepted} [ALPHA] Number of packets accepted on nodeports of loopback interface",
        f"# TYPE {accepted} counter",
        f"{accepted} 4.0",
    ]


def test_a_counter_that_does_not_exist_has_no_series():
    registry = CollectorRegistry()

    registry.register(nfacct.NfacctCollector(FakeCounters()))

    assert generate_latest(registry) == b""


def test_a_scrape_survives_a_refusal():
    registry = CollectorRegistry()

    registry.register(nfacct.NfacctCollector(FakeCounters(refusal=errno.EPERM)))

    assert generate_latest(registry) == b""
