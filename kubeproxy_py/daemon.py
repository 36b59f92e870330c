"""
The composition root: builds everything from settings, starts it in order, stops it in reverse.

Nothing is decided here that a module below could decide. The invariant it guards: the process is
either whole or gone. A thread that ends unasked ends the process, with a reason and a status that
make the supervisor start it again; the rules stay in the kernel in any case.
"""

import functools
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, get_args

import structlog
from prometheus_client import CollectorRegistry

import kubeproxy_py
from kubeproxy_py import (
    api,
    backend_watch,
    capabilities,
    cleanup,
    config,
    config_watch,
    conntrack,
    drift,
    external,
    flow_meter,
    health,
    host,
    hostnet,
    httpserver,
    keeper,
    lookout,
    manifests,
    metrics,
    nfacct,
    node_events,
    node_ports,
    notify,
    options,
    pages,
    privileges,
    pulses,
    recorder,
    snapshot,
    status,
    status_socket,
    sync,
    sync_loop,
    sysctls,
    traffic_meter,
    traffic_state,
    watch,
)
from kubeproxy_py import log as logging
from kubeproxy_py.errors import ConfigError, KubeProxyError
from kubeproxy_py.flags import Settings
from kubeproxy_py.iptables import backends, counters, events, infos, lock, probe, runner
from kubeproxy_py.model import IPFamily, Kind, Node, Problem, ServiceName
from kubeproxy_py.pacer import Pacer
from kubeproxy_py.ruleset import HealthCheck, Ruleset
from kubeproxy_py.store import Store

log = structlog.get_logger()

# kube-proxy's own limits for what may still come from a Node that is being set up.
_NODE_IPS_WAIT_S: Final = 30.0
_POD_CIDRS_WAIT_S: Final = 300.0
# A full look at the kernel though nobody asked, as often as kube-proxy looks at its canaries. It
# reads, and writes only what others have changed. On nft the kernel tells of every change, or that it
# lost some, so a look is for what nobody thought of; each costs 4 s of a core at 10,000 Services,
# which at this rate is less than a hundredth.
_AUDIT_PERIODS: Final = {"legacy": 1, "nft": 20}
# How long SIGTERM waits for threads: together with the rest, the process ends within two seconds.
_STOP_S: Final = 1.0
_TICK_S: Final = 1.0
# A thread that has not turned for so long hangs. One iptables program may take 300 s before it is
# given up, and nothing else takes that long.
_LONGEST_TURN_S: Final = 330.0
# An API server sends a bookmark about once a minute. Five that are missing are no accident.
_LONGEST_SILENCE_S: Final = 300.0
# How soon to look whether the Node is there: a local API server answers within milliseconds.
_FIRST_LOOK_S: Final = 0.05


