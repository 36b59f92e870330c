"""
As much of SCTP (RFC 9260) as shows where a first packet arrives, on raw sockets.

The kernel's own SCTP need not be there: an INIT goes out, and whoever receives it answers with an
ABORT whose reason text says who it was. Addresses never appear in SCTP's checksum, so the packets
are the same in both IP families.
"""

import struct
from typing import Final, NamedTuple

PROTOCOL: Final = 132  # IPPROTO_SCTP, which the socket module does not name everywhere

_INIT: Final = 1
_ABORT: Final = 6
_USER_INITIATED_ABORT: Final = 12  # the cause that carries a text for the upper layer
_COMMON_HEADER: Final = struct.Struct("!HHII")  # source, destination, verification tag, checksum
_CHUNK_HEADER: Final = struct.Struct("!BBH")
_CRC32C_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli, bits reversed


class Packet(NamedTuple):
    """What the first chunk of a received packet says."""

    source_port: int
    destination_port: int
    tag: int  # verification tag of the packet
    initiate_tag: int | None  # of an INIT, else None
    reason: bytes | None  # of an ABORT, else None


def render_init(source_port: int, destination_port: int, tag: int) -> bytes:
    """Return an INIT that asks for replies with *tag*."""
    # Window, streams out and in, first sequence number: any legal values will do.
    body = struct.pack("!IIHHI", tag, 65536, 1, 1, tag)
    return _packet(source_port, destination_port, 0, _INIT, body)


def render_abort(to: Packet, reason: bytes) -> bytes:
    """Return the ABORT that answers the INIT *to*."""
    cause = struct.pack("!HH", _USER_INITIATED_ABORT, 4 + len(reason)) + reason
    return _packet(to.destination_port, to.source_port, to.initiate_tag or 0, _ABORT, cause)


def parse(data: bytes) -> Packet | None:
    """Return the packet in *data* (from the SCTP header on), or None if it is damaged."""
    if len(data) < _COMMON_HEADER.size + _CHUNK_HEADER.size:
        return None
    source, destination, tag, checksum = _COMMON_HEADER.unpack_from(data)
    if checksum != _checksum(data):
        return None
    kind, _flags, length = _CHUNK_HEADER.unpack_from(data, _COMMON_HEADER.size)
    start = _COMMON_HEADER.size + _CHUNK_HEADER.size
    body = data[start : _COMMON_HEADER.size + length]
    initiate_tag = reason = None
    if kind == _INIT and len(body) >= 4:
        (initiate_tag,) = struct.unpack_from("!I", body)
    if kind == _ABORT:
        reason = body[4:]
    return Packet(source, destination, tag, initiate_tag, reason)


def crc32c(data: bytes) -> int:
    """Return the CRC that SCTP uses (RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _packet(source_port: int, destination_port: int, tag: int, kind: int, body: bytes) -> bytes:
    length = _CHUNK_HEADER.size + len(body)
    chunk = _CHUNK_HEADER.pack(kind, 0, length) + body + bytes(-length % 4)
    blank = _COMMON_HEADER.pack(source_port, destination_port, tag, 0) + chunk
    return _COMMON_HEADER.pack(source_port, destination_port, tag, _checksum(blank)) + chunk


def _checksum(data: bytes) -> int:
    # It covers the packet with the checksum field zero, and is stored least significant byte first.
    (swapped,) = struct.unpack("<I", struct.pack(">I", crc32c(data[:8] + bytes(4) + data[12:])))
    return int(swapped)


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = (crc >> 1) ^ (_CRC32C_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE: Final = _crc_table()
