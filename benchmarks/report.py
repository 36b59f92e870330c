"""Results as tables: for the terminal, and as Markdown for docs/performance.md."""

import subprocess
from collections.abc import Sequence
from typing import Final

from benchmarks import goals, series
from benchmarks.results import Results

# As the columns stand; those that were not measured are left out.
COLUMNS: Final = (("nft", "tree"), ("nft", "flat"), ("legacy", "tree"), ("legacy", "flat"))


def text(results: Results) -> str:
    """Return all tables as aligned text."""
    parts = [results.machine]
    for size in results.sizes:
        parts.append(f"\n{size:,} Services x 5 endpoints")
        parts.append(_aligned(_size_table(results, size)))
    if results.threshold_cells:
        parts += [
            "\nFlat or a tree",
            _aligned(_figure_table(results.threshold, series.THRESHOLD_ROWS)),
        ]
    judged = _goal_table(results)
    if len(judged) > 1:
        parts += ["\nGoals", _aligned(judged)]
    return "\n".join(parts)


def goals_markdown(results: Results) -> str:
    """Return the goals beside what was measured."""
    return _markdown(_goal_table(results))


def figures_markdown(results: Results) -> str:
    """Return one table: a row for each figure and column, a column for each size."""
    return _markdown(_figure_table(results, series.ROWS))


def threshold_markdown(results: Results) -> str:
    """Return the same of both layouts at small sizes, "" if they were not measured."""
    if not results.threshold_cells:
        return ""
    return _markdown(_figure_table(results.threshold, series.THRESHOLD_ROWS))


def iptables_version() -> str:
    """Return e.g. ``iptables v1.8.9``; the backend is in the tables."""
    done = subprocess.run(["iptables", "--version"], capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split()[:2])


def _size_table(results: Results, size: int) -> list[list[str]]:
    columns = [
        column
        for column in COLUMNS
        if any((cell.size, cell.backend, cell.layout) == (size, *column) for cell in results.cells)
    ]
    lines = [["", *(f"{backend} {layout}" for backend, layout in columns), ""]]
    for row in series.ROWS:
        values = [row.value(results, size, backend, layout) for backend, layout in columns]
        if any(value is not None for value in values):
            lines.append([row.title, *map(_number, values), row.unit])
    return lines


def _figure_table(results: Results, rows: Sequence[series.Row]) -> list[list[str]]:
    """Return a line for each row and column, a cell for each size."""
    lines = [["figure", "rules", *(f"{size:,}" for size in results.sizes)]]
    for row in rows:
        for backend, layout in COLUMNS:
            values = [row.value(results, size, backend, layout) for size in results.sizes]
            if any(value is not None for value in values):
                title = f"{row.title} ({row.unit})" if row.unit else row.title
                lines.append([title, f"{backend} {layout}", *map(_number, values)])
    return _without_repeats(lines)


def _goal_table(results: Results) -> list[list[str]]:
    return [
        ["goal", "measured", "limit", "unit", ""],
        *(
            [
                judged.title,
                _number(judged.value),
                _number(judged.limit),
                judged.unit,
                "met" if judged.is_met else "NOT MET",
            ]
            for judged in goals.judge(results)
        ),
    ]


def _number(value: float | None) -> str:
    """Write three significant digits."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _without_repeats(lines: list[list[str]]) -> list[list[str]]:
    shown, last = [], ""
    for line in lines:
        shown.append(["" if line[0] == last else line[0], *line[1:]])
        last = line[0]
    return shown


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n in {0, len(widths) - 1} else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    rule = f"|---|{'---|' * (len(lines[0]) - 1)}"
    return "\n".join([head, rule, *body])
