"""Wrong rules are noticed: a table of scenarios that cannot fail proves nothing."""

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import flows, mutations, scenario
from tests.support.scenarios import ALL

DAMAGES = mutations.damages()


@pytest.mark.parametrize("family", IPFamily, ids=lambda family: family.value)
@pytest.mark.parametrize("damage", DAMAGES, ids=list(DAMAGES))
def test_some_scenario_notices(damage, family):
    assert next(mutations.noticing(DAMAGES[damage], family), None) is not None


@pytest.mark.parametrize("lost", mutations.NOTHING_LOST, ids=list(mutations.NOTHING_LOST))
def test_nothing_is_lost_without(lost):
    """If one of these were noticed, it would belong among the damages."""
    concerned = 0
    for case in ALL:
        tables = scenario.build(case).tables
        damaged = mutations.edited(tables, mutations.without(lost))
        concerned += damaged != tables
        assert not flows.trace_all(case, damaged)

    assert concerned


def test_rules_of_one_kind_are_one_class_whatever_their_names_and_numbers():
    first, second = (
        f'-s {ip} -m comment --comment "default/web{name} loadbalancer IP" -j KUBE-EXT-{text * 16}'
        for ip, name, text in (("10.0.0.0/8", "", "A"), ("fd00::/64", ":p80", "B"))
    )

    assert mutations.rule_class("nat", "KUBE-FW-" + "A" * 16, first) == mutations.rule_class(
        "nat", "KUBE-FW-" + "B" * 16, second
    )
