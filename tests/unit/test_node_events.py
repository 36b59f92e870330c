"""What is told of this node to the cluster."""

import pytest

from kubeproxy_py import drift, node_events
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.model import IPFamily

V4 = IPFamily.V4
FIREWALLD = drift.Culprit("firewalld", 99)


def repair(**fields):
    return drift.Repair(
        **{
            "family": V4,
            "table": "nat",
            "kind": "chain_flushed",
            "count": 1,
            "chains": ("KUBE-SERVICES",),
            "culprits": (FIREWALLD,),
            **fields,
        }
    )


def test_a_repair_says_who_did_what_to_which_chains():
    event = node_events.repaired(repair())

    assert (event.event_type, event.reason) == ("Warning", "RulesRepaired")
    assert event.note == (
        "IPv4: firewalld flushed chains in nat: KUBE-SERVICES; they are as they should be again"
    )


def test_the_same_again_by_another_process_id_is_the_same_event():
    again = repair(culprits=(drift.Culprit("firewalld", 100),))

    assert node_events.repaired(again) == node_events.repaired(repair())


@pytest.mark.parametrize("kind", drift.Kind.__args__)
def test_every_kind_of_change_has_words(kind):
    assert node_events.repaired(repair(kind=kind)).note


def test_of_many_chains_some_are_named():
    event = node_events.repaired(repair(chains=("A", "B", "C", "D"), count=900, culprits=()))

    assert "an unknown process flushed chains in nat: A, B, C and others;" in event.note


@pytest.mark.parametrize(
    ("chains", "told"),
    [(frozenset([ChainId("nat", "X")]), "changes nat/X again"), (None, "changes our chains again")],
)
def test_a_contest_names_the_other_side(chains, told):
    event = node_events.contested(V4, drift.Contest(chains, (FIREWALLD,), 1.0))

    assert (event.event_type, event.reason) == ("Warning", "RulesContested")
    assert told in event.note


@pytest.mark.parametrize(
    ("is_met", "told"),
    [(True, "(packets pass them"), (False, "(harmless)"), (None, "cannot be seen")],
)
def test_rules_in_the_other_backend_are_told_with_what_to_do(is_met, told):
    event = node_events.mixed(V4, "legacy", is_met=is_met)

    assert (event.event_type, event.reason) == ("Warning", "BackendsMixed")
    assert told in event.note
    assert event.note.endswith("kubeproxy-py cleanup --backend=legacy removes them")


def test_what_was_found_at_the_start_is_told_with_what_became_of_it():
    event = node_events.adopted(V4, found=120, written=3, deleted=2)

    assert (event.event_type, event.reason) == ("Normal", "RulesAdopted")
    assert "of 120 chains" in event.note
    assert "3 were written, 2 deleted" in event.note
