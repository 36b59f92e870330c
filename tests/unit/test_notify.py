"""What systemd hears of us, on real datagram sockets."""

import os
import secrets
import socket
from contextlib import closing

import pytest

from kubeproxy_py.notify import Notifier


@pytest.fixture(params=["a path", "the abstract namespace"])
def listener(request, tmp_path):
    """Give a socket as systemd has it, and its address as systemd passes it on."""
    if request.param == "a path":
        name = address = str(tmp_path / "notify")
    else:
        name = f"@kubeproxy-py-{secrets.token_hex(8)}"
        address = f"\0{name[1:]}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(address)
        sock.settimeout(5)
        yield sock, name


def test_each_state_is_one_datagram(listener):
    sock, name = listener
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"})
    notifier.ready()
    notifier.alive()
    notifier.status("2 families")
    notifier.stopping()

    assert [sock.recv(100) for _ in range(4)] == [
        b"READY=1",
        b"WATCHDOG=1",
        b"STATUS=2 families",
        b"STOPPING=1",
    ]


def test_the_watchdog_is_fed_only_where_there_is_one(listener):
    sock, name = listener
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.alive()
    notifier.ready()

    assert sock.recv(100) == b"READY=1"


def test_nothing_happens_where_nobody_listens(tmp_path):
    Notifier({}).ready()
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        # A parent's, inherited.
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_asked(environ, interval_s):
    assert Notifier(environ).watchdog_s == interval_s
