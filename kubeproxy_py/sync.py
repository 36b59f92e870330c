"""
The recipe: changed Services → desired chains → batches → kernel, for one family.

It decides nothing itself: what rules there should be (``ruleset``), what must be written
(``iptables.plan``) and when (``sync_loop``) are other modules' business. The invariant it guards: after
an error nothing is assumed about the kernel; it is read again before anything is written.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

import msgspec

from kubeproxy_py import (
    audit,
    conntrack,
    drift,
    echoes,
    failures,
    refusals,
    renames,
    repairs,
    rules,
    sync_log,
    urgency,
)
from kubeproxy_py.dispatch import NAT_SERVICES, ChainId
from kubeproxy_py.errors import BatchRejected, IptablesError, LockTimeout
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.iptables.lock import LockWait
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceName, ServiceState
from kubeproxy_py.quarantine import Quarantine
from kubeproxy_py.ruleset import HealthCheck, Ruleset
from kubeproxy_py.store import Changes, Store
from kubeproxy_py.sync_log import Programmed, Quarantined, SyncResult

# iptables-nft-restore takes time in proportion to the square of its input: 100 Services with five
# endpoints each (2,200 rules) a batch are near the optimum (benchmarks/).
NFT_BATCH_RULES: Final = 2500
# When so many Services have changed that one restore does not do, what is urgent is written first.
# Fewer take about as long as the additional restore would.
_STAGED_ABOVE: Final = 100
# How many times one sync may set Services aside: each names at least one, and costs two looks at the
# kernel. What is left is for the next sync.
_MAX_REFUSALS: Final = 20
# Times at which changes were triggered, kept while syncs fail: 3 MB. The latency of what comes after
# them is not observed.
_MAX_TRIGGERS: Final = 100_000


class Kernel(Protocol):
    """What a Syncer needs of ``iptables.runner.Iptables``."""

    @property
    def lock_wait(self) -> LockWait | None: ...
    @property
    def lock_waited_s(self) -> float: ...
    @property
    def unreadable(self) -> frozenset[ChainId]: ...
    def abandon_lock_wait(self) -> None: ...
    def has_rules(self, chain: ChainId) -> bool: ...
    def save(self, *, known: chains.Tables | None = None) -> chains.Tables: ...
    def restore(self, batch: plan.Batch) -> None: ...


def unwatched(_batch: plan.Batch) -> AbstractContextManager[None]:
    """Surround the writing of a batch with nothing."""
    return contextlib.nullcontext()


class Effects(msgspec.Struct, frozen=True, kw_only=True):
    """What happens around a sync, each a function so that a test can look on."""

    #: Local addresses on which node ports are served; None: all, by the kernel's own judgement.
    node_port_addresses: Callable[[], tuple[str, ...] | None]
    #: Called before the first rules are written and whenever the kernel has been read again.
    prepare: Callable[[], object]
    #: Called after each successful sync with the health check node ports there should be.
    publish_health_checks: Callable[[dict[ServiceName, HealthCheck]], None]
    #: Called after a successful sync if UDP endpoints changed; must not block.
    clean_conntrack: Callable[[Callable[[], conntrack.Frontends]], None]
    #: Called with a Service whose rules were refused, and why; must not block.
    report_quarantined: Callable[[ServiceName, str], None]
    #: Called after a sync that read the whole kernel state, of which little is kept.
    release_memory: Callable[[], None]
    #: Called before each restore, of which a big change needs many: the sync goes on.
    beat: Callable[[], None]
    #: Surrounds the writing of each batch, which lets the counters of its chains begin anew.
    writing: Callable[[plan.Batch], AbstractContextManager[None]] = unwatched


class Syncer:
    """Programs one family."""

    def __init__(
        self,
        family: IPFamily,
        *,
        store: Store,
        ruleset: Ruleset,
        kernel: Kernel,
        max_batch_rules: int | None,
        effects: Effects,
        metrics: Metrics,
        read_chain: Callable[[ChainId], tuple[str, ...] | None] | None = None,
        list_chains: Callable[[], set[ChainId]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._family = family
        self._store = store
        self._ruleset = ruleset
        self._kernel = kernel
        self._max_batch_rules = max_batch_rules
        self._effects = effects
        self._log = sync_log.SyncLog(family, metrics)
        # Reads one chain (None: there is none), where that costs less than reading all of them.
        self._read_chain = read_chain
        # Lists the names of all chains, likewise.
        self._list_chains = list_chains
        self._clock = clock
        self._wall_clock = wall_clock
        self._auditor = audit.Auditor(family, store, clock)
        # The audit has found rules that are not what they should be.
        self._is_doubtful = False
        # What the kernel has; None: unknown.
        self._live: chains.Tables | None = None
        # What it had when it was looked at before this sync's first stage.
        self._saved: chains.Tables | None = None
        self._echoes = echoes.Echoes()
        self._quarantine = Quarantine()
        # What is desired comes from the state file, because the API has not been heard yet;
        self._wants_restored = False
        #: and it is what the kernel has, too.
        self.is_restored = False
        #: Services that are set aside because their rules were refused.
        self.quarantined: tuple[ServiceName, ...] = ()
        #: Replaced as a whole, because other threads read them; None: it has not come to that yet.
        self.programmed: Programmed | None = None
        self.last_failure: failures.Failure | None = None
        # What Services had rules for when the last sync succeeded, as far as they changed since.
        self._before: dict[ServiceName, ServiceState | None] = {}
        self._must_compare_all = False
        # Chains of ours that were there at the first look; None: nobody has looked.
        self._chains_found: int | None = None
        # The last sync that succeeded left the kernel as desired: what differs when it is read, others
        # changed, unless we were asked for it since.
        self._is_auditing = False
        self._repairs = repairs.Repairs()
        # What the next sync reads of the kernel, where the rest is known; and who touched it.
        self._suspected: frozenset[ChainId] = frozenset()
        self._culprits: tuple[drift.Culprit, ...] = ()
        # Outlive failed syncs: what they ask for is still to be done.
        self._trigger_times: list[float] = []
        self._has_stale_udp = False

    def forget_live(self) -> None:
        """Let the next sync read the kernel and repair whatever differs."""
        self._is_auditing = self._is_auditing or self._live is not None
        self._live = None

    def look(self, look: drift.Look) -> None:
        """Let the next sync read what others touched, and repair what differs."""
        culprits = dict.fromkeys((*self._culprits, *look.culprits))
        self._culprits = tuple(culprits)[: drift.MAX_CULPRITS]
        if look.chains is None or self._read_chain is None or self._live is None:
            self.forget_live()
        else:
            self._is_auditing = True
            self._suspected |= look.chains

    def audit(self) -> bool:
        """Look whether a few Services' rules are what building from nothing gives; False: they differ.

        If so, the next sync builds everything from nothing, and reads the kernel.
        """
        if not self._store.is_synced:
            return True
        before = self._auditor.compared
        differing = self._auditor.look(self._ruleset, ignored=self._quarantine.cases)
        self._log.audited(self._auditor.compared - before, differing)
        self._is_doubtful = self._is_doubtful or bool(differing)
        return not differing

    @property
    def audited(self) -> tuple[int, int]:
        """Return how many Services the audit has compared, and how many differed. From any thread."""
        return self._auditor.compared, self._auditor.differed

    @property
    def retry_at(self) -> float:
        """Return when a Service that was set aside should be tried again; infinity: never."""
        return self._quarantine.next_retry_at()

    @property
    def lock_wait(self) -> LockWait | None:
        """Return for whom we wait to be let write, if we do. From any thread."""
        return self._kernel.lock_wait

    @property
    def lock_waited_s(self) -> float:
        """Return how long syncs have waited for others so far, all together."""
        return self._kernel.lock_waited_s

    def abandon_lock_wait(self) -> None:
        """Say that nothing is waited for any more, whether it was written or need not be."""
        self._kernel.abandon_lock_wait()

    def sync(self) -> SyncResult | None:
        """Run one sync from beginning to end; None before everything was listed.

        Raises IptablesError if the rules could not be read, or not be written completely.
        """
        started = self._clock()
        if self._is_doubtful:
            self._store.demand_everything(self._family)
        changes = self._take()
        if changes is None:
            return None
        self._trigger_times += changes.trigger_times[: _MAX_TRIGGERS - len(self._trigger_times)]
        self._has_stale_udp = self._has_stale_udp or changes.has_udp
        is_full = self._live is None
        try:
            result = self._write_in_stages(changes, started)
        except IptablesError as error:
            self.last_failure = failures.of(error, self._wall_clock())
            self._saved = None
            # Where it has not come to writing, nobody else has asked what has changed.
            self._repairs.ask_for(self._ruleset.take_touched())
            if isinstance(error, LockTimeout) and self._live is not None:
                # Nothing of that batch, of one table, was done, and what was done before is known. What
                # this sync was about is not known any more, so the next compares everything, in memory.
                self._must_compare_all = True
            else:
                self._live = None
            self._log.ended(is_full=is_full, seconds=self._clock() - started)
            raise
        self._log.ended(is_full=is_full, seconds=result.seconds)
        self._finish(result)
        return result

    def _take(self) -> Changes | None:
        """Return what the API says or, before it has said anything, what the state file does.

        Rules that are there are at least as new as any file: a daemon that starts again without an
        API server leaves them alone. Only on a kernel without (a reboot, a flush) is old better than
        nothing.
        """
        changes = self._store.take(self._family)
        if changes is None and self._store.restored_at is not None:
            if not self._wants_restored and self._kernel.has_rules(NAT_SERVICES):
                return None
            changes = self._store.take_restored(self._family)
            if changes is None:
                # The lists have come in between.
                changes = self._store.take(self._family)
        if changes is not None:
            self._wants_restored = changes.is_restored
        return changes

    def _write_in_stages(self, changes: Changes, started: float) -> SyncResult:
        """Write what cannot wait as a sync of its own, if there is much besides; then the rest."""
        rest = changes
        done: list[SyncResult] = []
        try:
            done += self._write_essentials(changes, started)
            urgent, others = self._urgent(changes)
            if urgent is not None:
                rest = others
                done += [self._write_what_is_accepted(self._update_ruleset(urgent), started)]
                self._before.clear()
                self._clean_conntrack(self._ruleset)
        except IptablesError:
            # It was taken out of the store, and will not be handed out again.
            self._update_ruleset(rest)
            raise
        done += [self._write_what_is_accepted(self._update_ruleset(rest), started)]
        return functools.reduce(SyncResult.followed_by, done)

    def _write_essentials(self, changes: Changes, started: float) -> list[SyncResult]:
        """Where the kernel serves no Service, let it serve those first that all others need.

        After a reboot, or when somebody has flushed nat. Nothing else is built before, or deleted.
        """
        if self._live is not None:
            return []
        # Rules from before serve all Services. Fewer must not take their place.
        if not self._ruleset.service_count and self._kernel.has_rules(NAT_SERVICES):
            # They are read when those to compare with have been built: in memory once, that is.
            return []
        live = self._saved = self._read_kernel()
        if live.get(NAT_SERVICES.table, {}).get(NAT_SERVICES.chain):
            return []
        known = {} if changes.is_everything else self._ruleset.states()
        states = {**known, **changes.services}
        essential = {
            name: state
            for name, state in states.items()
            if state is not None
            and urgency.is_essential(name, state)
            and name not in self._quarantine.cases
        }
        if len(states) <= _STAGED_ABOVE or not essential:
            return []
        few = Ruleset(msgspec.structs.replace(self._ruleset.options, zone=changes.zone))
        few.apply(essential)
        self._follow_addresses(few)
        batches = plan.plan(
            few.tables,
            live,
            groups=few.groups(),
            # What refuses and drops in filter is there for all Services: it stays as it is.
            touched=frozenset(
                chain
                for chain in few.take_touched()
                if chain.table == rules.NAT or not live.get(chain.table, {}).get(chain.chain)
            ),
            max_rules=self._max_batch_rules,
        )
        self._note_repairs(batches, live)
        try:
            for batch in batches:
                self._restore(batch, live, is_full=True)
        except BatchRejected:
            # Whose rule it is, is found out when all are written; from what the kernel has then.
            self._saved = None
            return []
        self._clean_conntrack(few)
        return [self._result(batches, started, is_full=True)]

    def _urgent(self, changes: Changes) -> tuple[Changes | None, Changes]:
        """Return what is to be written before the rest of many changes, if anything, and that rest.

        Each is a complete ruleset, of older Services in part, and is written like any other.
        """
        if (
            changes.is_everything
            or len(changes.services) <= _STAGED_ABOVE
            # One exchange of the table costs about the same for one Service as for thousands.
            or self._max_batch_rules is None
        ):
            return None, changes
        first: dict[ServiceName, ServiceState | None] = {}
        others: dict[ServiceName, ServiceState | None] = {}
        for name, state in changes.services.items():
            is_urgent = urgency.is_essential(name, state) or urgency.loses_endpoints(
                self._ruleset.state(name), state
            )
            (first if is_urgent else others)[name] = state
        if not first or not others:
            return None, changes
        return (
            msgspec.structs.replace(changes, services=first),
            msgspec.structs.replace(changes, services=others),
        )

    def _update_ruleset(self, changes: Changes) -> Collection[ServiceName] | None:
        """Take *changes* in; return the Services whose chains may differ, or None: all."""
        ruleset = self._ruleset
        services = self._admitted(changes)
        for name, state in services.items():
            # What was programmed before, should the kernel refuse what is to come. A sync that
            # failed programmed nothing, so what stood before it still holds.
            if self._before.setdefault(name, ruleset.state(name)) is None and state is None:
                # It came and went while syncs failed; so may many.
                del self._before[name]
        if self._is_doubtful:
            # Nothing of what was computed before is used; the kernel is read again as well.
            ruleset = self._ruleset = Ruleset(ruleset.options)
            self._is_doubtful, self._live = False, None
        was_large = ruleset.is_large
        if changes.is_everything:
            self._rebuild(services, changes.zone)
        else:
            ruleset.apply(services)
        is_all = changes.is_everything or ruleset.is_large != was_large
        self._follow_addresses(ruleset)
        return None if is_all else services

    def _follow_addresses(self, ruleset: Ruleset) -> None:
        addresses = self._effects.node_port_addresses()
        if addresses is not None:
            ruleset.set_node_port_addresses(addresses)

    def _admitted(self, changes: Changes) -> dict[ServiceName, ServiceState | None]:
        """Return the Services to build: what changed, and what was set aside and is due again."""
        services = dict(changes.services)
        for name, case in list(self._quarantine.cases.items()):
            if name in services and services[name] == case.state:
                # Only everything was asked for; it is as it was when it was refused.
                services[name] = self._ruleset.state(name)
            elif name in services or changes.is_everything:
                self._quarantine.release_changed([name])
        # What has changed is not set aside any more, so what is due is what these Services are to be.
        return {**services, **self._quarantine.release_due(self._clock())}

    def _rebuild(self, services: Mapping[ServiceName, ServiceState | None], zone: str) -> None:
        options = msgspec.structs.replace(self._ruleset.options, zone=zone)
        states = {name: state for name, state in services.items() if state is not None}
        self._ruleset.rebuild(options, states)

    def _write_what_is_accepted(
        self, names: Collection[ServiceName] | None, started: float
    ) -> SyncResult:
        """Write, setting aside Services whose rules are refused, until the rest is accepted."""
        for _ in range(_MAX_REFUSALS):
            try:
                return self._write_twice_if_refused(names, started)
            except BatchRejected as error:
                if not self._set_aside(error):
                    raise
                self._is_auditing = False
                self._repairs.forget()
        return self._write_twice_if_refused(names, started)

    def _write_twice_if_refused(
        self, names: Collection[ServiceName] | None, started: float
    ) -> SyncResult:
        """Write; raise BatchRejected only where what is refused is refused again after another look.

        A refusal may be what others did: a chain is gone since we looked, or goes while iptables makes
        its transaction, of which then every line is refused. No Service is to blame for that.
        """
        try:
            return self._write_once(names, started)
        except BatchRejected:
            return self._write_once(names, started)

    def _write_once(self, names: Collection[ServiceName] | None, started: float) -> SyncResult:
        try:
            return self._write(names, started)
        except BatchRejected as error:
            self.last_failure = failures.of(error, self._wall_clock())
            # Tables that stood before the refused one in the input may have been changed. Before
            # anything else: finding out who is to blame writes as well, and may end anywhere.
            self._live = None
            raise

    def _set_aside(self, error: BatchRejected) -> bool:
        """Set aside the Services that *error* is about; return whether there are any."""
        accused = refusals.accused(error, self._ruleset, self._commit)
        for name in sorted(accused):
            refused = self._ruleset.state(name)
            assert refused is not None  # it has a rule in the batch
            before = self._before.get(name)
            self._quarantine.admit(name, refused, error.reason, self._clock())
            self._ruleset.apply({name: before if before != refused else None})
            keeps_rules = self._ruleset.state(name) is not None
            self._log.set_aside(name, error, keeps_rules=keeps_rules)
            self._effects.report_quarantined(name, error.reason)
        return bool(accused)

    def _commit(self, batch: plan.Batch) -> None:
        self._effects.beat()
        with self._effects.writing(batch):
            self._kernel.restore(batch)

    def _write(self, names: Collection[ServiceName] | None, started: float) -> SyncResult:
        self._repairs.ask_for(self._ruleset.take_touched())
        if self._live is not None:
            self._find_renamed(self._live)
        touched = self._repairs.asked_for
        is_full = self._live is None
        if self._live is None:
            self._live, self._saved = self._saved or self._read_kernel(), None
        elif self._suspected:
            self._read_suspected(self._live)
            touched = None if touched is None else touched | self._suspected
        suspected, self._suspected = self._suspected, frozenset()
        if is_full or self._must_compare_all or touched is None:
            touched = names = None
        batches = plan.plan(
            self._ruleset.tables,
            self._live,
            groups=self._ruleset.groups(names),
            touched=touched,
            max_rules=self._max_batch_rules,
        )
        self._note_repairs(batches, self._live)
        for batch in batches:
            self._restore(batch, self._live, is_full=is_full)
        self._must_compare_all = False
        repaired = self._repairs.take(self._family, self._culprits)
        desired = self._ruleset.tables
        if self._is_auditing:
            self._is_auditing = False
            self._log.repaired(repaired)
            if repaired:
                # What had to be repaired may have been spelt otherwise, no more.
                found = self._kernel.save(known=desired) if is_full else self._read(suspected)
                self._echoes.learn(found, desired)
        self._culprits = ()
        if is_full:
            plan.adopt(self._live, desired)
        return self._result(batches, started, is_full=is_full, repaired=repaired)

    def _result(
        self,
        batches: Sequence[plan.Batch],
        started: float,
        *,
        is_full: bool,
        repaired: tuple[drift.Repair, ...] = (),
    ) -> SyncResult:
        sections = [section for batch in batches for section in batch.sections]
        return SyncResult(
            is_full=is_full,
            batches=len(batches),
            rules_written={
                table: sum(batch.rule_count(table) for batch in batches)
                for table in sync_log.TABLES
            },
            chains_written=sum(len(section.write) for section in sections),
            chains_deleted=sum(len(section.delete) for section in sections),
            seconds=self._clock() - started,
            repairs=repaired,
            chains_found=self._chains_found or 0 if self.programmed is None else 0,
        )

    def _read_kernel(self) -> chains.Tables:
        self._effects.prepare()
        live = self._kernel.save(known=self._ruleset.tables)
        self._echoes.undo(live)
        if self._chains_found is None:
            self._chains_found = chains.count_ours(live)
        return live

    def _find_renamed(self, live: chains.Tables) -> None:
        """Suspect the chains that are not called any more what they were, instead of their tables."""
        tables = {table for table, name in self._suspected if not name}
        if not tables:
            return
        found: Collection[ChainId] = ()
        if self._list_chains is not None:
            found = renames.find(tables, live, self._list_chains())
        if self._list_chains is None or len(found) > drift.MAX_CHAINS:
            self.forget_live()
        self._suspected = frozenset(name for name in self._suspected if name.chain).union(found)

    def _read_suspected(self, live: chains.Tables) -> None:
        """Put in *live* what the suspected chains have now."""
        found = self._read(self._suspected)
        for table, chain in self._suspected:
            live.setdefault(table, {}).pop(chain, None)
            if chain in found.get(table, {}):
                live[table][chain] = found[table][chain]
        self._echoes.undo(live)

    def _read(self, wanted: Collection[ChainId]) -> chains.Tables:
        assert self._read_chain is not None
        found: chains.Tables = {}
        for chain in sorted(wanted):
            texts = self._read_chain(chain)
            if texts is not None:
                found.setdefault(chain.table, {})[chain.chain] = texts
        return found

    def _restore(self, batch: plan.Batch, live: chains.Tables, *, is_full: bool) -> None:
        try:
            self._commit(batch)
        except IptablesError as error:
            if isinstance(error, LockTimeout) and len(batch.sections) > 1:
                # Legacy takes the lock for each table anew: the first may have been written.
                self._live = None
            self._log.restore_failed(is_full=is_full)
            raise
        batch.apply_to(live)
        self._log.restored(batch)

    def _note_repairs(self, batches: Sequence[plan.Batch], live: chains.Tables) -> None:
        if self._is_auditing:
            self._repairs.note(batches, live=live, desired=self._ruleset.tables)

    def _finish(self, result: SyncResult) -> None:
        ruleset, now = self._ruleset, self._wall_clock()
        self._before.clear()
        # Replaced as a whole: other threads read it.
        self.quarantined = tuple(sorted(self._quarantine.cases))
        self.programmed = self._describe(now)
        self.is_restored = self._wants_restored
        self._log.unreadable(self._kernel.unreadable)
        # Of the endpoints here, a reboot has left none; no load balancer is to be told otherwise on
        # the word of a file.
        self._effects.publish_health_checks({} if self.is_restored else ruleset.health_checks())
        if result.is_full:
            self._effects.release_memory()
        self._clean_conntrack(ruleset)
        self._has_stale_udp = False
        self._log.succeeded(
            result,
            ruleset,
            now=now,
            triggered=self._trigger_times,
            set_aside=len(self.quarantined),
            is_restored=self.is_restored,
        )
        self._trigger_times = []

    def _describe(self, now: float) -> Programmed:
        ruleset, quarantine = self._ruleset, self._quarantine
        quarantine.settle()
        ahead = now - self._clock()
        return Programmed(
            services=ruleset.service_count,
            endpoints=ruleset.endpoint_count,
            rules={table: ruleset.rule_count(table) for table in sync_log.TABLES},
            trees=ruleset.trees(),
            quarantined=tuple(
                Quarantined(
                    service=name,
                    reason=case.reason,
                    since=case.since + ahead,
                    retry_at=case.retry_at + ahead,
                    attempts=case.attempts,
                )
                for name, case in sorted(quarantine.cases.items())
            ),
        )

    def _clean_conntrack(self, ruleset: Ruleset) -> None:
        # After the restore: before it, the next packet would make the entry anew.
        if self._has_stale_udp:
            services = ruleset.udp_services()
            self._effects.clean_conntrack(lambda: conntrack.frontends(services))
