"""Walks through whole tables: what becomes of a packet, with which probability, by which rule."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeproxy_py import explain, explain_match, rules
from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    PortKey,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)
from kubeproxy_py.ruleset import Ruleset
from tests.support import states
from tests.support.addresses import PLANS, V4, V6

DETECTORS = {
    IPFamily.V4: rules.LocalDetector("-s", V4.cluster_cidr),
    IPFamily.V6: rules.LocalDetector("-s", V6.cluster_cidr),
}
NODE_PORT = 30080
CLUSTER_POD = "10.180.9.9"


def service_port(plan=V4, protocol="tcp", **fields):
    return ServicePort(
        name=ServicePortName("default", "web", "", protocol),
        cluster_ip=plan.cluster_ip,
        port=80,
        **fields,
    )


def external(**fields):
    return {
        "node_port": NODE_PORT,
        "external_ips": (V4.external_ip,),
        "lb_vips": (V4.lb_vip,),
        "is_externally_accessible": True,
        **fields,
    }


def tables(endpoints, plan=V4, protocol="tcp", options=None, **fields):
    """Return the tables of a node with one Service; endpoints are addresses or records."""
    known = {"localhost_node_ports": plan is V4, "local_detector": DETECTORS[plan.family]}
    ruleset = Ruleset(
        rules.Options(
            family=plan.family,
            node_name="node1",
            node_ip=plan.node,
            has_nfacct=True,
            **known | (options or {}),
        )
    )
    records = tuple(
        endpoint if isinstance(endpoint, Endpoint) else Endpoint(endpoint, 8080, is_local=True)
        for endpoint in endpoints
    )
    key = PortKey("", protocol)
    port = service_port(plan, protocol, **fields)
    ruleset.apply({ServiceName("default", "web"): ServiceState({key: port}, {key: records})})
    return explain.with_jumps(ruleset.tables)


def facts(plan=V4, **fields):
    local = frozenset({plan.node, plan.node_alternate, plan.pod_gateway})
    return explain.Facts(local_addresses=local, **fields)


def walk(found, source, destination, port=80, *, facts_=None, policies=None, **packet):
    """Trace a packet; one from the node's own addresses is generated there, unless told."""
    family = V6 if ":" in source else V4
    facts_ = facts_ or facts(family)
    if "in_interface" not in packet and not facts_.is_local(source):
        packet["in_interface"] = "cni0" if source.startswith(("10.180.", "fd00:10:180")) else "eth0"
    asked = explain.Packet(
        source=source, destination=destination, destination_port=port, source_port=40000, **packet
    )
    return explain.trace(found, asked, facts_, policies)


def only(trace):
    (outcome,) = trace.outcomes
    return outcome


def reached(trace):
    return [
        (outcome.verdict, f"{outcome.destination}:{outcome.port}", outcome.is_masqueraded)
        for outcome in trace.outcomes
    ]


def chains(*texts, table="filter", builtin="FORWARD", **others):
    """Return tables with one built-in chain, and other chains by name."""
    return {table: {builtin: texts, **{name: tuple(found) for name, found in others.items()}}}


# Endpoints and their shares ----------------------------------------------------------------------


