"""
The two engines that try a Scenario: the tracer, and the kernel with real connections.

Both answer in the same words (Found), and one judge compares them with what is wanted. An engine
returns the flows that came to something else; no misses means that the scenario holds.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, NamedTuple

from kubeproxy_py import explain, nfacct, rules
from kubeproxy_py.iptables.chains import Tables
from kubeproxy_py.model import IPFamily
from tests.support import segments, traffic
from tests.support.addresses import V4
from tests.support.netns import Backend, Lab, Namespace, iptables_programs
from tests.support.scenario import (
    ENDPOINT_PORT,
    NODE_SERVER_PORT,
    PRIVATE_PORT,
    Flow,
    Place,
    Rules,
    Scenario,
)
from tests.support.servers import Servers

Kind = Literal["reached", "refused", "dropped", "untouched", "reset"]

_CLIENT_PORT: Final = 40000  # any that is nobody's
#: Links by which packets come to the node; "": from the node itself.
_INTERFACES: Final[dict[Place, str]] = {"pod1": "cni0", "pod2": "cni0", "node": ""}
_UPLINK: Final = "eth0"

_ANSWER_S: Final = 3.0  # a SYN whose refusal is not noticed is sent again after one second
_SILENCE_S: Final = 0.2  # far above the millisecond that an answer takes
# Connections until every endpoint must have been met: with three of them, one in 10^11 runs fails.
_MAX_CONNECTIONS: Final = 64
_MIN_CONNECTIONS: Final = 3
# Two endpoints chosen at random would be the same one so often in one of a million runs.
_STICKY_CONNECTIONS: Final = 21
_CLIENTS: Final = 8  # flows tried at once

#: Port unreachable, which is how kube-proxy rejects.
_REJECTED: Final = re.compile(r"(?:ICMP 3/3|ICMPv6 1/4) from (.+)")
_REMEMBERED: Final = re.compile(r"-m recent --set --name (\S+)")


class Found(NamedTuple):
    """What became of one connection."""

    kind: Kind
    endpoint: str = ""  # "pod1:80"
    is_masqueraded: bool | None = None  # None: cannot be seen


class Miss(NamedTuple):
    """A flow that came to something else than is wanted."""

    flow: Flow
    got: str

    def __str__(self) -> str:
        return f"{self.flow}: wanted {self.flow.wanted}, source {self.flow.seen}; got {self.got}"


class Report(NamedTuple):
    """What the kernel did not do as wanted, and the rules it had: "" if it did everything."""

    misses: list[Miss]
    live: str


def judge(flow: Flow, clients: Sequence[Sequence[Found]]) -> Miss | None:
    """Compare what *clients* found, each in its connections, with what is wanted of *flow*."""
    found = {each for client in clients for each in client}
    got = ", ".join(sorted(_describe(each) for each in found))
    wanted = flow.wanted
    if {each.kind for each in found} != {wanted.kind}:
        return Miss(flow, got)
    if wanted.kind != "reached":
        return None
    if any(_has_wrong_source(flow, each) for each in found):
        return Miss(flow, got)
    endpoints = {each.endpoint for each in found}
    if not flow.is_sticky:
        return None if endpoints == wanted.endpoints else Miss(flow, got)
    for client in clients:
        if len({each.endpoint for each in client}) != 1:
            return Miss(flow, f"one client: {got}")
    return None if endpoints <= wanted.endpoints else Miss(flow, got)


def _has_wrong_source(flow: Flow, found: Found) -> bool:
    if found.is_masqueraded is None or flow.seen == "whatever":
        return False
    is_hairpin = flow.seen == "hairpin" and found.endpoint.startswith(f"{flow.source}:")
    return found.is_masqueraded != (flow.seen == "masqueraded" or is_hairpin)


def _describe(found: Found) -> str:
    source = {True: " masqueraded", False: " with its own address", None: ""}[found.is_masqueraded]
    return f"{found.kind} {found.endpoint}".strip() + source


# The tracer --------------------------------------------------------------------------------------


def trace_all(scenario: Scenario, tables: Tables) -> list[Miss]:
    """Try all flows on the tracer."""
    tried = ((flow, _trace_clients(scenario, tables, flow)) for flow in scenario.flows)
    return [miss for flow, clients in tried if (miss := judge(flow, clients)) is not None]


def trace(
    scenario: Scenario, tables: Tables, flow: Flow, *, remembered: Sequence[str] = ()
) -> explain.Trace:
    """Walk the first packet of *flow*, whose client is in the lists *remembered*."""
    source = scenario.source_address(flow)
    packet = explain.Packet(
        source=source,
        destination=flow.to,
        protocol=flow.protocol,
        source_port=_CLIENT_PORT,
        destination_port=flow.port,
        in_interface=_INTERFACES.get(flow.source, _UPLINK),
        ctstate="INVALID" if flow.is_invalid else "NEW",
    )
    recent = dict.fromkeys(remembered, (source,))
    return explain.trace(tables, packet, _facts(scenario, recent))


def _facts(scenario: Scenario, recent: Mapping[str, tuple[str, ...]]) -> explain.Facts:
    local = frozenset(scenario.local_addresses())
    return explain.Facts(local_addresses=local, recent=recent)


def _trace_clients(scenario: Scenario, tables: Tables, flow: Flow) -> list[list[Found]]:
    """Return a client for each outcome; a sticky one connects once more, remembered as it is."""
    clients = []
    for outcome in trace(scenario, tables, flow).outcomes:
        client = [_found_by_trace(scenario, tables, flow, outcome)]
        if flow.is_sticky:
            lists = [name for step in outcome.path for name in _REMEMBERED.findall(step.rule)]
            again = trace(scenario, tables, flow, remembered=lists)
            client += [_found_by_trace(scenario, tables, flow, each) for each in again.outcomes]
        clients.append(client)
    return clients


def _found_by_trace(
    scenario: Scenario, tables: Tables, flow: Flow, outcome: explain.Outcome
) -> Found:
    if outcome.verdict == "rejected":
        return Found("refused")
    if outcome.verdict == "dropped":
        return Found("dropped")
    place = scenario.place_of(outcome.destination)
    endpoint = f"{place}:{outcome.port}"
    if outcome.verdict == "accepted" and endpoint not in flow.wanted.endpoints:
        return Found("untouched")
    if not flow.is_invalid and not _is_answered(scenario, tables, flow, outcome):
        return Found("dropped")
    return Found("reached", endpoint, outcome.is_masqueraded)


def _is_answered(scenario: Scenario, tables: Tables, flow: Flow, outcome: explain.Outcome) -> bool:
    """Tell whether the endpoint's answer comes back through the node."""
    endpoint = scenario.place_of(outcome.destination)
    # Rules other than NAT's see it with its addresses translated back on the client's side.
    answer = explain.Packet(
        source=outcome.destination,
        destination=scenario.source_address(flow),
        protocol=flow.protocol,
        source_port=outcome.port,
        destination_port=_CLIENT_PORT,
        in_interface=next(
            (name for place, name in _INTERFACES.items() if place == endpoint), _UPLINK
        ),
        ctstate="ESTABLISHED",
    )
    verdicts = {
        each.verdict for each in explain.trace(tables, answer, _facts(scenario, {})).outcomes
    }
    return verdicts == {"accepted"}


