"""
Gathers what each part of the daemon keeps into one ``status_document.Status``, and judges it.

Nothing that is called here waits for a sync, so an answer takes milliseconds whatever the daemon does.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from kubeproxy_py import drift, failures
from kubeproxy_py.conntrack import Outcome
from kubeproxy_py.iptables.lock import LockWait
from kubeproxy_py.iptables.runner import Programs
from kubeproxy_py.keeper import FileState
from kubeproxy_py.model import IPFamily, Node
from kubeproxy_py.status_document import (
    AuditStatus,
    ConntrackStatus,
    ContestedChains,
    DriftRepair,
    FailureStatus,
    FamilyStatus,
    LockStatus,
    NodeStatus,
    QuarantinedService,
    State,
    StateFileFailure,
    StateFileStatus,
    Status,
    SyncStatus,
    WatchStatus,
)
from kubeproxy_py.sync_log import Programmed
from kubeproxy_py.sync_loop import Done, History
from kubeproxy_py.watch import WatchState

# A server that restarts is back by then, and a watch that was cut has been made anew.
_FAILING_IS_BAD_S: Final = 60.0
# Whoever is silent is asked after two minutes; the alert KubeProxyWatchSilent has the same limit.
_STALE_S: Final = 300.0
# Many hosts do without, and few Services need them.
_DISPENSABLE: Final = frozenset({"nfacct", "random-fully", "sctp"})
_STATE_FILE_FAILURES: Final = {"prepare": "kept", "load": "used", "save": "written"}
# Chains that one line of text has room for.
_NAMED_CHAINS: Final = 5


class FamilyParts(msgspec.Struct, frozen=True, kw_only=True):
    """Where to ask for one family's part."""

    programs: Programs
    history: Callable[[], History]
    programmed: Callable[[], Programmed | None]
    last_failure: Callable[[], failures.Failure | None]
    contested: Callable[[], Sequence[drift.Contest]]
    lock_wait: Callable[[], LockWait | None]
    lock_waited_s: Callable[[], float]
    #: Whether the rules come from the state file.
    is_restored: Callable[[], bool]
    #: How many Services the audit has compared, and how many of them differed.
    audited: Callable[[], tuple[int, int]]
    #: What rules would need and this host does not have.
    missing_capabilities: tuple[str, ...]