def pods(count):
    return [Endpoint(f"10.180.{n // 250}.{n % 250 + 1}", 8080) for n in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
def test_endpoints_have_equal_shares(count):
    trace = walk(tables(pods(count)), V4.outside, V4.cluster_ip)
    shares = [outcome.probability for outcome in trace.outcomes]

    assert len(shares) == count
    assert sum(shares) == 1
    assert max(abs(share - Fraction(1, count)) for share in shares) < 1e-9


def test_endpoints_chosen_in_two_steps_have_equal_shares():
    trace = walk(tables(pods(100), options={"layout": "tree"}), V4.outside, V4.cluster_ip)
    shares = [outcome.probability for outcome in trace.outcomes]

    assert len(shares) == 100
    assert sum(shares) == 1
    assert max(abs(share - Fraction(1, 100)) for share in shares) < 1e-9


def test_outcomes_stand_in_the_order_of_the_rules():
    trace = walk(tables(pods(3)), V4.outside, V4.cluster_ip)

    assert [outcome.destination for outcome in trace.outcomes] == [
        "10.180.0.1",
        "10.180.0.2",
        "10.180.0.3",
    ]


def test_outcomes_by_different_rules_stay_apart():
    found = chains(
        "-m statistic --mode random --probability 0.25000000000 -j DROP",
        "-m statistic --mode random --probability 0.50000000000 -j OTHER",
        "-j ACCEPT",
        OTHER=["-j ACCEPT"],
    )
    outcomes = walk(found, V4.outside, V4.local_pod(1)).outcomes

    assert [(outcome.verdict, outcome.probability) for outcome in outcomes] == [
        ("dropped", Fraction(1, 4)),
        ("accepted", Fraction(3, 8)),
        ("accepted", Fraction(3, 8)),
    ]


def test_equal_outcomes_are_one_with_the_likeliest_path():
    found = chains("-m statistic --mode random --probability 0.25000000000 -j LOG")
    outcome = only(walk(found, V4.outside, V4.local_pod(1)))

    assert (outcome.probability, outcome.path) == (1, ())


@pytest.mark.parametrize(
    ("probability", "verdict"), [("0.00000000000", "accepted"), ("1.00000000000", "dropped")]
)
def test_certainty_makes_no_branch(probability, verdict):
    found = chains(f"-m statistic --mode random --probability {probability} -j DROP")

    assert only(walk(found, V4.outside, V4.local_pod(1))).verdict == verdict


def test_known_client_goes_where_it_was_before():
    found = tables(pods(3), affinity_timeout_s=10800)
    names = [name for name in found["nat"] if name.startswith("KUBE-SEP-")]
    known = facts(recent={names[1]: {V4.outside}})

    assert reached(walk(found, V4.outside, V4.cluster_ip, facts_=known)) == [
        ("delivered", "10.180.0.2:8080", True)
    ]


def test_unknown_client_of_a_service_with_affinity_may_go_anywhere():
    found = tables(pods(3), affinity_timeout_s=10800)

    assert len(walk(found, V4.outside, V4.cluster_ip).outcomes) == 3


# Who is masqueraded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "is_masqueraded"),
    [
        pytest.param(CLUSTER_POD, False, id="a pod"),
        pytest.param(V4.node, True, id="the node"),
        pytest.param(V4.outside, True, id="an outside client"),
        pytest.param(V4.local_pod(1), True, id="the endpoint itself"),
    ],
)
def test_cluster_ip_masquerades_who_would_not_be_answered(source, is_masqueraded):
    trace = walk(tables([V4.local_pod(1)]), source, V4.cluster_ip)

    assert reached(trace) == [("delivered", f"{V4.local_pod(1)}:8080", is_masqueraded)]


def test_hairpin_is_masqueraded_by_the_rule_of_the_endpoint():
    outcome = only(walk(tables([V4.local_pod(1)]), V4.local_pod(1), V4.cluster_ip))

    assert outcome.masquerade_rule.chain.startswith("KUBE-SEP-")
    assert outcome.masquerade_rule.effect == "jump KUBE-MARK-MASQ"


def test_mark_is_gone_after_masquerading():
    outcome = only(walk(tables([V4.local_pod(1)]), V4.outside, V4.cluster_ip))

    assert [step.effect for step in outcome.path if step.effect.startswith("mark")] == [
        "mark 0x4000",
        "mark 0x0",
    ]


def test_foreign_masquerading_has_its_own_reason():
    found = tables([V4.local_pod(1)])
    foreign = f"-s {V4.pod_cidr} ! -d {V4.cluster_cidr} -j MASQUERADE"
    found["nat"]["POSTROUTING"] += (foreign,)
    outcome = only(walk(found, V4.local_pod(2), V4.outside))

    assert (outcome.verdict, outcome.masquerade_rule.rule) == ("accepted", foreign)


