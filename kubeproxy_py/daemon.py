"""
The composition root: builds everything from settings, starts it in order, stops it in reverse.

Nothing is decided here that a module below could decide. Read it as the table of contents of a start
and a stop.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

import kubeproxy_py
from kubeproxy_py import (
    api,
    backend_watch,
    config,
    config_watch,
    conntrack,
    external,
    families,
    health,
    host,
    httpserver,
    keeper,
    lifecycle,
    lookout,
    manifests,
    metrics,
    node_events,
    node_ports,
    notify,
    options,
    own_node,
    pages,
    privileges,
    pulses,
    recorder,
    reports,
    snapshot,
    status,
    status_socket,
    sysctls,
    traffic_counting,
    watch,
)
from kubeproxy_py import log as logging
from kubeproxy_py.errors import ConfigError, KubeProxyError
from kubeproxy_py.flags import Settings
from kubeproxy_py.iptables import runner
from kubeproxy_py.model import IPFamily, Kind, Node
from kubeproxy_py.store import Store

log = structlog.get_logger()

# How often to see whether the configuration file has changed.
_TICK_S: Final = 1.0
# After two minutes without a word an API server is asked whether it is there (watch.py). One that has
# not answered by then either is no accident.
_LONGEST_SILENCE_S: Final = 300.0


class Daemon:
    """One node's proxy."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._config = settings.config
        self._started_at = time.time()
        self._registry = CollectorRegistry()
        self._metrics = metrics.Metrics(self._registry)
        self._notifier = notify.Notifier()
        self._has_accounting = False
        self._node_name = host.node_name(settings.hostname_override)
        # What cannot work on any node is refused before anything on this one is touched.
        for family in IPFamily:
            options.local_detector(self._config, family, ())
        self._connection = self._connect()
        self._recorder = recorder.Recorder(self._connection, host=host.node_name(""))
        self._health = health.ProxyHealth(self._config.iptables.sync_period_s)
        self._life = lifecycle.Lifecycle(self._notifier, self._health)
        self._reporter = reports.Reporter(self._node_name, self._metrics, self._recorder)
        self._node = own_node.OwnNode(
            self._node_name,
            is_in_files=bool(settings.manifests),
            needs_pod_cidrs=self._config.detect_local_mode == "NodeCIDR",
            life=self._life,
            health=self._health,
        )
        self._watches_heard = pulses.Pulses()
        self._http = httpserver.HttpServer()
        # Each is there once it has been started; changes of the store are told to those that are.
        self._keeper: keeper.Keeper | None = None
        self._counting: traffic_counting.TrafficCounting | None = None
        self._families: families.Families | None = None
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
        self._life.follow_signals()
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
        if self._life.failure is not None:
            log.error("daemon.failed", reason=self._life.failure)
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
        self._gatherer.backend = backend
        self._store = self._open_store(kernels)
        self._start_sources()
        self._start_keeper()
        # Units that start after this one may be what brings the API server up.
        self._notifier.ready()
        self._tell_phase(f"waiting for Node {self._node_name}")
        node = self._node.wait(self._store)
        if node is None:
            return False
        ips = self._choose_ips(node, kernels)
        self._prepare_host(ips, kernels)
        if self._settings.init_only:
            log.info("daemon.initialised", message="--init-only: ending here")
            return False
        self._start_programming(node, ips, kernels)
        return True

    def _open_store(self, kernels: Mapping[IPFamily, runner.Iptables]) -> Store:
        store = Store(
            node_name=self._node_name,
            families=tuple(kernels),
            metrics=self._metrics,
            report=self._reporter.invalid,
            changed=self._nudge,
            node_changed=self._node_changed,
            policy=options.external_policy(self._config, self._settings.external_ips_allow),
            refused=self._reporter.refused,
            selects=self._settings.traffic.selects if self._settings.traffic else None,
        )
        self._gatherer.node = lambda: store.node
        self._gatherer.refused_addresses = lambda: [*map(str, store.refusals())]
        return store

    def _choose_ips(
        self, node: Node, kernels: Mapping[IPFamily, runner.Iptables]
    ) -> options.NodeIPs:
        """Return this node's addresses, and say what is doubtful about them and the configuration."""
        ips = options.node_ips(self._config.bind_address, node.ips)
        if ips.primary not in kernels:
            raise KubeProxyError(f'no support for primary IP family "{ips.primary.value}"')
        host.warn_if_unknown(self._config, is_known=ips.is_known)
        for doubt in options.doubts(self._config, ips, node.pod_cidrs, tuple(kernels)):
            log.warning(
                "config.doubtful",
                message="Kube-proxy configuration may be incomplete or incorrect",
                error=doubt,
            )
        return ips

    def _prepare_host(
        self, ips: options.NodeIPs, kernels: Mapping[IPFamily, runner.Iptables]
    ) -> None:
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
                self._reporter.invalid,
                stop=self._life.stop,
                beat=self._life.expect_thread("manifests"),
            )
            self._life.spawn("manifests", source.run)
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
            stop=self._life.stop,
            release_memory=host.release_memory,
        )
        self._gatherer.state_file = lambda: kept.state
        self._life.spawn("snapshot", kept.run)
        self._life.at_end(kept.stop)

    def _start_programming(
        self, node: Node, ips: options.NodeIPs, kernels: Mapping[IPFamily, runner.Iptables]
    ) -> None:
        sysctls.set_oom_score_adj(self._config.oom_score_adj)
        self._health.expect(kernels)
        self._start_servers()
        self._recorder.start()
        self._life.at_end(self._recorder.stop)
        reconciler = self._start_conntrack()
        self._start_backend_watch(kernels)
        self._start_traffic(kernels)
        self._families = families.Families(
            kernels,
            families.Surroundings(
                settings=self._settings,
                facts=options.Facts(
                    node_name=self._node_name, node_ips=ips, pod_cidrs=node.pod_cidrs
                ),
                store=self._store,
                life=self._life,
                metrics=self._metrics,
                health=self._health,
                gatherer=self._gatherer,
                reporter=self._reporter,
                http=self._http,
                reconciler=reconciler,
                meters=self._counting.meters if self._counting else {},
            ),
        )
        self._families.start()
        self._start_lookout(node, ips, kernels)
        self._reporter.post(node_events.STARTING)
        self._tell_phase("programming Services")

    def _start_conntrack(self) -> conntrack.Reconciler:
        # A node port is one only on this host's addresses: flows to that port of others are not ours.
        reconciler = conntrack.Reconciler(
            self._metrics,
            run=lambda family, wanted: conntrack.reconcile(
                family, wanted, local_addresses=set(host.addresses_of(family))
            ),
        )
        reconciler.start()
        self._gatherer.conntrack = lambda: reconciler.last
        self._life.at_end(reconciler.stop)
        return reconciler

    def _start_backend_watch(self, kernels: Mapping[IPFamily, runner.Iptables]) -> None:
        others = backend_watch.BackendWatch(
            next(iter(kernels.values())).backend,
            tuple(kernels),
            self._metrics,
            wait=self._life.stop.wait,
            tell=lambda found: self._reporter.post(
                node_events.mixed(found.family, found.backend, is_met=found.is_met)
            ),
        )
        self._health.add_readiness("backends", others.reason)
        self._life.spawn("backend-watch", others.run)

    def _start_traffic(self, kernels: Mapping[IPFamily, runner.Iptables]) -> None:
        """Let connections be counted, if that is asked for."""
        if self._settings.traffic is None:
            return
        self._counting = traffic_counting.start(
            self._settings.traffic,
            kernels,
            self._store,
            self._metrics,
            has_accounting=self._has_accounting,
        )
        self._life.at_end(self._counting.stop)

    def _start_lookout(
        self, node: Node, ips: options.NodeIPs, kernels: Mapping[IPFamily, runner.Iptables]
    ) -> None:
        cidrs = options.node_port_cidrs(self._config, ips)

        def ways(family: IPFamily) -> lookout.Family:
            on_loopback = family is IPFamily.V4 and options.has_localhost_node_ports(
                self._config, cidrs
            )

            def reach() -> node_ports.Reach:
                local = host.addresses_of(family)
                served = options.served_addresses(cidrs[family], local, allows_loopback=on_loopback)
                return node_ports.Reach(served, on_loopback)

            return lookout.Family(lambda: self._store.service_ports(family), reach)

        found = lookout.Lookout(
            {family: ways(family) for family in kernels},
            is_ready=lambda: self._store.is_synced,
            metrics=self._metrics,
            tell=self._reporter.doubtful,
            node_ips=lambda: (self._store.node or node).ips,
            api=external.api_address(self._connection.server) if self._connection else None,
        )
        self._gatherer.doubts = lambda: [*map(str, found.notices)]
        self._life.at_end(found.stop)
        self._life.spawn("lookout", found.run)

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
        self._life.at_end(self._http.stop)
        self._pages.add("/status", lambda _query: self._gatherer.status())
        self._pages.add("/last-failure", lambda _query: self._gatherer.failures())
        if self._settings.status_socket:
            self._life.at_end(
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

    def _spawn_watcher(self, kind: Kind) -> None:
        assert self._connection is not None
        thread = f"watch-{kind}"
        beat = self._life.expect_thread(thread)
        heard = self._watches_heard.expect(kind, _LONGEST_SILENCE_S)
        self._health.add_readiness(f"fresh-{kind}", lambda: self._watches_heard.silence(kind))
        self._metrics.watch_staleness.labels(kind).set_function(
            lambda: self._watches_heard.age_s(kind)
        )
        watcher = watch.Watcher(
            kind,
            self._connection,
            self._store,
            self._reporter.invalid,
            self._metrics,
            stop=self._life.stop,
            node_name=self._node_name,
            beat=beat,
            heard=heard,
        )
        self._gatherer.add_watch(watcher.state)
        self._life.spawn(thread, watcher.run)

    # Changes from below --------------------------------------------------------------------------

    def _nudge(self, family: IPFamily) -> None:
        if self._keeper is not None:
            self._keeper.note()
        if self._counting is not None:
            self._counting.outdate()
        if self._families is not None:
            self._families.nudge(family)

    def _node_changed(self, node: Node) -> None:
        self._node.changed(node)
        if self._keeper is not None:
            self._keeper.note()

    # Running and stopping ----------------------------------------------------------------------------

    def _wait(self, file: config_watch.ConfigFile | None) -> None:
        while not self._life.rest(_TICK_S):
            if file is not None and file.has_changed():
                self._life.fail("content of the proxy server's configuration file was updated")

    def _open_config_file(self) -> config_watch.ConfigFile | None:
        path = self._settings.config_file
        try:
            return config_watch.ConfigFile(path) if path else None
        except OSError as error:
            raise ConfigError(
                f"cannot watch configuration file {path}: {error.strerror}"
            ) from error

    def _shut_down(self) -> None:
        self._life.stop.set()
        if self._connection is not None:
            self._connection.close()
        self._life.shut_down()
