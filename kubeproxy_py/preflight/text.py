"""
Findings as a person or a program reads them.

Pure. Worst first; what is well is only counted, unless asked for. A topic that was found several times
is explained once.
"""

import json
import textwrap
from collections.abc import Callable, Iterable
from typing import Final

from kubeproxy_py.preflight import findings
from kubeproxy_py.preflight.findings import Finding, Severity

#: Makes text stand out by its severity.
Style = Callable[[str, Severity], str]

# Of one topic; the rest is counted. --output json has all.
_MAX_SHOWN: Final = 10
# Where the text begins: the longest severity and the longest topic, with two spaces after each.
_SEVERITY_WIDTH: Final = 9
_TOPIC_WIDTH: Final = max(map(len, findings.TOPICS)) + 2


def as_text(
    found: Iterable[Finding], *, verbose: bool = False, width: int = 100, style: Style | None = None
) -> str:
    """Render for a terminal of *width* columns."""
    ordered = findings.worst_first(found)
    shown = [finding for finding in ordered if verbose or finding.severity != "ok"]
    lines: list[str] = []
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in shown:
        groups.setdefault((finding.severity, finding.topic), []).append(finding)
    indent = " " * (_SEVERITY_WIDTH + _TOPIC_WIDTH)

    def wrap(text: str, first: str = indent) -> list[str]:
        # Commands and addresses stay whole: they are copied.
        return textwrap.wrap(
            text,
            max(width, len(indent) + 40),
            initial_indent=first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    for (severity, topic), members in groups.items():
        first = f"{severity:{_SEVERITY_WIDTH}}{topic:{_TOPIC_WIDTH}}"
        for finding in members[:_MAX_SHOWN]:
            head, *rest = wrap(finding.found, first)
            shown_head = head.replace(severity, style(severity, severity), 1) if style else head
            lines += [shown_head, *rest]
            first = indent
        if len(members) > _MAX_SHOWN:
            lines += wrap(f"and {len(members) - _MAX_SHOWN} more; --output json lists all")
        if severity == "ok":
            continue
        explained = findings.TOPICS[topic]
        lines += wrap(explained.meaning)
        commands = [finding.command for finding in members[:_MAX_SHOWN] if finding.command]
        if severity != "info" or commands:
            lines += wrap(f"To do: {explained.action}")
        # Not wrapped: it is copied as one line.
        lines += [f"{indent}  $ {command}" for command in dict.fromkeys(commands)]
    return "\n".join([*lines, *([""] if lines else []), summary(ordered, verbose=verbose)])


def summary(found: Iterable[Finding], *, verbose: bool = False) -> str:
    """Return how many there are of each severity."""
    counts = _counts(found)
    parts = [
        _plural(counts["error"], "error"),
        _plural(counts["warning"], "warning"),
        f"{counts['info']} for information",
        f"{counts['ok']} ok" + ("" if verbose else " (--verbose shows them)"),
    ]
    return ", ".join(parts)


def as_json(found: Iterable[Finding]) -> str:
    """Render for programs: everything, with meaning and action."""
    ordered = findings.worst_first(found)
    document = {
        "worst": findings.worst(ordered),
        "counts": _counts(ordered),
        "findings": [
            {
                "id": finding.topic,
                "severity": finding.severity,
                "found": finding.found,
                "meaning": findings.TOPICS[finding.topic].meaning,
                "action": findings.TOPICS[finding.topic].action,
                "command": finding.command,
            }
            for finding in ordered
        ],
    }
    return json.dumps(document, indent=2)


def _counts(found: Iterable[Finding]) -> dict[Severity, int]:
    counts: dict[Severity, int] = dict.fromkeys(findings.SEVERITIES, 0)
    for finding in found:
        counts[finding.severity] += 1
    return counts


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
