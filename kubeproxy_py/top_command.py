"""
``top``: looks at this host's rules again and again, and shows what has happened in between.

Reads the kernel, not the daemon, so it works without one and beside the real kube-proxy.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Literal, NamedTuple

import click

from kubeproxy_py import top
from kubeproxy_py.errors import ConfigError, KubeProxyError
from kubeproxy_py.iptables import counters, runner
from kubeproxy_py.model import IPFamily, Tables

Output = Literal["table", "json"]

# A look takes a second of a core at 10,000 Services; faster than this, nobody reads.
_SHORTEST_S: Final = 0.2
# Ends the process where the wait is interrupted; never set.
_wait: Final = threading.Event().wait


class Asked(NamedTuple):
    """What a person asks for."""

    interval_s: float = 2.0
    namespaces: tuple[str, ...] = ()
    sort: top.Sort = "rate"
    is_once: bool = False
    output: Output = "table"


class Source(NamedTuple):
    """Where one family's rules and counters are read."""

    save: Callable[[], Tables]
    counters: counters.Counters


def sources(programs: Mapping[IPFamily, runner.Programs]) -> list[Source]:
    """Return this host's."""
    return [
        Source(runner.Iptables(found).save, counters.of(found.backend, family))
        for family, found in programs.items()
    ]


def run(asked: Asked, found: list[Source]) -> None:
    """Show what happens until interrupted, or once. Raises KubeProxyError."""
    if not _SHORTEST_S <= asked.interval_s < threading.TIMEOUT_MAX:
        raise ConfigError(f"cannot look every {asked.interval_s:g} s: {_SHORTEST_S} s at least")
    looks = look(asked, found)
    if asked.is_once:
        next(looks)
        last = next(looks)
        if asked.output == "json":
            _print_json(last)
        else:
            from kubeproxy_py import top_screen  # noqa: PLC0415 - loads rich, which only this needs

            top_screen.print_once(last)
        return
    try:
        if asked.output == "json":
            next(looks)
            for each in looks:
                _print_json(each)
        else:
            _show(looks)
    except KeyboardInterrupt:
        # How one leaves it.
        return


def look(
    asked: Asked,
    found: list[Source],
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = _wait,
) -> Iterator[top.View]:
    """Yield a view at each look; the first has no rates. Raises KubeProxyError."""
    watches = [(top.FamilyWatch(asked.namespaces), source) for source in found]
    before: float | None = None
    while True:
        started = clock()
        for watch, source in watches:
            try:
                counts: dict[str, tuple[int, ...]] = {}
                for table, chains in watch.learn(source.save()).items():
                    counts |= source.counters.read(table, chains)
            except OSError as error:
                raise KubeProxyError(f"cannot read counters of rules: {error}") from error
            watch.fold(counts)
        now = clock()
        # Counters are read at the end of a look, as they were at the end of the last one.
        seconds = 0.0 if before is None else now - before
        before = now
        yield top.view([watch for watch, _ in watches], seconds, asked.sort)
        wait(max(0.0, started + asked.interval_s - clock()))


def _show(looks: Iterator[top.View]) -> None:
    if not sys.stdout.isatty():
        raise ConfigError("cannot show a live view where there is no terminal: --once, or --output")
    from kubeproxy_py import top_screen  # noqa: PLC0415 - as above

    with top_screen.live() as show:
        for each in looks:
            show(each)


def _print_json(found: top.View) -> None:
    click.echo(json.dumps(top.as_json(found)))
