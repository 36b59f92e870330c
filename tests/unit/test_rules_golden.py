"""The rules of whole clusters, chain by chain, against what kube-proxy made of the same objects."""

import pytest

from kubeproxy_py import rules
from kubeproxy_py.dispatch import NAT_SERVICES, SHARED, ChainId
from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily
from kubeproxy_py.ruleset import Ruleset
from tests.support import states

GOLDEN = [
    pytest.param(state, family, id=f"{state}-{family.value}")
    for state in ("state", "state2")
    for family in IPFamily
]


def wanted_tables(state, family):
    text = (states.GOLDEN / f"{state}.{family.value.lower()}.rules").read_text()
    tables = chains.parse_save(text.splitlines(keepends=True))
    return {
        table: {chain: texts for chain, texts in by_name.items() if chain not in chains.BUILTIN}
        for table, by_name in tables.items()
    }


def built(state, family):
    ruleset = Ruleset(states.golden_options(family))
    ruleset.apply(states.service_states(states.golden_items(state), family))
    return ruleset


def in_any_order(tables):
    """Sort the chains that hold many Services' rules: kube-proxy iterates a map there."""
    for table, chain in SHARED:
        tables[table][chain] = tuple(sorted(tables[table][chain]))
    return tables


@pytest.mark.parametrize(("state", "family"), GOLDEN)
def test_rules_are_those_of_kube_proxy(state, family):
    wanted = in_any_order(wanted_tables(state, family))
    if family is IPFamily.V6:
        # Made for the kubelet's sake by the planner, and left to whoever fills it.
        assert wanted[rules.FILTER].pop(rules.FIREWALL) == ()

    assert in_any_order(built(state, family).tables) == wanted


@pytest.mark.parametrize(("state", "family"), GOLDEN)
def test_jumps_stand_where_kube_proxy_puts_them(state, family):
    text = (states.GOLDEN / f"{state}.{family.value.lower()}.rules").read_text()
    tables = chains.parse_save(text.splitlines(keepends=True))
    inserted: dict[ChainId, tuple[str, ...]] = {}
    for table, builtin, rule in rules.JUMPS:
        chain = ChainId(table, builtin)
        inserted[chain] = (rule, *inserted.get(chain, ()))

    assert inserted == {chain: tables[chain.table][chain.chain] for chain in inserted}


@pytest.mark.parametrize(("state", "family"), GOLDEN)
def test_node_port_jump_is_the_last_rule_of_nat_services(state, family):
    ruleset = built(state, family)

    table, chain = NAT_SERVICES
    assert ruleset.tables[table][chain][-1:] == rules.node_port_jumps(ruleset.options)


@pytest.mark.parametrize(("state", "family"), GOLDEN)
def test_rule_counts_are_what_stands_in_the_chains(state, family):
    ruleset = built(state, family)

    for table in (rules.FILTER, rules.NAT):
        assert ruleset.rule_count(table) == sum(map(len, ruleset.tables[table].values()))
