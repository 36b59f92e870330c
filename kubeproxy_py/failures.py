"""
What is kept of an iptables call that failed: enough to see why, however long its input was.

Pure.
"""

import msgspec

from kubeproxy_py.errors import BatchRejected, IptablesError

# On either side of the line that was refused: a Service's chains and some neighbours, in a few
# kilobytes. An input may have 100,000 lines.
_CONTEXT = 100


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One failure, with what iptables was given around the line it complained about."""

    at: float  # Unix time
    message: str
    table: str = ""  # "": not known
    refused: tuple[int, ...] = ()  # line numbers, from 1
    first_line: int = 1  # the number of the first of ``lines``
    lines: tuple[str, ...] = ()  # empty: no input was refused
    total_lines: int = 0


def of(error: IptablesError, at: float) -> Failure:
    """Return what is kept of *error*, which came *at* that Unix time."""
    if not isinstance(error, BatchRejected) or not error.batch:
        return Failure(at=at, message=str(error))
    lines = error.batch.splitlines()
    # Where no line is named, the end: legacy iptables refuses tables at their COMMIT.
    centre = error.lines[0] if error.lines else len(lines)
    first = max(0, min(centre - _CONTEXT - 1, len(lines) - 2 * _CONTEXT))
    tables = [line[1:] for line in lines[:centre] if line.startswith("*")]
    return Failure(
        at=at,
        message=str(error),
        table=tables[-1] if tables else "",
        refused=error.lines,
        first_line=first + 1,
        lines=tuple(lines[first : first + 2 * _CONTEXT]),
        total_lines=len(lines),
    )
