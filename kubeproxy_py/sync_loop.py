"""
When a family is synced: waits for changes, suspicions and periods, and runs the Syncer.

All times come from the ``pacer``. The invariant it guards: a nudge is never lost, whenever it comes.
"""

import threading
import time
from collections.abc import Callable
from typing import Final, Literal, Protocol

import msgspec
import structlog

from kubeproxy_py import drift
from kubeproxy_py.errors import IptablesError, LockTimeout
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily
from kubeproxy_py.pacer import Outcome, Pacer
from kubeproxy_py.sync import Syncer
from kubeproxy_py.sync_log import SyncResult

log = structlog.get_logger()

# For a status page: a screenful.
_KEPT_REPAIRS: Final = 20
# How long a fight lets rules be wrong at most, unless told otherwise: kube-proxy's period.
_LONGEST_WAIT_S: Final = 30.0
# A look takes milliseconds: a two-thousandth of a core.
_AUDIT_EVERY_S: Final = 10.0
# A loop with nothing to do turns this often, to show that it still does.
_LONGEST_REST_S: Final = 10.0
# Enough to tell what a fight is about.
_NAMED_CHAINS: Final = 10


class Health(Protocol):
    """What a sync tells the health server."""

    def started(self, family: IPFamily) -> None: ...
    def queued(self, family: IPFamily) -> None: ...
    def updated(self, family: IPFamily) -> None: ...
    def excused(self, family: IPFamily) -> None: ...


class Done(msgspec.Struct, frozen=True):
    """A sync that succeeded."""

    at: float  # Unix time of its end
    result: SyncResult


class Repaired(msgspec.Struct, frozen=True):
    """What a sync put right, and when (Unix time)."""

    at: float
    repair: drift.Repair


class History(msgspec.Struct, frozen=True, kw_only=True):
    """How the syncs went so far."""

    last: Done | None = None
    #: The last that wrote anything.
    last_write: Done | None = None
    #: The last that read and compared everything the kernel has.
    last_full: Done | None = None
    #: Why the latest attempt failed; None: it did not.
    error: str | None = None
    #: The last few repairs, the newest last.
    repairs: tuple[Repaired, ...] = ()

    def with_done(self, done: Done) -> "History":
        result = done.result
        new = tuple(Repaired(done.at, repair) for repair in result.repairs)
        return History(
            last=done,
            last_write=done if result.batches else self.last_write,
            last_full=done if result.is_full else self.last_full,
            repairs=(*self.repairs, *new)[-_KEPT_REPAIRS:],
        )


def _to_nobody(_news: SyncResult | drift.Contest) -> None:
    pass


def _nothing() -> None:
    pass


