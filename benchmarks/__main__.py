"""Runs the benchmarks: ``python -m benchmarks --help``, or ``make bench``. Needs root."""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import drift, figures, flows, publish, report
from benchmarks import stage as stages
from benchmarks.results import Cell, Layout, Results
from tests.support.netns import Backend
from tests.support.proxy import compile_program

_SIZES = (100, 1_000, 5_000, 10_000, 30_000)
# Around 32 and 64 entries, where --dispatch=auto changes between the layouts.
_THRESHOLD_SIZES = (8, 16, 32, 64, 128, 256)
_THRESHOLD_FIGURES = ("bare", "connect", "change", "create")
# nft first: what legacy leaves behind when it is emptied are tables, which packets still pass.
_BACKENDS: tuple[Backend, ...] = ("nft", "legacy")
_LAYOUTS: tuple[Layout, ...] = ("tree", "flat")
# Small syncs take less than a second, of which a hiccup of the machine is a good part.
_REPEAT_UP_TO = 1_000
_REPEATS = 3
# On a running daemon; restart, which ends it, comes last.
_FIGURES = {"drift": drift.drift, "flows": flows.flows, **figures.FIGURES}
_PARTS = ("sync", *_FIGURES, "threshold")
# Ten minutes, and with legacy's large tables many more, for each cell.
_LONG = ("endurance", "drift")


def main(argv: Sequence[str]) -> int:
    """Measure, print, write; the exit status tells of failures, not of goals."""
    options = _parse(argv)
    results = _loaded(options.load) if options.load else Results(machine=_machine())
    failures = [] if options.load else _measure(results, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results.write(options.json)
    print(report.text(results))
    if options.docs:
        publish.publish(results, options.docs)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--sizes", type=_numbers, default=_SIZES, help="e.g. 100,1000")
    parser.add_argument("--backends", type=_choice(*_BACKENDS), default=_BACKENDS)
    parser.add_argument("--layouts", type=_choice(*_LAYOUTS), default=_LAYOUTS)
    parser.add_argument(
        "--only",
        type=_choice(*_PARTS),
        default=tuple(part for part in _PARTS if part not in _LONG),
        help=f"of {','.join(_PARTS)}; sync is part of every run. threshold has sizes of its own, "
        f"and comes alone where nothing else is asked for. {','.join(_LONG)} must be asked for",
    )
    parser.add_argument("--json", type=Path, help="write all raw samples")
    parser.add_argument(
        "--load",
        type=Path,
        nargs="+",
        help="measure nothing: take what --json wrote; of several runs, each adds what those before "
        "it have not measured",
    )
    parser.add_argument("--docs", type=Path, help="renew the tables and plots in this directory")
    return parser.parse_args(argv)


def _loaded(paths: Sequence[Path]) -> Results:
    first, *others = map(Results.read, paths)
    for other in others:
        first.complete(other)
    return first


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _choice(*known: str) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)} are not of {','.join(known)}")
        return found

    return names


def _measure(results: Results, options: argparse.Namespace) -> list[str]:
    """Measure all that is asked for into *results*; return what could not be measured."""
    compile_program()
    began = time.monotonic()
    failures = []
    runs = []
    if set(options.only) != {"threshold"}:
        runs += [(results, size, options.only) for size in options.sizes]
    if "threshold" in options.only:
        runs += [(results.threshold, size, _THRESHOLD_FIGURES) for size in _THRESHOLD_SIZES]
    for part, size, only in runs:
        _say(began, f"{size} Services x {stages.ENDPOINTS} endpoints: building")
        with stages.build(size) as stage:
            # In the order of _BACKENDS, whatever the order they are asked for in.
            for backend in (each for each in _BACKENDS if each in options.backends):
                for layout in options.layouts:
                    cell = part.cell(size, backend, layout)
                    try:
                        _measure_cell(cell, stage, only, lambda text: _say(began, text))
                    except (AssertionError, OSError, RuntimeError) as error:
                        # The other cells are worth having, and take half an hour to get again.
                        failures.append(f"{size} {backend} {layout}: {error}")
                        _say(began, f"FAILED {failures[-1]}")
                    if options.json:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        results.write(options.json)
    _say(began, "done")
    return failures


def _measure_cell(
    cell: Cell, stage: stages.Stage, only: Sequence[str], say: Callable[[str], None]
) -> None:
    where = f"{cell.size} {cell.backend} {cell.layout}"
    repeats = _REPEATS if cell.size <= _REPEAT_UP_TO and "sync" in only else 1
    for _ in range(repeats - 1):
        stage.lab.reset_rules()
        with figures.daemon(stage, cell.backend, cell.layout) as (run, started):
            cell.add(figures.initial_sync(run, started))
    stage.lab.reset_rules()
    with figures.daemon(stage, cell.backend, cell.layout) as (run, started):
        cell.add(figures.initial_sync(run, started))
        say(f"{where}: sync {cell.samples['sync'][-1]:.2f} s")
        figures.wait_idle(run.proxy)
        for name, figure in _FIGURES.items():
            if name in only:
                cell.add(figure(run))
                say(f"{where}: {name}")
    stage.lab.reset_rules()


def _say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:7.1f} s] {text}", file=sys.stderr, flush=True)


def _machine() -> str:
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    total_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return (
        f"{len(cpus)} cores of {cpus[0] if cpus else platform.machine()},"
        f" {total_kb / 2**20:.0f} GiB, Linux {platform.release()},"
        f" {report.iptables_version()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
