"""Entries for the connection table, put there over netlink: as many as a test can wait for."""

import itertools
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from kubeproxy_py import conntrack, netlink
from kubeproxy_py.model import IPFamily

# struct nf_conntrack's attributes and messages, as linux/netfilter/nfnetlink_conntrack.h has them.
_IPCTNL_MSG_CT_NEW: Final = 1 << 8 | 0
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_TIMEOUT = 1, 2, 3, 7
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_NAT_DST: Final = 13
_CTA_NAT_PROTO, _CTA_PROTONAT_PORT_MIN, _CTA_PROTONAT_PORT_MAX = 3, 1, 2
_IPS_CONFIRMED: Final = 1 << 3
# Distinct addresses that clients have before they begin again with the next port.
_ADDRESSES: Final = 50_000
_FIRST_PORT: Final = 1024

Address = tuple[bytes, int]
"""An address as it is on the wire, and a port."""


class Flow(NamedTuple):
    """One entry: who asked whom, and who answers."""

    client: Address
    destination: Address
    answerer: Address
    protocol: int = socket.IPPROTO_UDP
    is_rewritten: bool = False  # the kernel knows that it was, as after DNAT


def packed(ip: str, port: int) -> Address:
    return socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip), port


def clients(like: str) -> Iterator[Address]:
    """Yield any number of clients, no two of them equal, with the first bytes of the address *like*."""
    base, _ = packed(like, 0)
    for number in itertools.count():
        port, address = divmod(number, _ADDRESSES)
        yield base[:-2] + struct.pack(">H", address), _FIRST_PORT + port


def insert(family: IPFamily, flows: Iterable[Flow], *, timeout_s: int = 300) -> None:
    """Put *flows* into the connection table of this thread's network namespace.

    Raises:
        NetlinkError: the kernel takes no more (ENOMEM: its limit is reached).
    """
    # Types of the source's address, and of the first one to rewrite to; the other is the next.
    kind, source, rewritten = (
        (socket.AF_INET, 1, 1) if family is IPFamily.V4 else (socket.AF_INET6, 3, 4)
    )
    head = struct.pack("=BBH", kind, 0, 0)
    tail = netlink.attribute(_CTA_STATUS, struct.pack(">I", _IPS_CONFIRMED))
    tail += netlink.attribute(_CTA_TIMEOUT, struct.pack(">I", timeout_s))

    def direction(number: int, protocol: int, sender: Address, receiver: Address) -> bytes:
        return netlink.nested(
            number,
            netlink.nested(
                _CTA_TUPLE_IP,
                netlink.attribute(source, sender[0]),
                netlink.attribute(source + 1, receiver[0]),
            ),
            netlink.nested(
                _CTA_TUPLE_PROTO,
                netlink.attribute(_CTA_PROTO_NUM, bytes([protocol])),
                netlink.attribute(_CTA_PROTO_SRC_PORT, struct.pack(">H", sender[1])),
                netlink.attribute(_CTA_PROTO_DST_PORT, struct.pack(">H", receiver[1])),
            ),
        )

    def rewriting(answerer: Address) -> bytes:
        address, port = answerer[0], struct.pack(">H", answerer[1])
        return netlink.nested(
            _CTA_NAT_DST,
            netlink.attribute(rewritten, address),
            netlink.attribute(rewritten + 1, address),
            netlink.nested(
                _CTA_NAT_PROTO,
                netlink.attribute(_CTA_PROTONAT_PORT_MIN, port),
                netlink.attribute(_CTA_PROTONAT_PORT_MAX, port),
            ),
        )

    with conntrack.connect() as sock:
        for client, destination, answerer, protocol, is_rewritten in flows:
            there = direction(_CTA_TUPLE_ORIG, protocol, client, destination)
            # Told to rewrite it, the kernel puts the answerer there itself.
            back = direction(
                _CTA_TUPLE_REPLY, protocol, destination if is_rewritten else answerer, client
            )
            payload = head + there + back + tail
            if is_rewritten:
                payload += rewriting(answerer)
            sock.request(_IPCTNL_MSG_CT_NEW, payload, flags=netlink.NLM_F_CREATE)
