"""Packet counters, in the kernel and fed by a rule."""

import contextlib
import socket

import pytest
from prometheus_client import CollectorRegistry

from kubeproxy_py import nfacct, rules
from kubeproxy_py.model import IPFamily

pytestmark = pytest.mark.packet

METRIC = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total"


@pytest.fixture
def node(clean_lab):
    """Give the node without counters."""
    yield clean_lab.node
    clean_lab.reset_rules()  # rules hold on to their counters
    clean_lab.node.run(["nfacct", "flush"])


def test_the_kernel_has_counters(node):
    with node.entered():
        assert nfacct.supported()


def test_a_counter_is_created_once(node):
    with node.entered():
        first = nfacct.ensure("abc")
        second = nfacct.ensure("abc")

    assert (first, second) == (True, True)
    assert node.run(["nfacct", "list"]).stdout.count("= abc;") == 1


def test_a_name_of_the_greatest_length_is_taken(node):
    name = "n" * 31
    with node.entered():
        assert nfacct.ensure(name)

    assert f"= {name};" in node.run(["nfacct", "list"]).stdout


def test_a_name_that_is_too_long_is_refused(node):
    with node.entered():
        assert not nfacct.ensure("n" * 32)


def test_a_counter_that_does_not_exist_reads_as_none(node):
    with node.entered():
        assert nfacct.read("abc") is None


def test_packets_that_match_a_rule_are_counted_and_exported(node, iptables, plan, family):
    name = rules.INVALID_DROPPED_COUNTER
    rule = f"-A OUTPUT -p udp -m udp --dport 9 -m nfacct --nfacct-name {name} -j DROP"
    registry = CollectorRegistry()
    with node.entered():
        assert nfacct.ensure(name)
        node.run([iptables.restore, "-w"], input=f"*filter\n{rule}\nCOMMIT\n")
        _send(family, plan.node2, times=3)
        counted = nfacct.read(name)
        registry.register(nfacct.NfacctCollector())
        exported = registry.get_sample_value(METRIC)

    # 20 or 40 bytes of IP header, 8 of UDP, 4 of data.
    size = 32 if family is IPFamily.V4 else 52
    assert counted == (3, 3 * size)
    assert exported == 3


def _send(family, address, *, times):
    kind = socket.AF_INET if family is IPFamily.V4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_DGRAM) as sock:
        for _ in range(times):
            # That is how the kernel tells a sender on this host that its packet was dropped.
            with contextlib.suppress(PermissionError):
                sock.sendto(b"abcd", (address, 9))
