"""
What programs the IP families of this node, each from the probe of its iptables to the loop that syncs it.

Each family has a thread of its own and waits for no other. The invariant it guards: nothing is
written for a family before it is known what its rules can be made of.
"""

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import structlog

from kubeproxy_py import (
    capabilities,
    cleanup,
    conntrack,
    drift,
    health,
    host,
    hostnet,
    httpserver,
    nfacct,
    options,
    status,
    sync,
    sync_log,
    sync_loop,
    sysctls,
    traffic_meter,
)
from kubeproxy_py.flags import Settings
from kubeproxy_py.iptables import backends, events, infos, lock, probe, runner
from kubeproxy_py.lifecycle import Lifecycle
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.pacer import Pacer
from kubeproxy_py.reports import Reporter
from kubeproxy_py.ruleset import HealthCheck, Ruleset
from kubeproxy_py.store import Store

log = structlog.get_logger()

# A full look at the kernel though nobody asked, as often as kube-proxy looks at its canaries. It
# reads, and writes only what others have changed. On nft the kernel tells of every change, or that it
# lost some, so a look is for what nobody thought of; each costs 4 s of a core at 10,000 Services,
# which at this rate is less than a hundredth.
_AUDIT_PERIODS: Final = {"legacy": 1, "nft": 20}
# As many as a person reads in one line.
_NAMED_SERVICES: Final = 5

Watcher = events.NftWatcher | infos.LegacyWatcher


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What all families work with."""

    settings: Settings
    #: Of this node; what a family's probe finds is not in them yet.
    facts: options.Facts
    store: Store
    life: Lifecycle
    metrics: Metrics
    health: health.ProxyHealth
    gatherer: status.Gatherer
    reporter: Reporter
    #: Serves health check node ports.
    http: httpserver.HttpServer
    reconciler: conntrack.Reconciler
    #: Of all families, or of none: connections are not counted.
    meters: Mapping[IPFamily, traffic_meter.FamilyMeter]
    #: Makes the nfacct counters if they are missing; False: there are none on this host.
    ensure_counters: Callable[[], bool] = host.ensure_counters


class Families:
    """All families that this host has programs for. All methods but ``start`` from any thread."""

    def __init__(
        self,
        kernels: Mapping[IPFamily, runner.Iptables],
        around: Surroundings,
        *,
        remove_nft_mode: Callable[[IPFamily], bool] = cleanup.remove_nft_mode_table,
    ) -> None:
        """Program *kernels*; call *remove_nft_mode* for a family once its rules are in its place."""
        self._kernels = kernels
        self._around = around
        self._remove_nft_mode = remove_nft_mode
        # Replaced as a whole: other threads read it.
        self._families: Mapping[IPFamily, Family] = {}
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._in_nft_mode = set(IPFamily)  # what kube-proxy's nftables mode left may be there
        self._counts_packets = False

    def start(self) -> None:
        """Watch what rules and node ports depend on, and start a thread for each family."""
        watcher = self._watch_rules()
        addresses_of = self._watch_addresses()
        self._families = {
            family: Family(
                _announced(kernel.programs, watcher, self._around.metrics),
                kernel.programs,
                self._around,
                has_watcher=watcher is not None,
                addresses_of=functools.partial(addresses_of, family),
                found=self._note_findings,
                tell=functools.partial(self._tell, family),
            )
            for family, kernel in self._kernels.items()
        }
        for family, programmed in self._families.items():
            self._around.life.spawn(f"sync-{family.value}", programmed.run)

    def nudge(self, family: IPFamily) -> None:
        """Say that *family* may have something to sync."""
        found = self._families.get(family)
        if found is not None:
            found.nudge()

    def nudge_all(self) -> None:
        """Say that every family may have something to sync."""
        for family in self._families.values():
            family.nudge()

    def suspect(self, suspicion: drift.Suspicion) -> None:
        """Say that others touched what may be ours."""
        found = self._families.get(suspicion.family)
        if found is not None:
            found.suspect(suspicion)

    def _watch_rules(self) -> Watcher | None:
        """Let others' changes of rules be noticed; None: only the audit finds them."""
        is_nft = any(kernel.backend == "nft" for kernel in self._kernels.values())
        watcher = (
            events.NftWatcher(self.suspect)
            if is_nft
            else infos.LegacyWatcher(self._kernels, self.suspect)
        )
        try:
            watcher.start()
        except OSError as error:
            log.warning("drift.watch_unavailable", error=str(error))
            return None
        self._around.life.at_end(watcher.stop)
        return watcher

    def _watch_addresses(self) -> Callable[[IPFamily], Sequence[str]]:
        """Let node ports follow this host's addresses, where they depend on them; return those."""
        watcher = hostnet.AddressWatcher(self.nudge_all)
        cidrs = options.node_port_cidrs(self._around.settings.config, self._around.facts.node_ips)
        if any(listed is not None for listed in cidrs.values()):
            watcher.start()
            self._around.life.at_end(watcher.stop)
        return watcher.addresses_of

    def _note_findings(self, found: probe.Findings) -> None:
        """Show the counters that rules of any family have."""
        with self._lock:
            if found.has("nfacct") and not self._counts_packets:
                self._counts_packets = True
                self._around.metrics.registry.register(nfacct.NfacctCollector())

    def _tell(self, family: IPFamily, news: sync_log.SyncResult | drift.Contest) -> None:
        if isinstance(news, drift.Contest):
            self._around.reporter.contested(family, news)
            return
        if news.is_full:
            # The first is; later ones try again what failed, not too often.
            self._replace_nft_mode(family)
        self._around.reporter.synced(family, news)

    def _replace_nft_mode(self, family: IPFamily) -> None:
        """Remove what kube-proxy's nftables mode left of *family*, whose rules are in its place.

        Each by itself: another family may never be programmed. What is left of a family that this
        host has no programs for is followed by nobody, and goes with the first.
        """
        with self._lock:
            replaced = [
                left for left in self._in_nft_mode if left is family or left not in self._kernels
            ]
        for left in replaced:
            if self._remove_nft_mode(left):
                with self._lock:
                    self._in_nft_mode.discard(left)


