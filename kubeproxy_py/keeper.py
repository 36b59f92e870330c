"""
Keeps the last good state on disk, and hands it to the store where no API server answers at the start.

In a thread of its own, because disks hang. A disk that is full, slow or broken costs the state file and
nothing else; a file is either the old or the new one, whole.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from kubeproxy_py import snapshot
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.store import Store

log = structlog.get_logger()

# An API server that is there has answered by then, and its lists alone count; a node that has none is
# without Services for so long.
_GRACE_S: Final = 1.5
# One that has told of the Node is there, and ten thousand Services take it a few seconds.
_LISTING_S: Final = 10.0
# A burst of changes is one state. A reboot within these seconds finds the state before.
_SETTLE_S: Final = 2.0
# What is lost by an older state is what changed while the machine was going down, and little else; a
# few hundred kilobytes every half minute are what a cheap flash card bears for years.
_INTERVAL_S: Final = 30.0


Operation = Literal["prepare", "load", "save"]


class Failed(msgspec.Struct, frozen=True):
    """What the file could not be used for, when (Unix time), and why."""

    at: float
    operation: Operation
    reason: str


class FileState(msgspec.Struct, frozen=True):
    """How it is with the file."""

    path: str
    #: When (Unix time) the state in it was current, and its size; None: not known yet, or not ours.
    saved_at: float | None = None
    size_bytes: int = 0
    last_failure: Failed | None = None
    #: It has not been written since that failure.
    is_failing: bool = False


class StateFile:
    """The file. Writes it so that a crash at any moment leaves the old or the new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draft = path.with_name(path.name + ".tmp")

    def prepare(self) -> None:
        """Make sure that the directory is there and can be written. Raises OSError."""
        os.close(self._open_draft())
        self._draft.unlink()

    def read(self) -> bytes | None:
        """Return the content; None if there is no file. Raises OSError, Unusable."""
        try:
            # Not a FIFO that somebody put there: opening it would wait for ever.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(snapshot.MAX_BYTES + 1)
        if len(data) > snapshot.MAX_BYTES:
            raise snapshot.Unusable(f"it has more than {snapshot.MAX_BYTES} bytes")
        return data

    def write(self, data: bytes) -> None:
        """Put *data* in the file's place, all or nothing. Raises OSError, Unusable."""
        if len(data) > snapshot.MAX_BYTES:
            raise snapshot.Unusable(f"it would have more than {snapshot.MAX_BYTES} bytes")
        try:
            with os.fdopen(self._open_draft(), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._draft.rename(self.path)
        except OSError:
            # Half a draft would go on filling a disk that is full.
            with contextlib.suppress(OSError):
                self._draft.unlink()
            raise
        # The rename itself must survive the power failure.
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _open_draft(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Addresses of all that runs in the cluster: not everybody's business.
        return os.open(self._draft, flags, 0o600)


class Keeper:
    """Offers what the file has, then keeps it up to date. ``run`` belongs in a thread of its own."""

    def __init__(
        self,
        file: StateFile,
        store: Store,
        metrics: Metrics,
        *,
        node: str,
        identity: str,
        stop: threading.Event,
        release_memory: Callable[[], None] = lambda: None,
        grace_s: float = _GRACE_S,
        listing_s: float = _LISTING_S,
        settle_s: float = _SETTLE_S,
        interval_s: float = _INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            file: where the state is kept.
            store: whose state it is.
            metrics: what becomes of it.
            node: name of this node; a file of another one is not used.
            identity: of ``snapshot.identity``; a file with another one is not used.
            stop: ends ``run``.
            release_memory: called after each save, which takes megabytes for a moment.
            grace_s: how long the API server has before the file's state is offered.
            listing_s: how long it has besides, if it has told of the Node by then.
            settle_s: how long after a change it is written, so that its siblings are in it.
            interval_s: the least time between two writes.
            clock: monotonic seconds.
            now: Unix time.
        """
        self._file = file
        self._store = store
        self._metrics = metrics
        self._node = node
        self._identity = identity
        self._stop = stop
        self._release_memory = release_memory
        self._grace_s = grace_s
        self._listing_s = listing_s
        self._settle_s = settle_s
        self._interval_s = interval_s
        self._clock = clock
        self._now = now
        self._changed = threading.Event()
        self._written = ""  # digest of what the file has
        # It could not be prepared, or saved, since the last save that was done.
        self._is_failing = False
        #: Replaced as a whole: other threads read it.
        self.state = FileState(str(file.path))
        for operation in ("prepare", "load", "save"):
            metrics.snapshot_failures.labels(operation)

    def note(self) -> None:
        """Say that the state changed. Cheap; from any thread."""
        self._changed.set()

    def stop(self) -> None:
        """Wake ``run``, so that it sees that it is to stop."""
        self._changed.set()

    def run(self) -> None:
        """Offer the file's state, then save until stopped. Raises nothing that a disk does."""
        try:
            self._file.prepare()
        except OSError as error:
            self._note_failure("prepare", error)
            log.warning("snapshot.unavailable", path=str(self._file.path), error=_reason(error))
            # What cannot be written may hold what this node needs now, and may be writable later.
            self._is_failing = True
        self._offer()
        while not self._stop.is_set():
            self._changed.wait()
            if self._stop.wait(self._settle_s):
                return
            # Before the state is read: what changes from here on is in the next.
            self._changed.clear()
            self._save()
            self._release_memory()
            self._stop.wait(self._interval_s)

    def _offer(self) -> None:
        # Read only if it is needed: that takes half a second of a core at 10,000 Services.
        if self._stop.wait(self._grace_s) or self._store.is_synced:
            return
        if self._store.has_listed("Node") and self._stop.wait(self._listing_s):
            return
        if self._store.is_synced:
            return
        last = self._load()
        if last is not None and self._store.restore(last):
            log.warning(
                "snapshot.offered",
                message="the API server has not answered; used where there are no rules",
                path=str(self._file.path),
                # Not negative: boards without a battery begin each day in 1970.
                age_s=max(0.0, round(self._now() - last.saved_at, 1)),
                services={
                    family.value: len(found) for family, found in last.state.services.items()
                },
            )

    def _load(self) -> snapshot.Snapshot | None:
        try:
            data = self._file.read()
            if data is None:
                return None
            last = snapshot.parse(data, node=self._node, identity=self._identity)
        except (OSError, snapshot.Unusable) as error:
            self._note_failure("load", error)
            log.warning("snapshot.ignored", path=str(self._file.path), error=_reason(error))
            return None
        self._note_content(last.saved_at, len(data))
        return last

    def _save(self) -> None:
        store, node = self._store, self._store.node
        if node is None or not store.is_synced:
            return
        if self._is_failing and not self._is_writable():
            # Megabytes would be packed for nothing, again and again.
            return
        packed = snapshot.pack(node, {family: store.states(family) for family in store.families})
        digest = hashlib.sha256(packed).hexdigest()
        if digest == self._written:
            return
        now = self._now()
        data = snapshot.render(packed, node=self._node, identity=self._identity, saved_at=now)
        try:
            self._file.write(data)
        except (OSError, snapshot.Unusable) as error:
            self._note_unsaved(error)
            return
        if self._is_failing:
            log.info("snapshot.save_recovered", path=str(self._file.path))
        self._is_failing = False
        self._written = digest
        self._note_content(now, len(data))

    def _is_writable(self) -> bool:
        try:
            self._file.prepare()
        except OSError as error:
            self._note_unsaved(error)
            return False
        return True

    def _note_unsaved(self, error: OSError | ValueError) -> None:
        self._note_failure("save", error)
        if not self._is_failing:
            log.warning("snapshot.save_failed", path=str(self._file.path), error=_reason(error))
        self._is_failing = True
        # Not lost: it is due again, in a while.
        self._changed.set()

    def _note_content(self, saved_at: float, size_bytes: int) -> None:
        self._metrics.snapshot_saved_timestamp.set(saved_at)
        self._metrics.snapshot_bytes.set(size_bytes)
        self.state = msgspec.structs.replace(
            self.state, saved_at=saved_at, size_bytes=size_bytes, is_failing=self._is_failing
        )

    def _note_failure(self, operation: Operation, error: OSError | ValueError) -> None:
        self._metrics.snapshot_failures.labels(operation).inc()
        failed = Failed(self._now(), operation, _reason(error))
        self.state = msgspec.structs.replace(self.state, last_failure=failed, is_failing=True)


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
