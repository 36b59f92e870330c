"""Renews docs/performance.md and its plots from the results of a run."""

import re
from pathlib import Path
from typing import Final

from benchmarks import plot, report
from benchmarks.results import Results, median
from benchmarks.series import Row

# A plot of what a reader feels at each size. Latencies are minima: what the rules add, without the
# machine's own noise.
_PLOTS: Final = {
    "performance-sync.svg": Row("Initial sync: process start to last Service", "sync", median, "s"),
    "performance-change.svg": Row(
        "One endpoint changed: until connections go there, p50", "change", median, "ms", 1e3
    ),
    "performance-connect.svg": Row(
        "Connect to the last Service: minimum", "connect_last", min, "µs", 1e6
    ),
    "performance-connect-none.svg": Row(
        "Connect to an address that is no Service: minimum", "connect_none", min, "µs", 1e6
    ),
    "performance-memory.svg": Row("Resident memory, idle", "memory", median, "MiB"),
}
_PAGE: Final = "performance.md"


def publish(results: Results, docs: Path) -> None:
    """Write the plots, and the tables between their marks in the page.

    Raises ValueError if the page lacks a mark.
    """
    for name, row in _PLOTS.items():
        lines = _lines(results, row)
        if lines:
            (docs / name).write_text(
                plot.render(row.title, "Services with five endpoints each", row.unit, lines)
            )
    page = docs / _PAGE
    text = page.read_text()
    for mark, content in (
        ("machine", results.machine),
        ("goals", report.goals_markdown(results)),
        ("figures", report.figures_markdown(results)),
        ("threshold", report.threshold_markdown(results)),
    ):
        # What was not measured this time stays as it is.
        if content:
            text = _replaced(text, mark, content)
    page.write_text(text)


def _lines(results: Results, row: Row) -> list[plot.Line]:
    lines = []
    for (backend, layout), (color, dash) in plot.STYLES.items():
        points = [
            (float(size), value)
            for size in results.sizes
            if (value := row.value(results, size, backend, layout)) is not None
        ]
        if points:
            lines.append(plot.Line(f"{backend}, {layout}", color, dash, points))
    return lines


def _replaced(text: str, mark: str, content: str) -> str:
    begin, end = f"<!-- {mark}: begin, written by benchmarks/ -->", f"<!-- {mark}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"cannot find the mark {mark!r} in {_PAGE}")
    return pattern.sub(lambda _match: f"{begin}\n{content}\n{end}", text)
