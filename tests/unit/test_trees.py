"""Search trees of chains, on keys that are short enough to have everything in a tree."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kubeproxy_py.trees import Prefix, Tree

BITS = 16
# As many rules as a chain may have before it is split, and jumps: the tree's own numbers.
MAX_RULES = 8
MAX_JUMPS = 16


def tree_of(held=None):
    """Return a tree with *held*: rules by key and owner."""
    tree = Tree(BITS, lambda prefix: f"jump {prefix.value} {prefix.length}")
    for (key, owner), rules in (held or {}).items():
        tree.replace(key, owner, rules)
    return tree


def rules_of(key, owner, number):
    return tuple(f"rule {key} {owner} {n}" for n in range(number))


def jumps(rules):
    return [Prefix(*map(int, rule.split()[1:])) for rule in rules if rule.startswith("jump")]


def covers(prefix, key):
    return key >> (BITS - prefix.length) == prefix.value >> (BITS - prefix.length)


def walk(tree, key, rules=None):
    """Return the rules for *key* in the order met, and how many rules of any kind were passed."""
    found, passed = [], 0
    for rule in tree.root_rules() if rules is None else rules:
        passed += 1
        if (below := jumps([rule])) and covers(below[0], key):
            more, further = walk(tree, key, tree.chains[below[0]])
            found += more
            passed += further
        elif rule.startswith(f"rule {key} "):
            found.append(rule)
    return found, passed


@st.composite
def keys(draw):
    """Draw a key: scattered, or near others, or very near."""
    base, width = draw(st.sampled_from([(0, 16), (0x1200, 8), (0x12F0, 4), (0x8000, 12)]))
    return base | draw(st.integers(0, (1 << width) - 1))


# A change: key, owner, number of rules (0: gone).
CHANGES = st.tuples(keys(), st.sampled_from("ab"), st.sampled_from([0, 0, 1, 1, 1, 2, 9]))
HISTORIES = st.lists(CHANGES, max_size=60)


def apply(tree, held, change):
    key, owner, number = change
    rules = rules_of(key, owner, number)
    tree.replace(key, owner, rules)
    held.pop((key, owner), None)
    if rules:
        held[key, owner] = rules


# Properties --------------------------------------------------------------------------------------


@given(HISTORIES)
def test_any_sequence_of_changes_is_what_building_from_nothing_gives(history):
    tree, held = tree_of(), {}
    for change in history:
        apply(tree, held, change)
    reference = tree_of(dict(sorted(held.items())))

    assert (tree.root_rules(), tree.chains) == (reference.root_rules(), reference.chains)
    assert tree.count == sum(map(len, held.values()))


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_that_comes_and_goes_leaves_no_trace(seed):
    """Hundreds of keys, so that chains split and join again on every level."""
    choice = random.Random(seed)
    tree, held = tree_of(), {}
    dense = [choice.randrange(0x1000) for _ in range(300)]
    for _ in range(1500):
        key = choice.choice(dense) if choice.random() < 0.8 else choice.randrange(1 << BITS)
        apply(tree, held, (key, "a", choice.choice([0, 1])))
    reference = tree_of(dict(sorted(held.items())))

    assert (tree.root_rules(), tree.chains) == (reference.root_rules(), reference.chains)

    for key, owner in list(held):
        tree.replace(key, owner, ())
    assert (tree.count, tree.root_rules(), tree.chains) == (0, (), {})


@given(HISTORIES)
def test_every_rule_is_found_by_its_key_and_by_no_other(history):
    tree, held = tree_of(), {}
    for change in history:
        apply(tree, held, change)

    for key in {key for key, *_ in history} | {0, 0x12FF, 0xFFFF}:
        wanted = [*held.get((key, "a"), ()), *held.get((key, "b"), ())]
        assert walk(tree, key)[0] == wanted


@given(HISTORIES)
def test_a_lookup_passes_no_more_than_a_chain_of_jumps_a_level_and_the_rules_of_a_leaf(history):
    tree, held = tree_of(), {}
    for change in history:
        apply(tree, held, change)

    for key in {key for key, *_ in history}:
        own = sum(len(held.get((key, owner), ())) for owner in "ab")
        # A rule that stands beside jumps is the only one of its branch, and so counts as one of them.
        assert walk(tree, key)[1] <= (BITS // 4 - 1) * MAX_JUMPS + max(MAX_JUMPS, own)


@given(HISTORIES)
def test_every_chain_is_jumped_to_once_and_every_jump_leads_to_a_chain(history):
    tree, held = tree_of(), {}
    for change in history:
        apply(tree, held, change)
    everything = [*tree.root_rules(), *(rule for rules in tree.chains.values() for rule in rules)]

    assert sorted(jumps(everything)) == sorted(tree.chains)
    assert sorted(rule for rule in everything if rule.startswith("rule")) == sorted(
        rule for rules in held.values() for rule in rules
    )


@given(HISTORIES)
def test_a_chain_holds_only_what_is_below_its_prefix(history):
    tree, held = tree_of(), {}
    for change in history:
        apply(tree, held, change)

    for prefix, rules in tree.chains.items():
        below = [int(rule.split()[1]) for rule in rules]
        assert all(covers(prefix, value) for value in below)
        assert all(found.length > prefix.length for found in jumps(rules))


@given(HISTORIES)
def test_no_chain_holds_more_than_it_may(history):
    tree, held = tree_of(), {}
    for change in history:
        apply(tree, held, change)

    for prefix, rules in tree.chains.items():
        is_leaf = len({rule.split()[1] for rule in rules}) == 1
        assert len(rules) >= 2
        assert is_leaf or len(rules) <= MAX_JUMPS, prefix


@given(st.lists(st.lists(CHANGES, max_size=20), max_size=5))
def test_changes_that_were_taken_add_up_to_the_chains(rounds):
    tree, held, told = tree_of(), {}, {}
    for changes in rounds:
        for change in changes:
            apply(tree, held, change)
        told |= tree.take_changed()
        told = {prefix: rules for prefix, rules in told.items() if rules is not None}

        assert told == tree.chains


@settings(max_examples=30)
@given(HISTORIES, CHANGES)
@example([(key, "a", 1) for key in range(0x1200, 0x1209)], (0x1200, "a", 0))
def test_a_change_touches_only_chains_on_the_way_to_it_unless_one_splits_or_joins(history, change):
    tree, held = tree_of(), {}
    for before in history:
        apply(tree, held, before)
    tree.take_changed()
    apply(tree, held, change)

    changed = tree.take_changed()
    elsewhere = [prefix for prefix in changed if not covers(prefix, change[0])]
    # What splits or joins has so many rules beside the changed ones, and fewer chains than rules.
    assert len(elsewhere) < MAX_RULES
    assert len(changed) - len(elsewhere) <= BITS // 4


# Cases -------------------------------------------------------------------------------------------


def test_an_empty_tree_has_nothing():
    tree = tree_of()

    assert (tree.count, tree.root_rules(), tree.chains, tree.take_changed()) == (0, (), {}, {})


def test_a_single_rule_stands_in_the_root():
    tree = tree_of({(0x1234, "a"): ("rule",)})

    assert (tree.root_rules(), tree.chains) == (("rule",), {})


def test_two_rules_of_one_key_are_a_chain_for_that_key():
    tree = tree_of({(0x1234, "a"): ("one", "two")})

    assert tree.root_rules() == ("jump 4660 16",)
    assert tree.chains == {Prefix(0x1234, 16): ("one", "two")}


def test_levels_on_which_nothing_branches_are_skipped():
    tree = tree_of({(0x1230, "a"): ("one",), (0x1235, "a"): ("two",)})

    assert tree.root_rules() == (f"jump {0x1230} 12",)
    assert tree.chains == {Prefix(0x1230, 12): ("one", "two")}


def test_a_chain_of_eight_rules_is_not_split_and_one_of_nine_is():
    held = {(0x1200 + 16 * n, "a"): (f"rule {n}",) for n in range(4)}
    held |= {(0x1200 + n, "a"): (f"rule 0.{n}",) for n in range(1, 5)}
    tree = tree_of(held)
    assert tree.chains.keys() == {Prefix(0x1200, 8)}

    tree.replace(0x12FF, "a", ("ninth",))
    assert tree.chains == {
        Prefix(0x1200, 8): (f"jump {0x1200} 12", "rule 1", "rule 2", "rule 3", "ninth"),
        Prefix(0x1200, 12): ("rule 0", "rule 0.1", "rule 0.2", "rule 0.3", "rule 0.4"),
    }

    tree.replace(0x12FF, "a", ())
    assert tree.chains.keys() == {Prefix(0x1200, 8)}


def test_nine_rules_of_one_key_stay_together():
    rules = tuple(f"rule {n}" for n in range(9))
    tree = tree_of({(0x1234, "a"): rules})

    assert tree.chains == {Prefix(0x1234, 16): rules}


def test_owners_decide_the_order_between_equal_keys_whoever_came_first():
    tree = tree_of({(0x1234, "b"): ("of b",), (0x1234, "a"): ("of a", "also of a")})

    assert tree.chains[Prefix(0x1234, 16)] == ("of a", "also of a", "of b")


def test_removing_what_was_never_there_changes_nothing():
    tree = tree_of({(0x1234, "a"): ("one", "two")})
    tree.take_changed()
    tree.replace(0x1235, "a", ())
    tree.replace(0x1234, "b", ())

    assert tree.take_changed() == {}
    assert tree.chains.keys() == {Prefix(0x1234, 16)}


def test_same_rules_again_change_nothing():
    tree = tree_of({(0x1234, "a"): ("one", "two")})
    tree.take_changed()
    tree.replace(0x1234, "a", ("one", "two"))

    assert tree.take_changed() == {}


def test_a_chain_that_goes_is_named_once():
    tree = tree_of({(0x1234, "a"): ("one", "two")})
    tree.take_changed()
    tree.replace(0x1234, "a", ())

    assert tree.take_changed() == {Prefix(0x1234, 16): None}
    assert tree.take_changed() == {}