def test_foreign_mark_asked_for_by_no_jump_is_the_reason_itself():
    found = tables([V4.local_pod(1)])
    found["mangle"] = {"PREROUTING": ("-j MARK --set-xmark 0x4000/0x4000",)}
    outcome = only(walk(found, CLUSTER_POD, V4.cluster_ip))

    assert outcome.masquerade_rule.table == "mangle"


def test_source_nat_is_masquerading():
    found = {
        "nat": {
            "POSTROUTING": (f"-j SNAT --to-source {V4.node}",),
            "INPUT": (),
        },
        "filter": {"INPUT": ("-m conntrack --ctstate SNAT -j DROP",)},
    }
    forwarded = only(walk(found, V4.local_pod(1), V4.outside))
    to_itself = only(walk(found, V4.node, V4.node_alternate))

    assert (forwarded.verdict, forwarded.is_masqueraded) == ("accepted", True)
    assert to_itself.verdict == "dropped"


def test_masquerade_all_masquerades_pods_too():
    found = tables([V4.local_pod(1)], options={"masquerade_all": True})

    assert only(walk(found, CLUSTER_POD, V4.cluster_ip)).is_masqueraded


def test_pods_are_told_by_interface():
    found = tables([V4.local_pod(1)], options={"local_detector": rules.LocalDetector("-i", "cni+")})

    assert not only(walk(found, CLUSTER_POD, V4.cluster_ip)).is_masqueraded
    assert only(walk(found, CLUSTER_POD, V4.cluster_ip, in_interface="eth0")).is_masqueraded


# External doors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination", "port"),
    [
        pytest.param(V4.outside, V4.node, NODE_PORT, id="node port from outside"),
        pytest.param(V4.node, V4.node, NODE_PORT, id="node port from the node"),
        pytest.param(V4.loopback, V4.loopback, NODE_PORT, id="node port on loopback"),
        pytest.param(CLUSTER_POD, V4.node, NODE_PORT, id="node port from a pod"),
        pytest.param(V4.outside, V4.external_ip, 80, id="external IP"),
        pytest.param(V4.node, V4.lb_vip, 80, id="load balancer IP from the node"),
    ],
)
def test_external_doors_lead_to_endpoints_and_masquerade(source, destination, port):
    trace = walk(tables([V4.remote_pod(1)], **external()), source, destination, port)

    assert reached(trace) == [("delivered", f"{V4.remote_pod(1)}:8080", True)]


def test_node_port_on_loopback_needs_to_be_on():
    found = tables(
        [V4.local_pod(1)],
        options={"localhost_node_ports": False},
        **external(),
    )

    assert only(walk(found, V4.loopback, V4.loopback, NODE_PORT)).verdict == "accepted"


LOCAL_AND_REMOTE = [
    Endpoint(V4.local_pod(1), 8080, is_local=True),
    Endpoint(V4.remote_pod(1), 8080),
]


@pytest.mark.parametrize("destination", [V4.node, V4.external_ip, V4.lb_vip])
def test_external_traffic_policy_local_keeps_outside_clients_here(destination):
    found = tables(LOCAL_AND_REMOTE, **external(is_external_local=True))
    port = NODE_PORT if destination == V4.node else 80

    assert reached(walk(found, V4.outside, destination, port)) == [
        ("delivered", f"{V4.local_pod(1)}:8080", False)
    ]


@pytest.mark.parametrize(
    ("source", "is_masqueraded"),
    [pytest.param(CLUSTER_POD, False, id="a pod"), pytest.param(V4.node, True, id="the node")],
)
def test_external_traffic_policy_local_is_short_circuited_for(source, is_masqueraded):
    found = tables(LOCAL_AND_REMOTE, **external(is_external_local=True))

    assert reached(walk(found, source, V4.lb_vip)) == [
        ("delivered", f"{V4.local_pod(1)}:8080", is_masqueraded),
        ("delivered", f"{V4.remote_pod(1)}:8080", is_masqueraded),
    ]


