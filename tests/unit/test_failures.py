"""What is kept of a failed iptables call."""

from kubeproxy_py import failures
from kubeproxy_py.errors import BatchRejected, LockTimeout

BATCH = "\n".join(
    ["*filter", *(f"-A F {n}" for n in range(300)), "COMMIT", "*nat", *(f"-A N {n}" for n in range(300)), "COMMIT", ""]
)  # fmt: skip
LINES = BATCH.splitlines()


def test_the_lines_around_the_refused_one_are_kept():
    line = LINES.index("-A N 7") + 1
    kept = failures.of(BatchRejected("no", batch=BATCH, lines=[line]), 12.5)

    assert (kept.at, kept.table, kept.refused, kept.total_lines) == (12.5, "nat", (line,), 604)
    assert len(kept.lines) == 200
    assert kept.lines[line - kept.first_line] == "-A N 7"


def test_a_refusal_at_the_beginning_keeps_the_beginning():
    kept = failures.of(BatchRejected("no", batch=BATCH, lines=[2]), 0.0)

    assert (kept.first_line, kept.table, kept.lines[0]) == (1, "filter", "*filter")


def test_without_a_line_the_end_is_kept():
    kept = failures.of(BatchRejected("no", batch=BATCH), 0.0)

    assert (kept.table, kept.refused, kept.lines[-1]) == ("nat", (), "COMMIT")


def test_a_short_input_is_kept_whole():
    kept = failures.of(BatchRejected("no", batch="-A X y\n", lines=[1]), 0.0)

    assert (kept.first_line, kept.lines, kept.table) == (1, ("-A X y",), "")


def test_where_nothing_was_refused_there_are_no_lines():
    kept = failures.of(LockTimeout("cannot get the xtables lock"), 3.0)

    assert kept == failures.Failure(at=3.0, message="cannot get the xtables lock")
