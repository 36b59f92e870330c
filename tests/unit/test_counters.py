"""Counters of rules, from messages and tables as the kernel writes them."""

import errno
import fcntl
import struct

import pytest

from kubeproxy_py import netlink
from kubeproxy_py.iptables import counters
from kubeproxy_py.model import IPFamily
from tests.unit.test_netlink import ScriptedSocket, message

V4, V6 = IPFamily.V4, IPFamily.V6
NEWRULE, DONE, DUMP_INTR = 0xA06, 3, 0x10
NESTED = 0x8000


def expression(name, *data, nest=netlink.attribute):
    return netlink.nested(1, netlink.attribute(1, name.encode() + b"\0"), nest(2, b"".join(data)))


def counter(packets, size=0, *, packets_first=False, nest=netlink.attribute):
    parts = [
        netlink.attribute(1, struct.pack(">Q", size)),
        netlink.attribute(2, struct.pack(">Q", packets)),
    ]
    return expression("counter", *(reversed(parts) if packets_first else parts), nest=nest)


def rule(*expressions):
    """Return a rule as netlink describes it; its comment tries to be taken for a counter."""
    comment = expression("match", netlink.attribute(1, b"default/counter\0" + bytes(20)))
    return (
        bytes(4)
        + netlink.attribute(1, b"nat\0")
        + netlink.attribute(2, b"KUBE-SEP-X\0")
        + netlink.nested(4, comment, *expressions)
    )


@pytest.mark.parametrize(
    ("payload", "packets"),
    [
        (rule(counter(7, 420)), 7),
        (rule(counter(2**40)), 2**40),
        (rule(counter(7, 420, packets_first=True)), 7),
        (rule(counter(7, 420, nest=netlink.nested)), 7),
        (rule(), 0),
        (rule(expression("counter")), 0),
        (bytes(4), 0),
    ],
    ids=[
        "usual",
        "large",
        "other order",
        "marked as nested",
        "no counter",
        "no numbers",
        "no expressions",
    ],
)
def test_packets_of_a_rule(payload, packets):
    # Others stand before and behind it.
    buffer = bytearray(rule(counter(99)) + payload + rule(counter(98)))
    begin = len(rule(counter(99)))

    assert counters.parse_rule_packets(buffer, begin, begin + len(payload)) == packets


def test_what_is_looked_for_first_is_what_the_kernel_writes():
    # As Linux 6.18 describes it; 7 packets, 420 bytes.
    said = (
        b",\0\1\0\x0c\0\1\0counter\0\x1c\0\2\0"
        b"\x0c\0\1\0\0\0\0\0\0\0\1\xa4\x0c\0\2\0\0\0\0\0\0\0\0\7"
    )

    assert counters._COUNTER_HEAD in said
    assert counters.parse_rule_packets(bytearray(said), 0, len(said)) == 7


class Kernel:
    """Gives a scripted socket, and keeps it to be looked at."""

    def __init__(self, *datagrams):
        self.sock = ScriptedSocket(*datagrams)

    def __call__(self):
        return self.sock


def end(seq, flags=0):
    return message(DONE, bytes(4), seq=seq, flags=flags)


def test_chains_are_read_one_by_one_and_those_that_are_not_there_left_out():
    kernel = Kernel(
        message(NEWRULE, rule(counter(1)), seq=1) + message(NEWRULE, rule(counter(2)), seq=1),
        end(1),
        end(2),
    )
    found = counters.NftCounters(V6, kernel).read("nat", ["KUBE-SEP-X", "KUBE-SEP-GONE"])

    assert found == {"KUBE-SEP-X": (1, 2)}
    family, *_ = kernel.sock.sent[0][16:17]
    assert family == 10
    assert b"nat\0" in kernel.sock.sent[0]
    assert b"KUBE-SEP-GONE\0" in kernel.sock.sent[1]
    assert kernel.sock.is_closed


def test_a_chain_that_changes_under_the_reading_is_read_again():
    kernel = Kernel(
        message(NEWRULE, rule(counter(1)), seq=1, flags=DUMP_INTR),
        end(1),
        message(NEWRULE, rule(counter(2)), seq=2),
        end(2),
    )

    assert counters.NftCounters(V4, kernel).read("nat", ["KUBE-SEP-X"]) == {"KUBE-SEP-X": (2,)}


def test_a_chain_that_changes_all_the_time_is_left_out():
    kernel = Kernel(*[end(seq, DUMP_INTR) for seq in range(1, 6)])

    assert counters.NftCounters(V4, kernel).read("nat", ["KUBE-SEP-X"]) == {}


def test_a_refusal_is_told():
    kernel = Kernel(OSError(errno.EPERM, "no"))

    with pytest.raises(OSError, match="rules"):
        counters.NftCounters(V4, kernel).read("nat", ["KUBE-SEP-X"])


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_nothing_is_opened_for_nothing(backend, tmp_path):
    found = (
        counters.NftCounters(V4, Kernel())
        if backend == "nft"
        else counters.LegacyCounters(V4, lock_file=tmp_path / "lock")
    )

    assert found.read("nat", []) == {}
    assert not (tmp_path / "lock").exists()


# legacy -----------------------------------------------------------------------------------------------


def entry(family, target, packets=0, *, match=b""):
    """Return struct ipt_entry or ip6t_entry with its match and its target."""
    head = 112 if family is V4 else 168
    start, pad = (84, 0) if family is V4 else (136, 4)
    fields = struct.pack(
        f"={start}xIHHI{pad}xQQ",
        0,
        head + len(match),
        head + len(match) + len(target),
        0,
        packets,
        9,
    )
    assert len(fields) == head
    return fields + match + target


def standard(verdict=-1):
    return struct.pack("=H29sBi4x", 40, b"", 0, verdict)


def error(name):
    return struct.pack("=H29sB30s2x", 64, b"ERROR", 0, name)


def table(family, *entries):
    blob = b"".join(entries)
    return memoryview(struct.pack("=32sI4x", b"nat", len(blob)) + blob)


@pytest.mark.parametrize("family", list(IPFamily))
def test_chains_of_a_legacy_table(family):
    blob = table(
        family,
        # PREROUTING, with a policy.
        entry(family, standard(), 100),
        entry(family, error(b"KUBE-SEP-X")),
        entry(family, standard(), 3, match=bytes(48)),
        entry(family, standard(), 10),
        entry(family, standard(), 13),  # RETURN at its end
        entry(family, error(b"EMPTY")),
        entry(family, standard(), 5),
        entry(family, error(b"ERROR")),
    )

    assert dict(counters.parse_entries(family, blob)) == {"KUBE-SEP-X": (3, 10), "EMPTY": ()}


def test_a_table_without_chains():
    assert list(counters.parse_entries(V4, table(V4, entry(V4, error(b"ERROR"))))) == []


@pytest.mark.parametrize(
    "blob",
    [table(V4, entry(V4, standard()))[:-60], table(V4, bytes(112))],
    ids=["cut off", "without sizes"],
)
def test_what_is_no_table_is_refused(blob):
    with pytest.raises(OSError, match="cannot read a legacy table"):
        list(counters.parse_entries(V4, blob))


def test_a_lock_that_others_keep_is_given_up(tmp_path):
    path, pauses = tmp_path / "lock", []
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = counters.LegacyCounters(V4, lock_file=path, pause=pauses.append)
        with pytest.raises(BlockingIOError):
            found.read("nat", ["KUBE-SEP-X"])

    assert 4.9 < sum(pauses) <= 5