@pytest.mark.parametrize("destination", [V4.node, V4.external_ip, V4.lb_vip])
def test_external_traffic_policy_local_without_local_endpoints_drops(destination):
    found = tables([Endpoint(V4.remote_pod(1), 8080)], **external(is_external_local=True))
    port = NODE_PORT if destination == V4.node else 80
    outcome = only(walk(found, V4.outside, destination, port))

    assert (outcome.verdict, outcome.reason) == (
        "dropped",
        "filter KUBE-EXTERNAL-SERVICES: default/web has no local endpoints",
    )


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        pytest.param(V4.outside, "delivered", id="inside the range"),
        pytest.param(V4.outside_blocked, "dropped", id="outside the range"),
        pytest.param(V4.node, "dropped", id="the node, outside the range"),
    ],
)
def test_source_ranges_decide_who_may_use_the_load_balancer(source, verdict):
    found = tables([V4.local_pod(1)], **external(source_ranges=(V4.outside_allowed_cidr,)))

    assert only(walk(found, source, V4.lb_vip)).verdict == verdict


def test_who_is_outside_the_ranges_learns_which_rule_drops():
    found = tables([V4.local_pod(1)], **external(source_ranges=(V4.outside_allowed_cidr,)))
    outcome = only(walk(found, V4.outside_blocked, V4.lb_vip))

    assert outcome.verdict_rule.chain == rules.PROXY_FIREWALL
    assert [step.effect for step in outcome.path if step.chain.startswith("KUBE-FW-")] == ["count"]


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination", "port"),
    [
        pytest.param(CLUSTER_POD, V4.cluster_ip, 80, id="a pod, cluster IP"),
        pytest.param(V4.node, V4.cluster_ip, 80, id="the node, cluster IP"),
        pytest.param(V4.outside, V4.lb_vip, 80, id="outside, load balancer IP"),
        pytest.param(V4.outside, V4.node, NODE_PORT, id="outside, node port"),
        pytest.param(V4.node, V4.node, NODE_PORT, id="the node, node port, when it comes by lo"),
    ],
)
def test_service_without_endpoints_rejects(source, destination, port):
    outcome = only(walk(tables([], **external()), source, destination, port))

    assert outcome.verdict == "rejected"
    assert outcome.reason.endswith("default/web has no endpoints")


def test_invalid_packet_is_dropped_and_meets_no_nat():
    outcome = only(
        walk(tables([V4.local_pod(1)]), V4.local_pod(1), V4.outside, 4000, ctstate="INVALID")
    )

    assert outcome.verdict == "dropped"
    assert {step.table for step in outcome.path} == {"filter"}


def test_martian_to_loopback_is_dropped():
    outcome = only(walk(tables([]), V4.node2, V4.loopback, 10250))

    assert (outcome.verdict, outcome.verdict_rule.chain) == ("dropped", rules.FIREWALL)


def test_answer_of_an_endpoint_passes():
    found = tables([V4.local_pod(1)])
    policies = {("filter", "FORWARD"): "DROP"}
    trace = walk(found, V4.local_pod(1), V4.outside, 4000, ctstate="ESTABLISHED", policies=policies)

    assert only(trace).verdict == "accepted"
    assert only(trace).verdict_rule.chain == rules.FORWARD


def test_policy_of_a_builtin_chain_drops_what_no_rule_takes():
    outcome = only(walk({}, V4.outside, V4.local_pod(1), policies={("filter", "FORWARD"): "DROP"}))

    assert (outcome.verdict, outcome.reason) == ("dropped", "policy of filter FORWARD")
    assert outcome.path == (explain.Step("filter", "FORWARD", "FORWARD", explain.POLICY, "drop"),)


def test_policy_drop_does_not_concern_what_masquerading_marked():
    policies = {("filter", "FORWARD"): "DROP"}
    trace = walk(tables([V4.remote_pod(1)]), V4.outside, V4.cluster_ip, policies=policies)

    assert only(trace).verdict == "delivered"


