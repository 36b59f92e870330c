"""The smallest change, in an order of which every prefix is safe."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeproxy_py import rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.model import IPFamily
from kubeproxy_py.ruleset import Ruleset
from tests.support import fake_iptables, states, strategies
from tests.support.builders import make_endpoint, make_node, make_port, make_service, make_slice
from tests.support.fake_iptables import FakeIptables
from tests.support.planning import foreign, kernel_with, planned, steps
from tests.support.world import own

OPTIONS = states.golden_options(IPFamily.V4)
# Each example plans a whole change; half the usual number found every mistake that there was.
FEW = settings(max_examples=50)
SIZES = st.sampled_from([None, 1, 3, 10, 50])

#: What the kubelet, a network plugin and an administrator have put beside our chains.
FOREIGN = {
    "mangle": {"KUBE-IPTABLES-HINT": (), "KUBE-KUBELET-CANARY": (), "PREROUTING": ("-j ACCEPT",)},
    "filter": {
        "KUBE-FIREWALL": ("-d 9.9.9.9/32 -j DROP",),
        "CNI-FORWARD": ("-j ACCEPT",),
        "FORWARD": ("-j CNI-FORWARD",),
        "INPUT": ("-s 198.51.100.0/24 -j DROP", "-j KUBE-FIREWALL"),
    },
    "nat": {
        "CNI-HOSTPORT-DNAT": ("-p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.0.1:80",),
        "PREROUTING": ("-m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",),
        "POSTROUTING": ("-s 10.0.0.0/8 -j MASQUERADE",),
    },
}


def ruleset_of(known):
    ruleset = Ruleset(OPTIONS)
    ruleset.apply(known)
    return ruleset


# Properties --------------------------------------------------------------------------------------


@FEW
@given(strategies.service_states(), strategies.service_states(), SIZES)
def test_kernel_takes_every_batch_and_has_what_was_desired(before, after, max_rules):
    kernel = kernel_with(ruleset_of(before), FOREIGN)
    ruleset = ruleset_of(after)
    for batch in planned(ruleset, kernel.save(), max_rules=max_rules):
        kernel.restore(batch.render())

    assert own(kernel.save()) == own(ruleset.tables)


@FEW
@given(strategies.service_states(), strategies.service_states(), SIZES)
def test_model_of_the_kernel_is_right_and_planning_again_gives_nothing(before, after, max_rules):
    kernel = kernel_with(ruleset_of(before), FOREIGN)
    ruleset, live = ruleset_of(after), kernel.save()
    for batch in planned(ruleset, live, max_rules=max_rules):
        kernel.restore(batch.render())
        batch.apply_to(live)

    assert live == kernel.save()
    assert planned(ruleset, live) == []


@FEW
@given(strategies.service_states(), strategies.changes(), SIZES)
def test_touched_chains_are_all_that_must_be_looked_at(before, changed, max_rules):
    ruleset = ruleset_of(before)
    kernel = kernel_with(ruleset, FOREIGN)
    ruleset.take_touched()
    ruleset.apply(changed)
    batches = plan.plan(
        ruleset.tables,
        kernel.save(),
        groups=ruleset.groups(changed),
        touched=ruleset.take_touched(),
        max_rules=max_rules,
    )
    for batch in batches:
        kernel.restore(batch.render())

    assert own(kernel.save()) == own(ruleset.tables)


@FEW
@given(strategies.service_states(), strategies.service_states(), SIZES)
def test_what_is_not_ours_is_not_touched(before, after, max_rules):
    kernel = kernel_with(ruleset_of(before), FOREIGN)
    had = foreign(kernel.save())
    for batch in planned(ruleset_of(after), kernel.save(), max_rules=max_rules):
        kernel.restore(batch.render())

        assert foreign(kernel.save()) == had


@FEW
@given(strategies.service_states(), st.randoms(use_true_random=False), SIZES)
def test_whatever_others_did_to_our_chains_is_repaired(known, random, max_rules):
    ruleset = ruleset_of(known)
    kernel = kernel_with(ruleset, FOREIGN)
    for table, by_name in kernel.tables.items():
        for chain, texts in by_name.items():
            if random.random() < 0.3 and chains.is_ours(table, chain):
                by_name[chain] = tuple(text for text in texts if random.random() < 0.5)
            elif random.random() < 0.3:
                jumps = {jump.rule for jump in rules.JUMPS}
                by_name[chain] = tuple(text for text in texts if text not in jumps)
    for batch in planned(ruleset, kernel.save(), max_rules=max_rules):
        kernel.restore(batch.render())

    assert own(kernel.save()) == own(ruleset.tables)
    assert all(jump.rule in kernel.tables[jump.table][jump.builtin] for jump in rules.JUMPS)


@FEW
@given(strategies.service_states(), strategies.service_states(), SIZES)
def test_no_prefix_leaves_a_jump_to_nowhere(before, after, max_rules):
    kernel = kernel_with(ruleset_of(before))
    for step in steps(planned(ruleset_of(after), kernel.save(), max_rules=max_rules)):
        kernel.restore(step)

        assert fake_iptables.dangling(kernel.tables) == []


# What packets find between two sections ----------------------------------------------------------

_MATCH = re.compile(r"-d (\S+)/32 -p (\w+) .* --dport (\d+) -j (\S+)")
_ON_NODE_PORT = re.compile(r"^-p (\w+) .* --dport (\d+) -j (\S+)")


def targets(tables, table, *names):
    """Return the target by destination of the rules in some shared chains."""
    found = {}
    for chain in names:
        for rule in tables[table].get(chain, ()):
            if match := _MATCH.match(rule):
                found[match.groups()[:3]] = match.group(4)
            elif match := _ON_NODE_PORT.match(rule):
                found["node", *match.groups()[:2]] = match.group(3)
    return found


def delivers(tables, chain):
    """Tell whether a packet that enters *chain* in nat can find an endpoint."""
    texts = tables["nat"][chain]
    return any(
        " -j DNAT " in text or (to in tables["nat"] and delivers(tables, to))
        for text in texts
        if (to := fake_iptables.target(text)) is not None
    )


def delivered(tables):
    found = targets(tables, "nat", rules.SERVICES, rules.NODE_PORTS)
    return {destination for destination, chain in found.items() if delivers(tables, chain)}


def refused(tables):
    """Return the destinations that are rejected or dropped at once rather than left to time out."""
    return targets(tables, "filter", rules.SERVICES, rules.EXTERNAL_SERVICES).keys()


def states_between(before, after, max_rules):
    """Return the kernel's tables before, after each section, and at the end."""
    kernel = kernel_with(ruleset_of(before))
    seen = [kernel.save()]
    for step in steps(planned(ruleset_of(after), kernel.save(), max_rules=max_rules)):
        kernel.restore(step)
        seen.append(kernel.save())
    return seen