class Family:
    """One family: waits until it can be programmed, then syncs it until it is time to stop."""

    def __init__(
        self,
        kernel: runner.Iptables,
        programs: runner.Programs,
        around: Surroundings,
        *,
        has_watcher: bool,
        addresses_of: Callable[[], Sequence[str]],
        found: Callable[[probe.Findings], None],
        tell: Callable[[sync_log.SyncResult | drift.Contest], None],
    ) -> None:
        """
        Prepare; nothing is read or written yet.

        Args:
            kernel: what is programmed.
            programs: by which it is.
            around: what all families work with.
            has_watcher: others' changes are noticed while nobody looks.
            addresses_of: returns this host's addresses, where node ports depend on them.
            found: called with what this family's rules can be made of, before the first sync.
            tell: called after each sync that succeeded and when a contest has begun; must not block.
        """
        self._family = programs.family
        self._kernel = kernel
        self._programs = programs
        self._is_nft = programs.backend == "nft"
        self._around = around
        self._has_watcher = has_watcher
        self._addresses_of = addresses_of
        self._found = found
        self._tell = tell
        config, ips = around.settings.config, around.facts.node_ips
        # Where node ports are served; None: on all local addresses.
        self._node_port_cidrs = options.node_port_cidrs(config, ips)[self._family]
        # None: it is not known yet what can be programmed. Set once; other threads read it.
        self._loop: sync_loop.SyncLoop | None = None

    def nudge(self) -> None:
        """Say that there is something to sync. Cheap; from any thread."""
        if self._loop is not None:
            self._loop.nudge()

    def suspect(self, suspicion: drift.Suspicion) -> None:
        """Say that others touched what may be ours. Cheap; from any thread."""
        if self._loop is not None:
            self._loop.suspect(suspicion)

    def run(self) -> None:
        """Find out what can be done here, then sync until it is time to stop."""
        prober = capabilities.Prober(
            self._kernel,
            self._around.metrics,
            ensure_counters=self._around.ensure_counters,
            wait=self._around.life.stop.wait,
        )
        self._add_readiness("capabilities", lambda: prober.refusal or None)
        found = prober.run()
        if found is None:
            return
        loop = self._build(found)
        self._around.life.at_end(loop.stop)
        self._loop = loop
        self._found(found)
        if not self._around.life.stop.is_set():
            # Whatever was listed before the loop was there.
            loop.nudge()
            loop.run()

    def _build(self, found: probe.Findings) -> sync_loop.SyncLoop:
        rules_options = options.rules_options(
            self._around.settings.config,
            self._family,
            msgspec.structs.replace(
                self._around.facts,
                has_nfacct=found.has("nfacct"),
                has_random_fully=found.has("random-fully"),
                lacks=found.lacks,
                conntrack_is_liberal=sysctls.conntrack_is_liberal(),
            ),
            node_port_addresses=None,
            layout=self._around.settings.dispatch,
        )
        beat = self._around.life.expect_thread(f"sync-{self._family.value}")
        syncer = self._build_syncer(
            Ruleset(rules_options),
            self._effects(
                functools.partial(self._served, allows_loopback=rules_options.localhost_node_ports),
                beat,
                has_counters=found.has("nfacct"),
            ),
        )
        loop = self._build_loop(syncer, beat)
        self._show(syncer, loop, found)
        return loop

    def _served(self, *, allows_loopback: bool) -> tuple[str, ...] | None:
        """Return the addresses that have node ports now; None: all, by the kernel's judgement."""
        cidrs = self._node_port_cidrs
        local = () if cidrs is None else self._addresses_of()
        return options.served_addresses(cidrs, local, allows_loopback=allows_loopback)

    def _effects(
        self,
        served: Callable[[], tuple[str, ...] | None],
        beat: Callable[[], None],
        *,
        has_counters: bool,
    ) -> sync.Effects:
        around, family = self._around, self._family
        return sync.Effects(
            node_port_addresses=served,
            prepare=around.ensure_counters if has_counters else _nothing,
            publish_health_checks=self._health_checks(served),
            clean_conntrack=lambda build: around.reconciler.request(family, build),
            report_quarantined=around.reporter.quarantined,
            release_memory=host.release_memory,
            beat=beat,
            writing=around.meters[family].writing if around.meters else sync.unwatched,
        )

    def _health_checks(
        self, served: Callable[[], tuple[str, ...] | None]
    ) -> Callable[[dict[ServiceName, HealthCheck]], None]:
        """Return what serves health check node ports, on the node port addresses of the start."""
        checks = health.ServiceHealthPorts(
            self._family,
            self._around.http,
            None if self._node_port_cidrs is None else served() or (),
            None if self._around.settings.healthz_disabled else self._around.health,
            self._around.reporter.listen_failed,
        )
        self._around.life.at_end(checks.close)

        def publish(wanted: dict[ServiceName, HealthCheck]) -> None:
            checks.update(
                {name: check.port for name, check in wanted.items()},
                {name: check.local_endpoints for name, check in wanted.items()},
            )

        return publish

    def _build_syncer(self, ruleset: Ruleset, effects: sync.Effects) -> sync.Syncer:
        return sync.Syncer(
            self._family,
            store=self._around.store,
            ruleset=ruleset,
            kernel=self._kernel,
            read_chain=self._kernel.read_chain if self._is_nft else None,
            list_chains=functools.partial(backends.chain_names, self._family, "nft")
            if self._is_nft
            else None,
            max_batch_rules=sync.NFT_BATCH_RULES if self._is_nft else None,
            effects=effects,
            metrics=self._around.metrics,
        )

    def _build_loop(self, syncer: sync.Syncer, beat: Callable[[], None]) -> sync_loop.SyncLoop:
        settings = self._around.settings
        period_s = settings.config.iptables.sync_period_s
        periods = _AUDIT_PERIODS[self._programs.backend] if self._has_watcher else 1
        return sync_loop.SyncLoop(
            self._family,
            syncer,
            Pacer(
                retry_s=period_s,
                audit_s=period_s * periods,
                min_interval_s=settings.min_sync_period_s,
            ),
            health=self._around.health,
            metrics=self._around.metrics,
            suspects=drift.Suspects(period_s),
            tell=self._tell,
            beat=beat,
        )

    def _show(self, syncer: sync.Syncer, loop: sync_loop.SyncLoop, found: probe.Findings) -> None:
        """Let /readyz and ``kubeproxy-py status`` ask how it is."""
        store = self._around.store
        self._add_readiness("quarantine", lambda: _told_quarantined(syncer.quarantined))
        self._add_readiness(
            "snapshot", lambda: _told_restored(store.restored_at if syncer.is_restored else None)
        )
        self._around.gatherer.add_family(
            self._family,
            status.FamilyParts(
                programs=self._programs,
                history=lambda: loop.history,
                programmed=lambda: syncer.programmed,
                last_failure=lambda: syncer.last_failure,
                contested=loop.contested,
                lock_wait=lambda: syncer.lock_wait,
                lock_waited_s=lambda: syncer.lock_waited_s,
                is_restored=lambda: syncer.is_restored,
                audited=lambda: syncer.audited,
                missing_capabilities=tuple(sorted(found.lacks)),
            ),
        )

    def _add_readiness(self, name: str, check: health.Check) -> None:
        self._around.health.add_readiness(f"{name}-{self._family.value}", check)


def _announced(
    programs: runner.Programs, watcher: Watcher | None, metrics: Metrics
) -> runner.Iptables:
    """Return the kernel's tables, with each write known to whoever would take it for another's."""
    return runner.Iptables(
        programs,
        own=watcher.own if watcher else None,
        lock=lock.LockWatch(programs.family, metrics) if programs.backend == "legacy" else None,
    )


def _told_quarantined(names: tuple[ServiceName, ...]) -> str | None:
    if not names:
        return None
    some = ", ".join(map(str, names[:_NAMED_SERVICES]))
    return f"rules refused for {len(names)} Services: {some}"


def _told_restored(saved_at: float | None) -> str | None:
    if saved_at is None:
        return None
    age_s = max(0.0, time.time() - saved_at)
    return f"from the state file of {age_s:.0f} s ago, not from the API server"


def _nothing() -> None:
    pass
