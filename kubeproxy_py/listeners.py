"""
Who listens on this host.

Asked of the kernel's socket diagnosis (sock_diag(7)), which lists listeners alone; /proc/net/tcp would
list every connection of the host.
"""

import socket
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, NamedTuple

from kubeproxy_py import addresses, netlink
from kubeproxy_py.model import IPFamily, Protocol
from kubeproxy_py.node_ports import Listener

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
# struct inet_diag_req_v2: family, protocol, extensions, padding, states; then a socket id of 48 bytes.
_REQUEST: Final = struct.Struct("=BBBxI48x")
# struct inet_diag_msg: where in it stand port and address of this end, and the inode.
_PORT: Final = struct.Struct(">H")
_INODE: Final = struct.Struct("=I")
_PORT_AT: Final = 4
_SOURCE_AT: Final = 8
_INODE_AT: Final = 68
_MESSAGE_BYTES: Final = 72
_SKV6ONLY: Final = 11

_ADDRESS_BYTES: Final = {IPFamily.V4: 4, IPFamily.V6: 16}
# The kernel's numbers of states: a TCP socket that listens, and a UDP socket that is not connected.
_KINDS: Final[tuple[tuple[Protocol, int, int], ...]] = (
    ("tcp", socket.IPPROTO_TCP, 1 << 10),
    ("udp", socket.IPPROTO_UDP, 1 << 7),
)
Opener = Callable[[], netlink.NetlinkSocket]


class Owner(NamedTuple):
    """The process that has a socket."""

    pid: int
    name: str


def connect() -> netlink.NetlinkSocket:
    """Open a socket to the sockets of this thread's network namespace."""
    return netlink.NetlinkSocket(netlink.connect(_NETLINK_SOCK_DIAG), "listening sockets")


def listening(opener: Opener = connect) -> list[Listener]:
    """Return all TCP and UDP sockets that wait for anybody.

    Raises:
        OSError: the kernel does not tell.
    """
    found = []
    for family in IPFamily:
        for protocol, number, states in _KINDS:
            # One socket for each list: a kernel without one of these protocols ends it early.
            with opener() as sock:
                request = _REQUEST.pack(family.socket_family, number, 0, states)
                for _, _, payload in sock.dump(_SOCK_DIAG_BY_FAMILY, request):
                    found.append(_parse(family, protocol, payload))
    return found


def _parse(family: IPFamily, protocol: Protocol, payload: memoryview) -> Listener:
    source = bytes(payload[_SOURCE_AT : _SOURCE_AT + _ADDRESS_BYTES[family]])
    text = socket.inet_ntop(family.socket_family, source)
    address = addresses.parse_ip(text)
    assert address is not None  # it has just been printed
    values = dict(netlink.attributes(payload[_MESSAGE_BYTES:]))
    is_v6_only = bytes(values.get(_SKV6ONLY, b"\0"))[:1] != b"\0"
    return Listener(
        protocol,
        # A socket of IPv6 may be bound to an IPv4 address.
        addresses.family_of(address),
        address,
        _PORT.unpack_from(payload, _PORT_AT)[0],
        _INODE.unpack_from(payload, _INODE_AT)[0],
        is_dual=address == "::" and not is_v6_only,
    )


def owners(inodes: Collection[int], root: Path = Path("/")) -> dict[int, Owner]:
    """Return whose the sockets are, as far as this process may know. Reads all of /proc."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, Owner] = {}
    if not wanted:
        return found
    for process in (root / "proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                inode = wanted.get(_target(descriptor))
                if inode is not None and inode not in found:
                    name = (process / "comm").read_text(errors="replace").strip()
                    found[inode] = Owner(int(process.name), name)
        except OSError:
            # It ended, or it is somebody else's.
            continue
    return found


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""