# The kernel --------------------------------------------------------------------------------------


@contextlib.contextmanager
def node_servers(lab: Lab, servers: Servers) -> Iterator[None]:
    """Let the node serve what scenarios expect of it, until the block ends."""
    servers.serve(lab.node, tcp=[ENDPOINT_PORT, NODE_SERVER_PORT])
    servers.serve(lab.node, tcp=[PRIVATE_PORT], ips=[V4.loopback])
    try:
        yield
    finally:
        servers.stop(lab.node.name)


class Kernel:
    """One backend of a lab whose pods serve as conftest.py lets them."""

    def __init__(self, lab: Lab, backend: Backend, *, answer_s: float = _ANSWER_S) -> None:
        """Wait *answer_s* for an answer where one is wanted."""
        self._lab = lab
        self._backend = backend
        self._answer_s = answer_s
        with lab.node.entered():
            #: Whether rules may count; a rule that names a missing counter is refused.
            self.has_nfacct = all(
                [
                    nfacct.ensure(rules.LOCALHOST_NODE_PORTS_COUNTER),
                    nfacct.ensure(rules.INVALID_DROPPED_COUNTER),
                ]
            )

    def try_all(self, scenario: Scenario, rules: Rules) -> Report:
        """Put *rules* into the kernel and try all flows there; nothing of it stays."""
        with self.programmed(scenario, rules), ThreadPoolExecutor(_CLIENTS) as pool:
            tried = pool.map(
                lambda flow: judge(flow, [self._connect(scenario, flow)]), scenario.flows
            )
            misses = [miss for miss in tried if miss is not None]
            return Report(misses, self.live(scenario.family) if misses else "")

    @contextlib.contextmanager
    def programmed(self, scenario: Scenario, rules: Rules) -> Iterator[None]:
        """Let the node be as *scenario* and *rules* want it, until the block ends."""
        node = self._lab.node
        self._lab.reset_rules()
        # What the daemon does where localhost node ports are on; KUBE-FIREWALL is its counterpart.
        node.write_sysctls({"net/ipv4/conf/*/route_localnet": "1"})
        with contextlib.ExitStack() as undo:
            undo.callback(self._lab.reset_rules)
            for ns, ips in ((node, scenario.bound), (self._lab.gateway, scenario.beyond)):
                for ip in ips:
                    link = [f"{ip}/{scenario.plan.host_bits}", "dev", "lo"]
                    ns.run(["ip", "address", "add", *link])
                    undo.callback(ns.run, ["ip", "address", "delete", *link])
            if any(flow.to == scenario.plan.loopback != flow.source for flow in scenario.flows):
                undo.enter_context(self._lab.loopback_over_the_wire())
            self.restore(scenario.family, rules)
            yield

    def restore(self, family: IPFamily, rules: Rules) -> None:
        """Give the node the inputs of *rules*, in addition to what it has."""
        program = iptables_programs(self._backend, family).restore
        for text in rules.inputs:
            self._lab.node.run([program, "-w", "5", "--noflush"], input=text)

    def live(self, family: IPFamily) -> str:
        """Return the kernel's rules with their counters."""
        save = iptables_programs(self._backend, family).save
        return self._lab.node.run([save, "-c"]).stdout

    def _namespace(self, place: str) -> Namespace:
        return self._lab.namespace("outside" if place == "blocked" else place)

    def _connect(self, scenario: Scenario, flow: Flow) -> list[Found]:
        """Connect until it is clear what becomes of *flow*."""
        wanted = flow.wanted
        if flow.is_invalid:
            return [self._send_invalid(scenario, flow)]
        if wanted.kind != "reached":
            # A chance is a chance: what is not silent or refused now, is not at all.
            return [self._connect_once(scenario, flow)]
        found: list[Found] = []
        met: set[str] = set()
        while len(found) < _MAX_CONNECTIONS:
            one = self._connect_once(scenario, flow)
            found.append(one)
            met.add(one.endpoint)
            if one.kind != "reached":
                break
            if flow.is_sticky:
                is_clear = len(found) >= _STICKY_CONNECTIONS
            else:
                is_clear = met >= wanted.endpoints and len(found) >= _MIN_CONNECTIONS
            if is_clear:
                break
        return found

    def _connect_once(self, scenario: Scenario, flow: Flow) -> Found:
        outcome = traffic.connect(
            self._namespace(flow.source),
            flow.to,
            flow.port,
            flow.protocol,
            source_ip=scenario.plan.outside_blocked if flow.source == "blocked" else "",
            timeout_s=_SILENCE_S if flow.wanted.kind == "dropped" else self._answer_s,
        )
        return _found_by_connecting(scenario, flow, outcome)

    def _send_invalid(self, scenario: Scenario, flow: Flow) -> Found:
        place = scenario.place_of(flow.to)
        has_come = segments.arrives(
            self._namespace(flow.source),
            self._namespace(place),
            flow.to,
            flow.port,
            timeout_s=_SILENCE_S,
        )
        return Found("reached", f"{place}:{flow.port}") if has_come else Found("dropped")


