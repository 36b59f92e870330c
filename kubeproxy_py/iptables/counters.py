"""
Packet counters of rules, read from the kernel without iptables' programs: chain by chain on nft, from
one copy of the table on legacy.

What a rule means is its reader's business: a chain's counters come in the order of its rules, as
``iptables-save`` prints them. Nothing is written, and no counter is ever set back.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final, Protocol

from kubeproxy_py import netlink
from kubeproxy_py.iptables import infos, lock, runner
from kubeproxy_py.model import IPFamily

#: Packets that each rule of a chain has matched, by chain. Chains that do not exist are left out.
Counts = dict[str, tuple[int, ...]]


class Counters(Protocol):
    """Where counters are read; one family's."""

    def read(self, table: str, chains: Collection[str]) -> Counts:
        """Return the counters of *chains*.

        Raises:
            OSError: they cannot be read now.
        """


# nft -------------------------------------------------------------------------------------------------

# linux/netfilter/nfnetlink.h and nf_tables.h.
_GETRULE: Final = 10 << 8 | 7
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_EXPR_NAME, _EXPR_DATA = 1, 2
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2
_GENERIC_BYTES: Final = 4
_COUNT: Final = struct.Struct(">Q")
# How often chains that change while they are read are read again; they have a handful of rules.
_ATTEMPTS: Final = 5


def _counter_head() -> bytes:
    """Return what stands before the packets of a counter as every kernel so far writes it.

    The order of attributes is no promise of the kernel's: what looks different is parsed by them.
    """
    size = netlink.attribute(_COUNTER_BYTES, bytes(_COUNT.size))
    packets = netlink.attribute(_COUNTER_PACKETS, bytes(_COUNT.size))
    named = netlink.attribute(_EXPR_NAME, b"counter\0")
    # nf_tables does not mark it as nested.
    data = netlink.attribute(_EXPR_DATA, size + packets)
    head = len(data) - len(packets) - _COUNT.size
    # Up to the bytes, which differ from rule to rule.
    return named + data[:head]


_COUNTER_HEAD: Final = _counter_head()
# Behind the head: the bytes, the packets' own head, the packets.
_PACKETS_AT: Final = len(_COUNTER_HEAD) + _COUNT.size + 4


class NftCounters:
    """Counters of iptables-nft's rules.

    A dump of a whole table takes the kernel time in proportion to the square of its rules (seconds at
    170,000), because each part of the answer begins to count at the first one. A chain is found by
    hash, and read in 12 µs whatever else there is.
    """

    def __init__(
        self,
        family: IPFamily,
        opener: Callable[[], netlink.RawSocket] = lambda: netlink.connect(
            netlink.NETLINK_NETFILTER
        ),
    ) -> None:
        self._family = family
        self._open = opener

    def read(self, table: str, chains: Collection[str]) -> Counts:
        if not chains:
            return {}
        head = bytes([self._family.socket_family, 0, 0, 0]) + netlink.attribute(
            _RULE_TABLE, table.encode() + b"\0"
        )
        found: Counts = {}
        left = list(chains)
        with netlink.NetlinkSocket(self._open(), "counters of rules") as sock:
            for _ in range(_ATTEMPTS):
                requests = (
                    head + netlink.attribute(_RULE_CHAIN, chain.encode() + b"\0") for chain in left
                )
                changed = []
                read = sock.dump_each(_GETRULE, requests, parse_rule_packets)
                for chain, counts in zip(left, read, strict=True):
                    if counts is None:
                        changed.append(chain)
                    elif counts:
                        found[chain] = tuple(counts)
                left = changed
        # What others write without a pause is left out; the next reading finds it.
        return found


def parse_rule_packets(buffer: bytearray, begin: int, end: int) -> int:
    """Return the packets counted by the rule that netlink describes there; 0 if it does not count."""
    at = buffer.find(_COUNTER_HEAD, begin, end)
    if at >= 0 and at + _PACKETS_AT + _COUNT.size <= end:
        packets: int = _COUNT.unpack_from(buffer, at + _PACKETS_AT)[0]
        return packets
    for kind, value in netlink.attributes(memoryview(buffer)[begin + _GENERIC_BYTES : end]):
        if kind == _RULE_EXPRESSIONS:
            for _, expression in netlink.attributes(value):
                parts = dict(netlink.attributes(expression))
                if bytes(parts.get(_EXPR_NAME, b"")) == b"counter\0":
                    counted = dict(netlink.attributes(parts.get(_EXPR_DATA, memoryview(b""))))
                    return int.from_bytes(counted.get(_COUNTER_PACKETS, b""), "big")
    return 0


# legacy ----------------------------------------------------------------------------------------------

