"""
IP addresses and CIDRs as text: lenient to read, canonical to write.

Rules are compared as text, so every address has exactly one spelling here: what Go's ``net`` package
prints, which is also what ``iptables-save`` prints. Pure.
"""

import functools
import ipaddress
import re
import socket

from kubeproxy_py.model import IPFamily

_IPV4 = re.compile(r"\d{1,}\.\d{1,}\.\d{1,}\.\d{1,}", re.ASCII)

#: Prefix length of a single address.
HOST_PREFIX = {IPFamily.V4: 32, IPFamily.V6: 128}


def parse_ip(text: str) -> str | None:
    """Return the canonical spelling of an address, or None if *text* is none.

    As Kubernetes' ParseIPSloppy: octets of IPv4 may have leading zeros and are decimal; an
    IPv4-mapped IPv6 address is its IPv4 address; zones are not allowed.
    """
    try:
        # What inet_pton accepts is canonical already (it refuses leading zeros), and this is the
        # spelling of nearly all addresses: ten times as fast as the rest.
        socket.inet_pton(socket.AF_INET, text)
    except (OSError, ValueError):
        return _parse_unusual(text)
    return text


@functools.lru_cache(maxsize=4096)
def _parse_unusual(text: str) -> str | None:
    if _IPV4.fullmatch(text):
        octets = [int(octet) for octet in text.split(".") if len(octet) <= 9]
        if len(octets) != 4 or max(octets) > 255:
            return None
        return ".".join(map(str, octets))
    if "%" in text or not text.isascii():
        return None
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return None
    return str(address.ipv4_mapped or address)


def parse_cidr(text: str) -> str | None:
    """Return the canonical spelling of a CIDR with its host bits cleared, or None."""
    base, slash, length = text.partition("/")
    ip = parse_ip(base)
    if ip is None or not slash or not (length.isascii() and length.isdigit()) or len(length) > 9:
        return None
    prefix = int(length)
    if ":" in base and ":" not in ip:
        # An IPv4-mapped base: Go takes the mask as one of IPv6 and prints what is left of it.
        prefix -= 96
    if not 0 <= prefix <= HOST_PREFIX[family_of(ip)]:
        return None
    return str(ipaddress.ip_network((ip, prefix), strict=False))


def family_of(text: str) -> IPFamily:
    """Return the family of a canonical address or CIDR."""
    return IPFamily.V6 if ":" in text else IPFamily.V4


def to_int(ip: str) -> int:
    """Return a canonical address as a number."""
    kind = socket.AF_INET6 if ":" in ip else socket.AF_INET
    return int.from_bytes(socket.inet_pton(kind, ip), "big")


def is_zero_cidr(cidr: str) -> bool:
    """Tell whether a canonical CIDR contains every address of its family."""
    return cidr.endswith("/0")


def contains(cidr: str, ip: str) -> bool:
    """Tell whether a canonical *cidr* contains a canonical *ip*; never across families."""
    return ipaddress.ip_address(ip) in ipaddress.ip_network(cidr)


def is_loopback(ip: str) -> bool:
    return ipaddress.ip_address(ip).is_loopback
