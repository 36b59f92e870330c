"""What the kernel says of connections, byte by byte, in the order that it has and in others."""

import socket
import struct

import pytest

from kubeproxy_py import ctnetlink, netlink
from kubeproxy_py.model import IPFamily
from tests.unit.test_conntrack import PLANS, TCP, direction

COUNTS = (5, 500, 3, 2**40)


def counters(kind, packets, octets):
    return netlink.nested(
        kind,
        netlink.attribute(1, struct.pack(">Q", packets)),
        netlink.attribute(2, struct.pack(">Q", octets)),
    )


def message(plan, *, protocol=TCP, zone=None, answerer="new", port=8080, number=7, between=(), end=()):  # fmt: skip
    """Return a buffer with an entry in it, and where it begins and ends."""
    client, vip = (plan["client"], 1234), (plan["vip"], 80)
    payload = b"".join(
        (
            bytes(4),
            direction(1, client, vip, protocol=protocol, zone=zone),
            direction(2, (plan[answerer], port), client, protocol=protocol),
            *between,
            netlink.attribute(12, struct.pack(">I", number)),
            *end,
        )
    )
    return bytearray(b"\xff" * 16 + payload + b"\xff" * 16), 16, 16 + len(payload)


@pytest.fixture(params=list(IPFamily), ids=lambda family: family.value)
def family(request):
    return request.param


@pytest.fixture
def plan(family):
    return PLANS[family]


def wire(family, text):
    return socket.inet_pton(family.socket_family, text)


def destination(family, *args, **kwargs):
    return ctnetlink.parse_destination(
        *message(PLANS[family], *args, **kwargs), ctnetlink.LAYOUTS[family]
    )


@pytest.mark.parametrize("zone", [None, 5], ids=["as ever", "with a zone of one direction"])
def test_a_rewritten_destination_is_found(family, plan, zone):
    wanted = (TCP, b"\0\x50", wire(family, plan["vip"]))

    assert destination(family, zone=zone) == wanted


@pytest.mark.parametrize("zone", [None, 5], ids=["as ever", "with a zone of one direction"])
def test_what_nobody_rewrote_is_none(family, zone):
    assert destination(family, zone=zone, answerer="vip", port=80) is None
    # The port alone is enough.
    assert destination(family, zone=zone, answerer="vip", port=81) is not None


def test_what_has_no_ports_is_none(family, plan):
    proto = netlink.nested(2, netlink.attribute(1, bytes([47])))
    end = netlink.nested(1), proto
    payload = bytes(4) + netlink.nested(1, *end) + netlink.nested(2, *end)

    assert (
        ctnetlink.parse_destination(bytearray(payload), 0, len(payload), ctnetlink.LAYOUTS[family])
        is None
    )


def test_a_cut_off_entry_is_none(family, plan):
    buffer, begin, end = message(plan)

    for cut in range(begin, end - 20):
        assert ctnetlink.parse_destination(buffer, begin, cut, ctnetlink.LAYOUTS[family]) is None


def test_an_entry_is_itself_in_a_list_and_when_it_ends(plan):
    status = netlink.attribute(3, struct.pack(">I", 0x1A8))
    listed = message(plan, between=(status,), end=(counters(9, 1, 1), counters(10, 1, 1)))
    ended = message(plan, end=(status, counters(9, 2, 2), counters(10, 2, 2)))

    assert ctnetlink.parse_identity(*listed) == ctnetlink.parse_identity(*ended)


def test_another_entry_is_another(plan):
    found = {
        ctnetlink.parse_identity(*message(plan)),
        ctnetlink.parse_identity(*message(plan, number=8)),
        ctnetlink.parse_identity(*message(plan, zone=3)),
        ctnetlink.parse_identity(*message(plan, answerer="old")),
    }

    assert len(found) == 4


def test_an_entry_without_a_number_is_told_by_its_directions(plan):
    buffer, begin, end = message(plan)
    malformed = bytearray(buffer)
    malformed[end - 8 : end - 4] = struct.pack("=HH", 2, 12)

    without = ctnetlink.parse_identity(buffer, begin, end - 8)
    assert without == ctnetlink.parse_identity(malformed, begin, end)
    assert without != ctnetlink.parse_identity(buffer, begin, end)


def counts(plan, *end):
    return ctnetlink.parse_counts(*message(plan, end=end))


def test_counts_are_found_behind_whatever_stands_before_them(plan):
    both = counters(9, *COUNTS[:2]), counters(10, *COUNTS[2:])
    mark = netlink.attribute(8, b"\0\0\x40\0")

    assert counts(plan, *both) == COUNTS
    assert counts(plan, mark, *both, mark) == COUNTS


def test_counts_in_another_order_are_found_too(plan):
    both = counters(9, *COUNTS[:2]), counters(10, *COUNTS[2:])
    swapped = netlink.nested(
        9,
        netlink.attribute(2, struct.pack(">Q", COUNTS[1])),
        netlink.attribute(1, struct.pack(">Q", COUNTS[0])),
    )

    assert counts(plan, both[1], both[0]) == COUNTS
    assert counts(plan, swapped, both[1]) == COUNTS
    assert counts(plan, both[0], netlink.attribute(8, bytes(4)), both[1]) == COUNTS
    assert counts(plan, netlink.nested(9), both[1]) == (0, 0, *COUNTS[2:])


def test_an_entry_that_does_not_count_says_nothing(plan):
    assert counts(plan) is None
    assert counts(plan, counters(9, 1, 1)) is None
    assert counts(plan, counters(10, 1, 1)) is None


def test_a_request_for_some_bits_names_them_twice():
    parts = dict(netlink.attributes(memoryview(ctnetlink.only_status(ctnetlink.IPS_DST_NAT))))

    assert {kind: bytes(value) for kind, value in parts.items()} == {
        ctnetlink.CTA_STATUS: b"\0\0\0\x20",
        ctnetlink.CTA_STATUS_MASK: b"\0\0\0\x20",
    }


def test_a_header_names_one_family_or_both():
    assert ctnetlink.generic_header(IPFamily.V6) == b"\x0a\0\0\0"
    assert ctnetlink.generic_header(None) == bytes(4)


def test_a_request_for_a_protocol_filters_by_it():
    parts = dict(netlink.attributes(memoryview(ctnetlink.only_protocol(TCP))))
    flags = dict(netlink.attributes(parts[ctnetlink.CTA_FILTER]))

    assert bytes(flags[1]) == struct.pack("=I", 8)
