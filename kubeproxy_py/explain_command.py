"""
A question on the command line → the rules it is about, desired or live → its answer as text or JSON.

What ``explain`` does beside reading flags. The only part of it that looks at the host.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from kubeproxy_py import (
    addresses,
    config_validation,
    explain,
    explain_service,
    explain_text,
    host,
    hostnet,
    privileges,
)
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.flags import HostFacts, Settings
from kubeproxy_py.iptables import runner
from kubeproxy_py.iptables.chains import Tables
from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.ruleset import Ruleset

_PROTOCOLS: Final = frozenset({"tcp", "udp", "sctp"})


class Question(NamedTuple):
    """What a person asks: for one Service, or for one packet."""

    service: str  # NAMESPACE/NAME, "" for a packet
    source: str  # "": from this node
    to: str  # IP:PORT/PROTOCOL
    in_interface: str
    is_live: bool


class Situation(NamedTuple):
    """The rules of one family and what they ask of the host."""

    tables: Tables
    facts: explain.Facts
    node_ip: str
    #: Of built-in chains, by (table, chain); what is not named accepts.
    policies: Mapping[tuple[str, str], str] = MappingProxyType({})


class _Destination(NamedTuple):
    ip: str
    port: int
    protocol: str


#: Finds the rules of a family.
Find = Callable[[IPFamily], Situation]


def answer(
    question: Question,
    find: Find,
    families: Iterable[IPFamily],
    *,
    as_json: bool,
    bold: explain_text.Bold = str,
) -> str:
    """Return what is to be said. Raises ConfigError for a question that makes no sense."""
    if bool(question.service) == bool(question.to):
        raise ConfigError("cannot explain: give either NAMESPACE/NAME of a Service or --to")
    if question.service:
        if question.source:
            raise ConfigError("cannot use --from with a Service: all who may come are shown")
        views = _views(question, find, families)
        if as_json:
            return json.dumps([explain_text.service_json(view) for view in views], indent=2)
        return "\n\n".join(explain_text.service_text(view, bold) for view in views)
    trace = _trace(question, find, families)
    if as_json:
        return json.dumps(explain_text.packet_json(trace), indent=2)
    return explain_text.packet_text(trace, bold)


def desired(ruleset: Ruleset, host_facts: HostFacts) -> Situation:
    """Return *ruleset* as the only rules of a host with the stated addresses."""
    node_ip = ruleset.options.node_ip
    assert node_ip is not None  # at worst loopback (options.node_ips)
    stated = [cidr.partition("/")[0] for _, cidr in host_facts.interface_addresses]
    local = frozenset({node_ip, *host_facts.node_ips, *stated})
    return Situation(
        explain.with_jumps(ruleset.tables), explain.Facts(local_addresses=local), node_ip
    )


def live(settings: Settings, host_facts: HostFacts, family: IPFamily) -> Situation:
    """Return the rules and addresses this host has now."""
    privileges.require_netfilter()
    programs = runner.find_programs(family, host.choose_backend(settings.iptables_backend))
    local = [found.address for found in hostnet.local_addresses(family)]
    stated = [ip for ip in host_facts.node_ips if addresses.family_of(ip) is family]
    outward = [ip for ip in local if not addresses.is_loopback(ip)]
    loopback = "127.0.0.1" if family is IPFamily.V4 else "::1"
    policies: dict[tuple[str, str], str] = {}
    tables = runner.Iptables(programs).save(policies)
    return Situation(
        tables,
        explain.Facts(local_addresses=frozenset([*stated, *local])),
        next(iter([*stated, *outward]), loopback),
        policies,
    )


def _views(
    question: Question, find: Find, families: Iterable[IPFamily]
) -> list[explain_service.ServiceView]:
    namespace, slash, name = question.service.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise ConfigError(f"cannot read {question.service!r} as NAMESPACE/NAME of a Service")
    views = list(_views_by_family(ServiceName(namespace, name), question, find, families))
    if not views:
        raise ConfigError(f"cannot find Service {question.service}: no rule tells of it")
    return views


def _views_by_family(
    name: ServiceName, question: Question, find: Find, families: Iterable[IPFamily]
) -> Iterator[explain_service.ServiceView]:
    for family in families:
        situation = find(family)
        viewpoint = explain_service.Viewpoint(
            situation.facts,
            situation.node_ip,
            question.in_interface or explain.UNKNOWN_INTERFACE,
            situation.policies,
        )
        view = explain_service.view(situation.tables, name, viewpoint)
        if view is not None:
            yield view


def _trace(question: Question, find: Find, families: Iterable[IPFamily]) -> explain.Trace:
    to = _parse_destination(question.to)
    family = addresses.family_of(to.ip)
    if family not in families:
        raise ConfigError(f"cannot use --to {question.to}: {family.value} is not looked at")
    source = addresses.parse_ip(question.source) if question.source else ""
    if source is None:
        raise ConfigError(f"cannot read --from {question.source!r} as an IP address")
    if source and addresses.family_of(source) is not family:
        raise ConfigError(f"cannot send from {source} to {to.ip}: --from and --to differ in family")
    if question.in_interface and not source:
        raise ConfigError("cannot use --in-interface without --from: what this node sends has none")
    situation = find(family)
    facts = situation.facts
    if not source:
        # What the kernel takes: to an address of its own, that one.
        source = to.ip if facts.is_local(to.ip) else situation.node_ip
    in_interface = question.in_interface
    if not in_interface and not facts.is_local(source):
        in_interface = explain.UNKNOWN_INTERFACE
    packet = explain.Packet(
        source=source,
        destination=to.ip,
        protocol=to.protocol,
        destination_port=to.port,
        in_interface=in_interface,
    )
    return explain.trace(situation.tables, packet, facts, situation.policies)


def _parse_destination(text: str) -> _Destination:
    """Parse ``IP:PORT/PROTOCOL`` or ``[IP]:PORT/PROTOCOL``. Raises ConfigError."""
    where, slash, protocol = text.partition("/")
    ip, port = config_validation.split_host_port(where) or ("", "")
    address = addresses.parse_ip(ip)
    if address is None or not (port.isascii() and port.isdigit() and 0 < int(port[:9]) <= 65535):
        raise ConfigError(f"cannot read --to {text!r} as IP:PORT/PROTO, e.g. 10.96.0.1:443/tcp")
    if slash and protocol.lower() not in _PROTOCOLS:
        raise ConfigError(f"cannot use protocol {protocol!r} of --to {text}: tcp, udp or sctp")
    return _Destination(address, int(port), protocol.lower() or "tcp")