# linux/netfilter_ipv4/ip_tables.h, and the same numbers for IPv6.
_SO_GET_ENTRIES: Final = 65
_LEVEL: Final = {IPFamily.V4: socket.IPPROTO_IP, IPFamily.V6: socket.IPPROTO_IPV6}
# struct ipt_get_entries: table, size, and then the entries, aligned to eight bytes.
_GET_ENTRIES: Final = struct.Struct("=32sI4x")
# struct ipt_entry and ip6t_entry from target_offset on: it, next_offset, comefrom, packets, bytes.
# What stands before it are the addresses and a word.
_ENTRIES: Final = {
    IPFamily.V4: struct.Struct("=88xHHIQQ"),
    IPFamily.V6: struct.Struct("=140xHHI4xQQ"),
}
# struct xt_entry_target: its size (2), name (29), revision (1). A chain begins with a target called
# ERROR, behind which its name stands (struct xt_error_target).
_ERROR: Final = b"ERROR\0"
_TARGET_BYTES: Final = 32
_NAME_BYTES: Final = 30

# Once for all: each CDLL is a class of its own, which only a look for cycles frees again.
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

# As long as a restore of ours would wait, which often is what comes next.
_LOCK_WAIT_S: Final = 5.0
_LOCK_PAUSE_S: Final = 0.01


# Waits; nobody ever sets it.
_pause: Final = threading.Event().wait


class LegacyCounters:
    """Counters of iptables-legacy's rules.

    The kernel gives a table only as a whole: 56 MiB and 0.26 s at 10,000 Services with 5 endpoints.
    Whoever writes legacy tables exchanges all of a table and then adds the counters of the rules that
    stay. In between they begin at zero, so nobody may read without the xtables lock.
    """

    def __init__(
        self,
        family: IPFamily,
        *,
        lock_file: Path | None = None,
        pause: Callable[[float], object] = _pause,
    ) -> None:
        self._family = family
        self._lock_file = lock_file or lock.lock_path()
        self._pause = pause

    def read(self, table: str, chains: Collection[str]) -> Counts:
        if not chains:
            return {}
        with _locked(self._lock_file, self._pause):
            blob = _read_entries(self._family, table)
        wanted = set(chains)
        return {
            chain: counts
            for chain, counts in parse_entries(self._family, memoryview(blob))
            if chain in wanted
        }


@contextlib.contextmanager
def _locked(path: Path, pause: Callable[[float], object]) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        tries = int(_LOCK_WAIT_S / _LOCK_PAUSE_S)
        for attempt in range(tries):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == tries - 1:
                    raise
                pause(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def _read_entries(family: IPFamily, table: str) -> bytes | bytearray:
    with socket.socket(family.socket_family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for _ in range(_ATTEMPTS):
            info = infos.read_infos(family).get(table)
            if info is None:
                return b""
            size = infos.entries_bytes(info)
            blob = bytearray(_GET_ENTRIES.size + size)
            _GET_ENTRIES.pack_into(blob, 0, table.encode(), size)
            length = ctypes.c_uint32(len(blob))
            if not _LIBC.getsockopt(
                sock.fileno(),
                _LEVEL[family],
                _SO_GET_ENTRIES,
                ctypes.byref(ctypes.c_char.from_buffer(blob)),
                ctypes.byref(length),
            ):
                return blob
            number = ctypes.get_errno()
            if number != errno.EAGAIN:
                raise OSError(number, f"cannot read legacy table {table}: {os.strerror(number)}")
            # Somebody changed its size meanwhile, without the lock.
    raise OSError(errno.EAGAIN, f"cannot read legacy table {table}: it changes all the time")


def parse_entries(family: IPFamily, blob: memoryview) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the chains of a legacy table as the kernel gives it, without the built-in ones.

    Raises:
        OSError: it is not such a table.
    """
    unpack, head = _ENTRIES[family].unpack_from, _ENTRIES[family].size
    error_bytes = len(_ERROR)
    chain = ""
    counts: list[int] = []
    offset, end = _GET_ENTRIES.size, len(blob)
    while offset < end:
        if offset + head > end:
            raise OSError(errno.EBADMSG, "cannot read a legacy table: it is cut off")
        target, size, _, packets, _ = unpack(blob, offset)
        if size < head:
            raise OSError(errno.EBADMSG, "cannot read a legacy table: an entry has no size")
        named = offset + target + 2
        if blob[named : named + error_bytes].tobytes() == _ERROR:
            if chain:
                # Its last entry is what the kernel does at its end, which is no rule.
                yield chain, tuple(counts[:-1])
            text = bytes(blob[offset + target + _TARGET_BYTES :][:_NAME_BYTES])
            chain = text.partition(b"\0")[0].decode(errors="replace")
            counts = []
        elif chain:
            counts.append(packets)
        offset += size


def of(backend: runner.Backend, family: IPFamily) -> Counters:
    """Return where the counters of a backend's rules are read."""
    return NftCounters(family) if backend == "nft" else LegacyCounters(family)
