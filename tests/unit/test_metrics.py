"""Metrics as dashboards and alerts made for kube-proxy expect them."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kubeproxy_py.metrics import Metrics

FAMILY = ("ip_family",)
TABLE = ("ip_family", "table")
# 0.001 * 2^i, as Go prints it.
EXPONENTIAL = (
    "0.001", "0.002", "0.004", "0.008", "0.016", "0.032", "0.064", "0.128",
    "0.256", "0.512", "1.024", "2.048", "4.096", "8.192", "16.384", "+Inf",
)  # fmt: skip
PROGRAMMING = (
    "0.25", "0.5",
    *(f"{second}.0" for second in range(1, 60)),
    *(f"{second}.0" for second in range(60, 120, 5)),
    "120.0", "150.0", "180.0", "210.0", "240.0", "270.0", "300.0", "+Inf",
)  # fmt: skip

# As kube-proxy 1.36.2 shows them on /metrics: type, labels, help.
KUBE_PROXY = {
    "sync_proxy_rules_duration_seconds": (
        "histogram", FAMILY, "SyncProxyRules latency in seconds"),
    "sync_full_proxy_rules_duration_seconds": (
        "histogram", FAMILY, "SyncProxyRules latency in seconds for full resyncs"),
    "sync_partial_proxy_rules_duration_seconds": (
        "histogram", FAMILY, "SyncProxyRules latency in seconds for partial resyncs"),
    "sync_proxy_rules_last_timestamp_seconds": (
        "gauge", FAMILY, "The last time proxy rules were successfully synced"),
    "sync_proxy_rules_last_queued_timestamp_seconds": (
        "gauge", FAMILY, "The last time a sync of proxy rules was queued"),
    "network_programming_duration_seconds": (
        "histogram", FAMILY, "In Cluster Network Programming Latency in seconds"),
    "sync_proxy_rules_endpoint_changes_pending": (
        "gauge", (), "Pending proxy rules Endpoint changes"),
    "sync_proxy_rules_endpoint_changes_total": (
        "counter", (), "Cumulative proxy rules Endpoint changes"),
    "sync_proxy_rules_service_changes_pending": (
        "gauge", (), "Pending proxy rules Service changes"),
    "sync_proxy_rules_service_changes_total": (
        "counter", (), "Cumulative proxy rules Service changes"),
    "sync_proxy_rules_iptables_restore_failures_total": (
        "counter", FAMILY, "Cumulative proxy iptables restore failures"),
    "sync_proxy_rules_iptables_partial_restore_failures_total": (
        "counter", FAMILY, "Cumulative proxy iptables partial restore failures"),
    "sync_proxy_rules_iptables_total": (
        "gauge", TABLE, "Total number of iptables rules owned by kube-proxy"),
    "sync_proxy_rules_iptables_last": (
        "gauge", TABLE, "Number of iptables rules written by kube-proxy in last sync"),
    "sync_proxy_rules_no_local_endpoints_total": (
        "gauge", ("ip_family", "traffic_policy"),
        "Number of services with a Local traffic policy and no endpoints"),
    "proxy_healthz_total": ("counter", ("code",), "Cumulative proxy healthz HTTP status"),
    "proxy_livez_total": ("counter", ("code",), "Cumulative proxy livez HTTP status"),
    "conntrack_reconciler_sync_duration_seconds": (
        "histogram", FAMILY, "ReconcileConntrackFlowsLatency latency in seconds"),
    "conntrack_reconciler_deleted_entries_total": (
        "counter", FAMILY, "Cumulative conntrack flows deleted by conntrack reconciler"),
}  # fmt: skip
# Registered with the counters in the kernel, by nfacct.NfacctCollector: see test_nfacct.py.


def families(metrics):
    """Use every metric once; return what /metrics then shows, by name as in # TYPE lines."""
    for metric in vars(metrics).values():
        if hasattr(metric, "labels"):
            names = metric._labelnames
            used = metric.labels(*("x" for _ in names)) if names else metric
            if hasattr(used, "observe"):
                used.observe(0.3)
            else:
                used.inc()
    text = generate_latest(metrics.registry).decode()
    return {
        f"{family.name}_total" if family.type == "counter" else family.name: family
        for family in text_string_to_metric_families(text)
    }


@pytest.mark.parametrize("name", KUBE_PROXY)
def test_a_metric_of_kube_proxy_has_its_type_labels_and_help(metrics, name):
    kind, labels, text = KUBE_PROXY[name]
    family = families(metrics)[f"kubeproxy_{name}"]

    assert family.type == kind
    assert family.documentation == f"[ALPHA] {text}"
    for sample in family.samples:
        assert sorted(set(sample.labels) - {"le"}) == sorted(labels)


@pytest.mark.parametrize(
    "name", [name for name, (kind, _, _) in KUBE_PROXY.items() if kind == "histogram"]
)
def test_a_histogram_of_kube_proxy_has_its_buckets(metrics, name):
    family = families(metrics)[f"kubeproxy_{name}"]
    edges = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
    wanted = PROGRAMMING if name.startswith("network_programming") else EXPONENTIAL

    assert edges == list(wanted)


def test_metrics_without_labels_are_there_from_the_start(metrics):
    shown = generate_latest(metrics.registry).decode().splitlines()

    for name, (_, labels, _) in KUBE_PROXY.items():
        assert (f"kubeproxy_{name} 0.0" in shown) is (not labels)


def test_no_metric_tells_when_it_was_created(metrics):
    # kube-proxy's do not, and they would double the number of series.
    assert not [name for name in families(metrics) if name.endswith("_created")]
    assert "_created" not in generate_latest(metrics.registry).decode()


def test_all_names_are_ours_or_the_client_library_s(metrics):
    for name in families(metrics):
        assert name.startswith(("kubeproxy_", "rest_client_"))


def test_metrics_on_two_registries_count_for_themselves(metrics):
    other = Metrics(CollectorRegistry())
    metrics.endpoint_changes.inc()
    name = "kubeproxy_sync_proxy_rules_endpoint_changes_total"

    assert metrics.registry.get_sample_value(name) == 1
    assert other.registry.get_sample_value(name) == 0