@FEW
@given(strategies.service_states(), strategies.service_states(), SIZES)
def test_what_is_delivered_before_and_after_is_delivered_all_the_time(before, after, max_rules):
    seen = states_between(before, after, max_rules)
    always = delivered(seen[0]) & delivered(seen[-1])

    assert all(always <= delivered(tables) for tables in seen)


@FEW
@given(strategies.service_states(), strategies.service_states(), SIZES)
def test_reject_stands_before_delivery_ends_and_until_it_begins(before, after, max_rules):
    seen = states_between(before, after, max_rules)
    first, last = seen[0], seen[-1]
    handled = (delivered(first) | refused(first)) & (delivered(last) | refused(last))

    assert all(handled <= delivered(tables) | refused(tables) for tables in seen)


@FEW
@given(strategies.service_states(), strategies.service_states(), SIZES)
def test_source_ranges_never_leak(before, after, max_rules):
    for tables in states_between(before, after, max_rules):
        to = targets(tables, "nat", rules.SERVICES)
        guarded = {destination for destination, chain in to.items() if chain.startswith("KUBE-FW-")}

        assert guarded <= targets(tables, "filter", rules.PROXY_FIREWALL).keys()


# Nobody's text becomes a rule --------------------------------------------------------------------

_HOSTILE = st.sampled_from(
    ['a" -j ACCEPT', "a\n-A INPUT -j ACCEPT", "a\rb", "a\u2028b", "a\\", "-j", "a b", "$(x)", "a\0"]
) | st.text(max_size=20)
# All that our rules, as they are meant, consist of.
_LINE = re.compile(r'[-\w .:/!+,;\[\]>]*("[-\w .:/;\[\]>]*")?[-\w .:/!+,\[\]>]*', re.ASCII)


