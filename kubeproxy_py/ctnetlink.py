"""
What the kernel says of an entry of the connection table, and how it is asked for (ctnetlink).

Messages as bytes; nothing is sent here. What an entry means for a Service is its reader's business.
"""

import socket
import struct
from typing import Final, NamedTuple

from kubeproxy_py import netlink
from kubeproxy_py.flows import Counts
from kubeproxy_py.model import IPFamily

#: Address family numbers, as netlink has them.

# linux/netfilter/nfnetlink_conntrack.h and nfnetlink_compat.h.
GET: Final = 1 << 8 | 1
DELETE: Final = 1 << 8 | 2
#: The multicast group that is told of entries that end.
GROUP_DESTROY: Final = 3

CTA_TUPLE_ORIG: Final = 1
CTA_TUPLE_REPLY: Final = 2
CTA_STATUS: Final = 3
CTA_COUNTERS_ORIG: Final = 9
CTA_COUNTERS_REPLY: Final = 10
CTA_ID: Final = 12
CTA_ZONE: Final = 18
CTA_FILTER: Final = 25
CTA_STATUS_MASK: Final = 26

CTA_TUPLE_IP: Final = 1
CTA_TUPLE_PROTO: Final = 2
CTA_PROTO_NUM: Final = 1
CTA_PROTO_SRC_PORT: Final = 2
CTA_PROTO_DST_PORT: Final = 3

_CTA_FILTER_ORIG_FLAGS: Final = 1
_CTA_FILTER_F_PROTO_NUM: Final = 1 << 3

_CTA_COUNTERS_PACKETS: Final = 1
_CTA_COUNTERS_BYTES: Final = 2

#: The destination was rewritten (linux/netfilter/nf_conntrack_common.h).
IPS_DST_NAT: Final = 1 << 5

_ATTRIBUTE: Final = struct.Struct("=HH")


class Ends(NamedTuple):
    """Between whom an entry is; addresses and ports as they are on the wire."""

    protocol: int
    destination: bytes
    port: bytes
    source: bytes  # who answers: where the packets were really sent
    source_port: bytes


def generic_header(family: IPFamily | None) -> bytes:
    """Return struct nfgenmsg: address family (None: both), version, resource id."""
    return struct.pack("=BBH", family.socket_family if family else socket.AF_UNSPEC, 0, 0)


def only_protocol(number: int) -> bytes:
    """Return what asks for entries of one protocol.

    Kernels before 5.8 ignore it or refuse it (EINVAL, EOPNOTSUPP), so nobody may rely on it.
    """
    protocol = netlink.attribute(CTA_PROTO_NUM, bytes([number]))
    return netlink.nested(
        CTA_TUPLE_ORIG, netlink.nested(CTA_TUPLE_PROTO, protocol)
    ) + netlink.nested(
        CTA_FILTER,
        netlink.attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", _CTA_FILTER_F_PROTO_NUM)),
    )


def only_status(bits: int) -> bytes:
    """Return what asks for entries with one of these status bits. Kernels before 5.18 ignore it."""
    value = struct.pack(">I", bits)
    return netlink.attribute(CTA_STATUS, value) + netlink.attribute(CTA_STATUS_MASK, value)


class Layout:
    """Where the fields of an entry with ports stand as every kernel so far writes it.

    The order of attributes is no promise of the kernel's, so the headers are compared too. What
    looks different (zones of one direction, protocols without ports) is parsed by attributes.
    ``fields`` begins at the payload's begin: head of the original direction, destination, head of
    the protocol, its number, port, head of the reply, source, source port.
    """

    def __init__(self, address_size: int) -> None:
        ip_size = 4 + 2 * (4 + address_size)
        # Number (8 bytes with its header and padding) and two ports (8 each).
        proto_size = 4 + 3 * 8
        tuple_size = 4 + ip_size + proto_size
        nest = struct.Struct("=HHHH")
        self.original = nest.pack(
            tuple_size,
            CTA_TUPLE_ORIG | netlink.NLA_F_NESTED,
            ip_size,
            CTA_TUPLE_IP | netlink.NLA_F_NESTED,
        )
        self.reply = nest.pack(
            tuple_size,
            CTA_TUPLE_REPLY | netlink.NLA_F_NESTED,
            ip_size,
            CTA_TUPLE_IP | netlink.NLA_F_NESTED,
        )
        self.proto = nest.pack(proto_size, CTA_TUPLE_PROTO | netlink.NLA_F_NESTED, 5, CTA_PROTO_NUM)
        n = address_size
        self.fields = struct.Struct(
            "=4x"  # generic header
            f"8s 4x {n}x 4x {n}s"  # original: heads, source, destination
            "8s B 3x 8x 4x 2s 2x"  # heads, protocol, source port, destination port
            f"8s 4x {n}s 4x {n}x"  # reply: heads, source, destination
            "12x 4x 2s 2x"  # heads and protocol, source port
        )
        #: Where both directions end, from the payload's begin.
        self.end = 4 + 2 * tuple_size


