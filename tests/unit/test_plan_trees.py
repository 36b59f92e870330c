"""
What packets find between two sections where the shared chains are trees, or become or cease to be.

The same promises as in test_plan.py, held in clusters that are large enough to have trees.
"""

from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeproxy_py import cleanup, rules
from kubeproxy_py.dispatch import tree_depth
from kubeproxy_py.iptables import plan
from kubeproxy_py.model import IPFamily
from kubeproxy_py.ruleset import Ruleset
from tests.support import crowds, fake_iptables, kube_proxy, lookups, states
from tests.support.planning import foreign, kernel_with, planned, steps
from tests.support.world import own

# Each example plans the change of a hundred Services and looks at hundreds of states in between.
FEW = settings(max_examples=20)
SIZES = st.sampled_from([None, 5, 50, 300])
#: The layout before and after: a restart may change it, and auto changes between both by itself.
LAYOUTS = st.sampled_from(
    [("tree", "tree"), ("auto", "auto"), ("flat", "tree"), ("tree", "flat"), ("auto", "flat")]
)
FOREIGN = {
    "filter": {
        "KUBE-FIREWALL": ("-d 9.9.9.9/32 -j DROP",),
        "CNI-FORWARD": ("-j ACCEPT",),
        "FORWARD": ("-j CNI-FORWARD",),
        # Begins as the chains of trees do, which are ours in filter only by their whole name.
        "KUBE-SVC-OF-OTHERS": ("-j DROP",),
        "KUBE-SVC-10.0.0.0": ("-j DROP",),
    },
    "nat": {"POSTROUTING": ("-s 10.0.0.0/8 -j MASQUERADE",)},
}


def ruleset_of(known, layout):
    options = msgspec.structs.replace(states.golden_options(IPFamily.V4), layout=layout)
    ruleset = Ruleset(options)
    ruleset.apply(known)
    return ruleset


@st.composite
def changes(draw):
    """Draw rulesets before and after a change, and the size of its batches."""
    before, after = draw(crowds.changed_crowds())
    first, last = draw(LAYOUTS)
    return ruleset_of(before, first), ruleset_of(after, last), draw(SIZES)


def states_between(before, after, max_rules):
    """Yield the kernel's tables before, after each section, and at the end."""
    kernel = kernel_with(before)
    yield kernel.tables
    for step in steps(planned(after, kernel.save(), max_rules=max_rules)):
        kernel.restore(step)
        yield kernel.tables


# What a packet to a front door of a Service comes to ---------------------------------------------


class Ends(NamedTuple):
    """Where nat sends a packet, and who in filter refuses it if nat does not; None: nowhere, nobody."""

    nat: str | None
    filter: tuple[str, str] | None

    @property
    def is_handled(self):
        return self != (None, None)


def ends(tables, packet):
    refusing = (
        (chain, found)
        for chain in (rules.PROXY_FIREWALL, rules.SERVICES, rules.EXTERNAL_SERVICES)
        if (found := lookups.look_up(tables, "filter", chain, packet).target) is not None
    )
    return Ends(lookups.look_up(tables, "nat", rules.SERVICES, packet).target, next(refusing, None))


def ends_in_dnat(tables, chain):
    texts = tables["nat"][chain]
    return any(
        " -j DNAT " in text or (to in tables["nat"] and ends_in_dnat(tables, to))
        for text in texts
        if (to := fake_iptables.target(text)) is not None
    )