def _found_by_connecting(scenario: Scenario, flow: Flow, outcome: traffic.Outcome) -> Found:
    if outcome.kind == "answered":
        return _found_by_answer(scenario, flow, outcome)
    rejected = _REJECTED.fullmatch(outcome.cause)
    if rejected and rejected[1] in scenario.local_addresses():
        # The kernel tells a sender of datagrams on the node twice: by ICMP, and that it may not.
        return Found("refused")
    if outcome.kind == "refused":
        # A reset is the word of the host to which the packet came, since nobody serves there.
        return Found("untouched")
    # Unreachable: addresses of rules are routed to the node and from there to where they came from,
    # until the hop limit is used up.
    kinds: dict[traffic.Kind, Kind] = {"timeout": "dropped", "unreachable": "untouched"}
    return Found(kinds.get(outcome.kind, "reset"))


def _found_by_answer(scenario: Scenario, flow: Flow, outcome: traffic.Outcome) -> Found:
    endpoint = f"{outcome.server}:{outcome.server_port}"
    source, node = scenario.source_address(flow), scenario.plan.node
    if outcome.client_ip == source:
        # On its uplink the node masquerades with the address that its own connections have anyway.
        is_ambiguous = source == node and outcome.server.startswith("remote")
        return Found("reached", endpoint, None if is_ambiguous else False)
    if outcome.client_ip not in scenario.local_addresses():
        endpoint += f" from {outcome.client_ip}"  # wanted of nobody
    return Found("reached", endpoint, is_masqueraded=True)


def explain_misses(scenario: Scenario, rules: Rules, misses: Sequence[Miss], live: str = "") -> str:
    """Say what went wrong, which way the packets should go by the tracer, and what rules live."""
    lines = [f"{scenario}:"]
    for miss in misses:
        lines.append(f"  {miss}")
        for outcome in trace(scenario, rules.tables, miss.flow).outcomes:
            end = f"{outcome.verdict} {outcome.destination} port {outcome.port}"
            lines.append(f"    by the tracer {float(outcome.probability):.1%} {end}")
            lines += [
                f"      {step.table} {step.hook} {'  ' * step.depth}{step.chain} {step.rule}"
                for step in outcome.path
            ]
    return "\n".join([*lines, live])