def test_health_check_node_port_is_accepted():
    found = tables(
        [V4.local_pod(1)], **external(is_external_local=True, health_check_node_port=32000)
    )
    outcome = only(walk(found, V4.outside, V4.node, 32000))

    assert (outcome.verdict, outcome.verdict_rule.chain) == ("accepted", rules.NODE_PORTS)


# Chains ------------------------------------------------------------------------------------------


def verdict(found, **packet):
    return only(walk(found, V4.outside, V4.local_pod(1), **packet)).verdict


def test_chain_that_ends_returns_to_its_caller():
    assert verdict(chains("-j A", "-j DROP", A=["-p udp -j ACCEPT"])) == "dropped"


def test_return_goes_back_to_the_caller():
    assert verdict(chains("-j A", "-j REJECT", A=["-j RETURN", "-j DROP"])) == "rejected"


def test_return_in_a_builtin_chain_is_its_policy():
    assert verdict(chains("-j RETURN", "-j DROP")) == "accepted"


def test_goto_does_not_come_back_to_where_it_was():
    found = chains("-j A", "-j ACCEPT", "-j DROP", A=["-g B", "-j DROP"], B=["-p udp -j DROP"])

    assert verdict(found) == "accepted"


def test_accept_ends_one_table_only():
    found = chains("-j ACCEPT", "-j DROP", table="mangle") | chains("-j DROP")

    assert verdict(found) == "dropped"


def test_onlookers_let_the_packet_go_on():
    found = chains("-j LOG --log-prefix x", "-j NFLOG --nflog-group 5", "-p tcp", "-j DROP")
    outcome = only(walk(found, V4.outside, V4.local_pod(1)))

    assert [step.effect for step in outcome.path] == ["log", "nflog", "count", "drop"]


def test_dnat_to_where_it_goes_already_is_no_dnat_to_conntrack():
    found = {
        "nat": {"PREROUTING": ("-j DNAT --to-destination 10.180.1.11",)},
        "filter": {"FORWARD": ("-m conntrack --ctstate DNAT -j DROP",)},
    }

    assert verdict(found) == "delivered"
    assert only(walk(found, V4.outside, V4.remote_pod(1))).verdict == "dropped"


def test_dnat_of_the_port_alone_keeps_the_address():
    found = {"nat": {"PREROUTING": ("-j DNAT --to-destination :8080",)}}

    assert reached(walk(found, V4.outside, V4.local_pod(1))) == [
        ("delivered", f"{V4.local_pod(1)}:8080", False)
    ]


def test_dnat_rule_is_named():
    outcome = only(walk(tables([V4.local_pod(1)]), V4.outside, V4.cluster_ip))

    assert outcome.dnat_rule == explain.Step(
        "nat",
        "PREROUTING",
        outcome.dnat_rule.chain,
        f'-p tcp -m comment --comment "default/web" -m tcp -j DNAT --to-destination {V4.local_pod(1)}:8080',
        f"dnat {V4.local_pod(1)}:8080",
        3,
    )


# The way through the host ------------------------------------------------------------------------

LOGGED = {
    table: dict.fromkeys(hooks, (f"-j LOG --log-prefix {table}",))
    for table, hooks in {
        "raw": ("PREROUTING", "OUTPUT"),
        "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
        "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
        "filter": ("INPUT", "FORWARD", "OUTPUT"),
    }.items()
}
INPUT_BY_LO = "raw/PREROUTING mangle/PREROUTING mangle/INPUT filter/INPUT"


