"""How many rules a cluster costs, and that this grows no faster than the cluster."""

import collections
import functools
import ipaddress
import random

import msgspec
import pytest

from kubeproxy_py import rules
from kubeproxy_py.dispatch import tree_depth
from kubeproxy_py.iptables import plan
from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    PortKey,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)
from kubeproxy_py.rules import FILTER, NAT, NODE_PORTS, SERVICES
from kubeproxy_py.ruleset import Ruleset
from tests.support import fake_iptables, lookups, states
from tests.support.lookups import Packet

KEY = PortKey("", "tcp")
# One rule of KUBE-FIREWALL and three of KUBE-FORWARD; one of KUBE-MARK-MASQ, three of
# KUBE-POSTROUTING and the jump to the node ports.
BASE = {FILTER: 4, NAT: 5}
LOAD_BALANCER = {
    "node_port": 30000,
    "external_ips": ("192.168.99.22",),
    "lb_vips": ("1.2.3.4",),
    "source_ranges": ("203.0.113.0/25",),
    "is_externally_accessible": True,
}


def rule_counts(services, endpoints, **fields):
    ruleset = Ruleset(states.golden_options(IPFamily.V4))
    ruleset.apply(
        {
            ServiceName("ns", f"svc{number}"): ServiceState(
                {
                    KEY: ServicePort(
                        name=ServicePortName("ns", f"svc{number}", "", "tcp"),
                        cluster_ip=f"172.30.{number}.1",
                        port=80,
                        **fields,
                    )
                },
                {KEY: tuple(Endpoint(f"10.0.{number}.{n}", 80) for n in range(1, endpoints + 1))},
            )
            for number in range(services)
        }
    )
    return {table: ruleset.rule_count(table) - BASE[table] for table in (FILTER, NAT)}


@pytest.mark.parametrize("services", [0, 1, 10])
@pytest.mark.parametrize("endpoints", [0, 1, 2, 10])
def test_cluster_ip_services_cost_what_they_cost_with_kube_proxy(services, endpoints):
    each = {FILTER: 0, NAT: 2 + 3 * endpoints} if endpoints else {FILTER: 1, NAT: 0}

    assert rule_counts(services, endpoints) == {
        table: services * count for table, count in each.items()
    }


@pytest.mark.parametrize("services", [0, 1, 10])
@pytest.mark.parametrize("endpoints", [0, 1, 2, 10])
def test_load_balancers_cost_what_they_cost_with_kube_proxy(services, endpoints):
    each = {FILTER: 1, NAT: 10 + 3 * endpoints} if endpoints else {FILTER: 4, NAT: 0}

    assert rule_counts(services, endpoints, **LOAD_BALANCER) == {
        table: services * count for table, count in each.items()
    }


# Trees of chains ---------------------------------------------------------------------------------

# None of them such that one more makes the cluster a large one, which changes comments everywhere.
SIZES = [10, 900, 30_000]
FAMILIES = list(IPFamily)
#: Where the cluster IPs are, as wide as they are by default, and how they are given out: at random.
CIDRS = {IPFamily.V4: "10.96.0.0/12", IPFamily.V6: "fd00:10:96::/108"}


def cluster_ips(services, family):
    network = ipaddress.ip_network(CIDRS[family])
    chosen = random.Random(services).sample(range(1, network.num_addresses - 1), services)
    return [str(network[number]) for number in chosen]


def service_state(number, cluster_ip, endpoints=1, **fields):
    return {
        ServiceName("ns", f"svc{number}"): ServiceState(
            {
                KEY: ServicePort(
                    name=ServicePortName("ns", f"svc{number}", "", "tcp"),
                    cluster_ip=cluster_ip,
                    port=80,
                    **fields,
                )
            },
            {KEY: tuple(Endpoint(f"10.0.{n // 250}.{n % 250 + 1}", 80) for n in range(endpoints))},
        )
    }


def cluster(services, family=IPFamily.V4, layout="auto"):
    """Return a ruleset with so many Services, and their cluster IPs. Nobody may change it."""
    return _cluster(services, family, layout)