def doors(before, after, limit=40):
    """Return packets to the front doors of some Services there are before or after."""
    names = sorted({*before, *after})
    step = max(1, len(names) * 4 // limit)
    return [packet for name in names[::step] for packet in crowds.front_doors(int(name.name[3:]))]


@FEW
@given(crowds.changed_crowds(), LAYOUTS, SIZES)
def test_every_front_door_leads_where_it_did_or_where_it_will(change, layouts, max_rules):
    """There is no third thing, whatever has been written so far; so what is unchanged stays so."""
    rulesets = [ruleset_of(known, layout) for known, layout in zip(change, layouts, strict=True)]
    packets = doors(*change)
    first, last = ([ends(ruleset.tables, packet) for packet in packets] for ruleset in rulesets)

    for tables in states_between(*rulesets, max_rules):
        for packet, was, will in zip(packets, first, last, strict=True):
            found = ends(tables, packet)
            assert found.nat in {was.nat, will.nat}
            if found.nat is not None:
                assert ends_in_dnat(tables, found.nat)
                continue
            assert found.filter in {was.filter, will.filter}
            assert found.is_handled or not (was.is_handled and will.is_handled)


@FEW
@given(crowds.changed_crowds(), LAYOUTS, SIZES)
def test_a_service_that_does_not_change_is_reached_all_the_time(change, layouts, max_rules):
    before, after = change
    rulesets = [ruleset_of(known, layout) for known, layout in zip(change, layouts, strict=True)]
    numbers = [int(name.name[3:]) for name in before if before[name] == after.get(name)][:30]
    packets = [packet for number in numbers for packet in crowds.front_doors(number)]
    wanted = [ends(rulesets[0].tables, packet) for packet in packets]

    for tables in states_between(*rulesets, max_rules):
        assert [ends(tables, packet) for packet in packets] == wanted


@FEW
@given(changes())
def test_source_ranges_never_leak(change):
    for tables in states_between(*change):
        for rule in lookups.shared_rules(tables, "nat", rules.SERVICES):
            if " -j KUBE-FW-" in rule:
                packet = lookups.Packet(rule.split()[1].partition("/")[0], 80)
                found = lookups.look_up(tables, "filter", rules.PROXY_FIREWALL, packet)
                assert found.target == "DROP"


@FEW
@given(changes())
def test_no_prefix_leaves_a_jump_to_nowhere_and_the_end_is_as_desired(change):
    before, after, max_rules = change
    kernel = kernel_with(before, FOREIGN)
    others = foreign(kernel.tables)
    for step in steps(planned(after, kernel.save(), max_rules=max_rules)):
        kernel.restore(step)
        assert fake_iptables.dangling(kernel.tables) == []
        assert foreign(kernel.tables) == others

    assert own(kernel.tables) == own(after.tables)


@FEW
@given(changes())
def test_model_of_the_kernel_is_right_and_planning_again_gives_nothing(change):
    before, after, max_rules = change
    kernel = kernel_with(before, FOREIGN)
    live = kernel.save()
    for batch in planned(after, live, max_rules=max_rules):
        kernel.restore(batch.render())
        batch.apply_to(live)

    assert live == kernel.save()
    assert planned(after, live) == []


@FEW
@given(st.lists(crowds.crowds(), min_size=2, max_size=4), st.sampled_from(["tree", "auto"]), SIZES)
def test_touched_chains_are_all_that_must_be_looked_at(history, layout, max_rules):
    first, *later = history
    ruleset = ruleset_of(first, layout)
    kernel = kernel_with(ruleset, FOREIGN)
    ruleset.take_touched()
    for before, after in zip(history, later, strict=False):
        changed = {name: after.get(name) for name in {**before, **after}}
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

        assert own(kernel.tables) == own(ruleset.tables)


@FEW
@given(crowds.crowds(), st.sampled_from(["tree", "auto"]), st.randoms(use_true_random=False), SIZES)
def test_whatever_others_did_to_a_tree_is_repaired(known, layout, random, max_rules):
    ruleset = ruleset_of(known, layout)
    kernel = kernel_with(ruleset, FOREIGN)
    for by_name in kernel.tables.values():
        for chain in [chain for chain in by_name if tree_depth(chain) is not None][:20]:
            by_name[chain] = by_name[chain][random.randint(0, 1) :]
    for batch in planned(ruleset, kernel.save(), max_rules=max_rules):
        kernel.restore(batch.render())

    assert own(kernel.tables) == own(ruleset.tables)


@FEW
@given(changes(), crowds.crowds(), st.sampled_from(["flat", "tree"]), st.integers(0, 40))
def test_a_change_that_stops_halfway_is_taken_up_from_there(change, later, layout, taken):
    """The daemon is killed between two inputs, and comes back to another cluster."""
    before, after, max_rules = change
    kernel = kernel_with(before, FOREIGN)
    for step in list(steps(planned(after, kernel.save(), max_rules=max_rules)))[:taken]:
        kernel.restore(step)
    ruleset = ruleset_of(later, layout)
    for batch in planned(ruleset, kernel.save(), max_rules=max_rules):
        kernel.restore(batch.render())

    assert own(kernel.tables) == own(ruleset.tables)


# To and from others ------------------------------------------------------------------------------


@FEW
@given(crowds.changed_crowds())
def test_kube_proxy_takes_over_in_one_restore_and_leaves_nothing_that_is_reached(change):
    before, after = change
    kernel = kernel_with(ruleset_of(before, "tree"))
    flat = ruleset_of(after, "flat")
    kernel.restore(kube_proxy.first_sync(flat.tables, kernel.save()))

    assert own(kernel.tables)["nat"] == own(flat.tables)["nat"]
    # In filter it does not know the chains of a tree: they stay, and nothing leads there any more.
    left = {name for name in kernel.tables["filter"] if tree_depth(name) is not None}
    reached = {
        fake_iptables.target(rule)
        for name, texts in kernel.tables["filter"].items()
        for rule in texts
        if name not in left
    }
    assert left.isdisjoint(reached)


@FEW
@given(crowds.changed_crowds(), st.sampled_from(["flat", "tree"]), SIZES)
def test_what_kube_proxy_left_of_a_tree_goes_when_we_come_back(change, layout, max_rules):
    before, after = change
    kernel = kernel_with(ruleset_of(before, "tree"))
    flat = ruleset_of(before, "flat")
    kernel.restore(kube_proxy.first_sync(flat.tables, kernel.save()))
    ruleset = ruleset_of(after, layout)
    for batch in planned(ruleset, kernel.save(), max_rules=max_rules):
        kernel.restore(batch.render())

    assert own(kernel.tables) == own(ruleset.tables)


@FEW
@given(crowds.crowds())
def test_cleanup_removes_a_tree_and_nothing_of_others(known):
    kernel = kernel_with(ruleset_of(known, "tree"), FOREIGN)
    before = foreign(kernel.tables)
    kernel.restore(cleanup.removal(kernel.save()).render())

    assert own(kernel.tables) == {"mangle": {}, "filter": {}, "nat": {}}
    assert foreign(kernel.tables) == before


# Cases -------------------------------------------------------------------------------------------


def crowd(count, kind="cluster IP"):
    return {crowds.name(number): crowds.state(number, kind) for number in range(count)}


def test_one_service_more_writes_its_chains_and_one_chain_of_the_tree():
    ruleset = ruleset_of(crowd(120), "tree")
    kernel = kernel_with(ruleset)
    ruleset.apply({crowds.name(121): crowds.state(121, "cluster IP")})
    (batch,) = planned(ruleset, kernel.save())
    (section,) = batch.sections

    assert sum(tree_depth(name) is not None for name in section.write) == 1
    assert section.rule_count < 20


@pytest.mark.parametrize("layouts", [("flat", "tree"), ("tree", "flat")])
def test_a_change_of_layout_writes_no_chain_of_a_service(layouts):
    before, after = (ruleset_of(crowd(120), layout) for layout in layouts)
    written = [
        name
        for batch in planned(after, kernel_with(before).save())
        for section in batch.sections
        for name in section.write
    ]

    assert written
    assert {name for name in written if tree_depth(name) is None} == {rules.SERVICES}


def test_trees_are_written_from_the_leaves_and_deleted_from_the_root():
    flat, tree = ruleset_of(crowd(120), "flat"), ruleset_of(crowd(120), "tree")
    written = [
        name
        for batch in planned(tree, kernel_with(flat).save(), max_rules=1)
        for section in batch.sections
        for name in section.write
    ]
    deleted = [
        name
        for batch in planned(flat, kernel_with(tree).save(), max_rules=1)
        for section in batch.sections
        for name in section.delete
    ]

    assert written.pop() == rules.SERVICES
    assert [tree_depth(name) for name in written] == sorted(map(tree_depth, written), reverse=True)
    assert [tree_depth(name) for name in deleted] == sorted(map(tree_depth, deleted))
    assert sorted(written) == sorted(deleted)


def test_groups_of_endpoints_change_with_the_chain_that_leads_to_them():
    ruleset = ruleset_of({crowds.name(1): crowds.state(1, "many endpoints")}, "tree")
    (group,) = ruleset.groups()
    batches = planned(ruleset, fake_iptables.empty_tables(), max_rules=1)

    assert sum(name.startswith("KUBE-SVC-") for name in group) > 5
    assert any(
        set(group) <= section.write.keys() for batch in batches for section in batch.sections
    )
