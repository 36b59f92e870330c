"""
Notice that others have changed legacy tables: the kernel tells nobody, so it is asked.

Whoever writes legacy tables opens the xtables lock file, which wakes us and says who it is; and once
a second the kernel is asked how large the tables are, in case somebody did without the lock. Nothing
is read rule by rule and nothing repaired here. The invariant: what could have been missed is told as
"anything may have changed", never as nothing.
"""

import contextlib
import ctypes
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

import structlog

from kubeproxy_py import rules
from kubeproxy_py.drift import Culprit, Suspicion
from kubeproxy_py.iptables import libiptc
from kubeproxy_py.iptables.lock import lock_path
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

# linux/netfilter_ipv4/ip_tables.h, and the same number for IPv6.
_SO_GET_INFO: Final = 64
# struct ipt_getinfo: name, valid hooks, five entry points, five underflows, entries, bytes.
_INFO: Final = struct.Struct("=32s13I")
_LEVEL: Final = {IPFamily.V4: socket.IPPROTO_IP, IPFamily.V6: socket.IPPROTO_IPV6}
_TABLES: Final = (rules.NAT, rules.FILTER, rules.MANGLE)

# Once for all: each CDLL, and each array type of ctypes, is a class of its own, which only a look for
# cycles frees again. One a second and family took 4 MiB in ten minutes.
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_InfoBuffer: Final = ctypes.c_char * _INFO.size

# linux/fanotify.h; only this of the kernel's ways to watch files says which process it was.
_FAN_CLOEXEC: Final = 0x1
_FAN_NONBLOCK: Final = 0x2
_FAN_MARK_ADD: Final = 0x1
_FAN_CLOSE: Final = 0x8 | 0x10
_FAN_OPEN: Final = 0x20
_FAN_Q_OVERFLOW: Final = 0x4000
_AT_FDCWD: Final = -100
# struct fanotify_event_metadata: length, version, its own length, mask, file descriptor, process.
_EVENT: Final = struct.Struct("=IBxHQii")
_READ_BYTES: Final = 4096

_POLL_S: Final = 1.0
# A change that leaves all sizes as they are (a rule replaced, a chain renamed) is found only by
# reading everything, half a second of work at 5,000 Services. Others take the lock for each Pod that
# starts, and for their own rules, so it is worth no more than a twentieth of the time.
_CLOSER_LOOK_S: Final = 10.0

Infos = dict[str, bytes]


