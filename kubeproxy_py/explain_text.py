"""
What ``explain`` found, as text for people (100 columns) and as JSON for programs.

Pure. People get the answer in the first sentence, then the endpoints, then the rules that decided.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any, Final

import msgspec

from kubeproxy_py import explain_match, rules
from kubeproxy_py.explain import Outcome, Packet, Step, Trace
from kubeproxy_py.explain_service import Door, ServiceView, Visit

_WIDTH: Final = 100
Json = dict[str, Any]
#: Makes text stand out on a terminal.
Bold = Callable[[str], str]

_VERDICTS: Final = {
    "delivered": "is delivered",
    "accepted": "passes",
    "rejected": "is rejected",
    "dropped": "is dropped",
}


def packet_text(trace: Trace, bold: Bold = str) -> str:
    """Render everything that can become of one packet."""
    lines = [*_wrap(bold(_headline(trace)), "")]
    if len(trace.outcomes) > 1 or trace.outcomes[0].verdict == "delivered":
        lines += ["", "Outcomes:", *_outcome_lines(trace.outcomes)]
    # Outcomes of one kind go the same way but for the last steps.
    shown: set[tuple[str, bool]] = set()
    for outcome in sorted(trace.outcomes, key=lambda outcome: -outcome.probability):
        kind = (outcome.verdict, outcome.is_masqueraded)
        if kind not in shown:
            shown.add(kind)
            lines += ["", *_path_lines(outcome, bold)]
    return "\n".join([*lines, *_warning_lines([trace])])


def service_text(view: ServiceView, bold: Bold = str) -> str:
    """Render the front doors of a Service, each with what becomes of those who come to it."""
    lines = [bold(f"Service {view.name}")]
    if view.pods_are:
        lines.append(f"Pods are told by {view.pods_are}.")
    else:
        lines.append("The rules do not tell pods from others.")
    if view.affinity_timeout_s is not None:
        lines.append(
            f"A client keeps its endpoint for {view.affinity_timeout_s} s (session affinity)."
        )
    for door in view.doors:
        lines += ["", *_door_lines(door, bold)]
    traces = [visit.trace for door in view.doors for visit in door.visits]
    return "\n".join([*lines, *_warning_lines(traces)])


# Text: packets -----------------------------------------------------------------------------------


def _headline(trace: Trace) -> str:
    packet, outcomes = trace.packet, trace.outcomes
    where = _address(packet.destination, packet.destination_port)
    what = f"{packet.protocol} from {packet.source} to {where}"
    verdicts = {outcome.verdict for outcome in outcomes}
    if len(verdicts) > 1:
        return f"{what} has more than one outcome."
    said = f"{what} {_VERDICTS[outcomes[0].verdict]}"
    if verdicts != {"delivered"}:
        is_masqueraded = any(outcome.is_masqueraded for outcome in outcomes)
        source = f"; {_source_text(outcomes)}" if is_masqueraded else ""
        return f"{said}{_by(outcomes[0])}{source}."
    if len(outcomes) == 1:
        to = f"to {_address(outcomes[0].destination, outcomes[0].port)}"
    else:
        to = f"to one of {len({(o.destination, o.port) for o in outcomes})} endpoints"
    return f"{said} {to}; {_source_text(outcomes)}."


def _source_text(outcomes: Sequence[Outcome]) -> str:
    masqueraded = [outcome for outcome in outcomes if outcome.is_masqueraded]
    if not masqueraded:
        return "its source is kept"
    if len(masqueraded) < len(outcomes):
        which = ", ".join(_address(outcome.destination, outcome.port) for outcome in masqueraded)
        return f"it is masqueraded only on the way to {which}"
    reasons = {
        _why_masqueraded(outcome.masquerade_rule): None
        for outcome in masqueraded
        if outcome.masquerade_rule is not None
    }
    return f"it is masqueraded ({'; '.join(reasons)})"


def _by(outcome: Outcome) -> str:
    has_rule = outcome.verdict_rule is not None
    return f" by {outcome.reason}" if has_rule else f": {outcome.reason}"


def _why_masqueraded(step: Step) -> str:
    """Say in plain words what the rule that asks for masquerading has found."""
    rule = explain_match.parse_rule(step.rule)
    if step.effect != f"jump {rules.MARK_MASQ}":
        return rule.comment or f"by a rule in {step.table} {step.chain}"
    if step.chain.startswith("KUBE-SEP-"):
        return "an endpoint that is sent to itself"
    if "! -s" in rule.values:
        return f"not from a pod: outside {rule.values['! -s']}"
    if "! -i" in rule.values:
        return f"not from a pod: not by {rule.values['! -i']}"
    if rule.values.get("--src-type") == "LOCAL":
        return "from this node to an external destination"
    if step.chain.startswith("KUBE-EXT-"):
        return "to an external destination"
    return rule.comment


def _outcome_lines(outcomes: Iterable[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        what = "masqueraded" if outcome.is_masqueraded else "source kept"
        if outcome.verdict in {"rejected", "dropped"}:
            what = f"{outcome.verdict}{_by(outcome)}"
        elif outcome.verdict == "accepted":
            what += ", no endpoint"
        address = _address(outcome.destination, outcome.port)
        yield f"  {_percent(outcome.probability):>8}  {address:<21}  {what}"


def _path_lines(outcome: Outcome, bold: Bold) -> Iterator[str]:
    if outcome.verdict in {"rejected", "dropped"}:
        yield f"Path until it {_VERDICTS[outcome.verdict]} (* decides):"
    else:
        source = "masqueraded" if outcome.is_masqueraded else "source kept"
        to = _address(outcome.destination, outcome.port)
        yield f"Path to {to}, {source} (* decides):"
    decisive = (outcome.dnat_rule, outcome.masquerade_rule, outcome.verdict_rule)
    stages = groupby(outcome.path, key=lambda step: (step.hook, step.table))
    for (hook, table), steps in stages:
        yield f"  {hook}, {table}"
        in_vain: list[str] = []
        listed = list(steps)
        for step, following in zip(listed, [*listed[1:], None], strict=True):
            is_jump = step.effect.startswith("jump ")
            if is_jump and (following is None or following.depth <= step.depth):
                in_vain.append(step.effect.removeprefix("jump "))
                continue
            yield from _step_lines(step, bold, is_decisive=step in decisive)
        if in_vain:
            yield from _wrap(f"nothing matches in {', '.join(in_vain)}", "      ")


def _step_lines(step: Step, bold: Bold, *, is_decisive: bool) -> Iterator[str]:
    indent = "  " * step.depth
    text = f"{step.chain}: {_without_comment(step.rule) or '(no target)'}"
    lines = _wrap(text, f"    {'* ' if is_decisive else '  '}{indent}")
    yield from (bold(line) if is_decisive else line for line in lines)
    note = _note(step)
    if note:
        yield from _wrap(f"# {note}", f"          {indent}")


def _note(step: Step) -> str:
    """Say in plain words what the rule means for this packet."""
    rule = explain_match.parse_rule(step.rule)
    what, _, argument = step.effect.partition(" ")
    if argument == rules.MARK_MASQ:
        return f"{_why_masqueraded(step)}: will be masqueraded"
    if rule.chance < 1:
        return f"chosen here with {_percent(rule.chance)}"
    if argument.startswith("KUBE-SEP-"):
        if "--rcheck" in step.rule:
            return "was here before: the same endpoint again"
        return "what is left"
    if what == "dnat":
        return f"destination becomes {argument}"
    if what == "snat":
        return f"source becomes {argument}"
    if what == "masquerade":
        return "source becomes an address of this node"
    if what == "return" and step.chain == rules.POSTROUTING:
        return "not marked: keeps its source"
    return rule.comment


# Text: Services ----------------------------------------------------------------------------------


def _door_lines(door: Door, bold: Bold) -> Iterator[str]:
    named = f" (port {door.port_name})" if door.port_name else ""
    yield bold(f"{door.kind} {_address(door.address, door.port)}/{door.protocol}{named}")
    # Those of whom the same becomes are told of together.
    for said, group in groupby(door.visits, key=_visit_text):
        visits = list(group)
        who = ", ".join(f"{visit.who} ({visit.trace.packet.source})" for visit in visits)
        yield from _wrap(f"{who}: {said}", "    ")
        for outcome in visits[0].trace.outcomes:
            if outcome.verdict == "delivered":
                address = _address(outcome.destination, outcome.port)
                yield f"        {_percent(outcome.probability):>8}  {address}"


def _visit_text(visit: Visit) -> str:
    outcomes = visit.trace.outcomes
    verdicts = {outcome.verdict for outcome in outcomes}
    if verdicts == {"delivered"}:
        return f"delivered; {_source_text(outcomes)}"
    if len(verdicts) == 1:
        return f"{outcomes[0].verdict}{_by(outcomes[0])}"
    shares = {verdict: _share(outcomes, verdict) for verdict in sorted(verdicts)}
    return ", ".join(f"{_percent(share)} {verdict}" for verdict, share in shares.items())


def _share(outcomes: Sequence[Outcome], verdict: str) -> Fraction:
    return sum((o.probability for o in outcomes if o.verdict == verdict), Fraction(0))


# Text: parts -------------------------------------------------------------------------------------


def _warning_lines(traces: Iterable[Trace]) -> list[str]:
    warnings = dict.fromkeys(warning for trace in traces for warning in trace.warnings)
    if not warnings:
        return []
    lines = ["", "Not understood, and taken as not matching:"]
    for warning in warnings:
        text = f"{warning.table} {warning.chain}: {warning.rule}"
        lines += [*_wrap(text, "    "), *_wrap(f"# unknown: {warning.word}", "          ")]
    return lines


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * (len(indent) + 4 if indent else 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


_COMMENT: Final = re.compile(r' ?-m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+)')


def _without_comment(rule: str) -> str:
    # The notes say it in fewer words.
    return _COMMENT.sub("", rule).strip()


def _percent(share: Fraction) -> str:
    return f"{float(share):.2%}".replace("%", " %")


def _address(ip: str, port: int) -> str:
    if not port:
        return ip
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


# JSON --------------------------------------------------------------------------------------------


def packet_json(trace: Trace) -> Json:
    """Return everything that can become of one packet; probabilities are rounded to floats."""
    return {
        "packet": _packet_json(trace.packet),
        "outcomes": [_outcome_json(outcome) for outcome in trace.outcomes],
        "warnings": [msgspec.to_builtins(warning) for warning in trace.warnings],
    }


def service_json(view: ServiceView) -> Json:
    """Return the front doors of a Service, each with a trace for everyone who may come."""
    return {
        "namespace": view.name.namespace,
        "name": view.name.name,
        "affinityTimeoutSeconds": view.affinity_timeout_s,
        "podsAre": view.pods_are,
        "doors": [
            {
                "kind": door.kind,
                "portName": door.port_name,
                "address": door.address,
                "port": door.port,
                "protocol": door.protocol,
                "visits": [{"who": visit.who, **packet_json(visit.trace)} for visit in door.visits],
            }
            for door in view.doors
        ],
    }


def _packet_json(packet: Packet) -> Json:
    return {
        "source": packet.source,
        "sourcePort": packet.source_port,
        "destination": packet.destination,
        "destinationPort": packet.destination_port,
        "protocol": packet.protocol,
        "inInterface": packet.in_interface,
        "outInterface": packet.out_interface,
        "ctstate": packet.ctstate,
        "mark": packet.mark,
    }


def _outcome_json(outcome: Outcome) -> Json:
    return {
        "probability": float(outcome.probability),
        "verdict": outcome.verdict,
        "destination": outcome.destination,
        "port": outcome.port,
        "isMasqueraded": outcome.is_masqueraded,
        "reason": outcome.reason,
        "dnatRule": _step_json(outcome.dnat_rule),
        "masqueradeRule": _step_json(outcome.masquerade_rule),
        "verdictRule": _step_json(outcome.verdict_rule),
        "path": [msgspec.to_builtins(step) for step in outcome.path],
    }


def _step_json(step: Step | None) -> Json | None:
    return None if step is None else msgspec.to_builtins(step)
