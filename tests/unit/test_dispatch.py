"""The chains that all ServicePorts share."""

import pytest

from kubeproxy_py import rules
from kubeproxy_py.dispatch import NAT_SERVICES, SHARED, ChainId, Dispatch
from kubeproxy_py.model import IPFamily, ServicePortName

NAT_NODE_PORTS = ChainId(rules.NAT, rules.NODE_PORTS)
FILTER_SERVICES = ChainId(rules.FILTER, rules.SERVICES)
FIRST = ServicePortName("a", "first", "", "tcp")
SECOND = ServicePortName("b", "second", "", "tcp")


def entry(chain, rule):
    return rules.Entry(*chain, address="", protocol="tcp", port=80, rule=rule)


@pytest.fixture
def layout():
    """Give a layout of which all that is there from the beginning was taken."""
    layout = Dispatch(IPFamily.V4)
    layout.take_changed()
    return layout


def test_shared_chains_exist_when_they_are_empty():
    assert Dispatch(IPFamily.V4).take_changed() == dict.fromkeys(SHARED, ())


def test_nothing_changed_is_nothing_taken(layout):
    assert layout.take_changed() == {}


def test_only_the_chain_that_changed_is_taken(layout):
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])

    assert layout.take_changed() == {NAT_SERVICES: ("one",)}


def test_rules_are_sorted_by_service_port_whatever_came_first(layout):
    layout.replace(SECOND, [entry(NAT_SERVICES, "two")])
    layout.replace(FIRST, [entry(NAT_SERVICES, "z"), entry(NAT_SERVICES, "a")])

    assert layout.take_changed() == {NAT_SERVICES: ("z", "a", "two")}


def test_same_entries_again_change_nothing(layout):
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])
    layout.take_changed()
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])

    assert layout.take_changed() == {}


def test_entries_move_from_one_chain_to_another(layout):
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])
    layout.take_changed()
    layout.replace(FIRST, [entry(FILTER_SERVICES, "reject")])

    assert layout.take_changed() == {NAT_SERVICES: (), FILTER_SERVICES: ("reject",)}


def test_no_entries_remove_a_service_port(layout):
    layout.replace(FIRST, [entry(NAT_NODE_PORTS, "one")])
    layout.replace(SECOND, [entry(NAT_NODE_PORTS, "two")])
    layout.take_changed()
    layout.replace(FIRST, [])

    assert layout.take_changed() == {NAT_NODE_PORTS: ("two",)}


def test_removing_what_was_never_there_changes_nothing(layout):
    layout.replace(FIRST, [])

    assert layout.take_changed() == {}


def test_tail_stays_the_end_of_nat_services(layout):
    layout.set_tail(("node ports",))
    layout.replace(SECOND, [entry(NAT_SERVICES, "two")])

    assert layout.take_changed() == {NAT_SERVICES: ("two", "node ports")}


def test_same_tail_again_changes_nothing(layout):
    layout.set_tail(("node ports",))
    layout.take_changed()
    layout.set_tail(("node ports",))

    assert layout.take_changed() == {}
