"""What the figures should reach, all within one run on one machine. Judged, never asserted."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from benchmarks.results import Results, median
from benchmarks.series import p99

# Goals are for the layout that a daemon chooses by itself at these sizes.
_LAYOUT: Final = "tree"
_BACKENDS: Final = ("nft", "legacy")
_TARGETS: Final = ("first", "middle", "last", "none")


class Judgement(NamedTuple):
    """One goal beside what was measured, both in *unit*."""

    title: str
    value: float
    limit: float
    unit: str

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit


def judge(results: Results) -> list[Judgement]:
    """Compare what was measured with the goals; what was not measured is left out."""
    return [
        *_initial_sync(results),
        *_changes(results),
        *_creations(results),
        *_cpu(results),
        *_connects(results),
        *_memory(results),
        *_restarts(results),
        *_conntrack(results),
    ]


def _initial_sync(results: Results) -> Iterator[Judgement]:
    for size, limit in ((5_000, 5.5), (10_000, 11.0)):
        if found := _samples(results, size, "nft", "sync"):
            yield Judgement(f"nft {size:,}x5: initial sync", median(found), limit, "s")
    for size in results.sizes:
        found = _samples(results, size, "legacy", "sync")
        bare = _samples(results, size, "legacy", "bare_all")
        if found and bare:
            limit = median(bare) + 1.5
            title = f"legacy {size:,}x5: initial sync, against the bare restore + 1.5 s"
            yield Judgement(title, median(found), limit, "s")


def _changes(results: Results) -> Iterator[Judgement]:
    if found := _samples(results, 10_000, "nft", "change"):
        yield Judgement("nft 10,000x5: one endpoint changed, p50", 1e3 * median(found), 100, "ms")
        yield Judgement("nft 10,000x5: one endpoint changed, p99", 1e3 * p99(found), 250, "ms")
    found = _samples(results, 10_000, "legacy", "change")
    bare = _samples(results, 10_000, "legacy", "bare_small")
    if found and bare:
        limit = 1.3e3 * median(bare)
        title = "legacy 10,000x5: one endpoint changed, p50, against 1.3 bare smallest restores"
        yield Judgement(title, 1e3 * median(found), limit, "ms")
    if found := _samples(results, 5_000, "nft", "busy"):
        title = "nft 5,000x5: one endpoint changed while 20/s change"
        yield Judgement(f"{title}, p50", 1e3 * median(found), 200, "ms")
        yield Judgement(f"{title}, p99", 1e3 * p99(found), 500, "ms")


def _creations(results: Results) -> Iterator[Judgement]:
    for backend in _BACKENDS:
        if found := _samples(results, 1_000, backend, "create"):
            title = f"{backend} 1,000x5: Service and slice created, p50"
            yield Judgement(title, 1e3 * median(found), 100, "ms")


def _cpu(results: Results) -> Iterator[Judgement]:
    for backend in _BACKENDS:
        small = _samples(results, 100, backend, "change_cpu")
        large = _samples(results, 10_000, backend, "change_cpu")
        if small and large:
            title = f"{backend}: daemon's own CPU per change, p50, 10,000x5 against 100x5"
            yield Judgement(title, median(large) / median(small), 1.5, "times")


def _connects(results: Results) -> Iterator[Judgement]:
    for backend in _BACKENDS:
        for size, limit in ((10_000, 10.0), (30_000, 15.0)):
            bare = _samples(results, size, backend, "connect_bare")
            found = [
                min(samples)
                for name in _TARGETS
                if (samples := _samples(results, size, backend, f"connect_{name}"))
            ]
            if bare and found:
                title = f"{backend} {size:,}x5: connect to any Service or none, added at most"
                yield Judgement(title, 1e6 * (max(found) - min(bare)), limit, "µs")


def _memory(results: Results) -> Iterator[Judgement]:
    for backend in _BACKENDS:
        for size, limit in ((5_000, 100), (10_000, 150)):
            for series, when in (
                ("memory", "idle"),
                ("memory_endured", "after ten minutes of churn"),
            ):
                if found := _samples(results, size, backend, series):
                    title = f"{backend} {size:,}x5: memory {when}"
                    yield Judgement(title, median(found), limit, "MiB")


def _restarts(results: Results) -> Iterator[Judgement]:
    for backend in _BACKENDS:
        if found := _samples(results, 10_000, backend, "restart"):
            title = f"{backend} 10,000x5: restart with nothing changed"
            yield Judgement(f"{title}, to healthy", median(found), 6, "s")
            restores = _samples(results, 10_000, backend, "restart_restores")
            yield Judgement(f"{title}, restores", max(restores), 0, "")


def _conntrack(results: Results) -> Iterator[Judgement]:
    for backend in _BACKENDS:
        for size in results.sizes:
            full = _samples(results, size, backend, "conntrack_change")
            empty = _samples(results, size, backend, "conntrack_change_empty")
            if full and empty:
                title = (
                    f"{backend} {size:,}x5: one endpoint changed while a full connection table is"
                )
                ratio = median(full) / median(empty)
                yield Judgement(f"{title} cleaned, p50, against an empty one", ratio, 1.5, "times")
            for found in _samples(results, size, backend, "conntrack_memory"):
                title = f"{backend} {size:,}x5: memory for cleaning a full connection table"
                yield Judgement(title, found, 2, "MiB")


def _samples(results: Results, size: int, backend: str, series: str) -> list[float]:
    return results.samples(size, backend, _LAYOUT, series)