def _slice_with(**fields):
    return make_slice() | fields


HOSTILE_OBJECTS = {
    "service name": lambda text: [make_service(text), make_slice(text)],
    "namespace": lambda text: [
        make_service(namespace=text), make_slice(namespace=text),
    ],
    "port name": lambda text: [
        make_service(ports=[make_port(80, name=text)]),
        make_slice(ports=[make_port(8080, name=text)]),
    ],
    "protocol": lambda text: [
        make_service(ports=[make_port(80, protocol=text)]),
        make_slice(ports=[make_port(8080, protocol=text)]),
    ],
    "cluster IP": lambda text: [make_service(clusterIP=text, clusterIPs=[text]), make_slice()],
    "old cluster IP": lambda text: [
        make_service(clusterIP=text, clusterIPs=None, ipFamilies=None), make_slice(),
    ],
    "external IP": lambda text: [make_service(externalIPs=[text, "9.9.9.9"]), make_slice()],
    "VIP": lambda text: [make_service(lb_ips=[text, "9.9.9.9"]), make_slice()],
    "source range": lambda text: [
        make_service(lb_ips=["9.9.9.9"], loadBalancerSourceRanges=[text, f"10.0.0.0/{text}"]),
        make_slice(),
    ],
    "policies": lambda text: [
        make_service(
            externalTrafficPolicy=text, internalTrafficPolicy=text, sessionAffinity=text, type=text
        ),
        make_slice(),
    ],
    "labels": lambda text: [
        make_service(labels={text: text}), make_slice(labels={text: text}), make_node(zone=text),
    ],
    "address type": lambda text: [make_service(), make_slice(address_type=text or "x")],
    "endpoint address": lambda text: [
        make_service(), make_slice(endpoints=[make_endpoint(text), make_endpoint("10.0.0.9")]),
    ],
    "endpoint node and hints": lambda text: [
        make_service(),
        make_slice(
            endpoints=[make_endpoint("10.0.0.9", node=text, zone_hints=[text], node_hints=[text])]
        ),
    ],
}  # fmt: skip


def lines(section):
    """Return what a section should be told in: a line for each chain, rule and frame."""
    return [
        f"*{section.table}",
        *(f":{chain} - [0:0]" for chain in sorted((*section.write, *section.delete))),
        *(f"-A {chain} {text}" for chain in sorted(section.write) for text in section.write[chain]),
        *(f"-I {jump.builtin} {jump.rule}" for jump in section.insert),
        *(f"-D {jump.builtin} {jump.rule}" for jump in section.remove),
        *(f"-X {chain}" for chain in section.delete),
        "COMMIT",
    ]


@given(st.sampled_from(sorted(HOSTILE_OBJECTS)), _HOSTILE)
def test_no_field_of_an_object_can_write_a_rule(field, text):
    ruleset = ruleset_of(states.service_states(HOSTILE_OBJECTS[field](text), IPFamily.V4))
    kernel = FakeIptables()
    batches = planned(ruleset, kernel.save())
    expected = [line for batch in batches for section in batch.sections for line in lines(section)]
    rendered = "".join(batch.render() for batch in batches)
    kernel.restore(rendered)

    assert rendered.splitlines() == expected
    assert [line for line in expected if not _LINE.fullmatch(line.lstrip("*"))] == []
    assert own(kernel.save()) == own(ruleset.tables)


# Cases -------------------------------------------------------------------------------------------

ONE = states.service_states([make_service(), make_slice()], IPFamily.V4)


