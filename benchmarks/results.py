"""What was measured: raw samples by size, backend, layout and series; a JSON file and back."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from tests.support.netns import Backend

Layout = Literal["flat", "tree"]


@dataclasses.dataclass(slots=True)
class Cell:
    """All samples of one size, backend and layout."""

    size: int
    backend: Backend
    layout: Layout
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, found: dict[str, list[float]]) -> None:
        """Add samples to those there are."""
        for name, values in found.items():
            self.samples.setdefault(name, []).extend(values)


@dataclasses.dataclass(slots=True)
class Results:
    """One run of the benchmarks."""

    machine: str
    cells: list[Cell] = dataclasses.field(default_factory=list)
    #: Small sizes, around the number of entries where the daemon chooses between the layouts.
    threshold_cells: list[Cell] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        loaded: dict[str, Any] = json.loads(path.read_text())
        return cls(
            loaded["machine"],
            [Cell(**cell) for cell in loaded["cells"]],
            [Cell(**cell) for cell in loaded.get("threshold_cells", [])],
        )

    def complete(self, later: "Results") -> None:
        """Add those series of another run on the same machine that this one does not have.

        Raises:
            ValueError: it is of another machine.
        """
        if later.machine != self.machine:
            raise ValueError(f"cannot join runs of {self.machine} and of {later.machine}")
        for mine, others in ((self, later), (self.threshold, later.threshold)):
            for other in others.cells:
                cell = mine.cell(other.size, other.backend, other.layout)
                for name, values in other.samples.items():
                    cell.samples.setdefault(name, values)

    @property
    def threshold(self) -> "Results":
        """Return what was measured around the threshold, as results of their own; cells are shared."""
        return Results(self.machine, self.threshold_cells)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    def cell(self, size: int, backend: Backend, layout: Layout) -> Cell:
        """Return the cell, a new one if there is none."""
        for cell in self.cells:
            if (cell.size, cell.backend, cell.layout) == (size, backend, layout):
                return cell
        self.cells.append(Cell(size, backend, layout))
        return self.cells[-1]

    def samples(self, size: int, backend: str, layout: str, series: str) -> list[float]:
        """Return the samples, none if this was not measured."""
        for cell in self.cells:
            if (cell.size, cell.backend, cell.layout) == (size, backend, layout):
                return cell.samples.get(series, [])
        return []

    @property
    def sizes(self) -> list[int]:
        return sorted({cell.size for cell in self.cells})


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that *percent* of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
