"""
Every metric, declared once.

Names, types, labels, buckets and help texts of ``kubeproxy_*`` metrics are kube-proxy 1.36's,
so that dashboards and alerts carry over; those it does not have follow below the line.
Modules set the values they know; nothing here decides anything.
"""

from functools import cached_property
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
# kube-proxy's mark for what may still change; all of its own metrics have it.
_HELP: Final = "[ALPHA] "


def _histogram(
    name: str,
    text: str,
    labels: tuple[str, ...] = _FAMILY,
    buckets: tuple[float, ...] = _EXPONENTIAL,
) -> cached_property[Histogram]:
    def make(metrics: "Metrics") -> Histogram:
        return Histogram(name, _HELP + text, labels, buckets=buckets, registry=metrics.registry)

    return cached_property(make)


def _gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> cached_property[Gauge]:
    def make(metrics: "Metrics") -> Gauge:
        return Gauge(name, _HELP + text, labels, registry=metrics.registry)

    return cached_property(make)


def _counter(name: str, text: str, labels: tuple[str, ...] = ()) -> cached_property[Counter]:
    def make(metrics: "Metrics") -> Counter:
        return Counter(name, _HELP + text, labels, registry=metrics.registry)

    return cached_property(make)


class Metrics:
    """All metrics, on one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        # All at once: what nobody has set yet is exposed, too.
        for name, declared in vars(Metrics).items():
            if isinstance(declared, cached_property):
                getattr(self, name)

    # kube-proxy's own ----------------------------------------------------------------------------
    sync_duration = _histogram(
        "kubeproxy_sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds"
    )
    sync_full_duration = _histogram(
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "SyncProxyRules latency in seconds for full resyncs",
    )
    sync_partial_duration = _histogram(
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "SyncProxyRules latency in seconds for partial resyncs",
    )
    sync_last_timestamp = _gauge(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "The last time proxy rules were successfully synced",
        _FAMILY,
    )
    sync_last_queued_timestamp = _gauge(
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "The last time a sync of proxy rules was queued",
        _FAMILY,
    )
    network_programming_duration = _histogram(
        "kubeproxy_network_programming_duration_seconds",
        "In Cluster Network Programming Latency in seconds",
        buckets=tuple(float(edge) for edge in _PROGRAMMING),
    )
    endpoint_changes_pending = _gauge(
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
        "Pending proxy rules Endpoint changes",
    )
    endpoint_changes = _counter(
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "Cumulative proxy rules Endpoint changes",
    )
    service_changes_pending = _gauge(
        "kubeproxy_sync_proxy_rules_service_changes_pending", "Pending proxy rules Service changes"
    )
    service_changes = _counter(
        "kubeproxy_sync_proxy_rules_service_changes_total", "Cumulative proxy rules Service changes"
    )
    restore_failures = _counter(
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
        "Cumulative proxy iptables restore failures",
        _FAMILY,
    )
    partial_restore_failures = _counter(
        "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
        "Cumulative proxy iptables partial restore failures",
        _FAMILY,
    )
    iptables_rules_total = _gauge(
        "kubeproxy_sync_proxy_rules_iptables_total",
        "Total number of iptables rules owned by kube-proxy",
        ("table", "ip_family"),
    )
    iptables_rules_last = _gauge(
        "kubeproxy_sync_proxy_rules_iptables_last",
        "Number of iptables rules written by kube-proxy in last sync",
        ("table", "ip_family"),
    )
    no_local_endpoints = _gauge(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Number of services with a Local traffic policy and no endpoints",
        ("traffic_policy", "ip_family"),
    )
    healthz = _counter(
        "kubeproxy_proxy_healthz_total", "Cumulative proxy healthz HTTP status", ("code",)
    )
    livez = _counter("kubeproxy_proxy_livez_total", "Cumulative proxy livez HTTP status", ("code",))
    conntrack_sync_duration = _histogram(
        "kubeproxy_conntrack_reconciler_sync_duration_seconds",
        "ReconcileConntrackFlowsLatency latency in seconds",
    )
    conntrack_deleted_entries = _counter(
        "kubeproxy_conntrack_reconciler_deleted_entries_total",
        "Cumulative conntrack flows deleted by conntrack reconciler",
        _FAMILY,
    )
    rest_requests = _counter(
        "rest_client_requests_total",
        "Number of HTTP requests, partitioned by status code, method, and host.",
        ("code", "host", "method"),
    )
    rest_request_duration = _histogram(
        "rest_client_request_duration_seconds",
        "Request latency in seconds. Broken down by verb, and host.",
        ("host", "verb"),
        buckets=_REST_LATENCY,
    )

    # Ours ----------------------------------------------------------------------------------------
    invalid_objects = _counter(
        "kubeproxy_invalid_objects_total",
        "Objects, or parts of them, that were left out because they are invalid",
        ("kind",),
    )
    watch_last_event_timestamp = _gauge(
        "kubeproxy_watch_last_event_timestamp_seconds",
        "When the API server last sent anything on this watch, bookmarks included",
        ("kind",),
    )
    watch_staleness = _gauge(
        "kubeproxy_watch_staleness_seconds",
        "How long ago the API server last sent anything on this watch, by a monotonic clock",
        ("kind",),
    )
    watch_reconnects = _counter(
        "kubeproxy_watch_reconnects_total",
        "Watches started again, by what ended the last",
        ("kind", "reason"),
    )
    quarantined_services = _gauge(
        "kubeproxy_quarantined_services",
        "Services that are not programmed as they should be because their rules were refused",
        _FAMILY,
    )
    audited_services = _counter(
        "kubeproxy_audited_services_total",
        "Services whose rules were compared with what building from nothing gives",
        _FAMILY,
    )
    audit_mismatches = _counter(
        "kubeproxy_audit_mismatches_total",
        "Services whose rules were not what building from nothing gives",
        _FAMILY,
    )
    snapshot_saved_timestamp = _gauge(
        "kubeproxy_snapshot_saved_timestamp_seconds",
        "When the state that the state file has was current",
    )
    snapshot_bytes = _gauge("kubeproxy_snapshot_bytes", "Size of the state file")
    snapshot_in_use = _gauge(
        "kubeproxy_snapshot_in_use",
        "1 while rules come from the state file because the API server has not answered",
        _FAMILY,
    )
    snapshot_failures = _counter(
        "kubeproxy_snapshot_failures_total",
        "State files that could not be kept, read or written",
        ("operation",),
    )
    external_ips_refused = _counter(
        "kubeproxy_external_ips_refused_total",
        "External IPs and load balancer VIPs that came to be left out",
        ("reason",),
    )
    shadowing_services = _gauge(
        "kubeproxy_shadowing_services",
        "Services with an external IP or load balancer VIP that is refused, or served with doubt",
        ("ip_family", "reason"),
    )
    node_port_collisions = _gauge(
        "kubeproxy_node_port_collisions",
        "Node ports on which a local process listens, and gets nothing",
    )
    conntrack_failures = _counter(
        "kubeproxy_conntrack_reconciler_failures_total",
        "Reconciliations of conntrack entries that ended with an error",
        _FAMILY,
    )
    iptables_restores = _counter(
        "kubeproxy_iptables_restores_total", "Restore inputs that were committed", _FAMILY
    )
    iptables_restore_lines = _counter(
        "kubeproxy_iptables_restore_lines_total",
        "Lines of restore input that were committed",
        _FAMILY,
    )
    iptables_chains_repaired = _counter(
        "kubeproxy_iptables_chains_repaired_total",
        "Chains of ours that somebody else had changed and that were written again",
        ("table", "ip_family"),
    )
    iptables_drift = _counter(
        "kubeproxy_iptables_drift_total",
        "The same chains, and built-in ones that had lost our jump, by what was done to them",
        ("table", "ip_family", "kind"),
    )
    unreadable_chains = _gauge(
        "kubeproxy_iptables_unreadable_chains",
        "Chains of others in iptables' tables with rules that only nft can show",
        _FAMILY,
    )
    lock_wait_seconds = _counter(
        "kubeproxy_xtables_lock_wait_seconds_total",
        "Time that restores have waited for the xtables lock, the wait that is not over included",
        _FAMILY,
    )
    lock_waiting = _gauge(
        "kubeproxy_xtables_lock_waiting",
        "Whether a restore waits for the xtables lock now",
        _FAMILY,
    )
    capability = _gauge(
        "kubeproxy_iptables_capability",
        "Whether the kernel and iptables have what our rules need, by its name",
        ("capability", "ip_family"),
    )
    other_backend_chains = _gauge(
        "kubeproxy_iptables_other_backend_chains",
        "Chains of kube-proxy's in the iptables backend that is not used",
        _FAMILY,
    )
    other_backend_jumps = _gauge(
        "kubeproxy_iptables_other_backend_jumps",
        "Built-in chains of that backend that lead there, so that packets meet stale rules",
        _FAMILY,
    )
    traffic_look_duration = _histogram(
        "kubeproxy_traffic_look_duration_seconds",
        "Time it took to read the counters of all Services' rules once",
    )
    traffic_failures = _counter(
        "kubeproxy_traffic_look_failures_total",
        "Readings of rules' counters that failed; the next one makes up for it",
        _FAMILY,
    )
    flow_look_duration = _histogram(
        "kubeproxy_traffic_flow_look_duration_seconds",
        "Time it took to read what all living connections have counted once",
        (),
    )
    flow_failures = _counter(
        "kubeproxy_traffic_flow_look_failures_total",
        "Readings of living connections that failed; the next one makes up for it",
    )
    flow_events_lost = _counter(
        "kubeproxy_traffic_flow_events_lost_total",
        "Times that the kernel had no room to tell of connections that ended",
    )
    flows = _gauge(
        "kubeproxy_traffic_flows",
        "Living connections to Services, by whether their progress is counted",
        ("state",),
    )
