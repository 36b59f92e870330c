"""Every series of samples: what it is called, its unit, and how its samples become one number."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from benchmarks.results import Results, median, percentile

Statistic = Callable[[Sequence[float]], float]


class Row(NamedTuple):
    """One line of a table: a series, seen through a statistic."""

    title: str
    series: str
    statistic: Statistic
    unit: str
    factor: float = 1.0  # from the samples' unit (s, MiB, %, 1/s) to this one
    minus: str = ""  # the series whose same statistic is taken off

    def value(self, results: Results, size: int, backend: str, layout: str) -> float | None:
        """Return the number, in ``unit``; None if it was not measured."""
        samples = results.samples(size, backend, layout, self.series)
        base = results.samples(size, backend, layout, self.minus) if self.minus else [0.0]
        if not samples or not base:
            return None
        return (self.statistic(samples) - self.statistic(base)) * self.factor


def p99(samples: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return percentile(samples, 99)


_MS: Final = 1e3
_US: Final = 1e6

ROWS: Final = (
    Row("initial sync, process start to last Service", "sync", median, "s"),
    Row("initial sync, process start to DNS", "sync_dns", median, "s"),
    Row("bare iptables-legacy-restore of the same rules", "bare_all", median, "s"),
    Row("one endpoint changed, p50", "change", median, "ms", _MS),
    Row("one endpoint changed, p99", "change", p99, "ms", _MS),
    Row("bare smallest restore, p50", "bare_small", median, "ms", _MS),
    Row("daemon's own CPU per change, p50", "change_cpu", median, "ms", _MS),
    Row("daemon's own CPU when nothing happens", "idle_cpu", median, "%"),
    Row("Service and slice created, p50", "create", median, "ms", _MS),
    Row("Service and slice created, p99", "create", p99, "ms", _MS),
    Row("one endpoint changed while 20/s change, p50", "busy", median, "ms", _MS),
    Row("one endpoint changed while 20/s change, p99", "busy", p99, "ms", _MS),
    Row("one endpoint changed while 100/s change, p50", "churn", median, "ms", _MS),
    Row("one endpoint changed while 100/s change, p99", "churn", p99, "ms", _MS),
    Row("100/s: updates accepted", "churn_rate", median, "/s"),
    Row("100/s: restores", "churn_restores", median, "/s"),
    Row("100/s: CPU of the daemon", "churn_cpu", median, "%"),
    Row("100/s: CPU of the programs it runs", "churn_cpu_programs", median, "%"),
    *(
        Row(f"{title}, until it is repaired, {name}", f"drift_{kind}", statistic, "s")
        for kind, title in (
            ("rule", "a rule deleted"),
            ("foreign", "a foreign rule"),
            ("chain", "a chain flushed"),
            ("rename", "a chain renamed"),
            ("jump", "a jump deleted"),
            ("flush", "nat flushed"),
            ("flush_dns", "DNS after a flush of nat"),
        )
        for name, statistic in (("p50", median), ("max", max))
    ),
    Row("traffic counted: one look at all counters", "look", median, "s"),
    Row("traffic counted: the first look", "look_first", median, "s"),
    Row("traffic counted: daemon's own CPU per scrape", "look_cpu", median, "s"),
    Row("traffic counted: memory", "look_memory", median, "MiB"),
    Row(
        "traffic counted, scraped every second: one endpoint changed, p50",
        "look_change",
        median,
        "ms",
        _MS,
    ),
    Row(
        "bytes counted: CPU a look, each connection to a Service", "flows_living", median, "µs", _US
    ),
    Row("bytes counted: CPU a look, each other entry", "flows_others", median, "µs", _US),
    Row("bytes counted: CPU, each connection that ends", "flows_ended", median, "µs", _US),
    Row("bytes counted: memory at 50,000 connections", "flows_memory", median, "MiB"),
    Row("restart with nothing changed, to healthy", "restart", median, "s"),
    Row("restart with nothing changed, restores", "restart_restores", median, ""),
    Row("memory, idle after the first sync", "memory", median, "MiB"),
    Row("memory, after a moment of churn", "memory_churned", median, "MiB"),
    Row("memory, after ten minutes of 100/s", "memory_endured", median, "MiB"),
    Row("memory, peak of the first sync", "memory_peak", median, "MiB"),
    Row("connection tracking: entries, half UDP", "conntrack_entries", median, ""),
    Row("connection tracking: cleaning them once", "conntrack_clean", median, "s"),
    Row("connection tracking: memory for it", "conntrack_memory", median, "MiB"),
    Row("connection tracking: share of time cleaned", "conntrack_busy", median, "%"),
    *(
        Row(
            f"one endpoint changed while {what}, {name}",
            f"conntrack_{series}",
            statistic,
            "ms",
            _MS,
        )
        for what, series in (
            ("a full table is cleaned", "change"),
            ("an empty one is, as often", "change_empty"),
        )
        for name, statistic in (("p50", median), ("p99", p99))
    ),
    Row("connect without a rule, minimum", "connect_bare", min, "µs", _US),
    *(
        Row(f"connect to {title}, minimum added", f"connect_{name}", min, "µs", _US, "connect_bare")
        for name, title in (
            ("first", "the first Service"),
            ("middle", "the middle Service"),
            ("last", "the last Service"),
            ("none", "no Service"),
            ("node_port", "a node port"),
        )
    ),
    Row("connect without a rule, p50", "connect_bare", median, "µs", _US),
    Row(
        "connect to the last Service, p50 added", "connect_last", median, "µs", _US, "connect_bare"
    ),
    Row("connections per second without a rule", "rate_bare", median, "/s"),
    Row("connections per second to the last Service", "rate_last", median, "/s"),
)

#: What the choice between the layouts depends on, at the small sizes where it is made.
THRESHOLD_ROWS: Final = tuple(
    row
    for row in ROWS
    if row.statistic is not p99
    and row.series
    in {"change", "create", "connect_first", "connect_middle", "connect_last", "connect_none"}
    and (row.statistic is min or not row.minus)
)
