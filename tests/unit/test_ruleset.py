"""Desired state as a fold of Fragments."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeproxy_py import dispatch, rules
from kubeproxy_py.dispatch import NAT_SERVICES, SHARED, ChainId
from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    PortKey,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)
from kubeproxy_py.ruleset import HealthCheck, Ruleset
from tests.support import crowds, fake_iptables, lookups, states, strategies

OPTIONS = states.golden_options(IPFamily.V4)
TCP, UDP = PortKey("", "tcp"), PortKey("", "udp")


def name(number=1):
    return ServiceName("ns", f"svc{number}")


def state(number=1, *, key=TCP, endpoints=("10.0.0.1",), **fields):
    return ServiceState(
        {
            key: ServicePort(
                name=ServicePortName(*name(number), *key),
                cluster_ip=f"172.30.0.{number}",
                port=80,
                **fields,
            )
        },
        {key: tuple(Endpoint(ip, 80, is_local=True) for ip in endpoints)},
    )


@pytest.fixture
def ruleset():
    """Give a ruleset without Services, of which all that is touched was taken."""
    ruleset = Ruleset(OPTIONS)
    ruleset.take_touched()
    return ruleset


def everything(ruleset):
    """Return all that can be asked of a ruleset."""
    return {
        "tables": ruleset.tables,
        "counts": [ruleset.rule_count(table) for table in (rules.FILTER, rules.NAT, rules.MANGLE)],
        "services": ruleset.service_count,
        "endpoints": ruleset.endpoint_count,
        "lacking": ruleset.lacking_local(),
        "health checks": ruleset.health_checks(),
        "groups": list(ruleset.groups()),
        "udp": sorted(map(repr, ruleset.udp_services())),
    }


# The promise -------------------------------------------------------------------------------------


@given(st.lists(strategies.changes(), max_size=6))
def test_any_sequence_of_changes_is_what_building_from_nothing_gives(history):
    ruleset = Ruleset(OPTIONS)
    known = {}
    for changed in history:
        ruleset.apply(changed)
        known |= changed
    reference = Ruleset(OPTIONS)
    reference.apply({name: known[name] for name in sorted(known) if known[name] is not None})

    assert everything(ruleset) == everything(reference)


@given(strategies.service_states(), strategies.service_states(), st.booleans())
def test_rebuilding_is_what_building_from_nothing_gives(before, after, is_large):
    options = msgspec.structs.replace(OPTIONS, zone="zone-b", is_large=is_large)
    ruleset = Ruleset(OPTIONS)
    ruleset.apply(before)
    ruleset.rebuild(options, after)
    reference = Ruleset(options)
    reference.apply(after)

    assert everything(ruleset) == everything(reference)


@given(strategies.service_states(), strategies.changes())
def test_touched_chains_are_those_that_differ(before, changed):
    ruleset = Ruleset(OPTIONS)
    ruleset.apply(before)
    ruleset.take_touched()
    old = {table: dict(chains) for table, chains in ruleset.tables.items()}
    ruleset.apply(changed)

    differing = {
        ChainId(table, chain)
        for table in old
        for chain in {*old[table], *ruleset.tables[table]}
        if old[table].get(chain) != ruleset.tables[table].get(chain)
    }
    assert differing <= ruleset.take_touched()


# The same where the shared chains are trees ------------------------------------------------------

FEW = settings(max_examples=30)


def laid_out(layout):
    return Ruleset(msgspec.structs.replace(OPTIONS, layout=layout))


@FEW
@given(st.lists(crowds.crowds(), max_size=4))
def test_trees_are_what_building_from_nothing_gives_after_any_sequence_of_changes(history):
    ruleset, last = laid_out("tree"), {}
    for known in history:
        ruleset.apply(dict.fromkeys(last.keys() - known.keys()) | known)
        last = known
    reference = laid_out("tree")
    reference.apply(last)

    assert everything(ruleset) == everything(reference)


@FEW
@given(st.lists(crowds.crowds(), min_size=1, max_size=4))
def test_auto_is_chain_by_chain_either_flat_or_a_tree(history):
    """Between the thresholds it depends on what was before, and nothing else does."""
    rulesets = {layout: laid_out(layout) for layout in ("flat", "auto", "tree")}
    last = {}
    for known in history:
        for ruleset in rulesets.values():
            ruleset.apply(dict.fromkeys(last.keys() - known.keys()) | known)
        last = known
    flat, auto, tree = (rulesets[layout].tables for layout in ("flat", "auto", "tree"))

    for table, chain in SHARED:
        rule_count = len(flat[table][chain])
        is_flat = auto[table][chain] == flat[table][chain]
        assert is_flat or auto[table][chain] == tree[table][chain]
        assert is_flat or rule_count >= 32
        assert not is_flat or rule_count <= 64 + 1  # one: nat's jump to the node ports
        assert sorted(lookups.shared_rules(auto, table, chain)) == sorted(flat[table][chain])


@FEW
@given(crowds.crowds())
def test_every_chain_of_a_tree_is_jumped_to_once_in_its_table(known):
    """So no two of the shared chains of a table have trees with a name in common."""
    ruleset = laid_out("tree")
    ruleset.apply(known)

    for by_name in ruleset.tables.values():
        targets = [fake_iptables.target(text) for texts in by_name.values() for text in texts]
        jumped_to = [name for name in targets if dispatch.tree_depth(name or "") is not None]
        chains = [name for name in by_name if dispatch.tree_depth(name) is not None]
        assert sorted(jumped_to) == sorted(chains)


@FEW
@given(crowds.changed_crowds(), st.sampled_from(["tree", "auto"]))
def test_touched_chains_of_a_tree_are_those_that_differ(change, layout):
    before, after = change
    ruleset = laid_out(layout)
    ruleset.apply(before)
    ruleset.take_touched()
    old = {table: dict(chains) for table, chains in ruleset.tables.items()}
    ruleset.apply(dict.fromkeys(before.keys() - after.keys()) | after)

    differing = {
        ChainId(table, chain)
        for table in old
        for chain in {*old[table], *ruleset.tables[table]}
        if old[table].get(chain) != ruleset.tables[table].get(chain)
    }
    assert differing <= ruleset.take_touched()


# Details -----------------------------------------------------------------------------------------


def test_shared_and_fixed_chains_are_there_before_any_service():
    tables = Ruleset(OPTIONS).tables

    assert all(chain in tables[table] for table, chain in SHARED)
    assert tables[rules.NAT][rules.SERVICES] == rules.node_port_jumps(OPTIONS)
    assert "KUBE-POSTROUTING" in tables[rules.NAT]


def test_same_state_again_touches_nothing(ruleset):
    ruleset.apply({name(): state()})
    ruleset.take_touched()
    ruleset.apply({name(): state()})

    assert ruleset.take_touched() == frozenset()


def test_endpoint_of_one_service_touches_only_its_own_chains(ruleset):
    ruleset.apply({name(1): state(1), name(2): state(2)})
    ruleset.take_touched()
    ruleset.apply({name(1): state(1, endpoints=("10.0.0.1", "10.0.0.2"))})

    assert {chain.chain[:9] for chain in ruleset.take_touched()} == {"KUBE-SVC-", "KUBE-SEP-"}


def test_service_that_goes_takes_its_chains_along(ruleset):
    empty = {table: dict(chains) for table, chains in ruleset.tables.items()}
    ruleset.apply({name(): state(node_port=30080, is_externally_accessible=True)})
    ruleset.apply({name(): None})

    assert ruleset.tables == empty
    assert list(ruleset.groups()) == []


def test_service_that_was_never_there_goes_without_a_trace(ruleset):
    ruleset.apply({name(): None})

    assert ruleset.take_touched() == frozenset()


def test_dns_and_the_api_are_programmed_first(ruleset):
    first = [
        ServiceName("default", "kubernetes"),
        ServiceName("kube-system", "kube-dns"),
    ]
    names = [ServiceName("a", "a"), *first, ServiceName("z", "z")]
    ruleset.apply(
        {
            service: ServiceState(
                {TCP: ServicePort(name=ServicePortName(*service, "", "tcp"), cluster_ip="1.1.1.1", port=80)},
                {TCP: (Endpoint("10.0.0.1", 80),)},
            )
            for service in names
        }
    )  # fmt: skip
    order = [group[0] for group in ruleset.groups()]

    assert order == [
        f"KUBE-SVC-{rules.hash16(str(service), 'tcp')}" for service in [*first, names[0], names[3]]
    ]


def test_groups_of_some_services_leave_out_what_is_gone(ruleset):
    ruleset.apply({name(1): state(1), name(2): state(2)})
    ruleset.apply({name(2): None})

    assert len(list(ruleset.groups([name(1), name(2)]))) == 1


def test_large_is_strictly_more_than_a_thousand_endpoints_counted_per_port(ruleset):
    def with_ports(count, endpoints):
        keys = [PortKey(f"p{number}", "tcp") for number in range(count)]
        eps = tuple(
            Endpoint(f"10.0.{n // 250}.{n % 250}", 80, ready=False) for n in range(endpoints)
        )
        return ServiceState(
            {
                key: ServicePort(name=ServicePortName(*name(), *key), cluster_ip="1.1.1.1", port=80)
                for key in keys
            },
            dict.fromkeys(keys, eps),
        )

    ruleset.apply({name(): with_ports(2, 500)})
    assert not ruleset.is_large

    ruleset.apply({name(): with_ports(3, 334)})
    assert ruleset.is_large


def test_endpoints_of_ports_that_no_service_has_do_not_count(ruleset):
    ruleset.apply(
        {name(): msgspec.structs.replace(state(), endpoints={UDP: (Endpoint("1.1.1.1", 1),)})}
    )

    assert ruleset.endpoint_count == 0


@pytest.mark.parametrize(
    ("policies", "endpoints", "lacking"),
    [
        pytest.param({}, (), (0, 0), id="Cluster, none"),
        pytest.param({"is_internal_local": True}, ("remote",), (1, 0), id="iTP Local, remote only"),
        pytest.param({"is_internal_local": True}, ("local",), (0, 0), id="iTP Local, local"),
        pytest.param({"is_internal_local": True}, (), (0, 0), id="iTP Local, none anywhere"),
        pytest.param({"is_external_local": True}, ("remote",), (0, 1), id="eTP Local, remote only"),
        pytest.param(
            {"is_external_local": True}, ("local", "remote"), (0, 0), id="eTP Local, local"
        ),
        pytest.param(
            {"is_external_local": True, "is_internal_local": True}, ("remote",), (1, 1), id="both"
        ),
    ],
)
def test_services_that_lack_local_endpoints_are_counted(ruleset, policies, endpoints, lacking):
    service = state(node_port=30080, is_externally_accessible=True, **policies)
    eps = tuple(
        Endpoint("10.0.0.1", 80 + n, is_local=kind == "local") for n, kind in enumerate(endpoints)
    )
    ruleset.apply({name(): msgspec.structs.replace(service, endpoints={TCP: eps})})

    assert ruleset.lacking_local() == lacking

    ruleset.apply({name(): None})
    assert ruleset.lacking_local() == (0, 0)


def test_health_check_counts_distinct_addresses_that_are_local_and_ready(ruleset):
    endpoints = {
        TCP: (
            Endpoint("10.0.0.1", 80, is_local=True),
            Endpoint("10.0.0.2", 80, is_local=False),
            Endpoint("10.0.0.3", 80, is_local=True, ready=False, terminating=True),
        ),
        UDP: (Endpoint("10.0.0.1", 81, is_local=True), Endpoint("10.0.0.4", 81, is_local=True)),
    }
    ruleset.apply(
        {name(): msgspec.structs.replace(state(health_check_node_port=30000), endpoints=endpoints)}
    )

    assert ruleset.health_checks() == {name(): HealthCheck(30000, 2)}


def test_health_check_goes_with_its_port(ruleset):
    ruleset.apply({name(): state(health_check_node_port=30000)})
    ruleset.apply({name(): state()})

    assert ruleset.health_checks() == {}


def test_udp_services_are_known_while_they_have_a_udp_port(ruleset):
    ruleset.apply({name(1): state(1), name(2): state(2, key=UDP)})
    assert ruleset.udp_services() == [state(2, key=UDP)]

    ruleset.apply({name(2): state(2)})
    assert ruleset.udp_services() == []


def test_node_port_addresses_change_nothing_but_the_last_rules_of_nat_services(ruleset):
    ruleset.set_node_port_addresses(("192.168.0.2",))

    assert ruleset.take_touched() == {NAT_SERVICES}
    assert ruleset.tables[rules.NAT][rules.SERVICES] == rules.node_port_jumps(ruleset.options)


def test_same_node_port_addresses_again_touch_nothing(ruleset):
    ruleset.set_node_port_addresses(("192.168.0.2",))
    ruleset.take_touched()
    ruleset.set_node_port_addresses(("192.168.0.2",))

    assert ruleset.take_touched() == frozenset()


def test_a_rule_in_a_shared_chain_is_owned_by_the_service_that_it_is_for(ruleset):
    ruleset.apply({name(1): state(1), name(2): state(2)})
    chain = ruleset.tables["nat"]["KUBE-SERVICES"]
    (rule,) = [rule for rule in chain if f'"{name(2)}' in rule]

    assert ruleset.owner("KUBE-SERVICES", rule) == name(2)
    assert ruleset.owner("KUBE-SERVICES", "-j RETURN") is None