@functools.cache  # by position: with defaults and names, one cluster would have several keys
def _cluster(services, family, layout):
    options = msgspec.structs.replace(states.golden_options(family), layout=layout)
    ruleset = Ruleset(options)
    ips = cluster_ips(services, family)
    known = {}
    for number, ip in enumerate(ips):
        # Every tenth has a node port.
        node_port = {} if number % 10 or number >= 20_000 else {"node_port": 30000 + number // 10}
        known |= service_state(number, ip, is_externally_accessible=bool(node_port), **node_port)
    ruleset.apply(known)
    return ruleset, ips


def passed(ruleset, packets, chain=SERVICES):
    """Return worst and mean number of rules that one of *packets*, or of 2,000, passes in nat."""
    packets = random.Random(1).sample(packets, min(len(packets), 2000))
    counts = [lookups.look_up(ruleset.tables, NAT, chain, packet).rules for packet in packets]
    return max(counts), sum(counts) / len(counts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("services", "worst", "mean"),
    # Of 10 in a flat chain, half; then a level more, of eight jumps on average, for sixteen times
    # as many.
    [(10, 10, 6), (900, 40, 25), (30_000, 60, 40)],
)
def test_a_packet_to_a_service_passes_few_rules_however_many_services(
    services, worst, mean, family
):
    ruleset, ips = cluster(services, family)
    got_worst, got_mean = passed(ruleset, [Packet(ip, 80) for ip in ips])

    assert got_worst <= worst
    assert got_mean <= mean


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("services", [900, 30_000])
def test_a_packet_to_no_service_passes_a_few_rules_and_leaves(services, family):
    ruleset, ips = cluster(services, family)
    elsewhere = "203.0.113.2" if family is IPFamily.V4 else "2001:db8::2"
    beside = [str(ipaddress.ip_address(ip) + 1) for ip in ips]
    strangers = [Packet(ip, 80) for ip in sorted(set(beside) - set(ips))]

    assert passed(ruleset, [Packet(elsewhere, 80)])[0] <= 3
    # To an address among those of Services it is as far as to a Service.
    assert passed(ruleset, strangers)[0] <= 70


@pytest.mark.parametrize("services", [900, 30_000])
def test_a_packet_to_a_node_port_passes_few_rules(services):
    ruleset, _ = cluster(services)
    ports = range(30000, 30000 + min(services, 20_000) // 10)
    packets = [Packet("192.168.0.2", port, is_local=True) for port in ports]

    assert passed(ruleset, packets, NODE_PORTS)[0] <= 60
    assert passed(ruleset, packets)[0] <= 65


def test_rules_passed_grow_as_the_logarithm_of_services():
    means = [passed(r, [Packet(ip, 80) for ip in ips])[1] for r, ips in map(cluster, SIZES[1:])]
    flat, ips = cluster(900, layout="flat")

    # Thirty times as many Services are less than two levels of sixteen.
    assert means[1] - means[0] < 2 * 8
    # And in a flat chain half of them are passed.
    assert passed(flat, [Packet(ip, 80) for ip in ips])[1] == pytest.approx(450, abs=1)


@pytest.mark.parametrize(
    ("services", "family"), [*((size, IPFamily.V4) for size in SIZES), (900, IPFamily.V6)]
)
def test_a_tree_costs_less_than_half_a_rule_and_half_a_chain_for_each_entry(services, family):
    ruleset, _ = cluster(services, family)
    flat, _ = cluster(services, family, "flat")
    trees = [name for name in ruleset.tables[NAT] if tree_depth(name) is not None]
    entries = sum(len(flat.tables[NAT][chain]) for chain in (SERVICES, NODE_PORTS))

    assert ruleset.rule_count(NAT) - flat.rule_count(NAT) == len(trees)
    assert len(trees) <= entries * 0.4
    assert not trees or services > 64


@pytest.mark.parametrize(
    ("services", "layout"), [(10, "flat"), (900, "flat"), *((size, "auto") for size in SIZES)]
)
def test_one_service_more_restores_its_own_rules_and_a_few_shared_ones(services, layout):
    shared, ips = cluster(services, layout=layout)
    added = next(ip for ip in cluster_ips(1, IPFamily.V4) if ip not in ips)
    more = service_state(services, added)
    lines = restored_lines(shared, dict.fromkeys(more), more)

    # Its chains: two with two rules each. A tree writes one chain of its own beside, and seldom one
    # more; what is flat, all it has.
    assert lines <= (services + services // 10 + 20 if layout == "flat" else 40)
    assert lines >= (services if layout == "flat" else 6)


@pytest.mark.parametrize("services", SIZES)
def test_an_endpoint_more_restores_the_same_few_lines_however_many_services(services):
    shared, ips = cluster(services)

    # Two tables' frame, two chains, and three and two rules: a tree has no part in it.
    before, after = (service_state(1, ips[1], endpoints=count) for count in (1, 2))
    assert restored_lines(shared, before, after) <= 10


def restored_lines(ruleset, before, changed):
    """Return how many lines a change costs. The ruleset is as before afterwards."""
    live = {table: dict(chains) for table, chains in ruleset.tables.items()}
    for table, hooks in fake_iptables.HOOKS.items():
        for hook in hooks:
            live[table][hook] = tuple(
                jump.rule for jump in rules.JUMPS if (jump.table, jump.builtin) == (table, hook)
            )
    live[FILTER].setdefault(rules.FIREWALL, ())
    ruleset.take_touched()
    try:
        ruleset.apply(changed)
        batches = plan.plan(
            ruleset.tables, live, groups=ruleset.groups(changed), touched=ruleset.take_touched()
        )
        return sum(batch.render().count("\n") for batch in batches)
    finally:
        ruleset.apply(before)


# Many endpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoints", [33, 100, 1000, 2000])
def test_groups_cost_two_rules_and_a_chain_for_each_square_root(endpoints):
    counts = {}
    for layout in ("flat", "tree"):
        ruleset = Ruleset(
            msgspec.structs.replace(states.golden_options(IPFamily.V4), layout=layout)
        )
        ruleset.apply(service_state(1, "172.30.0.1", endpoints))
        counts[layout] = collections.Counter(
            rules=ruleset.rule_count(NAT), chains=len(ruleset.tables[NAT])
        )
    more = counts["tree"] - counts["flat"]

    assert more["rules"] == more["chains"]
    assert more["chains"] <= 2 * endpoints**0.5 + 1
