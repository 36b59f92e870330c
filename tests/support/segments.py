"""
TCP segments that no client would send, and who receives them.

A segment with SYN and FIN belongs to no connection and begins none: conntrack calls it INVALID.
"""

import random
import socket
import struct
import time
from typing import Final

from tests.support import servers
from tests.support.netns import Namespace

_HEADER: Final = struct.Struct("!HHIIBBHHH")
_PSEUDO_HEADER: Final = struct.Struct("!4s4sBBH")
_SYN_AND_FIN: Final = 0x03
_WORDS: Final = 5  # a header without options
_CHECKSUM_OFFSET: Final = 16


def arrives(source: Namespace, to: Namespace, ip: str, port: int, *, timeout_s: float) -> bool:
    """Send an invalid segment to *ip*, an address of *to*; tell whether it comes there."""
    deadline = time.monotonic() + timeout_s
    with _raw_socket(to, ip) as receiver, _raw_socket(source, ip) as sender:
        sender.connect((ip, 0))
        own_port = random.randint(49152, 65535)
        sender.send(_segment(sender.getsockname()[0], ip, own_port, port))
        while (left := deadline - time.monotonic()) > 0:
            receiver.settimeout(left)
            try:
                # A raw socket sees every segment that comes to its namespace.
                data = servers.strip_ip_header(receiver, receiver.recv(4096))
            except TimeoutError:
                break
            if data[:4] == struct.pack("!HH", own_port, port):
                return True
    return False


def _raw_socket(ns: Namespace, ip: str) -> socket.socket:
    with ns.entered():
        sock = socket.socket(servers.family_of(ip), socket.SOCK_RAW, socket.IPPROTO_TCP)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, _CHECKSUM_OFFSET)
    return sock


def _segment(source: str, destination: str, source_port: int, port: int) -> bytes:
    def header(checksum: int) -> bytes:
        return _HEADER.pack(source_port, port, 1, 0, _WORDS << 4, _SYN_AND_FIN, 65535, checksum, 0)

    if ":" in destination:
        return header(0)  # the kernel puts the checksum in
    pseudo = _PSEUDO_HEADER.pack(
        socket.inet_aton(source),
        socket.inet_aton(destination),
        0,
        socket.IPPROTO_TCP,
        _HEADER.size,
    )
    return header(_checksum(pseudo + header(0)))


def _checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
