"""Addresses and CIDRs, read leniently and written canonically."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import addresses
from kubeproxy_py.model import IPFamily


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        pytest.param("172.30.0.41", "172.30.0.41", id="canonical"),
        pytest.param("172.30.0.041", "172.30.0.41", id="leading zero is decimal, not octal"),
        pytest.param("010.0.0.1", "10.0.0.1", id="leading zero in front"),
        pytest.param("000.000.000.000", "0.0.0.0", id="all zeros"),
        pytest.param("FD00:0:0:0:0:0:0:0001", "fd00::1", id="IPv6 is compressed and lower case"),
        pytest.param("::ffff:192.0.2.1", "192.0.2.1", id="IPv4-mapped is IPv4"),
        pytest.param("::ffff:c000:201", "192.0.2.1", id="IPv4-mapped in hexadecimal"),
        pytest.param("2001:db8:0:1:1:1:1:1", "2001:db8:0:1:1:1:1:1", id="one zero stays"),
    ],
)
def test_address_is_spelled_canonically(text, canonical):
    assert addresses.parse_ip(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", "None", "1.2.3", "1.2.3.4.5", "1.2.3.256", "1.2.3.4 ", " 1.2.3.4", "1.2.3.4\n",
        "1.2.3.-4", "1.2.3.0x4", "1.2.3.0000000004", "fe80::1%eth0", "fd00::1::2", "fd00::1/64",
        "[fd00::1]", "\uff11.2.3.4", "1.2.3.4\0", "\ud800", "fd00::\uff11", "1.2.3.99999999999",
    ],
)  # fmt: skip
def test_text_that_is_no_address_is_refused(text):
    assert addresses.parse_ip(text) is None


@given(st.ip_addresses())
def test_every_address_is_read_back_from_its_canonical_text(ip):
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None

    assert addresses.parse_ip(str(ip)) == str(mapped or ip)


@given(st.text())
def test_canonical_text_is_a_fixed_point(text):
    ip = addresses.parse_ip(text)

    assert ip is None or addresses.parse_ip(ip) == ip


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        pytest.param("10.0.0.0/8", "10.0.0.0/8", id="canonical"),
        pytest.param("10.1.2.3/8", "10.0.0.0/8", id="host bits are cleared"),
        pytest.param("203.0.113.000/025", "203.0.113.0/25", id="leading zeros"),
        pytest.param("fd00::1/64", "fd00::/64", id="IPv6"),
        pytest.param("0.0.0.0/0", "0.0.0.0/0", id="everybody"),
        pytest.param("::/0", "::/0", id="everybody in IPv6"),
        pytest.param("1.2.3.4/32", "1.2.3.4/32", id="one address"),
        pytest.param("::ffff:192.0.2.9/120", "192.0.2.0/24", id="IPv4-mapped counts from 96"),
    ],
)
def test_cidr_is_spelled_canonically(text, canonical):
    assert addresses.parse_cidr(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", "10.0.0.0", "10.0.0.0/", "/8", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0.0/8/8",
        "10.0.0.0/²", "10.0.0.0/0000000008", "fd00::/129", "10.0.0/8", "::ffff:192.0.2.9/24",
        "10.0.0.0/255.0.0.0",
    ],
)  # fmt: skip
def test_text_that_is_no_cidr_is_refused(text):
    assert addresses.parse_cidr(text) is None


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6), st.integers(0, 128))
def test_cidr_contains_the_address_it_was_made_of(ip, length):
    canonical = addresses.parse_ip(str(ip))
    cidr = addresses.parse_cidr(f"{canonical}/{length}")

    assert cidr is None or addresses.contains(cidr, canonical)


@pytest.mark.parametrize(
    ("cidr", "ip", "is_inside"),
    [
        ("10.0.0.0/8", "10.255.255.255", True),
        ("10.0.0.0/8", "11.0.0.0", False),
        ("fd00::/64", "fd00::ffff", True),
        ("0.0.0.0/0", "::1", False),
        ("::/0", "127.0.0.1", False),
    ],
)
def test_contains_asks_within_one_family(cidr, ip, is_inside):
    assert addresses.contains(cidr, ip) is is_inside


def test_family_is_told_by_the_spelling():
    assert [addresses.family_of(text) for text in ("1.2.3.4", "10.0.0.0/8", "::1", "fd00::/8")] == [
        IPFamily.V4, IPFamily.V4, IPFamily.V6, IPFamily.V6,
    ]  # fmt: skip


def test_only_a_prefix_of_length_zero_contains_all():
    assert [addresses.is_zero_cidr(cidr) for cidr in ("0.0.0.0/0", "::/0", "10.0.0.0/10")] == [
        True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ip", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("::2", False),
    ],
)
def test_loopback_is_known_in_both_families(ip, is_loopback):
    assert addresses.is_loopback(ip) is is_loopback