def read_infos(family: IPFamily) -> Infos:
    """Return how large each legacy table is and where its chains begin.

    Raises:
        OSError: the kernel gives no raw socket.
    """
    try:
        names = libiptc.TABLE_LISTS[family].read_text().split()
    except OSError:
        return {}
    infos: Infos = {}
    with socket.socket(family.socket_family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        # Asking for a table that does not exist would create it.
        for table in (name for name in _TABLES if name in names):
            buffer = _InfoBuffer.from_buffer_copy(_INFO.pack(table.encode(), *[0] * 13))
            size = ctypes.c_uint32(_INFO.size)
            if not _LIBC.getsockopt(
                sock.fileno(), _LEVEL[family], _SO_GET_INFO, buffer, ctypes.byref(size)
            ):
                infos[table] = buffer.raw
    return infos


def entries_bytes(info: bytes) -> int:
    """Return how large the entries of a table are, of which ``read_infos`` says *info*."""
    size: int = _INFO.unpack(info)[-1]
    return size


class LegacyWatcher:
    """Calls back, mostly from a thread of its own, when others have changed legacy tables."""

    def __init__(
        self,
        families: Iterable[IPFamily],
        callback: Callable[[Suspicion], None],
        *,
        read: Callable[[IPFamily], Infos] = read_infos,
        lock_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callback = callback
        self._read = read
        self._lock_file = lock_file or lock_path()
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="legacy-infos", daemon=True)
        self._wake = -1
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._lock_users: LockUsers | None = None
        self._known: dict[IPFamily, Infos] = {family: {} for family in families}
        self._own: dict[int, IPFamily] = {}  # by process
        # Who else has used the lock while one of those runs.
        self._meanwhile: dict[IPFamily, tuple[Culprit, ...]] = {}
        self._looked_at = float("-inf")
        # Who has used the lock since, by the families of which that has not told anything yet: what
        # keeps all sizes may have been done to them.
        self._unseen: dict[IPFamily, tuple[Culprit, ...]] = {}

    def start(self) -> None:
        """Begin; changes after the return of this are noticed.

        Raises:
            OSError: the kernel cannot be asked. Nothing is running then.
        """
        with self._lock:
            for family in self._known:
                self._known[family] = self._read(family)
            try:
                self._lock_users = LockUsers(self._lock_file)
            except OSError as error:
                # Sizes are still asked for; what does not change them waits for the audit.
                log.info("drift.lock_unwatched", error=str(error))
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
            # A restore may still be running, and end after this.
            if self._lock_users is not None:
                self._lock_users.close()
            self._lock_users = None

    @contextlib.contextmanager
    def own(self, family: IPFamily, pid: int) -> Iterator[None]:
        """Overlook what process *pid*, a child of ours, does to *family* meanwhile."""
        with self._lock:
            found = self._look()
            self._own[pid] = family
            self._meanwhile[family] = ()
        self._tell(found)
        try:
            yield
        finally:
            with self._lock:
                others, has_closed = self._others()
                self._has_changed(family)
                del self._own[pid]
                # Our thread, too, may have been woken and told of somebody who came after our program
                # and before this.
                others = tuple(dict.fromkeys((*self._meanwhile.pop(family, ()), *others)))
                if has_closed:
                    self._note_unseen(others, told=[family])
            # What others did at the same time is in the sizes that are taken for ours now.
            self._tell(dict.fromkeys([family], others) if others else {})

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._lock_users is not None:
            poller.register(self._lock_users.fileno(), select.POLLIN)
        while True:
            ready = poller.poll(_POLL_S * 1000)
            if any(descriptor == self._wake for descriptor, _ in ready):
                return
            with self._lock:
                found = self._look()
            self._tell(found)

    def _look(self) -> dict[IPFamily, tuple[Culprit, ...]]:
        """Return the families to be looked at, and who held the lock."""
        others, has_closed = self._others()
        busy = set(self._own.values())
        for family in busy:
            seen = self._meanwhile.get(family, ())
            self._meanwhile[family] = tuple(dict.fromkeys((*seen, *others)))
        found = {
            family: others
            for family in self._known
            if family not in busy and self._has_changed(family)
        }
        if has_closed:
            self._note_unseen(others, told=found)
        if self._unseen and self._clock() - self._looked_at >= _CLOSER_LOOK_S:
            found = {**self._unseen, **found}
            self._unseen, self._looked_at = {}, self._clock()
        return found

    def _note_unseen(self, others: tuple[Culprit, ...], told: Collection[IPFamily]) -> None:
        for family in self._known:
            if family not in told:
                unseen = self._unseen.get(family, ())
                self._unseen[family] = tuple(dict.fromkeys((*unseen, *others)))

    def _others(self) -> tuple[tuple[Culprit, ...], bool]:
        """Return who else used the lock since this was last asked; and whether one is done."""
        if self._lock_users is None:
            return (), False
        # This process itself takes the lock only to read counters.
        own = {*self._own, os.getpid()}
        users = [user for user in self._lock_users.read() if user[0].pid not in own]
        # Who opened it earlier and still has it may be the one who has written since.
        holders = [who for who in self._lock_users.holders() if who.pid not in own]
        others = tuple(dict.fromkeys([*(who for who, _ in users), *holders]))
        return others, any(is_done for _, is_done in users)

    def _has_changed(self, family: IPFamily) -> bool:
        try:
            infos = self._read(family)
        except OSError as error:
            log.warning("drift.watch_unavailable", error=str(error))
            return False
        if infos == self._known[family]:
            return False
        self._known[family] = infos
        return True

    def _tell(self, found: dict[IPFamily, tuple[Culprit, ...]]) -> None:
        for family, culprits in found.items():
            for culprit in culprits or (None,):
                self._callback(Suspicion(family, culprit, None))


class LockUsers:
    """Tells who opens and closes a file (fanotify(7)). Not for several threads at once."""

    def __init__(self, path: Path, proc: Path = Path("/proc")) -> None:
        """Watch *path*, as soon as it exists.

        Raises:
            OSError: the kernel does not allow it: it takes CAP_SYS_ADMIN.
        """
        self._path = path
        self._proc = proc
        self._names: dict[int, str] = {}
        self._fd: int = _LIBC.fanotify_init(_FAN_CLOEXEC | _FAN_NONBLOCK, os.O_RDONLY)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot watch the xtables lock: {os.strerror(number)}")
        self._mark()

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[tuple[Culprit, bool]]:
        """Return who has opened or closed it since this was last asked, and whether they closed."""
        found: list[tuple[Culprit, bool]] = []
        # Nothing (more) to be read; or no descriptor to be had, in which case sizes must do.
        with contextlib.suppress(OSError):
            while data := os.read(self._fd, _READ_BYTES):
                for _, _, _, mask, descriptor, pid in _EVENT.iter_unpack(data):
                    if descriptor >= 0:
                        os.close(descriptor)
                    is_done = bool(mask & (_FAN_CLOSE | _FAN_Q_OVERFLOW))
                    found.append((Culprit(self._name(pid, is_done=is_done), pid or None), is_done))
        # The file may have been made, or made anew; watching it again changes nothing.
        self._mark()
        return found

    def holders(self) -> list[Culprit]:
        """Return who had it open when that was last read."""
        return [Culprit(name, pid) for pid, name in self._names.items()]

    def close(self) -> None:
        os.close(self._fd)

    def _mark(self) -> None:
        _LIBC.fanotify_mark(
            self._fd,
            _FAN_MARK_ADD,
            ctypes.c_uint64(_FAN_OPEN | _FAN_CLOSE),
            _AT_FDCWD,
            os.fsencode(self._path),
        )

    def _name(self, pid: int, *, is_done: bool) -> str:
        # A process that has closed it may be gone before it can be asked, hence the memory.
        name = self._names.pop(pid, "")
        if not name:
            try:
                name = (self._proc / str(pid) / "comm").read_text(errors="replace").strip()
            except OSError:
                name = "unknown"
        if not is_done:
            self._names[pid] = name
        return name
