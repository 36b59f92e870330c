"""What becomes of the samples that benchmarks have measured."""

import pytest

from benchmarks.results import Cell, Results


def test_a_later_run_adds_what_the_first_did_not_measure():
    first = Results("a machine", [Cell(100, "nft", "tree", {"sync": [1.0]})])
    later = Results(
        "a machine",
        [
            Cell(100, "nft", "tree", {"sync": [9.0], "drift_rule": [0.1]}),
            Cell(5000, "legacy", "tree", {"sync": [2.0]}),
        ],
        [Cell(8, "nft", "flat", {"change": [0.02]})],
    )
    first.complete(later)

    assert first.samples(100, "nft", "tree", "sync") == [1.0]
    assert first.samples(100, "nft", "tree", "drift_rule") == [0.1]
    assert first.samples(5000, "legacy", "tree", "sync") == [2.0]
    assert first.threshold.samples(8, "nft", "flat", "change") == [0.02]


def test_runs_of_different_machines_are_not_joined():
    with pytest.raises(ValueError, match="this machine and of that"):
        Results("this machine").complete(Results("that"))