class SyncLoop:
    """Runs a Syncer whenever its Pacer says so, until stopped."""

    def __init__(
        self,
        family: IPFamily,
        syncer: Syncer,
        pacer: Pacer,
        *,
        health: Health,
        metrics: Metrics,
        suspects: drift.Suspects | None = None,
        tell: Callable[[SyncResult | drift.Contest], None] = _to_nobody,
        beat: Callable[[], None] = _nothing,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._family = family
        self._syncer = syncer
        self._pacer = pacer
        self._health = health
        self._metrics = metrics
        # Called at every turn, so that a loop which hangs is missed.
        self._beat = beat
        self._clock = clock
        self._wall_clock = wall_clock
        # Called after each sync that succeeded and when a contest has begun; must not block.
        self._tell = tell
        self._wake = threading.Condition()
        # Guarded by the condition: the pacer, and
        self._is_stopped = False
        self._suspects = suspects or drift.Suspects(_LONGEST_WAIT_S)
        # Only the loop's own: what the sync that runs looks at, and what it repaired.
        self._look: drift.Look | None = None
        self._has_repaired = False
        self._audit_at = clock() + _AUDIT_EVERY_S
        #: Replaced as a whole: other threads read it.
        self.history = History()

    def nudge(self) -> None:
        """Say that there is something to sync. Cheap; from any thread."""
        self._health.queued(self._family)
        self._metrics.sync_last_queued_timestamp.labels(self._family.value).set_to_current_time()
        with self._wake:
            self._pacer.request(self._clock())
            self._wake.notify()

    def suspect(self, suspicion: drift.Suspicion) -> None:
        """Say that others touched what may be ours. Cheap; from any thread."""
        with self._wake:
            self._suspects.add(suspicion, self._clock())
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._is_stopped = True
            self._wake.notify()

    def run(self) -> None:
        """Sync until stopped. Raises whatever is not an IptablesError."""
        self._health.started(self._family)
        self._metrics.sync_last_queued_timestamp.labels(self._family.value).set_to_current_time()
        while (turn := self._wait()) is not None:
            if turn == "audit":
                self._audit()
                continue
            started, waited_s = self._clock(), self._syncer.lock_waited_s
            outcome = self._sync()
            ended = self._clock()
            if outcome != "locked":
                # A change that waited for the lock may have been undone meanwhile.
                self._syncer.abandon_lock_wait()
            # Waiting for the lock costs nobody anything, so it is no reason for a pause.
            idle_s = self._syncer.lock_waited_s - waited_s
            with self._wake:
                self._pacer.finished(ended, took_s=ended - started - idle_s, outcome=outcome)
                self._pacer.remind(self._syncer.retry_at)
                self._finish_look(ended)

    def _audit(self) -> None:
        is_right = self._syncer.audit()
        with self._wake:
            now = self._clock()
            self._audit_at = now + _AUDIT_EVERY_S
            if not is_right:
                self._pacer.request(now)

    def _wait(self) -> Literal["sync", "audit"] | None:
        """Wait until a sync is due, or nothing is and an audit may be; None when stopped."""
        with self._wake:
            while not self._is_stopped:
                self._beat()
                now = self._clock()
                if self._suspects.due_at() <= now:
                    self._pacer.request(now)
                left = self._pacer.due_at() - now
                if left <= 0:
                    self._look = self._suspects.take(now)
                    if self._look is not None:
                        self._syncer.look(self._look)
                    elif self._pacer.take_look(now):
                        # Whether the kernel still has what it was given.
                        self._syncer.forget_live()
                    self._pacer.started()
                    return "sync"
                if now >= self._audit_at:
                    return "audit"
                suspects_at = self._suspects.due_at()
                if suspects_at > now:
                    left = min(left, suspects_at - now)
                left = min(left, self._audit_at - now)
                self._wake.wait(min(left, _LONGEST_REST_S))
            return None

    def _finish_look(self, now: float) -> None:
        if self._look is None:
            return
        contest = self._suspects.finished(self._look, now, has_repaired=self._has_repaired)
        self._look = None
        if contest is not None:
            log.warning(
                "drift.contested",
                ip_family=self._family.value,
                chains=[f"{table}/{chain}" for table, chain in sorted(contest.chains or ())][
                    :_NAMED_CHAINS
                ]
                or "any",
                wait_s=contest.wait_s,
                **drift.told(contest.culprits),
            )
            self._tell(contest)

    def contested(self) -> tuple[drift.Contest, ...]:
        """Return who fights with us now. Waits for nobody but a nudge that is being taken."""
        with self._wake:
            return self._suspects.contested(self._clock())

    def _note_error(self, error: IptablesError) -> None:
        self.history = msgspec.structs.replace(self.history, error=str(error))

    def _sync(self) -> Outcome:
        self._has_repaired = False
        try:
            result = self._syncer.sync()
            if result is None:
                # Before everything was listed; the lists nudge. No restart would bring them sooner.
                self._health.excused(self._family)
            else:
                self._has_repaired = bool(result.repairs)
                self.history = self.history.with_done(Done(self._wall_clock(), result))
                self._health.updated(self._family)
                self._tell(result)
        except LockTimeout as error:
            log.warning("sync.delayed", ip_family=self._family.value, error=str(error))
            self._note_error(error)
        except IptablesError as error:
            log.error(  # noqa: TRY400 - the cause is another program; our stack says nothing
                "sync.failed",
                ip_family=self._family.value,
                error=str(error),
                excerpt=getattr(error, "excerpt", "") or None,
            )
            self._note_error(error)
            self._health.queued(self._family)
            with self._wake:
                is_disturbed = self._suspects.due_at() <= self._clock()
            return "disturbed" if is_disturbed else "failed"
        else:
            return "ok"
        self._health.queued(self._family)
        return "locked"
