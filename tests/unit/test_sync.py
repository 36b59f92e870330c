"""The recipe, against a kernel with manners."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kubeproxy_py import conntrack, rules, sync_loop
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import BatchRejected, IptablesError, LockTimeout
from kubeproxy_py.health import ProxyHealth
from kubeproxy_py.iptables import chains
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import ServiceName
from kubeproxy_py.pacer import Pacer
from kubeproxy_py.ruleset import HealthCheck
from kubeproxy_py.sync_loop import SyncLoop
from tests.support import fake_iptables, states
from tests.support.builders import make_node, make_port, make_service, make_slice
from tests.support.fake_iptables import FakeIptables
from tests.support.world import V4, World, desired, own

UDP = [make_port(53, protocol="UDP")]


def triggered(item):
    item["metadata"]["annotations"] = {
        "endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:01:30Z"
    }
    return item


@pytest.fixture
def world(metrics):
    """Give a world with one Service, in zone-a, that was synced."""
    world = World(metrics)
    world.listed(make_node(), make_service(), make_slice())
    world.sync()
    world.kernel.restored.clear()
    return world


# The ordinary course -----------------------------------------------------------------------------


def test_nothing_is_read_or_written_before_everything_was_listed(metrics):
    world = World(metrics)
    world.put(make_service(), make_slice())

    assert world.sync() is None
    assert (world.kernel.saves, world.kernel.restored, world.prepared) == (0, [], 0)


def test_first_sync_is_full_and_writes_all_there_should_be(metrics):
    world = World(metrics)
    world.listed(make_node(), make_service(), make_slice())
    result = world.sync()

    assert result.is_full
    assert world.own() == desired(make_service(), make_slice())
    assert all(j.rule in world.kernel.tables[j.table][j.builtin] for j in rules.JUMPS)
    assert (world.kernel.saves, world.prepared) == (1, 1)


def test_second_sync_with_nothing_changed_writes_nothing(world):
    result = world.sync()

    assert (result.is_full, result.batches, world.kernel.restored) == (False, 0, [])
    assert world.kernel.saves == 1


def test_one_endpoint_changed_writes_only_its_service(metrics):
    world = World(metrics)
    items = [make_node()]
    for number in range(100):
        name = f"svc{number}"
        items += [make_service(name, cluster_ip=f"172.30.2.{number}"), make_slice(name)]
    world.listed(*items)
    world.sync()
    world.put(make_slice("svc50", endpoints=["10.180.1.11", "10.180.1.12"]))
    result = world.sync()

    assert not result.is_full
    assert world.kernel.restored[-1].count("\n") < 40
    assert result.rules_written == {"filter": 0, "nat": 5}
    assert result.chains_written == 2


def test_node_port_addresses_are_asked_for_at_every_sync(world):
    world.node_port_addresses = ("192.168.0.2",)
    world.sync()
    world.node_port_addresses = ()
    world.sync()

    assert [text.count("-j KUBE-NODEPORTS") for text in world.kernel.restored] == [1, 0]


def test_change_of_zone_rebuilds_everything_and_writes_what_differs(world):
    world.put(make_node(zone="zone-b"))
    result = world.sync()

    assert (world.ruleset.options.zone, result.batches) == ("zone-b", 0)


def test_crossing_a_thousand_endpoints_rewrites_what_has_comments_of_endpoints(world):
    many = [f"10.181.{n // 250}.{n % 250}" for n in range(1001)]
    world.put(make_service("big", cluster_ip="172.30.9.9"), make_slice("big", endpoints=many))
    world.sync()
    assert world.ruleset.options.is_large
    assert not any("-> 10." in line for text in world.kernel.restored for line in text.splitlines())

    world.store.delete("EndpointSlice", "default", "big-abcde")
    world.sync()
    assert world.own() == desired(
        make_service(), make_slice(), make_service("big", cluster_ip="172.30.9.9")
    )


def test_batches_of_bounded_size_lead_to_the_same_end(metrics):
    world = World(metrics, max_batch_rules=10)
    world.listed(*states.golden_items("state2")[:-1])
    result = world.sync()

    assert result.batches > 5
    assert world.own() == own(world.ruleset.tables)
    assert world.sync().batches == 0


# What else a sync tells --------------------------------------------------------------------------


def test_health_checks_are_published_after_every_sync(world):
    world.put(
        make_service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=30100)
    )
    world.sync()

    assert world.health_checks == [{}, {ServiceName("default", "svc1"): HealthCheck(30100, 1)}]


def test_counts_of_rules_are_told(world):
    assert {
        (name, table): world.value(f"sync_proxy_rules_iptables_{name}", table=table)
        for name in ("total", "last")
        for table in ("filter", "nat")
    } == {
        ("total", "filter"): 4, ("total", "nat"): 10, ("last", "filter"): 4, ("last", "nat"): 10,
    }  # fmt: skip


def test_programming_latency_counts_from_the_trigger(world):
    world.put(triggered(make_slice(endpoints=["10.180.1.12"])))
    world.sync()

    assert world.value("network_programming_duration_seconds_sum") == 10
    assert world.value("sync_proxy_rules_last_timestamp_seconds") == 100


def test_services_that_lack_local_endpoints_are_told(world):
    world.put(make_service(internalTrafficPolicy="Local"))
    world.put(make_slice(endpoints=[{"addresses": ["10.180.2.1"], "nodeName": "node2"}]))
    world.sync()

    name = "sync_proxy_rules_no_local_endpoints_total"
    assert [world.value(name, traffic_policy=policy) for policy in ("internal", "external")] == [
        1,
        0,
    ]


def test_full_and_partial_syncs_are_timed_apart(world):
    world.sync()

    assert [
        world.value(f"sync_{kind}proxy_rules_duration_seconds_count")
        for kind in ("", "full_", "partial_")
    ] == [2, 1, 1]


# Stale UDP flows ---------------------------------------------------------------------------------


def test_conntrack_is_cleaned_once_after_udp_endpoints_changed(world):
    world.put(make_service(ports=UDP), make_slice(ports=UDP))
    world.sync()
    world.sync()

    assert world.frontends == [
        conntrack.Frontends(
            services={("172.30.0.41", 53): frozenset({("10.180.1.11", 53)})}, node_ports={}
        )
    ]


def test_conntrack_is_left_alone_by_other_changes(world):
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.sync()

    assert world.frontends == []


def test_conntrack_request_is_kept_until_a_sync_succeeds(world):
    world.put(make_service(ports=UDP), make_slice(ports=UDP))
    for _ in range(2):
        world.fail(BatchRejected("no"))
    assert world.frontends == []

    world.sync()
    assert len(world.frontends) == 1


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BatchRejected("no"), IptablesError("odd")], ids=repr)
def test_failure_loses_nothing(world, error):
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.fail(error)
    result = world.sync()

    assert result.is_full
    assert world.own() == desired(make_service(), make_slice(endpoints=["10.180.1.12"]))


def test_busy_lock_loses_nothing_and_costs_no_second_look(world):
    saves = world.kernel.saves
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.fail(LockTimeout("busy"))
    world.put(make_service("svc2", cluster_ip="172.30.0.42"))
    world.sync()

    assert world.kernel.saves == saves
    assert world.own() == desired(
        make_service(),
        make_slice(endpoints=["10.180.1.12"]),
        make_service("svc2", cluster_ip="172.30.0.42"),
    )


def test_a_look_reads_the_kernel_once_where_only_our_own_change_is_written(world):
    world.listed(make_node(), make_service(), make_slice())
    world.sync()
    saves = world.kernel.saves
    world.put(make_slice(endpoints=["10.180.9.9"]))
    world.syncer.forget_live()
    result = world.sync()

    assert (result.batches, result.repairs) == (1, ())
    assert world.kernel.saves == saves + 1


def test_busy_lock_at_the_second_table_of_an_input_leaves_the_first_written(world):
    """Legacy takes the lock for each table anew."""
    jumps = world.kernel.tables["filter"]["FORWARD"]
    world.kernel.tables["filter"]["FORWARD"] = jumps[1:]
    world.syncer.forget_live()
    world.put(make_slice(endpoints=[]))
    world.fail(LockTimeout("busy"), after_tables=1)
    assert sorted(world.kernel.tables["filter"]["FORWARD"]) == sorted(jumps)

    world.sync()
    assert sorted(world.kernel.tables["filter"]["FORWARD"]) == sorted(jumps)
    assert world.own() == desired(make_service())


def test_failure_between_two_tables_is_mended_by_the_next_sync(world):
    world.put(make_slice(endpoints=[]))  # filter rejects first, then nat stops to deliver
    world.fail(IptablesError("killed"), after_tables=1)
    assert world.own() != desired(make_service())

    world.sync()
    assert world.own() == desired(make_service())


def test_kernel_is_read_again_after_a_failure(world):
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.fail(IptablesError("odd"))
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    world.sync()

    assert world.own() == desired(make_service(), make_slice(endpoints=["10.180.1.12"]))


def test_failure_to_read_writes_nothing_and_is_mended(world):
    world.syncer.forget_live()
    world.kernel.fail_save(IptablesError("no such program"))
    with pytest.raises(IptablesError):
        world.sync()

    assert world.kernel.restored == []
    assert world.sync().is_full


def test_trigger_times_outlive_a_failure(world):
    world.put(triggered(make_slice(endpoints=["10.180.1.12"])))
    world.fail(BatchRejected("no"))
    assert world.value("network_programming_duration_seconds_count") in {None, 0}

    world.sync()
    assert world.value("network_programming_duration_seconds_count") == 1


def test_failures_are_counted_full_and_partial(world):
    world.put(make_slice(endpoints=["10.180.1.12"]))
    for _ in range(2):
        world.fail(BatchRejected("no"))

    # Each sync tried again after a look at the kernel.
    assert world.value("sync_proxy_rules_iptables_restore_failures_total") == 4
    assert world.value("sync_proxy_rules_iptables_partial_restore_failures_total") == 1


def test_failed_sync_publishes_nothing(world):
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.fail(BatchRejected("no"))

    assert len(world.health_checks) == 1


# Drift -------------------------------------------------------------------------------------------


def test_audit_finds_nothing_where_nothing_was_changed(world):
    world.syncer.forget_live()
    with capture_logs() as logs:
        result = world.sync()

    assert (result.is_full, result.batches) == (True, 0)
    assert "drift.repaired" not in {line["event"] for line in logs}


def test_flushed_tables_are_repaired_and_counted(world):
    world.kernel.tables = fake_iptables.empty_tables()
    world.syncer.forget_live()
    with capture_logs() as logs:
        world.sync()

    assert world.own() == desired(make_service(), make_slice())
    assert world.value("iptables_chains_repaired_total", table="nat") > 0
    assert {line["table"] for line in logs if line["event"] == "drift.repaired"} == {
        "mangle", "filter", "nat",
    }  # fmt: skip


def test_one_flushed_chain_is_the_only_one_that_is_written(world):
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    world.syncer.forget_live()
    world.sync()

    assert world.kernel.restored == [
        "*nat\n:KUBE-MARK-MASQ - [0:0]\n"
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n"
    ]
    assert world.value("iptables_chains_repaired_total", table="nat") == 1


def test_lost_jump_is_put_back_at_the_top(world):
    world.kernel.tables["nat"]["PREROUTING"] = ("-j ACCEPT",)
    world.syncer.forget_live()
    world.sync()

    assert world.kernel.tables["nat"]["PREROUTING"] == (
        '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES', "-j ACCEPT",
    )  # fmt: skip


def test_own_change_during_an_audit_is_not_called_drift(world):
    world.syncer.forget_live()
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.sync()

    assert world.value("iptables_chains_repaired_total", table="nat") is None


# Taking over -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["state", "state2"])
def test_taking_over_from_kube_proxy_writes_nothing_but_the_order(metrics, state):
    text = (states.GOLDEN / f"{state}.ipv4.rules").read_text()
    world = World(metrics, FakeIptables(chains.parse_save(text.splitlines(keepends=True))))
    before = {
        table: {chain: sorted(texts) for chain, texts in by_name.items()}
        for table, by_name in world.kernel.save().items()
    }
    world.listed(*(i for i in states.golden_items(state) if i["kind"] != "ServiceCIDR"))
    world.sync()

    written = {
        line for text in world.kernel.restored for line in text.splitlines() if line[0] in ":-"
    }
    assert {line.split()[0] for line in written if line[0] == ":"} <= {
        ":KUBE-SERVICES", ":KUBE-NODEPORTS", ":KUBE-EXTERNAL-SERVICES", ":KUBE-PROXY-FIREWALL",
    }  # fmt: skip
    assert not [line for line in written if line.startswith(("-I", "-D", "-X"))]
    assert before == {
        table: {chain: sorted(texts) for chain, texts in by_name.items()}
        for table, by_name in world.kernel.save().items()
    }


def test_restart_with_nothing_changed_writes_nothing(world, metrics):
    again = World(Metrics(CollectorRegistry()), world.kernel)
    again.listed(make_node(), make_service(), make_slice())

    assert (again.sync().batches, world.kernel.restored) == (0, [])


def test_stale_chains_of_a_predecessor_are_removed(metrics):
    stale = {
        "KUBE-SVC-AAAAAAAAAAAAAAAA": ("-j KUBE-SEP-BBBBBBBBBBBBBBBB",),
        "KUBE-SEP-BBBBBBBBBBBBBBBB": ("-p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80",),
        "KUBE-SERVICES": ("-d 1.1.1.1/32 -j KUBE-SVC-AAAAAAAAAAAAAAAA",),
    }
    world = World(metrics, FakeIptables({"nat": stale}))
    world.listed(make_node())
    world.sync()

    assert world.own() == desired()


def test_foreign_chains_and_rules_are_untouched(metrics):
    foreign = {
        "filter": {"KUBE-FIREWALL": ("-j DROP",), "CNI-FORWARD": ("-j ACCEPT",)},
        "nat": {"CNI-HOSTPORT-DNAT": ("-j RETURN",), "OUTPUT": ("-j CNI-HOSTPORT-DNAT",)},
        "mangle": {"KUBE-KUBELET-CANARY": ()},
    }
    world = World(metrics, FakeIptables(foreign))
    world.listed(make_node(), make_service(), make_slice())
    world.sync()
    world.put(make_slice(endpoints=[]))
    world.sync()

    tables = world.kernel.tables
    assert tables["filter"]["CNI-FORWARD"] == ("-j ACCEPT",)
    assert tables["nat"]["CNI-HOSTPORT-DNAT"] == ("-j RETURN",)
    assert tables["nat"]["OUTPUT"][-1] == "-j CNI-HOSTPORT-DNAT"
    assert tables["mangle"]["KUBE-KUBELET-CANARY"] == ()


def test_foreign_jump_to_a_service_that_goes_holds_up_nothing(world):
    chain = next(name for name in world.own()["nat"] if name.startswith("KUBE-SVC-"))
    world.kernel.tables["nat"]["ADMIN"] = (f"-j {chain}",)
    world.store.delete("Service", "default", "svc1")
    world.sync()  # refused at first: chains of others are known only where the kernel was just read

    assert world.own()["nat"] == desired()["nat"] | {chain: ()}
    assert world.syncer.quarantined == ()


# Any order of events -----------------------------------------------------------------------------

_SERVICES = [
    make_service("a", cluster_ip="172.30.0.1"),
    make_service(
        "a", cluster_ip="172.30.0.1", type="NodePort", ports=[make_port(80, nodePort=30080)]
    ),
    make_service("b", cluster_ip="172.30.0.2", internalTrafficPolicy="Local"),
]
_SLICES = [
    make_slice("a", endpoints=["10.180.1.11"]),
    make_slice("a", endpoints=["10.180.1.12", "10.180.1.11"]),
    make_slice("a", name="a-2", endpoints=["10.180.1.13"]),
    make_slice("b", endpoints=[{"addresses": ["10.180.2.1"], "nodeName": "node2"}]),
]  # fmt: skip
_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["put", "remove", "sync", "fail", "flush", "audit"]),
        st.sampled_from([*_SERVICES, *_SLICES]),
        st.integers(0, 3),
    ),
    max_size=20,
)


@settings(max_examples=60)
@given(_EVENTS, st.sampled_from([None, 5]))
def test_whatever_happened_the_next_good_sync_makes_the_kernel_right(events, max_batch_rules):
    world = World(Metrics(CollectorRegistry()), max_batch_rules=max_batch_rules)
    world.listed(make_node())
    known = {}
    for what, item, number in events:
        key = (item["kind"], item["metadata"]["name"])
        if what == "put":
            world.put(item)
            known[key] = item
        elif what == "remove":
            world.store.delete(item["kind"], "default", item["metadata"]["name"])
            known.pop(key, None)
        elif what == "fail":
            world.kernel.fail_restore(IptablesError("odd"), after_tables=number)
            try:
                world.sync()
            except IptablesError:
                pass
            else:
                world.kernel._restore_failures.clear()  # it had nothing to write
        elif what == "sync":
            world.sync()
        else:
            if what == "flush":
                world.kernel.tables = fake_iptables.empty_tables()
            world.syncer.forget_live()
    world.sync()

    assert world.own() == desired(*known.values())


# The loop ----------------------------------------------------------------------------------------


class Health:
    """Keeps what the loop tells the health server."""

    def __init__(self):
        self.told = []
        self.changed = threading.Condition()

    def _tell(self, what):
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()

    def started(self, family):
        self._tell("started")

    def queued(self, family):
        self._tell("queued")

    def updated(self, family):
        self._tell("updated")

    def excused(self, family):
        self._tell("excused")

    def wait_for(self, *wanted):
        with self.changed:
            assert self.changed.wait_for(lambda: self.told == list(wanted), timeout=10), self.told


@pytest.fixture
def health():
    return Health()


@pytest.fixture
def loop(world, health):
    """Give a loop that runs in a thread of its own until the test ends."""
    pacer = Pacer(retry_s=0.01, audit_s=3600)
    loop = SyncLoop(V4, world.syncer, pacer, health=health, metrics=world.metrics)
    failed = []

    def run():
        try:
            loop.run()
        except Exception as error:  # noqa: BLE001 - told by the fixture's end
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    health.wait_for("started")
    yield loop
    loop.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert failed == []


def test_nudge_makes_a_sync(world, loop, health):
    world.put(make_slice(endpoints=["10.180.1.12"]))
    loop.nudge()
    health.wait_for("started", "queued", "updated")

    assert world.own() == desired(make_service(), make_slice(endpoints=["10.180.1.12"]))


@pytest.mark.parametrize(
    ("error", "event"), [(IptablesError("no"), "sync.failed"), (LockTimeout("no"), "sync.delayed")]
)
def test_failed_sync_is_tried_again_without_being_asked(world, loop, health, error, event):
    world.kernel.fail_restore(error)
    world.put(make_slice(endpoints=["10.180.1.12"]))
    with capture_logs() as logs:
        loop.nudge()
        health.wait_for("started", "queued", "queued", "updated")

    assert event in [line["event"] for line in logs]
    assert world.own() == desired(make_service(), make_slice(endpoints=["10.180.1.12"]))


def test_sync_before_everything_was_listed_is_no_update(metrics, health):
    world = World(metrics)
    loop = SyncLoop(
        V4, world.syncer, Pacer(retry_s=1, audit_s=3600), health=health, metrics=metrics
    )

    assert loop._sync() == "ok"
    assert health.told == ["excused"]


def test_audit_comes_unasked_and_reads_the_kernel(world, health):
    """A clock that jumps: the loop sleeps only until the condition is notified."""
    now = [0.0]
    pacer = Pacer(retry_s=1, audit_s=60)
    loop = SyncLoop(
        V4, world.syncer, pacer, health=health, metrics=world.metrics, clock=lambda: now[0]
    )
    pacer.finished(0.0, took_s=0.0, outcome="ok")
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    now[0] = 60.0

    assert loop._wait()
    assert loop._sync() == "ok"
    assert world.own() == desired(make_service(), make_slice())


def test_loop_with_nothing_to_do_shows_that_it_turns(world, health, monkeypatch):
    monkeypatch.setattr(sync_loop, "_LONGEST_REST_S", 0.001)
    turned = threading.Semaphore(0)
    loop = SyncLoop(
        V4,
        world.syncer,
        Pacer(retry_s=1, audit_s=3600),
        health=health,
        metrics=world.metrics,
        beat=turned.release,
    )
    thread = threading.Thread(target=loop.run)
    thread.start()
    for _ in range(3):
        assert turned.acquire(timeout=10)
    loop.stop()
    thread.join(10)

    assert not thread.is_alive()


def test_sync_shows_that_it_goes_on_before_each_restore(world):
    before = world.beats
    world.put(make_service("other", cluster_ip="172.30.0.9"))
    world.sync()

    assert world.beats == before + 1


def test_stopped_loop_ends_at_once(world, health):
    loop = SyncLoop(
        V4, world.syncer, Pacer(retry_s=1, audit_s=60), health=health, metrics=world.metrics
    )
    loop.stop()
    loop.run()

    assert health.told == ["started"]


def test_memory_is_released_after_a_look_at_the_whole_kernel_and_only_then(world):
    released = world.released
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.sync()
    assert world.released == released

    world.syncer.forget_live()
    world.sync()
    assert world.released == released + 1


def one_turn(world, health, now):
    """Return a loop that stops after one sync, and a list that receives what that took."""
    took = []

    class Pacing(Pacer):
        def finished(self, now, *, took_s, outcome):
            took.append(took_s)
            loop.stop()

    loop = SyncLoop(
        V4,
        world.syncer,
        Pacing(retry_s=1, audit_s=60),
        health=health,
        metrics=world.metrics,
        clock=lambda: now[0],
    )
    return loop, took


def test_waiting_for_the_lock_is_no_reason_to_pause(world, health):
    now = [0.0]
    loop, took = one_turn(world, health, now)

    def wait(_text):
        now[0] += 5.5
        world.kernel.lock_waited_s += 5.0

    world.kernel.before_restore = wait
    world.put(make_slice(endpoints=["10.180.1.12"]))
    loop.nudge()
    now[0] = 1.0
    loop.run()

    assert took == [0.5]


@pytest.mark.parametrize(
    ("is_undone", "wanted"),
    [pytest.param(True, None, id="undone"), pytest.param(False, "waiting", id="still wanted")],
)
def test_a_wait_for_the_lock_is_over_when_the_change_was_undone(world, health, is_undone, wanted):
    now = [0.0]
    loop, _ = one_turn(world, health, now)
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.kernel.lock_wait = "waiting"
    world.fail(LockTimeout("cannot get the xtables lock"))
    if is_undone:
        world.put(make_slice())
    else:
        world.kernel.fail_restore(LockTimeout("cannot get the xtables lock"))
    loop.nudge()
    now[0] = 1.0
    loop.run()

    assert world.kernel.lock_wait == wanted


# What is told of it --------------------------------------------------------------------------------


def test_before_the_first_sync_nothing_is_programmed(metrics):
    world = World(metrics)

    assert (world.syncer.programmed, world.syncer.last_failure) == (None, None)


def test_after_a_sync_it_is_told_what_is_in_force(world):
    found = world.syncer.programmed

    assert (found.services, found.endpoints, found.quarantined) == (1, 1, ())
    assert found.rules["nat"] == world.ruleset.rule_count("nat")


def test_a_failure_is_told_and_what_is_in_force_stays(world):
    before = world.syncer.programmed
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.fail(LockTimeout("cannot get the xtables lock"))

    assert world.syncer.programmed is before
    assert world.syncer.last_failure.message == "cannot get the xtables lock"


def test_chains_that_were_there_at_the_start_are_counted_once(world, metrics):
    assert world.sync().chains_found == 0
    second = World(metrics, world.kernel)
    second.listed(make_node(), make_service(), make_slice())

    assert second.sync().chains_found == sum(len(chains) for chains in world.own().values())
    second.syncer.forget_live()
    assert second.sync().chains_found == 0


def test_the_loop_tells_how_the_last_attempt_ended(world, metrics):
    loop = SyncLoop(V4, world.syncer, Pacer(retry_s=30, audit_s=600), health=Health(), metrics=metrics, wall_clock=lambda: 50.0)  # fmt: skip
    world.put(make_slice(endpoints=["10.180.1.12"]))
    for _ in range(2):
        world.kernel.fail_restore(IptablesError("no"))
    loop._sync()
    assert (loop.history.error, loop.history.last) == ("no", None)

    world.kernel.fail_no_more()
    loop._sync()
    assert (loop.history.error, loop.history.last.at) == (None, 50.0)


def test_what_cannot_be_synced_yet_makes_no_proxy_unhealthy(metrics):
    # Without an API server, at the start: a change of addresses, say, nudges, and there is nothing to
    # write. A restart would not help, and lists that come nudge again.
    now = [0.0]
    proxy = ProxyHealth(30.0, clock=lambda: now[0])
    world = World(metrics)
    pacer = Pacer(retry_s=1, audit_s=3600)
    loop = SyncLoop(V4, world.syncer, pacer, health=proxy, metrics=metrics, clock=lambda: now[0])
    proxy.expect([V4])
    proxy.started(V4)
    loop.nudge()
    assert loop._sync() == "ok"
    now[0] = 3600.0

    assert proxy.verdict().is_healthy
    assert set(proxy.liveness().values()) == {None}
    assert proxy.unreadiness() == ["programmed-IPv4: not synced since the start"]


# What iptables cannot show ------------------------------------------------------------------------


def test_rules_that_only_nft_can_show_are_told_once_and_when_they_are_gone(world):
    # What is in a chain of ours is written over.
    world.kernel.unreadable = {ChainId("filter", "INPUT"), ChainId("nat", "KUBE-SERVICES")}
    with capture_logs() as logs:
        for _ in range(2):
            world.syncer.forget_live()
            world.sync()
        assert world.value("iptables_unreadable_chains") == 1
        world.kernel.unreadable = frozenset()
        world.syncer.forget_live()
        world.sync()

    told = [line for line in logs if line["event"].startswith("iptables.")]
    assert [(line["event"], line.get("chains")) for line in told] == [
        ("iptables.chains_unreadable", ["filter/INPUT"]), ("iptables.chains_readable", None),
    ]  # fmt: skip
    assert world.value("iptables_unreadable_chains") == 0
