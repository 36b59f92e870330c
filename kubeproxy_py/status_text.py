"""
A ``Status`` as text for people: the worst first, one line for each thing, 100 columns.

Pure. Ages count from the document's own time, not from the reader's clock.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from kubeproxy_py.status_document import (
    AuditStatus,
    ConntrackStatus,
    DriftRepair,
    FailureStatus,
    FamilyStatus,
    StateFileStatus,
    Status,
    SyncStatus,
    WatchStatus,
)

_WIDTH: Final = 100
#: Colours a text as that of a state: "ready", "degraded", "not ready".
Colour = Callable[[str, str], str]

# Of a long list, what a screen has room for; --output json has all.
_SHOWN: Final = 10
_NAMED: Final = 3


def plain(text: str, _state: str) -> str:
    """Return *text* as it is."""
    return text


def status_text(status: Status, colour: Colour = plain) -> str:
    """Render the whole document."""
    head = f"{status.node.name}: {colour(status.state, status.state)}"
    lines = [head, *_bullets(status.reasons), *_bullets(status.warnings)]
    for family in status.families:
        lines += _troubles(family, status.now)
    lines += ["", *_columns(_facts(status))]
    for family in status.families:
        lines += ["", *_family_lines(family, status.now)]
    if status.watches:
        lines += ["", "watches"]
        lines += _columns([_watch_row(watch) for watch in status.watches])
    lines += _listed("addresses that get no rules", status.refused_addresses)
    lines += _listed("served, but it takes what is somebody else's", status.doubts)
    return "\n".join(lines)


def _listed(title: str, texts: Sequence[str]) -> Iterator[str]:
    if texts:
        yield from ("", title)
        for text in (*texts[:_SHOWN], *_more(len(texts))):
            yield from _wrap(text)


def failures_text(failures: Sequence[FailureStatus]) -> str:
    """Render the last failures, each with the input around the lines that were refused."""
    if not failures:
        return "No iptables call has failed since the start."
    return "\n\n".join("\n".join(_failure_lines(failure)) for failure in failures)


def age_text(seconds: float) -> str:
    """Render a time span as roughly as people speak of it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "0 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} d"


def _facts(status: Status) -> list[tuple[str, str]]:
    node = status.node
    if not node.is_known:
        known = "not seen yet"
    else:
        known = ", ".join([*node.ips, *([f"zone {node.zone}"] if node.zone else [])]) or "no IPs"
    up = age_text((status.now - status.started_at).total_seconds())
    return [
        ("version", f"{status.version}, pid {status.pid}, up {up}, {status.phase}"),
        ("node", f"{node.name} ({known})"),
        ("source", status.source),
        ("rules", f"iptables-{status.backend or '?'}, dispatch {status.dispatch}"),
        *_state_file(status.state_file, status.now),
    ]


def _state_file(file: StateFileStatus | None, now: datetime) -> Iterator[tuple[str, str]]:
    if file is None:
        return
    if file.saved_at is None:
        text = f"{file.path}, nothing saved yet"
    else:
        what = "IN USE, state of" if file.is_in_use else "not in use, state of"
        size = f"{file.size_bytes / 1024:.1f} KiB"
        text = f"{file.path}, {what} {_age(now, file.saved_at)} ago, {size}"
    if file.last_failure is not None:
        failed = file.last_failure
        text += f"; last failure ({failed.operation}) {_age(now, failed.at)} ago: {failed.reason}"
    yield "state file", text


def _troubles(family: FamilyStatus, now: datetime) -> Iterator[str]:
    """Yield what somebody should do something about."""
    for case in family.quarantined[:_SHOWN]:
        yield from _wrap(
            f"{family.ip_family}: {case.service} has been set aside for {_age(now, case.since)}"
            f" ({_count(case.attempts, 'attempt')}, next in {_until(now, case.retry_at)}): {case.reason}"
        )
    for line in _more(len(family.quarantined)):
        yield from _wrap(line)


def _family_lines(family: FamilyStatus, now: datetime) -> list[str]:
    rules = ", ".join(f"{count} in {table}" for table, count in family.rules.items())
    rows = [
        ("programs", f"{family.program} {family.program_version}"),
        *([("lacks", ", ".join(lacking))] if (lacking := family.missing_capabilities) else []),
        ("services", f"{family.services}, with {family.endpoints} endpoints"),
        ("rules", rules or "none written yet"),
        ("layout", f"trees: {', '.join(family.trees)}" if family.trees else "flat"),
        ("last sync", _sync_text(family.last_sync, now)),
    ]
    if family.last_write is not None and family.last_write != family.last_sync:
        rows.append(("last write", _sync_text(family.last_write, now)))
    if family.last_full_sync not in (None, family.last_sync, family.last_write):
        rows.append(("last full look", _sync_text(family.last_full_sync, now)))
    waiting = family.pending_seconds
    rows.append(
        ("queue", "empty" if waiting is None else f"a change waits for {age_text(waiting)}")
    )
    rows.append(("conntrack", _conntrack_text(family.conntrack, now)))
    if family.lock is not None and family.lock.waited_seconds:
        waited = age_text(family.lock.waited_seconds)
        rows.append(("xtables lock", f"waited for it for {waited} since the start"))
    if family.audit is not None and family.audit.services_compared:
        rows.append(("audit", _audit_text(family.audit)))
    if family.last_failure is not None:
        rows.append(("last failure", f"{_age(now, family.last_failure.at)} ago (--last-failure)"))
    lines = [family.ip_family, *_columns(rows)]
    if family.repairs:
        lines.append("  repaired, because others had changed it:")
        lines += [line for text in _repairs(family, now) for line in _wrap(text, "    ")]
    return lines