def test_nothing_to_change_is_no_batch():
    ruleset = ruleset_of(ONE)

    assert planned(ruleset, kernel_with(ruleset).save()) == []


def test_first_plan_orders_mangle_filter_nat():
    batches = planned(ruleset_of(ONE), fake_iptables.empty_tables())

    assert [section.table for batch in batches for section in batch.sections] == [
        "mangle", "filter", "nat",
    ]  # fmt: skip


def test_no_limit_is_one_batch_and_a_limit_several():
    ruleset, live = ruleset_of(ONE), fake_iptables.empty_tables()

    assert len(planned(ruleset, live)) == 1
    assert len(planned(ruleset, live, max_rules=1)) > 3


def test_chains_of_one_service_change_in_one_section():
    ruleset = ruleset_of(ONE)
    (group,) = ruleset.groups()
    batches = planned(ruleset, fake_iptables.empty_tables(), max_rules=1)

    assert any(
        set(group) <= section.write.keys() for batch in batches for section in batch.sections
    )


def test_missing_firewall_chain_is_made_empty_where_it_is_not_filled():
    ruleset = Ruleset(states.golden_options(IPFamily.V6))
    kernel = kernel_with(ruleset)

    assert kernel.tables["filter"]["KUBE-FIREWALL"] == ()
    assert planned(ruleset, kernel.save()) == []


def test_kubelets_rules_in_the_firewall_chain_stay_where_it_is_not_filled():
    ruleset = Ruleset(states.golden_options(IPFamily.V6))
    kernel = kernel_with(ruleset, {"filter": {"KUBE-FIREWALL": ("-j DROP",)}})

    assert kernel.tables["filter"]["KUBE-FIREWALL"] == ("-j DROP",)


def test_jump_that_is_there_is_not_moved_to_the_top():
    ruleset = ruleset_of({})
    kernel = kernel_with(ruleset)
    kernel.tables["nat"]["PREROUTING"] = ("-j ACCEPT", *kernel.tables["nat"]["PREROUTING"])

    assert planned(ruleset, kernel.save()) == []


def test_stale_chains_go_in_an_order_in_which_none_is_referred_to():
    node_port = make_service(
        type="LoadBalancer", ports=[make_port(80, nodePort=30080)], lb_ips=["1.2.3.4"],
        loadBalancerSourceRanges=["10.0.0.0/8"], externalTrafficPolicy="Local",
        healthCheckNodePort=30100,
    )  # fmt: skip
    kernel = kernel_with(ruleset_of(states.service_states([node_port, make_slice()], IPFamily.V4)))
    for batch in planned(ruleset_of({}), kernel.save(), max_rules=1):
        kernel.restore(batch.render())

    assert own(kernel.save()) == own(ruleset_of({}).tables)


@pytest.mark.parametrize("flag", ["-j", "-g"])
@pytest.mark.parametrize("chain", ["PREROUTING", "ADMIN"])
def test_stale_chain_that_others_jump_to_is_emptied_and_holds_up_nothing(chain, flag):
    ruleset = ruleset_of(ONE)
    (group,) = ruleset.groups()
    kernel = kernel_with(ruleset)
    kernel.tables["nat"][chain] = (
        *kernel.tables["nat"].get(chain, ()), f"-s 198.51.100.7/32 {flag} {group[0]}",
    )  # fmt: skip
    after = ruleset_of({})
    for batch in planned(after, kernel.save()):
        kernel.restore(batch.render())

    assert own(kernel.save())["nat"] == own(after.tables)["nat"] | {group[0]: ()}
    assert planned(after, kernel.save()) == []


def test_stale_chain_of_ours_in_filter_and_mangle_goes_too():
    desired = {"filter": {}, "nat": {}, "mangle": {}}
    live = fake_iptables.empty_tables()
    live["filter"]["KUBE-SERVICES"] = live["mangle"]["KUBE-PROXY-CANARY"] = ()
    live["filter"]["CNI-FORWARD"] = ()
    (batch,) = plan.plan(desired, live, groups=[])

    assert {section.table: section.delete for section in batch.sections if section.delete} == {
        "mangle": ("KUBE-PROXY-CANARY",),
        "filter": ("KUBE-SERVICES",),
    }