class Daemon:
    """One node's proxy."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._config = settings.config
        self._started_at = time.time()
        self._registry = CollectorRegistry()
        self._metrics = metrics.Metrics(self._registry)
        self._notifier = notify.Notifier()
        self._stop = threading.Event()
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._failure: str | None = None
        self._threads: list[threading.Thread] = []
        self._undo: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        # Changed by the families' threads, under the lock. Replaced as a whole: others read it.
        self._loops: dict[IPFamily, sync_loop.SyncLoop] = {}
        # Families without a sync that succeeded. Guarded by the lock.
        self._unprogrammed: set[IPFamily] = set()
        self._counts_packets = False
        self._meters: dict[IPFamily, traffic_meter.FamilyMeter] = {}
        self._flow_meter: flow_meter.FlowMeter | None = None
        self._has_accounting = False
        self._node_name = host.node_name(settings.hostname_override)
        # What cannot work on any node is refused before anything on this one is touched.
        for family in IPFamily:
            options.local_detector(self._config, family, ())
        # As they were at the start; None: it has not come to that yet.
        self._pod_cidrs: tuple[str, ...] | None = None
        self._node_ips: tuple[str, ...] = ()
        self._connection = self._connect()
        # From 0 on, or Prometheus takes the first that is invalid for no increase.
        for kind in (*get_args(Kind), "File"):
            self._metrics.invalid_objects.labels(kind)
        self._recorder = recorder.Recorder(self._connection, host=host.node_name(""))
        self._health = health.ProxyHealth(self._config.iptables.sync_period_s)
        self._threads_alive = pulses.Pulses()
        self._watches_heard = pulses.Pulses()
        self._http = httpserver.HttpServer()
        self._keeper: keeper.Keeper | None = None
        #: What can be asked on the status socket: ``status_socket`` says how to add to it.
        self._pages = status_socket.Pages()
        self._gatherer = status.Gatherer(
            node_name=self._node_name,
            version=kubeproxy_py.__version__,
            source=self._source(),
            started_at=self._started_at,
            dispatch=settings.dispatch,
            unreadiness=self._health.unreadiness,
            pending=self._health.pending,
        )

    def run(self) -> int:
        """Run until a signal or a failure; return the exit status."""
        host.tune_interpreter()
        threading.Thread(target=self._stop_by_signal, name="signals", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        threading.excepthook = self._note_crash
        # From here on, because starting may take minutes and the file was read before.
        file = self._open_config_file()
        try:
            if self._start():
                self._wait(file)
        finally:
            if file is not None:
                file.close()
            self._notifier.stopping()
            self._shut_down()
        if self._failure is not None:
            log.error("daemon.failed", reason=self._failure)
            return 1
        log.info("daemon.stopped", message="rules stay in place")
        return 0

    # Starting ------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Start everything; False if a signal came first or there is nothing to run."""
        log.info("daemon.starting", version=kubeproxy_py.__version__, node=self._node_name)
        privileges.require_netfilter()
        if not self._settings.init_only:
            self._serve_status()
        # Before the Node is known, the backend's families are: the store must know them.
        backend = host.choose_backend(self._settings.iptables_backend)
        kernels = host.find_kernels(backend)
        self._store = Store(
            node_name=self._node_name,
            families=tuple(kernels),
            metrics=self._metrics,
            report=self._report,
            changed=self._nudge,
            node_changed=self._node_changed,
            policy=options.external_policy(self._config, self._settings.external_ips_allow),
            refused=self._report_refused,
            selects=self._traffic_selector(),
        )
        self._gatherer.backend = backend
        self._gatherer.node = lambda: self._store.node
        self._gatherer.refused_addresses = lambda: [*map(str, self._store.refusals())]
        self._start_sources()
        self._start_keeper()
        # Units that start after this one may be what brings the API server up.
        self._notifier.ready()
        self._tell_phase(f"waiting for Node {self._node_name}")
        node = self._wait_for_node()
        if self._stop.is_set():
            return False
        ips = options.node_ips(self._config.bind_address, node.ips if node else ())
        if ips.primary not in kernels:
            raise KubeProxyError(f'no support for primary IP family "{ips.primary.value}"')
        host.warn_if_unknown(self._config, is_known=ips.is_known)
        self._node_ips = node.ips if node else ()
        self._pod_cidrs = node.pod_cidrs if node else ()
        for doubt in options.doubts(self._config, ips, self._pod_cidrs, tuple(kernels)):
            log.warning(
                "config.doubtful",
                message="Kube-proxy configuration may be incomplete or incorrect",
                error=doubt,
            )
        self._prepare_host(ips, kernels)
        if self._settings.init_only:
            log.info("daemon.initialised", message="--init-only: ending here")
            return False
        self._start_programming(ips, kernels)
        return True

    def _prepare_host(self, ips: options.NodeIPs, kernels: dict[IPFamily, runner.Iptables]) -> None:
        """Set sysctls and counters up, as --init-only does for a process with fewer rights."""
        tracking = self._config.conntrack
        sysctls.apply_conntrack(
            max_per_core=tracking.max_per_core,
            min=tracking.min,
            tcp_established_timeout_s=tracking.tcp_established_timeout_s,
            tcp_close_wait_timeout_s=tracking.tcp_close_wait_timeout_s,
            tcp_be_liberal=tracking.tcp_be_liberal,
            udp_timeout_s=tracking.udp_timeout_s,
            udp_stream_timeout_s=tracking.udp_stream_timeout_s,
        )
        cidrs = options.node_port_cidrs(self._config, ips)
        if IPFamily.V4 in kernels and options.has_localhost_node_ports(self._config, cidrs):
            sysctls.ensure_route_localnet()
        host.ensure_counters()
        if self._settings.traffic is not None and self._settings.traffic.has_bytes:
            self._has_accounting = sysctls.ensure_conntrack_accounting()

    def _start_sources(self) -> None:
        """Start to read what rules are made of; Services, too, long before the Node is known.

        What takes longest of a start is read while the Node, the probe and the rest are waited for.
        """
        if self._settings.manifests:
            source = manifests.ManifestSource(
                [Path(path) for path in self._settings.manifests],
                self._store,
                self._report,
                stop=self._stop,
                beat=self._expect_thread("manifests"),
            )
            self._spawn("manifests", source.run)
            return
        self._spawn_watcher("Node")
        if not self._settings.init_only:
            self._spawn_watcher("Service")
            self._spawn_watcher("EndpointSlice")

    def _start_keeper(self) -> None:
        """Keep the state on disk. Files are on disk already, and --init-only knows no state."""
        path = self._settings.state_file
        if not path or self._connection is None or self._settings.init_only:
            return
        self._keeper = kept = keeper.Keeper(
            keeper.StateFile(Path(path)),
            self._store,
            self._metrics,
            node=self._node_name,
            identity=snapshot.identity(
                self._connection.server,
                config.allows_service_external_ips(self._config),
                *self._settings.external_ips_allow,
            ),
            stop=self._stop,
            release_memory=host.release_memory,
        )
        self._gatherer.state_file = lambda: kept.state
        self._spawn("snapshot", kept.run)
        self._undo.append(kept.stop)

    def _wait_for_node(self) -> Node | None:
        """Wait for the Node object, from the API or the state file, then for what it may lack."""
        store = self._store
        pause_s = _FIRST_LOOK_S
        while not store.has_listed("Node") and store.restored_at is None:
            if self._rest(pause_s):
                return None
            pause_s = min(1.2 * pause_s, _TICK_S)
        if self._settings.manifests and store.node is None:
            # Nobody registers Nodes where there is no API server; a file may, but need not.
            log.info("node.absent", message="no Node object in the manifests; going on without one")
            self._health.set_node(eligible=True)
            return None
        wait_s = 0.0 if self._settings.manifests else _NODE_IPS_WAIT_S
        has_ips = host.wait_until(
            lambda: store.node is not None and bool(store.node.ips), self._rest, wait_s
        )
        if self._stop.is_set():
            return None
        if not has_ips:
            what = "to exist" if store.node is None else "to be assigned IPs"
            log.error("node.wait_ended", message=f"Timed out waiting for node {what}")
        if self._config.detect_local_mode == "NodeCIDR" and not host.wait_until(
            lambda: store.node is not None and bool(store.node.pod_cidrs),
            self._rest,
            0.0 if self._settings.manifests else _POD_CIDRS_WAIT_S,
        ):
            if self._stop.is_set():
                return None
            name = f'"{self._node_name}"'
            raise KubeProxyError(
                f"timeout waiting for node {name} to exist"
                if store.node is None
                else f"timeout waiting for PodCIDR allocation on node {name}"
            )
        return store.node

    def _start_programming(
        self, ips: options.NodeIPs, kernels: dict[IPFamily, runner.Iptables]
    ) -> None:
        sysctls.set_oom_score_adj(self._config.oom_score_adj)
        self._health.expect(kernels)
        self._start_servers()
        self._recorder.start()
        self._undo.append(self._recorder.stop)
        # A node port is one only on this host's addresses: flows to that port of others are not ours.
        reconciler = conntrack.Reconciler(
            self._metrics,
            run=lambda family, wanted: conntrack.reconcile(
                family, wanted, local_addresses=set(host.addresses_of(family))
            ),
        )
        reconciler.start()
        self._gatherer.conntrack = lambda: reconciler.last
        self._undo.append(reconciler.stop)
        self._unprogrammed = set(kernels)
        rule_watcher = self._watch_rules(kernels)
        others = backend_watch.BackendWatch(
            next(iter(kernels.values())).backend,
            tuple(kernels),
            self._metrics,
            wait=self._stop.wait,
            tell=lambda found: self._post(
                node_events.mixed(found.family, found.backend, is_met=bool(found.jumps))
            ),
        )
        self._health.add_readiness("backends", others.reason)
        self._spawn("backend-watch", others.run)
        self._start_traffic(kernels)
        cidrs = options.node_port_cidrs(self._config, ips)
        if any(listed is not None for listed in cidrs.values()):
            # Node ports follow the addresses of the interfaces.
            watcher = hostnet.AddressWatcher(self._nudge_all)
            try:
                watcher.start()
            except OSError as error:
                # The audit looks at the addresses as well, only later.
                log.warning("hostnet.watch_unavailable", error=str(error))
            self._undo.append(watcher.stop)
        for family, kernel in kernels.items():
            program = functools.partial(
                self._program, family, kernel.programs, ips, reconciler, rule_watcher
            )
            self._spawn(f"sync-{family.value}", program)
        self._start_lookout(ips, tuple(kernels))
        self._post(node_events.STARTING)
        self._tell_phase("programming Services")

    def _program(
        self,
        family: IPFamily,
        programs: runner.Programs,
        ips: options.NodeIPs,
        reconciler: conntrack.Reconciler,
        watcher: events.NftWatcher | infos.LegacyWatcher | None,
    ) -> None:
        """Find out what *family* can do here, then sync it until stopped."""
        kernel = runner.Iptables(
            programs,
            own=watcher.own if watcher else None,
            lock=lock.LockWatch(family, self._metrics) if programs.backend == "legacy" else None,
        )
        prober = capabilities.Prober(
            kernel,
            self._metrics,
            ensure_counters=host.ensure_counters,
            wait=self._stop.wait,
        )
        self._health.add_readiness(f"capabilities-{family.value}", lambda: prober.refusal or None)
        found = prober.run()
        if found is None:
            return
        loop = self._build_loop(family, kernel, ips, found, reconciler, has_watcher=bool(watcher))
        self._undo.append(loop.stop)
        with self._lock:
            self._loops = {**self._loops, family: loop}
            if found.has("nfacct") and not self._counts_packets:
                self._counts_packets = True
                self._registry.register(nfacct.NfacctCollector())
        if not self._stop.is_set():
            # Whatever was listed before the loop was there.
            loop.nudge()
            loop.run()

    def _build_loop(
        self,
        family: IPFamily,
        kernel: runner.Iptables,
        ips: options.NodeIPs,
        found: probe.Findings,
        reconciler: conntrack.Reconciler,
        *,
        has_watcher: bool,
    ) -> sync_loop.SyncLoop:
        facts = options.Facts(
            node_name=self._node_name,
            node_ips=ips,
            pod_cidrs=self._pod_cidrs or (),
            has_nfacct=found.has("nfacct"),
            has_random_fully=found.has("random-fully"),
            lacks=found.lacks,
            conntrack_is_liberal=sysctls.conntrack_is_liberal(),
        )
        cidrs = options.node_port_cidrs(self._config, ips)[family]
        built = options.rules_options(
            self._config,
            family,
            facts,
            node_port_addresses=None,
            layout=self._settings.dispatch,
        )

        def served() -> tuple[str, ...] | None:
            local = () if cidrs is None else host.addresses_of(family)
            return options.served_addresses(
                cidrs, local, allows_loopback=built.localhost_node_ports
            )

        checks = health.ServiceHealthPorts(
            family,
            self._http,
            served() or () if cidrs is not None else None,
            None if self._settings.healthz_disabled else self._health,
            self._report_listen_failure,
        )
        self._undo.append(checks.close)

        def publish(wanted: dict[ServiceName, HealthCheck]) -> None:
            checks.update(
                {name: check.port for name, check in wanted.items()},
                {name: check.local_endpoints for name, check in wanted.items()},
            )

        beat = self._expect_thread(f"sync-{family.value}")
        period_s = self._config.iptables.sync_period_s
        syncer = sync.Syncer(
            family,
            store=self._store,
            ruleset=Ruleset(built),
            kernel=kernel,
            read_chain=kernel.read_chain if kernel.backend == "nft" else None,
            list_chains=functools.partial(backends.chain_names, family, "nft")
            if kernel.backend == "nft"
            else None,
            max_batch_rules=sync.NFT_BATCH_RULES if kernel.backend == "nft" else None,
            effects=sync.Effects(
                node_port_addresses=served,
                prepare=_ensure_counters if found.has("nfacct") else _nothing,
                publish_health_checks=publish,
                clean_conntrack=lambda build: reconciler.request(family, build),
                report_quarantined=self._report_quarantined,
                release_memory=host.release_memory,
                beat=beat,
                writing=self._meters[family].writing if self._meters else sync.unwatched,
            ),
            metrics=self._metrics,
        )
        self._health.add_readiness(
            f"quarantine-{family.value}", lambda: _told_quarantined(syncer.quarantined)
        )
        self._health.add_readiness(
            f"snapshot-{family.value}",
            lambda: _told_restored(self._store.restored_at if syncer.is_restored else None),
        )
        pacer = Pacer(
            retry_s=period_s,
            audit_s=period_s * (_AUDIT_PERIODS[kernel.backend] if has_watcher else 1),
            min_interval_s=self._settings.min_sync_period_s,
        )
        loop = sync_loop.SyncLoop(
            family,
            syncer,
            pacer,
            health=self._health,
            metrics=self._metrics,
            suspects=drift.Suspects(period_s),
            tell=lambda news: self._report_news(family, news),
            beat=beat,
        )
        self._gatherer.add_family(
            family,
            status.FamilyParts(
                programs=kernel.programs,
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
        return loop

    def _start_lookout(self, ips: options.NodeIPs, families: Sequence[IPFamily]) -> None:
        cidrs = options.node_port_cidrs(self._config, ips)

        def ways(family: IPFamily) -> lookout.Family:
            on_loopback = family is IPFamily.V4 and options.has_localhost_node_ports(
                self._config, cidrs
            )

            def reach() -> node_ports.Reach:
                local = host.addresses_of(family)
                served = options.served_addresses(cidrs[family], local, allows_loopback=on_loopback)
                return node_ports.Reach(served, on_loopback)

            return lookout.Family(
                lambda: self._store.service_ports(family),
                reach,
            )

        found = lookout.Lookout(
            {family: ways(family) for family in families},
            is_ready=lambda: self._store.is_synced,
            metrics=self._metrics,
            tell=self._report_notice,
            node_ips=lambda: self._node_ips,
            api=external.api_address(self._connection.server) if self._connection else None,
        )
        self._gatherer.doubts = lambda: [*map(str, found.notices)]
        self._undo.append(found.stop)
        self._spawn("lookout", found.run)

    def _watch_rules(
        self, kernels: Mapping[IPFamily, runner.Iptables]
    ) -> events.NftWatcher | infos.LegacyWatcher | None:
        """Let others' changes of rules be noticed; None: only the audit finds them."""
        is_nft = any(kernel.backend == "nft" for kernel in kernels.values())
        watcher = (
            events.NftWatcher(self._suspect)
            if is_nft
            else infos.LegacyWatcher(kernels, self._suspect)
        )
        try:
            watcher.start()
        except OSError as error:
            log.warning("drift.watch_unavailable", error=str(error))
            return None
        self._undo.append(watcher.stop)
        return watcher

    def _start_traffic(self, kernels: Mapping[IPFamily, runner.Iptables]) -> None:
        """Let connections be counted, if that is asked for."""
        asked = self._settings.traffic
        if asked is None:
            return
        if self._has_accounting:
            self._flow_meter = self._start_flow_meter(tuple(kernels), asked.namespaces)
        collector = traffic_meter.TrafficCollector(
            detail=asked.detail,
            max_series=asked.max_series,
            state=traffic_state.StateFile(Path(asked.state_file) if asked.state_file else None),
            flow_meter=self._flow_meter,
            choose=self._store.selected if self._traffic_selector() else None,
        )
        for family, kernel in kernels.items():
            self._meters[family] = traffic_meter.FamilyMeter(
                family,
                counters.of(kernel.backend, family),
                kernel.save,
                metrics=self._metrics,
                namespaces=asked.namespaces,
                wake=collector.wake,
                release_memory=host.release_memory,
            )
            collector.add(family, self._meters[family])
        self._registry.register(collector)
        collector.start()
        self._undo.append(collector.stop)

    def _traffic_selector(self) -> Callable[[Mapping[str, str]], bool] | None:
        asked = self._settings.traffic
        return asked.selector.matches if asked and asked.selector.requirements else None

    def _start_flow_meter(
        self, families: Sequence[IPFamily], namespaces: Collection[str]
    ) -> flow_meter.FlowMeter | None:
        meter = flow_meter.FlowMeter(
            lambda family: [
                port
                for ports in self._store.service_ports(family).values()
                for port in ports.values()
            ],
            host.addresses_of,
            families=families,
            metrics=self._metrics,
            is_ready=lambda: self._store.is_synced,
            namespaces=namespaces,
        )
        try:
            meter.start()
        except OSError as error:
            log.warning("traffic.flows_unavailable", error=str(error))
            return None
        self._undo.append(meter.stop)
        return meter

    def _start_servers(self) -> None:
        pages.register_process_metrics(self._registry, gates=self._config.feature_gates)
        serve = self._http.serve_address
        hard = self._config.bind_address_hard_fail
        if not self._settings.healthz_disabled:
            app = health.HealthPages(self._health, self._metrics)
            serve(self._config.healthz_bind_address, app.app, name="healthz", hard_fail=hard)
        metrics_pages = pages.MetricsPages(
            self._registry,
            configz=lambda: config.to_json(self._config),
            flagz=lambda: self._settings.flag_values,
            started_at=self._started_at,
            set_verbosity=logging.set_verbosity if self._config.enable_profiling else None,
        )
        serve(self._config.metrics_bind_address, metrics_pages.app, name="metrics", hard_fail=hard)

    def _serve_status(self) -> None:
        """Answer ``kubeproxy-py status`` from now on: most of all while nothing works yet."""
        self._http.start()
        self._undo.append(self._http.stop)
        self._pages.add("/status", lambda _query: self._gatherer.status())
        self._pages.add("/last-failure", lambda _query: self._gatherer.failures())
        if self._settings.status_socket:
            self._undo.append(
                status_socket.serve(self._settings.status_socket, self._http, self._pages)
            )

    def _source(self) -> str:
        if self._connection is not None:
            return f"API server {self._connection.server}"
        return f"files: {', '.join(self._settings.manifests)}"

    def _tell_phase(self, phase: str) -> None:
        self._gatherer.phase = phase
        self._notifier.status(phase)

    def _connect(self) -> api.Connection | None:
        if self._settings.manifests:
            return None
        return api.connect(
            kubeconfig=self._config.client_connection.kubeconfig,
            master=self._settings.master,
            user_agent=f"kubeproxy-py/{kubeproxy_py.__version__}",
            metrics=self._metrics,
        )

    # Threads -------------------------------------------------------------------------------------

    def _spawn(self, name: str, target: Callable[[], None]) -> None:
        def guarded() -> None:
            target()
            if not self._stop.is_set():
                self._fail(f"thread {name} ended")

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _expect_thread(self, name: str) -> Callable[[], None]:
        """Let /livez miss the thread *name* when it hangs; return what it shows that it turns by."""
        beat = self._threads_alive.expect(name, _LONGEST_TURN_S)
        self._health.add_liveness(name, lambda: self._threads_alive.silence(name))
        return beat

    def _spawn_watcher(self, kind: Kind) -> None:
        assert self._connection is not None
        thread = f"watch-{kind}"
        beat = self._expect_thread(thread)
        heard = self._watches_heard.expect(kind, _LONGEST_SILENCE_S)
        self._health.add_readiness(f"fresh-{kind}", lambda: self._watches_heard.silence(kind))
        self._metrics.watch_staleness.labels(kind).set_function(
            lambda: self._watches_heard.age_s(kind)
        )
        watcher = watch.Watcher(
            kind,
            self._connection,
            self._store,
            self._report,
            self._metrics,
            stop=self._stop,
            node_name=self._node_name,
            beat=beat,
            heard=heard,
        )
        self._gatherer.add_watch(watcher.state)
        self._spawn(thread, watcher.run)

    def _note_crash(self, args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        if args.exc_value is not None:
            log.error("thread.crashed", thread=name, exc_info=args.exc_value)
        self._fail(f"thread {name} crashed: {args.exc_type.__name__}: {args.exc_value}")

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
        self._stop.set()

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        # Runs in the main thread between any two of its steps, so it may take no lock: that of the
        # event or of the log may be the main thread's own at that moment.
        self._signals.put(number)

    def _stop_by_signal(self) -> None:
        log.info("daemon.stopping", signal=signal.Signals(self._signals.get()).name)
        self._stop.set()

    # Events from below -----------------------------------------------------------------------------

    def _nudge(self, family: IPFamily) -> None:
        if self._keeper is not None:
            self._keeper.note()
        if self._flow_meter is not None:
            self._flow_meter.outdate()
        loop = self._loops.get(family)
        if loop is not None:
            loop.nudge()

    def _suspect(self, suspicion: drift.Suspicion) -> None:
        loop = self._loops.get(suspicion.family)
        if loop is not None:
            loop.suspect(suspicion)

    def _nudge_all(self) -> None:
        for loop in self._loops.values():
            loop.nudge()

    def _report(self, problem: Problem) -> None:
        self._metrics.invalid_objects.labels(problem.kind).inc()
        log.warning(
            "object.invalid",
            kind=problem.kind,
            namespace=problem.namespace[:_MAX_NAME],
            name=problem.name[:_MAX_NAME],
            field=problem.field[:_MAX_NAME],
            message=problem.message[:_MAX_NOTE],
        )

    def _report_refused(self, refusal: external.Refusal) -> None:
        self._metrics.external_ips_refused.labels(refusal.reason).inc()
        log.warning(
            "service.address_refused",
            namespace=refusal.service.namespace,
            name=refusal.service.name,
            field=refusal.field,
            address=refusal.ip,
            port=refusal.port or None,
            reason=refusal.reason,
            message=refusal.message,
        )
        self._recorder.service_event(
            refusal.service.namespace,
            refusal.service.name,
            event_type="Warning",
            reason="AddressRefused",
            action="Sync",
            note=f"node {self._node_name} does not serve this Service's address: {refusal.where}",
        )

    def _report_notice(self, notice: lookout.Notice) -> None:
        log.warning(
            "service.doubtful",
            namespace=notice.service.namespace,
            name=notice.service.name,
            reason=notice.reason,
            message=notice.note,
        )
        self._recorder.service_event(
            notice.service.namespace,
            notice.service.name,
            event_type=notice.event_type,
            reason=notice.reason,
            action=notice.action,
            note=f"node {self._node_name}: {notice.note}",
        )

    def _report_news(self, family: IPFamily, news: sync.SyncResult | drift.Contest) -> None:
        if isinstance(news, drift.Contest):
            self._post(node_events.contested(family, news))
            return
        self._replace_nft_mode(family)
        for repair in news.repairs:
            self._post(node_events.repaired(repair))
        if news.chains_found and news.batches:
            self._post(
                node_events.adopted(
                    family,
                    found=news.chains_found,
                    written=news.chains_written,
                    deleted=news.chains_deleted,
                )
            )

    def _replace_nft_mode(self, family: IPFamily) -> None:
        """Remove what kube-proxy's nftables mode left, once rules of all families are in its place."""
        with self._lock:
            is_last = self._unprogrammed == {family}
            self._unprogrammed.discard(family)
        if is_last:
            cleanup.remove_nft_mode_tables()

    def _post(self, event: node_events.NodeEvent) -> None:
        self._recorder.node_event(
            self._node_name,
            event_type=event.event_type,
            reason=event.reason,
            action=event.action,
            note=event.note,
        )

    def _report_quarantined(self, service: ServiceName, reason: str) -> None:
        self._recorder.service_event(
            service.namespace,
            service.name,
            event_type="Warning",
            reason="RulesRefused",
            action="Sync",
            note=f"node {self._node_name} cannot program this Service: {reason}"[:_MAX_NOTE],
        )

    def _report_listen_failure(self, service: ServiceName, port: int, error: str) -> None:
        self._recorder.service_event(
            service.namespace,
            service.name,
            event_type="Warning",
            reason="FailedToStartServiceHealthcheck",
            action="Listen",
            note=f'node {self._node_name} failed to start healthcheck "{service}" on port {port}: '
            f"{error}",
        )

    def _node_changed(self, node: Node) -> None:
        self._health.set_node(eligible=node.is_eligible)
        if self._keeper is not None:
            self._keeper.note()
        if self._pod_cidrs is None:
            return
        if node.ips != self._node_ips:
            log.info(
                "node.ips_changed",
                message="the IPs of the start are still used, until a restart",
                ips=node.ips,
                started_with=self._node_ips,
            )
        if self._config.detect_local_mode == "NodeCIDR" and node.pod_cidrs != self._pod_cidrs:
            self._fail(
                f"PodCIDRs changed for the node: {', '.join(node.pod_cidrs)} instead of "
                f"{', '.join(self._pod_cidrs)}"
            )

    # Running and stopping ----------------------------------------------------------------------------

    def _wait(self, file: config_watch.ConfigFile | None) -> None:
        while not self._rest(_TICK_S):
            if file is not None and file.has_changed():
                self._fail("content of the proxy server's configuration file was updated")

    def _rest(self, seconds: float) -> bool:
        """Wait at most *seconds*, and tell systemd that we are alive; True: it is time to stop."""
        # All of us: a thread that hangs is healed by a restart, and by nothing else.
        if not self._threads_alive.has_silent():
            self._notifier.alive()
        return self._stop.wait(min(seconds, self._notifier.watchdog_s or seconds))

    def _open_config_file(self) -> config_watch.ConfigFile | None:
        path = self._settings.config_file
        try:
            return config_watch.ConfigFile(path) if path else None
        except OSError as error:
            raise ConfigError(
                f"cannot watch configuration file {path}: {error.strerror}"
            ) from error

    def _shut_down(self) -> None:
        self._stop.set()
        if self._connection is not None:
            self._connection.close()
        for undo in reversed(self._undo):
            undo()
        deadline = time.monotonic() + _STOP_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


# As many as a person reads in one line.
_NAMED_SERVICES: Final = 5
# What the API takes as the note of an Event.
_MAX_NOTE: Final = 1024
# What a log line shows of a name that may be megabytes long.
_MAX_NAME: Final = 253


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


def _ensure_counters() -> None:
    host.ensure_counters()


def _nothing() -> None:
    pass
