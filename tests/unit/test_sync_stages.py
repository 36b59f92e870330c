"""What is written first when there is much to write, against a kernel with manners."""

import re

import pytest

from kubeproxy_py import rules
from kubeproxy_py.errors import IptablesError, LockTimeout
from tests.support.builders import make_node, make_port, make_service, make_slice
from tests.support.fake_iptables import FakeIptables
from tests.support.world import V4, World, desired, own

DNS_IP = "172.30.0.10"
DNS = (
    make_service(
        "kube-dns",
        namespace="kube-system",
        cluster_ip=DNS_IP,
        ports=[make_port(53, protocol="UDP")],
    ),
    make_slice("kube-dns", namespace="kube-system", ports=[make_port(53, protocol="UDP")]),
)
API = (
    make_service("kubernetes", cluster_ip="172.30.0.1"),
    make_slice("kubernetes", endpoints=["192.168.0.9"]),
)


def crowd(first, last):
    """Return Services by number with a slice each."""
    return [
        item
        for number in range(first, last)
        for n in [2 + 2 * (number // 250)]
        for item in (
            make_service(f"svc{number}", cluster_ip=f"172.30.{2 + number // 250}.{number % 250}"),
            make_slice(
                f"svc{number}", endpoints=[f"10.180.{high}.{number % 250}" for high in (n, n + 1)]
            ),
        )
    ]


def snapshots(kernel):
    """Return a list that grows by what is ours in *kernel* before each restore."""
    found = []
    kernel.before_restore = lambda _text: found.append(own(kernel.tables))
    return found


@pytest.fixture
def world(metrics):
    """Give a world with a hundred and twenty Services and batches of some of them."""
    world = World(metrics, max_batch_rules=50)
    world.listed(make_node(), *API, *DNS, *crowd(0, 120))
    return world


# The first sync ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch_rules", [50, None], ids=["nft", "legacy"])
def test_the_api_and_dns_are_complete_before_anything_else_is_written(metrics, max_batch_rules):
    world = World(metrics, max_batch_rules=max_batch_rules)
    world.listed(make_node(), *API, *DNS, *crowd(0, 120))
    seen = snapshots(world.kernel)
    result = world.sync()

    stage = next(number for number, tables in enumerate(seen) if tables == desired(*API, *DNS))
    assert not any("svc" in text for text in world.kernel.restored[:stage])
    assert result.is_full
    assert result.batches == len(world.kernel.restored)
    assert world.own() == own(world.ruleset.tables)
    assert world.kernel.saves == 1
    assert world.sync().batches == 0


def test_the_first_stage_stays_reachable_while_the_rest_is_written(world):
    seen = snapshots(world.kernel)
    world.sync()

    stage = seen.index(desired(*API, *DNS))
    chain = f"KUBE-SVC-{rules.hash16('kube-system/kube-dns', 'udp')}"
    for tables in [*seen[stage:], world.own()]:
        assert tables["nat"][chain]
        assert any(chain in rule for rules in tables["nat"].values() for rule in rules)


def test_entries_of_dns_are_cleaned_as_soon_as_its_rules_are_there(world):
    world.sync()

    first, last = world.frontends
    assert list(first.services) == list(last.services) == [(DNS_IP, 53)]


def test_rules_that_were_there_before_are_never_replaced_by_fewer(metrics):
    kernel = FakeIptables()
    before = World(metrics, kernel, max_batch_rules=50)
    before.listed(make_node(), *API, *crowd(0, 120))
    before.sync()
    world = World(before.metrics, kernel, max_batch_rules=50)
    world.listed(make_node(), *API, *DNS, *crowd(0, 120))
    seen = snapshots(kernel)
    world.sync()

    known = own(before.ruleset.tables)["nat"].keys()
    assert all(known <= tables["nat"].keys() for tables in [*seen, world.own()])
    assert world.own() == own(world.ruleset.tables)


def test_at_a_restart_rules_are_read_when_those_to_compare_with_have_been_built(metrics):
    """Otherwise all would be in memory twice."""
    kernel = FakeIptables()
    first = World(metrics, kernel)
    first.listed(make_node(), *API, *DNS, *crowd(0, 120))
    first.sync()
    seen = []
    save = kernel.save

    def noting(*, known):
        seen.append(known["nat"].keys() >= first.own()["nat"].keys())
        return save(known=known)

    kernel.save = noting
    world = World(metrics, kernel)
    world.listed(make_node(), *API, *DNS, *crowd(0, 120))

    assert world.sync().batches == 0
    assert seen == [True]


def test_a_cluster_without_api_and_dns_is_written_in_one_go(metrics):
    world = World(metrics)
    world.listed(make_node(), *crowd(0, 120))

    assert world.sync().batches == 1


def test_few_services_are_written_in_one_go(metrics):
    world = World(metrics)
    world.listed(make_node(), *API, *DNS, *crowd(0, 50))

    assert world.sync().batches == 1


@pytest.mark.parametrize("error", [IptablesError("killed"), LockTimeout("busy")])
@pytest.mark.parametrize("successes", [0, 1, 2])
def test_a_failure_in_any_stage_loses_nothing(metrics, error, successes):
    world = World(metrics)
    world.listed(make_node(), *API, *DNS, *crowd(0, 120))
    restores = []

    def fail(text):
        restores.append(text)
        if len(restores) == successes + 1:
            world.kernel.fail_restore(error)

    world.kernel.before_restore = fail
    if successes < 2:
        with pytest.raises(type(error)):
            world.sync()
    world.sync()

    assert world.own() == own(world.ruleset.tables)
    assert world.ruleset.service_count == 122


def test_a_failure_to_read_before_the_first_stage_loses_nothing(world):
    world.kernel.fail_save(IptablesError("no such program"))
    with pytest.raises(IptablesError):
        world.sync()
    world.sync()

    assert world.own() == own(world.ruleset.tables)
    assert world.ruleset.service_count == 122


# A flush -----------------------------------------------------------------------------------------


def flush(world, table="nat"):
    """Do as ``iptables -F`` does: chains stay, without rules."""
    tables = world.kernel.tables
    tables[table] = dict.fromkeys(tables[table], ())
    world.syncer.forget_live()


def without_comments(tables):
    """Return the nat rules without what a large cluster's rules do not say."""
    return {
        chain: [re.sub(r'-m comment --comment "[^"]*" ', "", text) for text in texts]
        for chain, texts in tables["nat"].items()
        if texts
    }


def test_after_a_flush_the_api_and_dns_come_back_first_and_nothing_goes(world):
    world.sync()
    before = world.own()
    flush(world)
    seen = snapshots(world.kernel)
    world.kernel.restored.clear()
    world.sync()

    wanted = without_comments(desired(*API, *DNS))
    stage = next(number for number, tables in enumerate(seen) if without_comments(tables) == wanted)
    assert not any("svc" in text for text in world.kernel.restored[:stage])
    assert all(tables["nat"].keys() >= before["nat"].keys() for tables in seen)
    assert world.own() == before


def test_what_refuses_stays_while_nat_is_written_again(world):
    world.put(make_service("nobody", cluster_ip="172.30.200.1"))
    world.sync()
    before = world.own()["filter"]
    assert any("nobody" in rule for rule in before[rules.SERVICES])
    flush(world)
    seen = snapshots(world.kernel)
    world.sync()

    assert seen
    assert all(tables["filter"] == before for tables in seen)


def test_what_a_flush_took_is_told_once_though_it_is_written_in_stages(world, metrics):
    world.sync()
    has_rules = sum(map(bool, world.own()["nat"].values()))
    flush(world)
    result = world.sync()

    told = {(repair.table, repair.kind): repair.count for repair in result.repairs}
    assert told == {("nat", "jump_removed"): 3, ("nat", "chain_flushed"): has_rules}


def test_dns_that_is_refused_keeps_nobody_else_from_coming_back(world):
    world.sync()
    flush(world)
    world.kernel.refuses = lambda line: "kube-system/kube-dns" in line and line.startswith("-A")
    world.sync()

    assert [name.name for name, _ in world.quarantined] == ["kube-dns"]
    assert world.own()["nat"] == own(world.ruleset.tables)["nat"]
    assert world.ruleset.service_count == 121


# Later syncs -------------------------------------------------------------------------------------


def test_an_endpoint_that_went_does_not_wait_for_services_that_came(world):
    world.sync()
    # The last by name, so that order of names would put it behind all that is new.
    gone, left = "10.180.2.99", "10.180.3.99"
    world.put(*crowd(200, 310), make_slice("svc99", endpoints=[left]))
    world.kernel.restored.clear()
    world.sync()

    assert len(world.kernel.restored) > 5
    assert not any(gone in rule for rules in world.own()["nat"].values() for rule in rules)
    assert "svc99" in world.kernel.restored[0]
    assert not any("svc2" in line for line in world.kernel.restored[0].splitlines())
    assert world.own() == own(world.ruleset.tables)


def test_the_last_endpoint_that_went_is_refused_before_services_that_came_are_written(world):
    world.sync()
    world.put(*crowd(200, 310))
    world.store.delete("EndpointSlice", "default", "svc99-abcde")
    seen = snapshots(world.kernel)
    world.sync()

    refused = [
        any("svc99 has no endpoints" in rule for rule in tables["filter"][rules.SERVICES])
        and not any('"default/svc99 ' in rule for rule in tables["nat"][rules.SERVICES])
        for tables in seen
    ]
    came = ["svc309" in str(tables["nat"]) for tables in seen]
    assert refused.index(True) <= 3
    assert not any(came[: refused.index(True)])
    assert came[-1]


def test_one_exchange_of_a_whole_table_is_not_made_two(metrics):
    world = World(metrics)
    world.listed(make_node(), *API, *crowd(0, 120))
    world.sync()
    world.put(*crowd(200, 310), make_slice("svc99", endpoints=["10.180.3.99"]))

    assert world.sync().batches == 1


def test_a_failure_while_removals_are_written_loses_nothing(world):
    world.sync()
    world.put(*crowd(200, 310), make_slice("svc99", endpoints=["10.180.3.99"]))
    world.fail(IptablesError("killed"))
    world.sync()

    assert world.own() == own(world.ruleset.tables)
    assert world.store.take(V4).services == {}
    assert world.ruleset.service_count == 232
