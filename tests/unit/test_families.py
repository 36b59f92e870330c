"""What programs a family, on a fake kernel; the watchers and real programs are in tests/packet."""

import queue

import pytest

from kubeproxy_py import conntrack, drift, options, status
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.families import Families, Family, Surroundings
from kubeproxy_py.flags import Settings
from kubeproxy_py.health import ProxyHealth
from kubeproxy_py.httpserver import HttpServer
from kubeproxy_py.iptables.probe import Findings
from kubeproxy_py.iptables.runner import Programs
from kubeproxy_py.lifecycle import Lifecycle
from kubeproxy_py.model import IPFamily, Node
from kubeproxy_py.notify import Notifier
from kubeproxy_py.reports import Reporter
from kubeproxy_py.snapshot import Snapshot, State
from kubeproxy_py.store import Store
from tests.support import addresses, states
from tests.support.builders import make_service, make_slice
from tests.support.fake_iptables import FakeIptables
from tests.unit.test_reports import Events, result

V4, V6 = IPFamily.V4, IPFamily.V6
# One that no unit test can run by mistake.
PROGRAMS = Programs(V4, "legacy", "/nowhere/save", "/nowhere/restore", (1, 8, 9))
CONTEST = drift.Contest(None, (), 1.0)
# Longer than any machine takes.
DEADLINE_S = 60


class World:
    """One Family, and what it was given."""

    def __init__(self, metrics):
        self.kernel = FakeIptables()
        self.health = ProxyHealth(30.0)
        self.life = Lifecycle(Notifier({}), self.health)
        self.store = Store(
            node_name="node1",
            families=[V4],
            metrics=metrics,
            report=lambda problem: None,
            changed=lambda family: self.family.nudge(),
            node_changed=lambda node: None,
        )
        self.gatherer = status.Gatherer(
            node_name="node1",
            version="0",
            source="a test",
            started_at=0.0,
            dispatch="flat",
            unreadiness=self.health.unreadiness,
            pending=self.health.pending,
        )
        self.events = Events()
        self.around = Surroundings(
            settings=Settings(config=KubeProxyConfiguration()),
            facts=options.Facts(
                node_name="node1", node_ips=options.node_ips("", (addresses.V4.node,))
            ),
            store=self.store,
            life=self.life,
            metrics=metrics,
            health=self.health,
            gatherer=self.gatherer,
            reporter=Reporter("node1", metrics, self.events),
            http=HttpServer(),
            # Not started: what is asked of it is looked at by nobody.
            reconciler=conntrack.Reconciler(metrics),
            meters={},
            ensure_counters=lambda: False,
        )
        self.found = []
        self.news = queue.SimpleQueue()
        self.family = Family(
            self.kernel,
            PROGRAMS,
            self.around,
            has_watcher=False,
            addresses_of=lambda: (addresses.V4.node,),
            found=self.found.append,
            tell=self.news.put,
        )

    def listed(self, *items):
        for kind in ("Service", "EndpointSlice"):
            self.store.replace(
                kind, [states.decode(item) for item in items if item["kind"] == kind]
            )


@pytest.fixture
def world(metrics):
    world = World(metrics)
    yield world
    world.life.shut_down()


def test_what_was_listed_before_and_what_changes_later_is_synced(world):
    world.listed(make_service(), make_slice())
    world.life.spawn("sync-IPv4", world.family.run)
    first = world.news.get(timeout=DEADLINE_S)
    world.store.upsert("Service", states.decode(make_service("two", cluster_ip="172.30.7.7")))
    second = world.news.get(timeout=DEADLINE_S)

    assert first.chains_written > second.chains_written > 0
    assert "-d 172.30.7.7/32" in str(world.kernel.tables["filter"]["KUBE-SERVICES"])
    (shown,) = world.gatherer.status().families
    assert (shown.ip_family, shown.program) == ("IPv4", "/nowhere/restore")
    assert world.life.failure is None


def test_a_family_that_cannot_be_programmed_says_why_and_writes_nothing(world):
    world.kernel.refuses = lambda line: "--comment" in line
    world.listed(make_service())
    before = world.kernel.save()
    world.life.stop.set()
    world.family.run()

    assert "without comment" in world.health.readiness()["capabilities-IPv4"]
    assert world.kernel.tables == before
    assert world.found == []
    assert world.gatherer.status().families == ()


def test_rules_are_made_of_what_the_probe_has_found(world):
    world.kernel.refuses = lambda line: "-m recent" in line
    world.listed(make_service(sessionAffinity="ClientIP"), make_slice())
    world.life.spawn("sync-IPv4", world.family.run)
    world.news.get(timeout=DEADLINE_S)

    (found,) = world.found
    assert found.lacks == {"recent", "nfacct"}
    (shown,) = world.gatherer.status().families
    assert shown.missing_capabilities == ("nfacct", "recent")
    # Left out, where it would have been refused.
    assert (shown.services, shown.quarantined) == (1, ())