@pytest.mark.parametrize(
    ("source", "destination", "ctstate", "way"),
    [
        pytest.param(
            V4.outside,
            V4.local_pod(1),
            "NEW",
            "raw/PREROUTING mangle/PREROUTING nat/PREROUTING mangle/FORWARD filter/FORWARD "
            "mangle/POSTROUTING nat/POSTROUTING",
            id="forwarded",
        ),
        pytest.param(
            V4.outside,
            V4.node,
            "NEW",
            "raw/PREROUTING mangle/PREROUTING nat/PREROUTING mangle/INPUT filter/INPUT nat/INPUT",
            id="to this node",
        ),
        pytest.param(
            V4.node,
            V4.outside,
            "NEW",
            "raw/OUTPUT mangle/OUTPUT nat/OUTPUT filter/OUTPUT mangle/POSTROUTING nat/POSTROUTING",
            id="from this node",
        ),
        pytest.param(
            V4.node,
            V4.node_alternate,
            "NEW",
            "raw/OUTPUT mangle/OUTPUT nat/OUTPUT filter/OUTPUT mangle/POSTROUTING nat/POSTROUTING "
            + INPUT_BY_LO,
            id="from this node to itself",
        ),
        pytest.param(
            V4.outside,
            V4.local_pod(1),
            "ESTABLISHED",
            "raw/PREROUTING mangle/PREROUTING mangle/FORWARD filter/FORWARD mangle/POSTROUTING",
            id="known connections meet no nat",
        ),
    ],
)
def test_tables_are_asked_in_the_order_of_the_kernel(source, destination, ctstate, way):
    outcome = only(walk(LOGGED, source, destination, ctstate=ctstate))

    assert " ".join(f"{step.table}/{step.hook}" for step in outcome.path) == way


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        pytest.param("-o lo -j DROP", "dropped", id="to itself by lo"),
        pytest.param("! -o lo -j DROP", "accepted", id="to itself by nothing else"),
    ],
)
def test_what_a_node_sends_to_itself_leaves_by_lo(rule, wanted):
    found = chains(rule, table="mangle", builtin="POSTROUTING")

    assert only(walk(found, V4.node, V4.node)).verdict == wanted


def test_what_is_sent_elsewhere_by_dnat_does_not_leave_by_lo():
    found = {
        "nat": {"OUTPUT": (f"-j DNAT --to-destination {V4.local_pod(1)}",)},
        "mangle": {"POSTROUTING": ("-o lo -j DROP",)},
    }
    trace = walk(found, V4.node, V4.node)

    assert only(trace).verdict == "delivered"
    # By which device it leaves then follows from routes, which are not known.
    assert [warning.word for warning in trace.warnings] == ["-o lo"]


def test_what_comes_back_by_lo_has_it_as_in_interface():
    found = chains("-i lo -j DROP", builtin="INPUT")

    assert only(walk(found, V4.node, V4.node)).verdict == "dropped"


# Foreign rules -----------------------------------------------------------------------------------


def test_unknown_match_is_warned_of_and_taken_as_none():
    rule = "-p tcp -m hashlimit --hashlimit-upto 5/sec --hashlimit-name x -j DROP"
    trace = walk(chains(rule), V4.outside, V4.local_pod(1))

    assert only(trace).verdict == "accepted"
    assert trace.warnings == (explain.Unknown("filter", "FORWARD", rule, "-m hashlimit"),)


def test_unknown_target_is_warned_of_and_taken_as_none():
    trace = walk(chains("-j TARPIT", "-g nowhere", "-g DROP"), V4.outside, V4.local_pod(1))

    assert only(trace).verdict == "accepted"
    assert [warning.word for warning in trace.warnings] == ["-j TARPIT", "-g nowhere", "-g DROP"]


def test_unknown_rule_that_cannot_match_is_no_matter():
    trace = walk(chains("-p udp -m hashlimit -j DROP"), V4.outside, V4.local_pod(1))

    assert trace.warnings == ()


def test_unknown_rule_on_several_branches_is_warned_of_once():
    found = tables(pods(3))
    found["filter"]["FORWARD"] += ("-m hashlimit -j DROP",)

    assert len(walk(found, V4.outside, V4.cluster_ip).warnings) == 0  # marked ones are accepted
    assert len(walk(found, CLUSTER_POD, V4.cluster_ip).warnings) == 1


def test_loop_of_chains_ends():
    trace = walk(chains("-j A", "-j DROP", A=["-j B"], B=["-j A"]), V4.outside, V4.local_pod(1))

    assert only(trace).verdict == "dropped"
    assert [warning.word for warning in trace.warnings] == ["-j A (a loop)"]


