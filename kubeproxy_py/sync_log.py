"""
What syncs did, for one family: their results, and what of them metrics and the log tell.

It decides nothing, and remembers only what it has told last.
"""

from collections.abc import Collection, Sequence
from typing import Final

import msgspec
import structlog

from kubeproxy_py import drift, rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import BatchRejected
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.ruleset import Ruleset

log = structlog.get_logger()

#: Those whose rules are counted.
TABLES: Final = (rules.FILTER, rules.NAT)
# So many Services, or chains, one log line has room for.
_NAMED: Final = 10


class SyncResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one sync did."""

    is_full: bool
    batches: int
    rules_written: dict[str, int]
    chains_written: int
    chains_deleted: int
    seconds: float
    #: What others had changed and this sync put right.
    repairs: tuple[drift.Repair, ...] = ()
    #: Chains of ours that were there at the first look.
    chains_found: int = 0

    def followed_by(self, other: "SyncResult") -> "SyncResult":
        """Return what both did together; *other* ended last."""
        return SyncResult(
            is_full=self.is_full or other.is_full,
            batches=self.batches + other.batches,
            rules_written={
                table: count + other.rules_written[table]
                for table, count in self.rules_written.items()
            },
            chains_written=self.chains_written + other.chains_written,
            chains_deleted=self.chains_deleted + other.chains_deleted,
            seconds=other.seconds,
            repairs=(*self.repairs, *other.repairs),
            chains_found=other.chains_found,
        )


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """A Service that is set aside; times are Unix times."""

    service: ServiceName
    reason: str
    since: float
    retry_at: float
    attempts: int


class Programmed(msgspec.Struct, frozen=True, kw_only=True):
    """What the last sync that succeeded left in force."""

    services: int
    endpoints: int
    rules: dict[str, int]  # by table
    trees: tuple[ChainId, ...]  # shared chains that are trees of chains
    quarantined: tuple[Quarantined, ...]


class SyncLog:
    """Tells of one family's syncs."""

    def __init__(self, family: IPFamily, metrics: Metrics) -> None:
        self._family = family.value
        self._metrics = metrics
        # From 0 on, or Prometheus takes the first mismatch for no increase.
        metrics.audited_services.labels(self._family)
        metrics.audit_mismatches.labels(self._family)
        metrics.unreadable_chains.labels(self._family).set(0)
        self._unreadable: frozenset[ChainId] = frozenset()

    def restored(self, batch: plan.Batch) -> None:
        """Tell that *batch* was written."""
        self._metrics.iptables_restores.labels(self._family).inc()
        self._metrics.iptables_restore_lines.labels(self._family).inc(batch.line_count)

    def restore_failed(self, *, is_full: bool) -> None:
        """Tell that a batch of a sync was not written."""
        self._metrics.restore_failures.labels(self._family).inc()
        if not is_full:
            self._metrics.partial_restore_failures.labels(self._family).inc()

    def set_aside(self, name: ServiceName, error: BatchRejected, *, keeps_rules: bool) -> None:
        """Tell that the rules of Service *name* were refused."""
        log.error(
            "service.quarantined",
            ip_family=self._family,
            namespace=name.namespace,
            name=name.name,
            reason=error.reason,
            excerpt=error.excerpt or None,
            keeps_old_rules=keeps_rules,
        )

    def repaired(self, repairs: Collection[drift.Repair]) -> None:
        """Tell what others had changed and is put right."""
        for repair in repairs:
            labels = (repair.table, self._family)
            self._metrics.iptables_chains_repaired.labels(*labels).inc(repair.count)
            self._metrics.iptables_drift.labels(*labels, repair.kind).inc(repair.count)
            log.warning(
                "drift.repaired",
                ip_family=self._family,
                table=repair.table,
                kind=repair.kind,
                count=repair.count,
                chains=list(repair.chains),
                **drift.told(repair.culprits),
            )

    def unreadable(self, found: Collection[ChainId]) -> None:
        """Tell, where it has changed, which chains have rules that only `nft` can show."""
        # Of our own chains such rules are gone by now: they are written anew.
        unreadable = frozenset(chain for chain in found if not chains.is_ours(*chain))
        if unreadable == self._unreadable:
            return
        self._unreadable = unreadable
        self._metrics.unreadable_chains.labels(self._family).set(len(unreadable))
        if unreadable:
            log.warning(
                "iptables.chains_unreadable",
                ip_family=self._family,
                count=len(unreadable),
                chains=[f"{table}/{name}" for table, name in sorted(unreadable)[:_NAMED]],
                message="rules that only nft can show are in iptables' tables; ours are kept up",
            )
        else:
            log.info("iptables.chains_readable", ip_family=self._family)

    def ended(self, *, is_full: bool, seconds: float) -> None:
        """Tell how long a sync took, whether it succeeded or not."""
        self._metrics.sync_duration.labels(self._family).observe(seconds)
        kind = self._metrics.sync_full_duration if is_full else self._metrics.sync_partial_duration
        kind.labels(self._family).observe(seconds)

    def succeeded(
        self,
        result: SyncResult,
        ruleset: Ruleset,
        *,
        now: float,
        triggered: Sequence[float],
        set_aside: int,
        is_restored: bool,
    ) -> None:
        """
        Tell that the kernel has what *ruleset* desires.

        Args:
            result: what the sync did.
            ruleset: what is in force.
            now: Unix time.
            triggered: when what it wrote had changed in the cluster, in Unix times.
            set_aside: how many Services are, because their rules were refused.
            is_restored: it is what the state file says, not the API.
        """
        family, metrics = self._family, self._metrics
        for moment in triggered:
            metrics.network_programming_duration.labels(family).observe(max(0.0, now - moment))
        metrics.quarantined_services.labels(family).set(set_aside)
        metrics.sync_last_timestamp.labels(family).set(now)
        for table in TABLES:
            metrics.iptables_rules_total.labels(table, family).set(ruleset.rule_count(table))
            metrics.iptables_rules_last.labels(table, family).set(result.rules_written[table])
        internal, external = ruleset.lacking_local()
        metrics.no_local_endpoints.labels("internal", family).set(internal)
        metrics.no_local_endpoints.labels("external", family).set(external)
        metrics.snapshot_in_use.labels(family).set(is_restored)
        say = log.info if result.batches else log.debug
        say(
            "sync.completed",
            ip_family=family,
            full=result.is_full,
            services=ruleset.service_count,
            endpoints=ruleset.endpoint_count,
            restores=result.batches,
            chains_written=result.chains_written,
            chains_deleted=result.chains_deleted,
            duration_s=round(result.seconds, 4),
        )

    def audited(self, compared: int, differing: Sequence[ServiceName]) -> None:
        """Tell that an audit has *compared* so many Services, and which differ."""
        self._metrics.audited_services.labels(self._family).inc(compared)
        if not differing:
            return
        self._metrics.audit_mismatches.labels(self._family).inc(len(differing))
        log.error(
            "audit.mismatch_found",
            ip_family=self._family,
            message="a bug: please report it; all rules are built anew",
            services=[str(name) for name in differing[:_NAMED]],
        )
