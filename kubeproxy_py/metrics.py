"""
Every metric, declared once.

Names, types, labels, buckets and help texts of ``kubeproxy_*`` metrics are kube-proxy 1.36's,
so that dashboards and alerts carry over; those it does not have follow below the line.
Modules set the values they know; nothing here decides anything.
"""

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import disable_created_metrics as _disable_created_metrics

# kube-proxy exports no *_created series, and they would double the number of ours.
_disable_created_metrics()  # type: ignore[no-untyped-call]

_EXPONENTIAL: Final = tuple(0.001 * 2**n for n in range(15))
_PROGRAMMING: Final = (
    0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30),
)  # fmt: skip
# The API server answers in milliseconds or, when something is wrong, in many seconds.
_REST_LATENCY: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_FAMILY: Final = ("ip_family",)


class Metrics:
    """All metrics, on one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def histogram(
            name: str,
            text: str,
            labels: tuple[str, ...] = _FAMILY,
            buckets: tuple[float, ...] = _EXPONENTIAL,
        ) -> Histogram:
            return Histogram(
                f"kubeproxy_{name}", f"[ALPHA] {text}", labels, buckets=buckets, registry=registry
            )

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"kubeproxy_{name}", f"[ALPHA] {text}", labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"kubeproxy_{name}", f"[ALPHA] {text}", labels, registry=registry)

        self.registry = registry

        # kube-proxy's own -----------------------------------------------------------------------
        self.sync_duration = histogram(
            "sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds"
        )
        self.sync_full_duration = histogram(
            "sync_full_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for full resyncs",
        )
        self.sync_partial_duration = histogram(
            "sync_partial_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for partial resyncs",
        )
        self.sync_last_timestamp = gauge(
            "sync_proxy_rules_last_timestamp_seconds",
            "The last time proxy rules were successfully synced",
            _FAMILY,
        )
        self.sync_last_queued_timestamp = gauge(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "The last time a sync of proxy rules was queued",
            _FAMILY,
        )
        self.network_programming_duration = histogram(
            "network_programming_duration_seconds",
            "In Cluster Network Programming Latency in seconds",
            buckets=tuple(float(edge) for edge in _PROGRAMMING),
        )
        self.endpoint_changes_pending = gauge(
            "sync_proxy_rules_endpoint_changes_pending", "Pending proxy rules Endpoint changes"
        )
        self.endpoint_changes = counter(
            "sync_proxy_rules_endpoint_changes_total", "Cumulative proxy rules Endpoint changes"
        )
        self.service_changes_pending = gauge(
            "sync_proxy_rules_service_changes_pending", "Pending proxy rules Service changes"
        )
        self.service_changes = counter(
            "sync_proxy_rules_service_changes_total", "Cumulative proxy rules Service changes"
        )
        self.restore_failures = counter(
            "sync_proxy_rules_iptables_restore_failures_total",
            "Cumulative proxy iptables restore failures",
            _FAMILY,
        )
        self.partial_restore_failures = counter(
            "sync_proxy_rules_iptables_partial_restore_failures_total",
            "Cumulative proxy iptables partial restore failures",
            _FAMILY,
        )
        self.iptables_rules_total = gauge(
            "sync_proxy_rules_iptables_total",
            "Total number of iptables rules owned by kube-proxy",
            ("table", "ip_family"),
        )
        self.iptables_rules_last = gauge(
            "sync_proxy_rules_iptables_last",
            "Number of iptables rules written by kube-proxy in last sync",
            ("table", "ip_family"),
        )
        self.no_local_endpoints = gauge(
            "sync_proxy_rules_no_local_endpoints_total",
            "Number of services with a Local traffic policy and no endpoints",
            ("traffic_policy", "ip_family"),
        )
        self.healthz = counter(
            "proxy_healthz_total", "Cumulative proxy healthz HTTP status", ("code",)
        )
        self.livez = counter("proxy_livez_total", "Cumulative proxy livez HTTP status", ("code",))
        self.conntrack_sync_duration = histogram(
            "conntrack_reconciler_sync_duration_seconds",
            "ReconcileConntrackFlowsLatency latency in seconds",
        )
        self.conntrack_deleted_entries = counter(
            "conntrack_reconciler_deleted_entries_total",
            "Cumulative conntrack flows deleted by conntrack reconciler",
            _FAMILY,
        )
        self.rest_requests = Counter(
            "rest_client_requests_total",
            "[ALPHA] Number of HTTP requests, partitioned by status code, method, and host.",
            ("code", "host", "method"),
            registry=registry,
        )
        self.rest_request_duration = Histogram(
            "rest_client_request_duration_seconds",
            "[ALPHA] Request latency in seconds. Broken down by verb, and host.",
            ("host", "verb"),
            buckets=_REST_LATENCY,
            registry=registry,
        )

        # Ours ------------------------------------------------------------------------------------
        self.invalid_objects = counter(
            "invalid_objects_total",
            "Objects, or parts of them, that were left out because they are invalid",
            ("kind",),
        )
        self.watch_last_event_timestamp = gauge(
            "watch_last_event_timestamp_seconds",
            "When the API server last sent anything on this watch, bookmarks included",
            ("kind",),
        )
        self.watch_staleness = gauge(
            "watch_staleness_seconds",
            "How long ago the API server last sent anything on this watch, by a monotonic clock",
            ("kind",),
        )
        self.watch_reconnects = counter(
            "watch_reconnects_total",
            "Watches started again, by what ended the last",
            ("kind", "reason"),
        )
        self.quarantined_services = gauge(
            "quarantined_services",
            "Services that are not programmed as they should be because their rules were refused",
            _FAMILY,
        )
        self.audited_services = counter(
            "audited_services_total",
            "Services whose rules were compared with what building from nothing gives",
            _FAMILY,
        )
        self.audit_mismatches = counter(
            "audit_mismatches_total",
            "Services whose rules were not what building from nothing gives",
            _FAMILY,
        )
        self.snapshot_saved_timestamp = gauge(
            "snapshot_saved_timestamp_seconds",
            "When the state that the state file has was current",
        )
        self.snapshot_bytes = gauge("snapshot_bytes", "Size of the state file")
        self.snapshot_in_use = gauge(
            "snapshot_in_use",
            "1 while rules come from the state file because the API server has not answered",
            _FAMILY,
        )
        self.snapshot_failures = counter(
            "snapshot_failures_total",
            "State files that could not be kept, read or written",
            ("operation",),
        )
        self.external_ips_refused = counter(
            "external_ips_refused_total",
            "External IPs and load balancer VIPs that came to be left out",
            ("reason",),
        )
        self.shadowing_services = gauge(
            "shadowing_services",
            "Services with an external IP or load balancer VIP that is refused, or served with doubt",
            ("ip_family", "reason"),
        )
        self.node_port_collisions = gauge(
            "node_port_collisions", "Node ports on which a local process listens, and gets nothing"
        )
        self.conntrack_failures = counter(
            "conntrack_reconciler_failures_total",
            "Reconciliations of conntrack entries that ended with an error",
            _FAMILY,
        )
        self.iptables_restores = counter(
            "iptables_restores_total", "Restore inputs that were committed", _FAMILY
        )
        self.iptables_restore_lines = counter(
            "iptables_restore_lines_total", "Lines of restore input that were committed", _FAMILY
        )
        self.iptables_chains_repaired = counter(
            "iptables_chains_repaired_total",
            "Chains of ours that somebody else had changed and that were written again",
            ("table", "ip_family"),
        )
        self.iptables_drift = counter(
            "iptables_drift_total",
            "The same chains, and built-in ones that had lost our jump, by what was done to them",
            ("table", "ip_family", "kind"),
        )
        self.lock_wait_seconds = counter(
            "xtables_lock_wait_seconds_total",
            "Time that restores have waited for the xtables lock, the wait that is not over included",
            _FAMILY,
        )
        self.lock_waiting = gauge(
            "xtables_lock_waiting", "Whether a restore waits for the xtables lock now", _FAMILY
        )
        self.capability = gauge(
            "iptables_capability",
            "Whether the kernel and iptables have what our rules need, by its name",
            ("capability", "ip_family"),
        )
        self.other_backend_chains = gauge(
            "iptables_other_backend_chains",
            "Chains of kube-proxy's in the iptables backend that is not used",
            _FAMILY,
        )
        self.other_backend_jumps = gauge(
            "iptables_other_backend_jumps",
            "Built-in chains of that backend that lead there, so that packets meet stale rules",
            _FAMILY,
        )
        self.traffic_look_duration = histogram(
            "traffic_look_duration_seconds",
            "Time it took to read the counters of all Services' rules once",
        )
        self.traffic_failures = counter(
            "traffic_look_failures_total",
            "Readings of rules' counters that failed; the next one makes up for it",
            _FAMILY,
        )
        self.flow_look_duration = histogram(
            "traffic_flow_look_duration_seconds",
            "Time it took to read what all living connections have counted once",
            (),
        )
        self.flow_failures = counter(
            "traffic_flow_look_failures_total",
            "Readings of living connections that failed; the next one makes up for it",
        )
        self.flow_events_lost = counter(
            "traffic_flow_events_lost_total",
            "Times that the kernel had no room to tell of connections that ended",
        )
        self.flows = gauge(
            "traffic_flows",
            "Living connections to Services, by whether their progress is counted",
            ("state",),
        )
