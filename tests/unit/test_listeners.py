"""Who listens, as the kernel tells it, and whose the sockets are."""

import contextlib
import os
import socket
import struct

import pytest

from kubeproxy_py import listeners
from kubeproxy_py.listeners import Owner
from kubeproxy_py.model import IPFamily
from kubeproxy_py.node_ports import Listener

V4, V6 = IPFamily.V4, IPFamily.V6


@contextlib.contextmanager
def bound(family, kind, address):
    with socket.socket(family, kind) as sock:
        sock.bind((address, 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock


# The kernel's list -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "address", "wanted"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1", ("tcp", V4, "127.0.0.1", False)),
        (socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1", ("udp", V4, "127.0.0.1", False)),
        (socket.AF_INET6, socket.SOCK_STREAM, "::1", ("tcp", V6, "::1", False)),
        (socket.AF_INET6, socket.SOCK_STREAM, "::ffff:127.0.0.1", ("tcp", V4, "127.0.0.1", False)),
        (socket.AF_INET6, socket.SOCK_DGRAM, "::", ("udp", V6, "::", True)),
    ],
)
def test_a_socket_is_listed_with_its_address_port_and_inode(family, kind, address, wanted):
    with bound(family, kind, address) as sock:
        port = sock.getsockname()[1]
        (got,) = [entry for entry in listeners.listening() if entry.port == port]

        assert (got.protocol, got.family, got.address, got.is_dual) == wanted
        assert got.inode == os.fstat(sock.fileno()).st_ino


def test_a_connected_socket_is_no_listener():
    with (
        bound(socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1") as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        ports = {entry.port for entry in listeners.listening()}

        assert client.getsockname()[1] not in ports


class _Kernel:
    """Answers each dump with one socket of IPv6 for TCP, and nothing else."""

    def __init__(self, attribute):
        self._attribute = attribute

    def __call__(self):
        return contextlib.nullcontext(self)

    def dump(self, kind, request):
        if request[:2] == bytes((socket.AF_INET6, socket.IPPROTO_TCP)):
            head = struct.pack(">BBBBHH", socket.AF_INET6, 10, 0, 0, 30080, 0)
            message = head + bytes(60) + struct.pack("=I", 42) + self._attribute
            yield kind, 0, memoryview(message)


@pytest.mark.parametrize(
    ("attribute", "is_dual"),
    [
        (struct.pack("=HHB3x", 5, 11, 0), True),
        (struct.pack("=HHB3x", 5, 11, 1), False),
        (b"", True),
    ],
)
def test_a_wildcard_of_ipv6_takes_ipv4_unless_told(attribute, is_dual):
    assert listeners.listening(_Kernel(attribute)) == [
        Listener("tcp", V6, "::", 30080, 42, is_dual)
    ]


# Owners ------------------------------------------------------------------------------------------


def process(root, pid, name, *targets):
    directory = root / "proc" / str(pid)
    (directory / "fd").mkdir(parents=True)
    (directory / "comm").write_text(f"{name}\n")
    for number, target in enumerate(targets):
        (directory / "fd" / str(number)).symlink_to(target)


def test_the_owner_of_a_socket_is_found_by_its_descriptors(tmp_path):
    process(tmp_path, 7, "nginx", "/dev/null", "socket:[42]", "socket:[43]")
    process(tmp_path, 8, "child", "socket:[42]")
    (tmp_path / "proc" / "9").mkdir()
    (tmp_path / "proc" / "10" / "fd").mkdir(parents=True)
    (tmp_path / "proc" / "10" / "fd" / "0").write_text("no link")

    got = listeners.owners([42, 44], tmp_path)

    assert got.keys() == {42}
    assert got[42] in {Owner(7, "nginx"), Owner(8, "child")}


def test_nobody_is_looked_for_in_vain(tmp_path):
    assert listeners.owners([], tmp_path / "none") == {}