LAYOUTS: Final = {IPFamily.V4: Layout(4), IPFamily.V6: Layout(16)}


def parse_ends(entry: memoryview) -> Ends | None:
    """Return between whom an entry is, by its attributes; None where it has no ports."""
    tuples = dict(netlink.attributes(entry[4:]))
    if CTA_TUPLE_ORIG not in tuples or CTA_TUPLE_REPLY not in tuples:
        return None
    original = dict(netlink.attributes(tuples[CTA_TUPLE_ORIG]))
    reply = dict(netlink.attributes(tuples[CTA_TUPLE_REPLY]))
    # The source's attribute has the smaller type in both families: 1 and 2, 3 and 4.
    try:
        original_proto = dict(netlink.attributes(original[CTA_TUPLE_PROTO]))
        original_ip = dict(netlink.attributes(original[CTA_TUPLE_IP]))
        reply_ip = dict(netlink.attributes(reply[CTA_TUPLE_IP]))
        reply_proto = dict(netlink.attributes(reply[CTA_TUPLE_PROTO]))
        return Ends(
            original_proto[CTA_PROTO_NUM][0],
            bytes(original_ip[max(original_ip)]),
            bytes(original_proto[CTA_PROTO_DST_PORT]),
            bytes(reply_ip[min(reply_ip)]),
            bytes(reply_proto[CTA_PROTO_SRC_PORT]),
        )
    except (KeyError, IndexError, ValueError):
        return None


def parse_destination(
    buffer: bytearray, begin: int, end: int, layout: Layout
) -> tuple[int, bytes, bytes] | None:
    """Return protocol, port and address that the entry's client asked for.

    None where it has no ports, or where nobody rewrote the destination.
    """
    if end - begin >= layout.fields.size:
        original, destination, proto, protocol, port, reply, source, source_port = (
            layout.fields.unpack_from(buffer, begin)
        )
        if original == layout.original and reply == layout.reply and proto == layout.proto:
            if destination == source and port == source_port:
                return None
            return protocol, port, destination
    ends = parse_ends(memoryview(buffer)[begin:end])
    if ends is None or (ends.destination, ends.port) == (ends.source, ends.source_port):
        return None
    return ends.protocol, ends.port, ends.destination


def parse_identity(buffer: bytearray, begin: int, end: int) -> int:
    """Return what tells an entry from all others, in this process.

    The kernel's own number is a hash of 32 bits, of which two in 100,000 may be equal; addresses and
    ports alone come back when a client uses a port again.
    """
    offset, directions = begin + 4, begin
    while offset + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(buffer, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind == CTA_ID:
            number = buffer[offset + _ATTRIBUTE.size : offset + length]
            return hash((bytes(buffer[begin:directions]), bytes(number)))
        offset += length + -length % 4
        if kind == CTA_TUPLE_REPLY | netlink.NLA_F_NESTED:
            directions = offset
    return hash(bytes(buffer[begin:directions]))


# Counters ------------------------------------------------------------------------------------------

_COUNT: Final = struct.Struct(">Q")


def _counters(kind: int) -> bytes:
    empty = bytes(_COUNT.size)
    return netlink.nested(
        kind,
        netlink.attribute(_CTA_COUNTERS_PACKETS, empty),
        netlink.attribute(_CTA_COUNTERS_BYTES, empty),
    )


# Counters stand behind attributes that come and go, but together, and always look the same: what
# is searched for is the head up to the first number.
_HEAD_BYTES: Final = 8
_COUNTERS_HEAD: Final = _counters(CTA_COUNTERS_ORIG)[:_HEAD_BYTES]
_REPLY_HEAD: Final = _counters(CTA_COUNTERS_REPLY)[:_HEAD_BYTES]
_COUNTERS: Final = struct.Struct(f">{_HEAD_BYTES}x Q 4x Q {_HEAD_BYTES}s Q 4x Q")


def parse_counts(buffer: bytearray, begin: int, end: int) -> Counts | None:
    """Return what an entry has counted, in its original direction first; None: it does not count.

    An entry that began while ``nf_conntrack_acct`` was off never counts.
    """
    at = buffer.find(_COUNTERS_HEAD, begin, end)
    if at >= 0 and at + _COUNTERS.size <= end:
        packets, octets, reply, reply_packets, reply_octets = _COUNTERS.unpack_from(buffer, at)
        if reply == _REPLY_HEAD:
            return packets, octets, reply_packets, reply_octets
    parts = dict(netlink.attributes(memoryview(buffer)[begin + 4 : end]))
    original, reply = parts.get(CTA_COUNTERS_ORIG), parts.get(CTA_COUNTERS_REPLY)
    if original is None or reply is None:
        return None
    return (*_direction(original), *_direction(reply))


def _direction(counters: memoryview) -> tuple[int, int]:
    found = dict(netlink.attributes(counters))
    return (
        int.from_bytes(found.get(_CTA_COUNTERS_PACKETS, b""), "big"),
        int.from_bytes(found.get(_CTA_COUNTERS_BYTES, b""), "big"),
    )