class Gatherer:
    """Asks every part of the daemon, once there is one."""

    def __init__(
        self,
        *,
        node_name: str,
        version: str,
        source: str,
        started_at: float,
        dispatch: str,
        unreadiness: Callable[[], Sequence[str]],
        pending: Callable[[], Mapping[IPFamily, float]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Know what is known from the start.

        Args:
            node_name: of this node's Node object.
            version: this program's.
            source: where objects come from, in words.
            started_at: Unix time at which this process began.
            dispatch: the layout that was asked for.
            unreadiness: every reason not to be ready.
            pending: for how many seconds the oldest change of each family has been waiting.
            clock: Unix time.
        """
        self._node_name = node_name
        self._version = version
        self._source = source
        self._started_at = started_at
        self._dispatch = dispatch
        self._unreadiness = unreadiness
        self._pending = pending
        self._clock = clock
        #: What the daemon is about, for the time before it programs anything.
        self.phase = "starting"
        self.backend = ""
        #: Returns the Node, as far as it is known.
        self.node: Callable[[], Node | None] = _nobody
        self.conntrack: Callable[[], Mapping[IPFamily, tuple[float, Outcome | str]]] = dict
        #: Both return sentences, each about one Service.
        self.refused_addresses: Callable[[], Sequence[str]] = tuple
        self.doubts: Callable[[], Sequence[str]] = tuple
        #: Returns how it is with the state file, where there is one.
        self.state_file: Callable[[], FileState | None] = _nobody
        self._lock = threading.Lock()
        # Replaced under the lock, as wholes: requests come on other threads.
        self._families: Mapping[IPFamily, FamilyParts] = {}
        self._watches: tuple[Callable[[], WatchState], ...] = ()

    def add_family(self, family: IPFamily, parts: FamilyParts) -> None:
        with self._lock:
            self._families = {**self._families, family: parts}

    def add_watch(self, state: Callable[[], WatchState]) -> None:
        with self._lock:
            self._watches = (*self._watches, state)

    def status(self) -> Status:
        """Return how everything is now."""
        now = self._clock()
        pending, conntrack = self._pending(), self.conntrack()
        node = _node(self._node_name, self.node())
        families = tuple(
            family_status(
                family, parts, pending_s=pending.get(family), conntrack=conntrack.get(family)
            )
            for family, parts in sorted(self._families.items(), key=_by_name)
        )
        watches = tuple(watch_status(state()) for state in self._watches)
        file = self.state_file()
        state_file = None if file is None else state_file_status(file, families)
        unreadiness = self._unreadiness()
        state, warnings = judge(
            unreadiness, node=node, families=families, watches=watches, state_file=state_file
        )
        return Status(
            now=_time(now),
            state=state,
            reasons=tuple(unreadiness),
            warnings=warnings,
            phase=self.phase,
            node=node,
            version=self._version,
            pid=os.getpid(),
            started_at=_time(self._started_at),
            source=self._source,
            backend=self.backend,
            dispatch=self._dispatch,
            families=families,
            watches=watches,
            refused_addresses=tuple(self.refused_addresses()),
            doubts=tuple(self.doubts()),
            state_file=state_file,
        )

    def failures(self) -> tuple[FailureStatus, ...]:
        """Return the last failure of each family that had one, with its input."""
        families = sorted(self._families.items(), key=_by_name)
        found = ((family, parts.last_failure()) for family, parts in families)
        return tuple(_failure(family, failure) for family, failure in found if failure is not None)


def _by_name(item: tuple[IPFamily, FamilyParts]) -> str:
    return item[0].value


def family_status(
    family: IPFamily,
    parts: FamilyParts,
    *,
    pending_s: float | None,
    conntrack: tuple[float, Outcome | str] | None,
) -> FamilyStatus:
    """Return one family's part of the document."""
    history, programmed, failure = parts.history(), parts.programmed(), parts.last_failure()
    return FamilyStatus(
        ip_family=family.value,
        program=parts.programs.restore,
        program_version=".".join(map(str, parts.programs.version)),
        services=programmed.services if programmed else 0,
        endpoints=programmed.endpoints if programmed else 0,
        rules=programmed.rules if programmed else {},
        trees=tuple(f"{table}/{chain}" for table, chain in programmed.trees) if programmed else (),
        last_sync=_sync(history.last),
        last_write=_sync(history.last_write),
        last_full_sync=_sync(history.last_full),
        pending_seconds=pending_s,
        error=history.error,
        quarantined=tuple(
            QuarantinedService(
                service=str(case.service),
                reason=case.reason,
                since=_time(case.since),
                retry_at=_time(case.retry_at),
                attempts=case.attempts,
            )
            for case in (programmed.quarantined if programmed else ())
        ),
        repairs=tuple(
            DriftRepair(
                at=_time(done.at),
                table=done.repair.table,
                kind=done.repair.kind,
                count=done.repair.count,
                chains=done.repair.chains,
                processes=_processes(done.repair.culprits),
            )
            for done in history.repairs
        ),
        contested=tuple(
            ContestedChains(
                chains=tuple(f"{table}/{chain}" for table, chain in sorted(contest.chains or ())),
                processes=_processes(contest.culprits),
                wait_seconds=contest.wait_s,
            )
            for contest in parts.contested()
        ),
        conntrack=_conntrack(conntrack),
        # Its input is asked for by itself.
        last_failure=None
        if failure is None
        else msgspec.structs.replace(_failure(family, failure), lines=()),
        missing_capabilities=parts.missing_capabilities,
        lock=_lock(parts),
        is_restored=parts.is_restored(),
        audit=_audit(*parts.audited()),
    )


def state_file_status(file: FileState, families: Iterable[FamilyStatus]) -> StateFileStatus:
    """Return the state file's part of the document."""
    failed = file.last_failure
    return StateFileStatus(
        path=file.path,
        is_in_use=any(family.is_restored for family in families),
        saved_at=None if file.saved_at is None else _time(file.saved_at),
        size_bytes=file.size_bytes,
        last_failure=None
        if failed is None
        else StateFileFailure(
            at=_time(failed.at), operation=failed.operation, reason=failed.reason
        ),
        is_failing=file.is_failing,
    )


def watch_status(state: WatchState) -> WatchStatus:
    """Return one watch's part of the document."""
    last, silent_s = state.last_event_at, state.silent_for_s
    return WatchStatus(
        kind=state.kind,
        objects=state.objects,
        resource_version=state.resource_version,
        last_event_at=None if last is None else _time(last),
        silent_seconds=None if silent_s is None else round(silent_s, 3),
        is_stale=silent_s is not None and silent_s > _STALE_S,
        failing_seconds=state.failing_for_s,
        error=state.error,
    )


def judge(
    unreadiness: Sequence[str],
    *,
    node: NodeStatus,
    families: Iterable[FamilyStatus],
    watches: Iterable[WatchStatus],
    state_file: StateFileStatus | None = None,
) -> tuple[State, tuple[str, ...]]:
    """Return how it is, and what is wrong besides the reasons not to be ready."""
    warnings = [
        *(warning for family in families for warning in _family_warnings(family)),
        *(warning for watch in watches for warning in _watch_warnings(watch)),
    ]
    if state_file is not None and state_file.is_failing and state_file.last_failure is not None:
        failed = state_file.last_failure
        how = _STATE_FILE_FAILURES[failed.operation]
        warnings.append(f"the state file {state_file.path} cannot be {how}: {failed.reason}")
    if node.is_known and not node.is_eligible:
        warnings.append(
            f"Node {node.name} is being deleted or drained by the autoscaler: /healthz is 503"
        )
    if unreadiness:
        return "not ready", tuple(warnings)
    return "degraded" if warnings else "ready", tuple(warnings)


def _family_warnings(family: FamilyStatus) -> Iterable[str]:
    name = family.ip_family
    if family.error is not None:
        yield f"{name}: the last sync failed: {family.error}"
    for contest in family.contested:
        chains = ", ".join(contest.chains[:_NAMED_CHAINS]) or "all chains"
        who = ", ".join(contest.processes) or "an unknown process"
        yield f"{name}: {who} changes {chains} again and again; repairs wait {contest.wait_seconds:g} s"
    missing = [what for what in family.missing_capabilities if what not in _DISPENSABLE]
    if missing:
        yield f"{name}: the kernel or iptables lacks {', '.join(missing)}, which Services may need"
    if family.lock is not None and family.lock.waiting_seconds is not None:
        who = "; ".join(family.lock.holders) or "nobody that can be seen from here"
        yield (
            f"{name}: waits for the xtables lock for {family.lock.waiting_seconds:.1f} s;"
            f" who has it: {who}"
        )
    if family.conntrack is not None and family.conntrack.error:
        yield f"{name}: stale UDP connections are not cleaned up: {family.conntrack.error}"


def _watch_warnings(watch: WatchStatus) -> Iterable[str]:
    if watch.failing_seconds is not None and watch.failing_seconds >= _FAILING_IS_BAD_S:
        yield f"{watch.kind}s cannot be read from the API server: {watch.error}"
    elif watch.is_stale:
        yield f"the watch of {watch.kind}s has been silent for more than {_STALE_S:.0f} s"


def _sync(done: Done | None) -> SyncStatus | None:
    if done is None:
        return None
    result = done.result
    return SyncStatus(
        at=_time(done.at),
        seconds=round(result.seconds, 6),
        kind="full" if result.is_full else "partial",
        restores=result.batches,
        chains_written=result.chains_written,
        chains_deleted=result.chains_deleted,
        rules_written=result.rules_written,
    )


def _conntrack(ran: tuple[float, Outcome | str] | None) -> ConntrackStatus | None:
    if ran is None:
        return None
    at, outcome = ran
    if isinstance(outcome, str):
        return ConntrackStatus(at=_time(at), error=outcome)
    return ConntrackStatus(at=_time(at), deleted=outcome.deleted, failed=outcome.failed)


def _failure(family: IPFamily, failure: failures.Failure) -> FailureStatus:
    return FailureStatus(
        ip_family=family.value,
        at=_time(failure.at),
        message=failure.message,
        table=failure.table,
        refused=failure.refused,
        first_line=failure.first_line,
        total_lines=failure.total_lines,
        lines=failure.lines,
    )


def _node(name: str, node: Node | None) -> NodeStatus:
    if node is None:
        return NodeStatus(name=name)
    return NodeStatus(
        name=name, is_known=True, is_eligible=node.is_eligible, ips=node.ips, zone=node.zone
    )


def _nobody() -> None:
    return None


def _lock(parts: FamilyParts) -> LockStatus:
    wait = parts.lock_wait()
    return LockStatus(
        waited_seconds=round(parts.lock_waited_s(), 3),
        waiting_seconds=None if wait is None else round(wait.seconds, 3),
        holders=() if wait is None else tuple(map(str, wait.holders)),
    )


def _audit(compared: int, differed: int) -> AuditStatus:
    return AuditStatus(services_compared=compared, services_differed=differed)


def _processes(culprits: Iterable[drift.Culprit]) -> tuple[str, ...]:
    """Return names, each once, with the parent's: the pid is another each time."""
    return tuple(
        dict.fromkeys(
            f"{who.process} (started by {who.parent})" if who.parent else who.process
            for who in culprits
        )
    )


def _time(unix: float) -> datetime:
    return datetime.fromtimestamp(round(unix, 3), UTC)