def test_filter_rule_that_goes_stays_until_nat_has_changed():
    kernel = kernel_with(ruleset_of(states.service_states([make_service()], IPFamily.V4)))
    (batch,) = planned(ruleset_of(ONE), kernel.save())

    assert [section.table for section in batch.sections] == ["nat", "filter"]


def test_filter_rule_that_comes_stands_before_nat_changes():
    kernel = kernel_with(ruleset_of(ONE))
    without = ruleset_of(states.service_states([make_service()], IPFamily.V4))
    (batch,) = planned(without, kernel.save())

    assert [section.table for section in batch.sections] == ["filter", "nat"]


def test_filter_keeps_what_goes_beside_what_comes():
    other = make_service("svc2", cluster_ip="172.30.0.42")
    kernel = kernel_with(ruleset_of(states.service_states([make_service()], IPFamily.V4)))
    swapped = ruleset_of(states.service_states([make_service(), make_slice(), other], IPFamily.V4))
    (batch,) = planned(swapped, kernel.save())
    before, _, after = (section.write.get(rules.SERVICES) for section in batch.sections)

    assert [len(before), len(after)] == [2, 1]
    assert before[0] == after[0]


def test_chain_that_no_group_has_is_written_all_the_same():
    (batch,) = plan.plan({"nat": {"KUBE-SVC-X": ("-j DROP",)}}, {}, groups=[])

    assert any(section.write == {"KUBE-SVC-X": ("-j DROP",)} for section in batch.sections)


def test_touched_chain_that_went_and_never_was_there_needs_nothing():
    live = kernel_with(ruleset_of({})).save()
    gone = frozenset({ChainId("nat", "KUBE-SVC-GONE")})

    assert plan.plan(ruleset_of({}).tables, live, groups=[], touched=gone) == []


def test_batch_renders_as_a_restore_input():
    batch = plan.Batch(
        (
            plan.Section(
                "nat",
                write={"KUBE-SVC-A": ("-j ACCEPT", "-j DROP")},
                insert=(rules.Jump("nat", "OUTPUT", "-j KUBE-SVC-A"),),
                remove=(rules.Jump("nat", "PREROUTING", "-j KUBE-SVC-B"),),
                delete=("KUBE-SVC-B",),
            ),
        )
    )

    assert batch.render() == (
        "*nat\n"
        ":KUBE-SVC-A - [0:0]\n"
        ":KUBE-SVC-B - [0:0]\n"
        "-A KUBE-SVC-A -j ACCEPT\n"
        "-A KUBE-SVC-A -j DROP\n"
        "-I OUTPUT -j KUBE-SVC-A\n"
        "-D PREROUTING -j KUBE-SVC-B\n"
        "-X KUBE-SVC-B\n"
        "COMMIT\n"
    )
    assert (batch.rule_count("nat"), batch.rule_count("filter")) == (2, 0)
    assert batch.line_count == 9


def test_removal_is_applied_to_the_model():
    jump = rules.Jump("nat", "OUTPUT", "-j A")
    live = {"nat": {"OUTPUT": ("-j B", "-j A", "-j A"), "A": ()}}
    plan.Batch((plan.Section("nat", remove=(jump,)),)).apply_to(live)

    assert live == {"nat": {"OUTPUT": ("-j B", "-j A"), "A": ()}}


def test_batches_stay_near_their_limit():
    items = itertools.chain.from_iterable(
        (make_service(f"svc{n}", cluster_ip=f"172.30.1.{n}"), make_slice(f"svc{n}"))
        for n in range(50)
    )
    ruleset = ruleset_of(states.service_states(items, IPFamily.V4))
    batches = planned(ruleset, fake_iptables.empty_tables(), max_rules=60)
    sizes = [sum(batch.rule_count(table) for table in ("filter", "nat")) for batch in batches]

    assert max(sizes) <= 60
    assert len(batches) < 10
