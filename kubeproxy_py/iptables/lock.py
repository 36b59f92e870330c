"""
Who has the xtables lock while a restore of ours waits for it, and for how long it has waited.

It only looks, and never takes the lock, not even to try: a program that is run without ``-w`` would
fail because of that. The lock is flock(2)'s on one file for all legacy programs of a host; nft has
none. The invariant: time is counted as waiting only where somebody else is seen to have the lock, or
where it lasts longer than a program takes to start.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import structlog

from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

# How often to look while a restore runs. Most are over before the first time; who has the lock already,
# for a big table, is looked at less and less often.
_LOOK_S: Final = 0.05
_LONGEST_LOOK_S: Final = 0.4
# Others hold it for milliseconds, a big table for half a second; longer is worth a line in the log.
_TOLD_AFTER_S: Final = 1.0
# A program that was started takes a moment until it asks for the lock, more on a busy machine.
# Where nobody is seen to have it, as in a container with process ids of its own, only what lasts
# longer than that is a wait.
_UNSEEN_AFTER_S: Final = 1.0
# Enough of a command line to know the program and the script that it is.
_MAX_COMMAND: Final = 200


class Holder(msgspec.Struct, frozen=True):
    """A process that has the lock."""

    pid: int  # as this process's namespace counts
    process: str  # at most 15 bytes of its name; "" if it was gone already
    command: str = ""  # its command line, blanks between the words
    is_elsewhere: bool = False  # its files are another container's, or the host's

    def __str__(self) -> str:
        where = ", in another container or on the host" if self.is_elsewhere else ""
        return f"{self.process or 'a process'} (pid {self.pid}{where}): {self.command}"


class LockWait(msgspec.Struct, frozen=True):
    """A wait that is not over."""

    seconds: float
    holders: tuple[Holder, ...]

    def __str__(self) -> str:
        if not self.holders:
            return "nobody that can be seen from here has it; look outside of this container"
        return "; ".join(map(str, self.holders))


def lock_path() -> Path:
    """Return the file that legacy programs lock, as libxtables finds it."""
    return Path(os.environ.get("XTABLES_LOCKFILE") or "/run/xtables.lock")


def find_holders(
    path: Path, locks: Path = Path("/proc/locks"), proc: Path = Path("/proc")
) -> tuple[Holder, ...]:
    """Return who has *path* locked, as far as it can be seen.

    The kernel leaves out locks of processes that this process namespace does not have (proc(5),
    fs/locks.c), so nobody found does not mean that nobody has it.
    """
    try:
        status = path.stat()
        lines = locks.read_text().splitlines()
    except OSError:
        return ()
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    pids = []
    for line in lines:
        # "1: FLOCK  ADVISORY  WRITE 1234 00:18:5678 0 EOF"; "1: -> FLOCK …" for who waits.
        words = line.split()
        if len(words) >= 6 and words[1] == "FLOCK" and words[5] == file:
            pids.append(int(words[4]))
    return tuple(_holder(pid, proc) for pid in dict.fromkeys(pids))


def _holder(pid: int, proc: Path) -> Holder:
    directory = proc / str(pid)
    try:
        process = (directory / "comm").read_text(errors="replace").strip()
        words = (directory / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return Holder(pid, "")
    try:
        is_elsewhere = (directory / "ns/mnt").readlink() != (proc / "self/ns/mnt").readlink()
    except OSError:
        is_elsewhere = False
    return Holder(pid, process, " ".join(words)[:_MAX_COMMAND], is_elsewhere)


class LockWatch:
    """Follows the waits of one family's restores, one restore at a time."""

    def __init__(
        self,
        family: IPFamily,
        metrics: Metrics,
        *,
        find: Callable[[], tuple[Holder, ...]] = lambda: find_holders(lock_path()),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._family = family
        self._find = find
        self._clock = clock
        self._seconds = metrics.lock_wait_seconds.labels(family.value)
        self._is_waiting = metrics.lock_waiting.labels(family.value)
        self._began = 0.0
        self._counted_until = 0.0
        self._is_told = False
        #: How long restores have waited so far, all together.
        self.waited_s = 0.0
        #: Replaced as a whole: other threads read it.
        self.wait: LockWait | None = None

    @contextlib.contextmanager
    def following(self, pid: int) -> Iterator[None]:
        """Look again and again whether process *pid*, a restore of ours, waits; until the block ends."""
        is_over = threading.Event()

        def follow() -> None:
            pause_s = _LOOK_S
            while not is_over.wait(pause_s):
                pause_s = min(2 * pause_s, _LONGEST_LOOK_S) if self.look(pid) else _LOOK_S

        self.start()
        thread = threading.Thread(target=follow, name="lock-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def start(self) -> None:
        """Say that a restore begins."""
        if self.wait is None:
            # Otherwise this one takes up the wait of the one before, which gave up.
            self._began = self._counted_until = self._clock()

    def look(self, pid: int) -> bool:
        """See whether process *pid*, a restore of ours, waits for somebody; return whether it has the lock."""
        holders = self._find()
        if any(holder.pid == pid for holder in holders):
            self.finish(has_lock=True)
            return True
        now = self._clock()
        if not holders and now - self._began < _UNSEEN_AFTER_S:
            return False
        self._count(now, holders)
        if not self._is_told and now - self._began >= _TOLD_AFTER_S:
            self._is_told = True
            assert self.wait is not None
            log.warning(
                "lock.waiting",
                ip_family=self._family.value,
                waited_s=round(self.wait.seconds, 1),
                holder=str(self.wait),
                pid=[holder.pid for holder in holders],
            )
        return False

    def finish(self, *, has_lock: bool) -> None:
        """Say that the restore got the lock, or gave up waiting for it."""
        wait = self.wait
        if not has_lock:
            self._count(self._clock(), wait.holders if wait else self._find())
            return
        if wait is None:
            return
        if self._is_told:
            log.info("lock.acquired", ip_family=self._family.value, waited_s=round(wait.seconds, 1))
        self._end()
        # What this restore may still wait for begins here: each table takes the lock for itself.
        self._began = self._counted_until = self._clock()

    def abandon(self) -> None:
        """Say that no restore follows one that gave up: there is nothing to be written any more."""
        wait = self.wait
        if wait is None:
            return
        if self._is_told:
            log.info(
                "lock.abandoned", ip_family=self._family.value, waited_s=round(wait.seconds, 1)
            )
        self._end()

    def _end(self) -> None:
        self.wait = None
        self._is_told = False
        self._is_waiting.set(0)

    def _count(self, now: float, holders: tuple[Holder, ...]) -> None:
        self._seconds.inc(now - self._counted_until)
        self.waited_s += now - self._counted_until
        self._counted_until = now
        self._is_waiting.set(1)
        self.wait = LockWait(now - self._began, holders)