def test_a_family_that_is_told_to_stop_while_it_is_built_does_not_sync(world):
    world.listed(make_service(), make_slice())
    world.life.stop.set()
    world.family.run()

    assert len(world.found) == 1
    assert world.news.empty()
    assert not world.kernel.tables["nat"].keys() & {"KUBE-SERVICES"}


def test_a_family_that_is_not_built_yet_can_be_nudged(world):
    world.family.nudge()
    world.family.suspect(drift.Suspicion(V4, None, None))

    assert world.news.empty()


def test_a_service_that_is_set_aside_makes_its_family_unready(world):
    world.kernel.refuses = lambda line: "-d 172.30.9.9/32" in line
    world.listed(make_service("bad", cluster_ip="172.30.9.9"), make_service("good"))
    world.life.spawn("sync-IPv4", world.family.run)
    world.news.get(timeout=DEADLINE_S)

    assert world.health.readiness()["quarantine-IPv4"] == (
        "rules refused for 1 Services: default/bad"
    )
    assert [reason for _, _, reason, *_ in world.events.posted] == ["RulesRefused"]


def test_rules_from_the_state_file_make_their_family_unready(world):
    node = Node(name="node1")
    services = {V4: states.service_states([make_service(), make_slice()], V4)}
    world.store.restore(Snapshot(saved_at=0.0, state=State(node=node, services=services)))
    world.life.spawn("sync-IPv4", world.family.run)
    world.news.get(timeout=DEADLINE_S)

    assert "from the state file of " in world.health.readiness()["snapshot-IPv4"]
    world.listed(make_service(), make_slice())
    world.news.get(timeout=DEADLINE_S)
    assert world.health.readiness()["snapshot-IPv4"] is None


class Removal:
    """Notes of which families what nftables mode left was removed."""

    def __init__(self):
        self.families = []
        self.works = True

    def __call__(self, family):
        self.families.append(family)
        return self.works


@pytest.fixture
def removal():
    return Removal()


@pytest.fixture
def families(world, removal):
    """Give two Families that are not started: starting listens to the kernel."""
    kernels = {V4: FakeIptables(), V6: FakeIptables()}
    return Families(kernels, world.around, remove_nft_mode=removal)


FULL = result(is_full=True)


def test_nftables_mode_of_a_family_goes_once_when_its_own_rules_are_in_its_place(families, removal):
    families._tell(V4, FULL)
    families._tell(V4, FULL)
    assert removal.families == [V4]
    families._tell(V6, FULL)
    families._tell(V6, FULL)

    assert removal.families == [V4, V6]


def test_nftables_mode_that_cannot_be_removed_is_tried_again_at_the_next_full_sync(
    families, removal
):
    removal.works = False
    families._tell(V4, FULL)
    families._tell(V4, result())
    assert removal.families == [V4]
    removal.works = True
    families._tell(V4, FULL)
    families._tell(V4, FULL)

    assert removal.families == [V4, V4]


def test_nftables_mode_of_a_family_without_programs_goes_with_the_first(world, removal):
    families = Families({V4: FakeIptables()}, world.around, remove_nft_mode=removal)
    families._tell(V4, FULL)

    assert set(removal.families) == {V4, V6}


def test_a_contest_is_told_and_replaces_nothing(families, world, removal):
    for family in (V4, V6):
        families._tell(family, CONTEST)

    assert [reason for _, _, reason, *_ in world.events.posted] == ["RulesContested"] * 2
    assert removal.families == []


def test_a_sync_is_told_for_what_it_repaired(families, world):
    repair = drift.Repair(V4, "nat", "chain_flushed", 1, ("KUBE-SERVICES",), ())
    families._tell(V4, result(repairs=(repair,)))

    assert [reason for _, _, reason, *_ in world.events.posted] == ["RulesRepaired"]


def test_counters_are_shown_once_and_only_where_there_are_some(families, metrics):
    def is_shown():
        name = "kubeproxy_iptables_ct_state_invalid_dropped_packets"
        return name in metrics.registry._names_to_collectors

    families._note_findings(Findings(V4, missing={"nfacct": "no such counters"}))
    assert not is_shown()
    families._note_findings(Findings(V6))
    families._note_findings(Findings(V4))

    assert is_shown()


def test_families_that_are_not_started_can_be_nudged(families):
    families.nudge(V4)
    families.nudge_all()
    families.suspect(drift.Suspicion(V4, None, None))
