"""
What ``top`` shows on a terminal, with rich.

Loaded only by that command: the daemon needs neither the time nor the memory that rich takes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from kubeproxy_py.top import Row, View

# The package keeps it from being loaded by others.
if sys.modules.get("rich") is None:
    sys.modules.pop("rich", None)

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_BAR = 20
# What stands around the rows: a heading, the table's head and its rule, a line that is left free.
_AROUND = 5
_PIPE_WIDTH = 160


def print_once(found: View) -> None:
    """Print all rows there are."""
    console = Console()
    if not console.is_terminal:
        # What reads a pipe has no width; rich would take 80 columns for it and cut names off.
        console = Console(width=_PIPE_WIDTH)
    console.print(render(found))


@contextlib.contextmanager
def live() -> Iterator[Callable[[View], None]]:
    """Take over the terminal; give a function that shows what there is now."""
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as screen:
        yield lambda found: screen.update(
            render(found, max(1, console.height - _AROUND)), refresh=True
        )


def render(found: View, rows: int | None = None) -> Group:
    """Return a heading and a table of at most *rows* lines; None: of all."""
    shown = found.rows[:rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("SERVICE", overflow="ellipsis", no_wrap=True)
    table.add_column("PORT", no_wrap=True)
    for name in ("CONN/S", "TOTAL", "ENDPOINTS", "REFUSED/S"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("SHARE", no_wrap=True)
    for row in shown:
        table.add_row(*_cells(row, has_rates=found.seconds > 0))
    hidden = len(found.rows) - len(shown)
    more = f", {hidden} more not shown" if hidden else ""
    head = (
        f"{found.per_s:,.1f} new connections/s to {len(found.rows)} Service ports{more}"
        if found.seconds
        else f"{len(found.rows)} Service ports; counting"
    )
    return Group(Text(head, style="bold"), table)


def _cells(row: Row, *, has_rates: bool) -> tuple[Text, ...]:
    style = "red" if row.refused_per_s else "" if row.per_s else "dim"
    port = row.port
    return tuple(
        Text(cell, style=style)
        for cell in (
            f"{port.namespace}/{port.name}",
            f"{port.port or '-'}/{port.protocol}",
            f"{row.per_s:,.1f}" if has_rates else "",
            f"{row.total:,}",
            f"{row.endpoints}",
            f"{row.refused_per_s:,.1f}" if has_rates else "",
            f"{'█' * round(row.share * _BAR):{_BAR}} {row.share:4.0%}" if has_rates else "",
        )
    )
