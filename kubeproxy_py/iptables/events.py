"""
What the kernel tells about changes of nft rules: which chains of ours others touched, and who it was.

The kernel says it within milliseconds, by netlink; what our own restores do is kept from the sockets
by a filter in the kernel, so that thousands of own rules cost nothing here. Nothing is read and
nothing repaired here. The invariant: what could have been missed is told as "anything may have
changed", never as nothing.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import structlog

from kubeproxy_py import netlink, rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.drift import MAX_CHAINS, Culprit, Suspicion
from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

# linux/netfilter/nfnetlink.h and nf_tables.h.
_NFNLGRP_NFTABLES: Final = 7
_NFNL_SUBSYS_NFTABLES: Final = 10
_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWGEN = 0, 2, 3, 5, 6, 8, 15
# The first attribute of tables, chains and rules alike.
_NFTA_TABLE: Final = 1
_NFTA_RULE_CHAIN: Final = 2
_NFTA_CHAIN_NAME: Final = 3
_NFTA_CHAIN_HOOK: Final = 4
_NFTA_GEN_PROC_PID: Final = 2
_NFTA_GEN_PROC_NAME: Final = 3
# struct nfgenmsg: address family, version, and the lower half of the generation's number.
_NFGENMSG: Final = struct.Struct(">BBH")
_NLM_F_EXCL: Final = 0x200
_FAMILIES: Final[dict[int, IPFamily]] = {family.socket_family: family for family in IPFamily}
_TABLES: Final = frozenset({rules.FILTER, rules.NAT, rules.MANGLE})
_JUMPED_FROM: Final = frozenset(ChainId(jump.table, jump.builtin) for jump in rules.JUMPS)
_ENSURED: Final = ChainId(rules.FILTER, rules.FIREWALL)
_ANY: Final = ChainId("", "")

_SO_ATTACH_FILTER: Final = 26
# struct sock_filter and sock_fprog (linux/filter.h); the instructions that are used.
_INSTRUCTION: Final = struct.Struct("=HBBI")
_LOAD_HALF, _LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x28, 0x20, 0x15, 0x06
_TYPE_OFFSET, _PORT_OFFSET = 4, 12  # in struct nlmsghdr
_ALL: Final = 0xFFFFFFFF

# How soon to try again when a socket fails, which no kernel is known to do.
_REOPEN_S: Final = 1.0

Touched = dict[IPFamily, set[ChainId] | None]


def connect() -> socket.socket:
    """Open a socket that is told of every change of nft rules in this network namespace."""
    raw = netlink.connect(netlink.NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,))
    assert isinstance(raw, socket.socket)
    raw.setblocking(False)
    return raw


class NftWatcher:
    """Calls back, from a thread of its own, when others have changed what may be ours."""

    def __init__(
        self,
        callback: Callable[[Suspicion], None],
        opener: Callable[[], socket.socket] = connect,
    ) -> None:
        self._callback = callback
        self._open = opener
        self._thread = threading.Thread(target=self._run, name="nft-events", daemon=True)
        self._wake = -1
        self._lock = threading.Lock()
        # Guarded by the lock: the sockets' filters, and
        self._own_ports: set[int] = set()
        # Two sockets: that of the generations gets a short message for each transaction and
        # so never overflows, even when the other one does in a flush; so the culprit is known.
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        # Only the thread's: by the number of the generation that they belong to.
        self._pending: dict[int, Touched] = {}
        self._has_lost = False

    def start(self) -> None:
        """Begin; changes after the return of this are noticed.

        Raises:
            OSError: the kernel gives no events. Nothing is running then.
        """
        with self._lock:
            self._open_sockets()
        self._wake = os.eventfd(0)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, waiting for a callback that runs; nothing happens if it never started."""
        if self._wake < 0:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._wake = -1
        with self._lock:
            self._close_sockets()

    @contextlib.contextmanager
    def own(self, _family: IPFamily, pid: int) -> Iterator[None]:
        """Overlook what process *pid*, a child of ours, does meanwhile."""
        # The kernel names netlink's port, which iptables leaves to it to choose; it then is the
        # process id, also in a container, whose process ids the host does not know.
        with self._lock:
            self._own_ports.add(pid)
            self._attach_filters()
        try:
            yield
        finally:
            with self._lock:
                self._own_ports.discard(pid)
                self._attach_filters()

    # Sockets -------------------------------------------------------------------------------------

    def _open_sockets(self) -> None:
        with contextlib.ExitStack() as stack:
            generations = stack.enter_context(contextlib.closing(self._open()))
            details = stack.enter_context(contextlib.closing(self._open()))
            self._sockets = generations, details
            self._attach_filters()
            stack.pop_all()

    def _close_sockets(self) -> None:
        for sock in self._sockets or ():
            sock.close()
        self._sockets = None

    def _attach_filters(self) -> None:
        if self._sockets is not None:
            generations, details = self._sockets
            try:
                _attach(generations, _filter(self._own_ports, generations=True))
                _attach(details, _filter(self._own_ports, generations=False))
            except OSError as error:
                # Our own changes are looked at as if they were others', then, and found right.
                log.warning("drift.filter_failed", error=str(error))

    # The thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            sockets = self._sockets
            assert sockets is not None
            try:
                if self._follow(*sockets):
                    return
            except OSError:
                log.exception("drift.watch_failed")
                if self._reopen():
                    return

    def _follow(self, generations: socket.socket, details: socket.socket) -> bool:
        """Read what comes until stopped (True). Raises OSError if a socket fails."""
        reader = netlink.NetlinkSocket(generations, "nft generations")
        detail_reader = netlink.NetlinkSocket(details, "nft events")
        poller = select.poll()
        for descriptor in (generations.fileno(), details.fileno(), self._wake):
            poller.register(descriptor, select.POLLIN)
        while True:
            if any(descriptor == self._wake for descriptor, _ in poller.poll()):
                return True
            # Generations first: the kernel tells each one after its details, which therefore are
            # there to be read, or lost, by now.
            ended, has_lost_generations = self._read_generations(reader)
            self._read_details(detail_reader)
            if has_lost_generations:
                self._pending.clear()
                self._tell(dict.fromkeys(IPFamily), None)
            for number, culprit in ended:
                touched = self._pending.pop(number, {})
                self._tell(dict.fromkeys(IPFamily) if self._has_lost else touched, culprit)
            if ended:
                self._has_lost = False

    def _read_generations(
        self, reader: netlink.NetlinkSocket
    ) -> tuple[list[tuple[int, Culprit | None]], bool]:
        ended: list[tuple[int, Culprit | None]] = []
        has_lost = False
        for message in _drain(reader):
            if message is None:
                has_lost = True
                continue
            kind, _, payload = message
            if kind == _kind(_NEWGEN):
                ended.append((_generation(payload), parse_culprit(payload)))
        return ended, has_lost

    def _read_details(self, reader: netlink.NetlinkSocket) -> None:
        for message in _drain(reader):
            if message is None:
                self._has_lost = True
                self._pending.clear()
            else:
                kind, flags, payload = message
                touched = self._pending.setdefault(_generation(payload), {})
                note(touched, kind, flags, payload)

    def _tell(self, touched: Touched, culprit: Culprit | None) -> None:
        for family, found in touched.items():
            self._callback(Suspicion(family, culprit, None if found is None else frozenset(found)))

    def _reopen(self) -> bool:
        """Open the sockets again, as soon as that is possible; True: stopped."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while not poller.poll(_REOPEN_S * 1000):
            with self._lock:
                self._close_sockets()
                try:
                    self._open_sockets()
                except OSError as error:
                    log.warning("drift.watch_unavailable", error=str(error))
                    continue
            self._pending.clear()
            self._tell(dict.fromkeys(IPFamily), None)
            return False
        return True


def note(touched: Touched, kind: int, flags: int, payload: memoryview) -> None:
    """Add to *touched* what a message says about chains of ours."""
    family = _FAMILIES.get(payload[0])
    if family is None or touched.get(family, ()) is None:
        return
    chain = _touched_chain(kind & 0xFF, flags, payload)
    if chain is None:
        return
    known = touched.setdefault(family, set())
    assert known is not None
    known.add(chain)
    if chain == _ANY or len(known) > MAX_CHAINS:
        touched[family] = None


def _touched_chain(kind: int, flags: int, payload: memoryview) -> ChainId | None:
    """Return the chain that a message is about; one without a name: one of that table that was
    renamed; ``_ANY``; None: nothing of ours.
    """
    values: dict[int, memoryview] = {}
    # Of a rule, what follows its chain is long, and of no interest.
    for name, value in netlink.attributes(payload[_NFGENMSG.size :]):
        values[name] = value
        if name == _NFTA_RULE_CHAIN and kind in {_NEWRULE, _DELRULE}:
            break
    table = _text(values.get(_NFTA_TABLE))
    if table not in _TABLES:
        return None
    if kind == _DELTABLE:
        return _ANY
    if kind in {_NEWRULE, _DELRULE}:
        chain = ChainId(table, _text(values.get(_NFTA_RULE_CHAIN)))
        # Others may insert what they like in a built-in chain; they may only not remove our jumps.
        has_jump = kind == _DELRULE and chain in _JUMPED_FROM
        return chain if has_jump or _is_watched(chain) else None
    if kind not in {_NEWCHAIN, _DELCHAIN}:
        return None
    chain = ChainId(table, _text(values.get(_NFTA_CHAIN_NAME)))
    is_new = flags & (netlink.NLM_F_CREATE | _NLM_F_EXCL)
    if kind == _NEWCHAIN and not is_new and _NFTA_CHAIN_HOOK not in values:
        # Renamed, and the kernel does not say from what.
        return ChainId(table, "")
    if _is_watched(chain) or (kind == _DELCHAIN and chain in _JUMPED_FROM):
        return chain
    return None


def _is_watched(chain: ChainId) -> bool:
    return chains.is_ours(chain.table, chain.chain) or chain == _ENSURED


def parse_culprit(payload: memoryview, proc: Path = Path("/proc")) -> Culprit | None:
    """Return who committed a generation; None if the message does not say."""
    values = dict(netlink.attributes(payload[_NFGENMSG.size :]))
    name, number = values.get(_NFTA_GEN_PROC_NAME), values.get(_NFTA_GEN_PROC_PID)
    if name is None or number is None:
        return None
    process, pid = _text(name), int.from_bytes(number, "big")
    return Culprit(process, pid, _parent(proc, process, pid))


def _parent(proc: Path, process: str, pid: int) -> str:
    # Who runs `iptables` says more than that it was run. It lives for some milliseconds more, so
    # this often comes in time; in a container the number may be another process's, hence the name.
    try:
        status = _status(proc, pid)
        if status.get("Name") != process:
            return ""
        return _status(proc, int(status["PPid"])).get("Name", "")
    except (OSError, KeyError, ValueError):
        return ""


def _status(proc: Path, pid: int) -> dict[str, str]:
    lines = (proc / str(pid) / "status").read_text(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _drain(
    reader: netlink.NetlinkSocket,
) -> Iterator[tuple[int, int, memoryview] | None]:
    """Yield all messages there are; None: some were lost. Raises OSError for anything else."""
    while True:
        try:
            yield from reader.events()
        except netlink.NetlinkError as error:
            if error.errno == errno.EAGAIN:
                return
            if error.errno != errno.ENOBUFS:
                raise
            yield None


def _generation(payload: memoryview) -> int:
    number: int = _NFGENMSG.unpack_from(payload)[2]
    return number


def _text(value: memoryview | None) -> str:
    return bytes(value or b"").rstrip(b"\0").decode(errors="replace")


def _kind(message: int) -> int:
    return _NFNL_SUBSYS_NFTABLES << 8 | message


def _filter(own_ports: Iterable[int], *, generations: bool) -> bytes:
    """Return a program that passes generations or everything else, in no case our own."""
    ports = sorted(own_ports)
    # Jumps count from the next instruction: to the last one, which drops.
    is_generation = len(ports) + 2
    code = [
        (_LOAD_HALF, 0, 0, _TYPE_OFFSET),
        # Loads are big-endian, while netlink speaks the host's own order.
        (
            _JUMP_EQUAL,
            0 if generations else is_generation,
            is_generation if generations else 0,
            socket.htons(_kind(_NEWGEN)),
        ),
        (_LOAD_WORD, 0, 0, _PORT_OFFSET),
        *(
            (_JUMP_EQUAL, len(ports) - position, 0, socket.htonl(port))
            for position, port in enumerate(ports)
        ),
        (_RETURN, 0, 0, _ALL),
        (_RETURN, 0, 0, 0),
    ]
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def _attach(sock: socket.socket, program: bytes) -> None:
    # Replaces the one before without a gap.
    memory = ctypes.create_string_buffer(program, len(program))
    length = len(program) // _INSTRUCTION.size
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", length, ctypes.addressof(memory))
    )