# IPv6 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "is_masqueraded"),
    [
        pytest.param(V6.local_pod(2), False, id="a pod"),
        pytest.param(V6.local_pod(1), True, id="the endpoint itself"),
        pytest.param(V6.outside, True, id="an outside client"),
    ],
)
def test_ipv6_services_are_walked_alike(source, is_masqueraded):
    found = tables([V6.local_pod(1)], V6, "udp", node_port=30080)
    trace = walk(found, source, V6.cluster_ip, protocol="udp")

    assert reached(trace) == [("delivered", f"{V6.local_pod(1)}:8080", is_masqueraded)]
    assert only(trace).dnat_rule.effect == f"dnat [{V6.local_pod(1)}]:8080"


def test_ipv6_loopback_has_no_node_ports():
    found = tables([V6.local_pod(1)], V6, **external(external_ips=(), lb_vips=()))

    assert only(walk(found, V6.loopback, V6.loopback, NODE_PORT)).verdict == "accepted"
    assert only(walk(found, V6.node, V6.node, NODE_PORT)).verdict == "delivered"


# All of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", IPFamily, ids=lambda family: family.value)
@pytest.mark.parametrize("state", ["state", "state2"])
def test_every_rule_that_kube_proxy_writes_is_understood(state, family):
    text = (states.GOLDEN / f"{state}.{family.value.lower()}.rules").read_text().splitlines()
    rules_ = [line.split(" ", 2)[2] for line in text if line.startswith("-A ")]
    # Parsing alone tells: unknown parts have a check that never answers.
    packet = explain.Packet(
        source="::2", destination="::1", source_port=1, in_interface="x", out_interface="x"
    )
    unknown = [
        (rule, condition.text)
        for rule in rules_
        for condition in explain_match.parse_rule(rule).conditions
        if condition.holds(explain_match.Seen(packet, explain.Facts())) is None
    ]

    assert rules_
    assert unknown == []


_ports = st.builds(
    dict,
    is_internal_local=st.booleans(),
    is_external_local=st.booleans(),
    affinity_timeout_s=st.sampled_from([None, 60]),
    source_ranges=st.sampled_from([(), (V4.outside_allowed_cidr,)]),
)
_endpoints = st.lists(
    st.builds(
        Endpoint,
        st.sampled_from([V4.local_pod(n) for n in range(1, 6)]),
        st.sampled_from([80, 8080]),
        is_local=st.booleans(),
        ready=st.booleans(),
        serving=st.booleans(),
        terminating=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda endpoint: endpoint.address,
)


@settings(max_examples=200, deadline=None)
@given(
    port=_ports,
    endpoints=_endpoints,
    layout=st.sampled_from(["flat", "tree"]),
    source=st.sampled_from([V4.local_pod(1), V4.node, V4.outside, V4.outside_blocked]),
    door=st.sampled_from(
        [(V4.cluster_ip, 80), (V4.external_ip, 80), (V4.lb_vip, 80), (V4.node, NODE_PORT)]
    ),
)
def test_shares_of_all_outcomes_sum_to_one(port, endpoints, layout, source, door):
    endpoints.sort(key=lambda endpoint: endpoint.address)
    found = tables(endpoints, options={"layout": layout}, **external(**port))
    trace = walk(found, source, *door)

    assert sum(outcome.probability for outcome in trace.outcomes) == 1
    assert trace.warnings == ()


@pytest.mark.parametrize("family", IPFamily, ids=lambda family: family.value)
def test_jumps_stand_in_builtin_chains_as_on_a_host(family):
    plan = PLANS[family]
    found = tables([plan.local_pod(1)], plan)

    assert [rule.rpartition(" ")[2] for rule in found["filter"]["FORWARD"]] == [
        rules.PROXY_FIREWALL,
        rules.FORWARD,
        rules.SERVICES,
        rules.EXTERNAL_SERVICES,
    ]
    assert rules.FIREWALL in found["filter"]