def _repairs(family: FamilyStatus, now: datetime) -> Iterator[str]:
    """Yield a line for each kind of repair, the newest first: who fights does the same for ever."""
    alike: dict[tuple[object, ...], list[DriftRepair]] = {}
    for repair in reversed(family.repairs):
        key = (repair.table, repair.kind, repair.chains, repair.processes)
        alike.setdefault(key, []).append(repair)
    for repairs in list(alike.values())[:_SHOWN]:
        repair = repairs[0]
        times = f" ({len(repairs)} times since {_age(now, repairs[-1].at)} ago)"
        who = ", ".join(repair.processes) or "an unknown process"
        yield (
            f"{_age(now, repair.at)} ago{times if len(repairs) > 1 else ''}: {repair.kind} in"
            f" {repair.table}: {_chains(repair.chains, repair.count)}, by {who}"
        )
    yield from _more(len(alike))


def _chains(names: Sequence[str], count: int) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if count <= _NAMED else f"{shown} and {count - _NAMED} more"


def _sync_text(sync: SyncStatus | None, now: datetime) -> str:
    if sync is None:
        return "none yet"
    text = f"{_age(now, sync.at)} ago, {sync.kind}, took {age_text(sync.seconds)}"
    if not sync.restores:
        return f"{text}, wrote nothing"
    rules = sum(sync.rules_written.values())
    return (
        f"{text}, {_count(sync.restores, 'restore')}: {_count(sync.chains_written, 'chain')}"
        f" with {_count(rules, 'rule')} written, {sync.chains_deleted} deleted"
    )


def _conntrack_text(ran: ConntrackStatus | None, now: datetime) -> str:
    if ran is None:
        return "nothing to clean up yet"
    if ran.error:
        return f"failed {_age(now, ran.at)} ago: {ran.error}"
    return f"cleaned up {_age(now, ran.at)} ago, {ran.deleted} deleted, {ran.failed} refused"


def _audit_text(audit: AuditStatus) -> str:
    text = f"{_count(audit.services_compared, 'comparison')} with a build from nothing"
    if not audit.services_differed:
        return f"{text}, none differed"
    return f"{text}, {audit.services_differed} differed: a bug, please report it"


def _watch_row(watch: WatchStatus) -> tuple[str, str]:
    if watch.failing_seconds is not None:
        return watch.kind, f"failing for {age_text(watch.failing_seconds)}: {watch.error}"
    if watch.silent_seconds is None:
        return watch.kind, "nothing has come yet"
    text = f"{watch.objects}, last event {age_text(watch.silent_seconds)} ago"
    if watch.resource_version:
        text += f", at resourceVersion {watch.resource_version}"
    return watch.kind, f"{text}, STALE" if watch.is_stale else text


def _failure_lines(failure: FailureStatus) -> Iterator[str]:
    table = f", table {failure.table}" if failure.table else ""
    yield f"{failure.ip_family}, {failure.at:%Y-%m-%d %H:%M:%S} UTC{table}"
    yield from _wrap(failure.message, "  ")
    if not failure.lines:
        yield "  iptables was given nothing that it could have refused."
        return
    last = failure.first_line + len(failure.lines) - 1
    yield f"  lines {failure.first_line} to {last} of {failure.total_lines} (* refused):"
    for number, line in enumerate(failure.lines, start=failure.first_line):
        yield f"  {'*' if number in failure.refused else ' '}{number:>7}  {line}"


def _bullets(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _wrap(text)


def _wrap(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [line for name, text in rows for line in _row(name.ljust(width), text)]


def _row(name: str, text: str) -> list[str]:
    head = f"  {name}  "
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _more(count: int) -> list[str]:
    return [f"and {count - _SHOWN} more"] if count > _SHOWN else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _age(now: datetime, then: datetime) -> str:
    return age_text(max((now - then) / timedelta(seconds=1), 0.0))


def _until(now: datetime, then: datetime) -> str:
    return _age(then, now)
