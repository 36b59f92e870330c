"""What the parts of the daemon keep, as one document, and what it says of the daemon."""

import json
from pathlib import Path

import msgspec
import pytest

from kubeproxy_py import conntrack, drift, failures, status
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.iptables.lock import Holder, LockWait
from kubeproxy_py.iptables.runner import Programs
from kubeproxy_py.keeper import Failed, FileState
from kubeproxy_py.model import IPFamily, Node, ServiceName
from kubeproxy_py.status_document import (
    AuditStatus,
    ConntrackStatus,
    ContestedChains,
    FamilyStatus,
    LockStatus,
    NodeStatus,
    StateFileFailure,
    StateFileStatus,
    Status,
    WatchStatus,
)
from kubeproxy_py.sync_log import Programmed, Quarantined, SyncResult
from kubeproxy_py.sync_loop import Done, History
from kubeproxy_py.watch import WatchState

V4 = IPFamily.V4
NOW = 1_795_262_400.0  # 2026-11-21T12:00:00Z
SCHEMA = Path(__file__).parents[2] / "docs" / "status.schema.json"
PROGRAMS = Programs(V4, "nft", "/sbin/iptables-nft-save", "/sbin/iptables-nft-restore", (1, 8, 9))
CULPRIT = drift.Culprit("iptables", 77, "bash")
RESULT = SyncResult(
    is_full=True,
    batches=2,
    rules_written={"filter": 1, "nat": 5},
    chains_written=4,
    chains_deleted=1,
    seconds=0.25,
    repairs=(drift.Repair(V4, "nat", "chain_flushed", 1, ("KUBE-MARK-MASQ",), (CULPRIT, CULPRIT)),),
)
PROGRAMMED = Programmed(
    services=3,
    endpoints=7,
    rules={"filter": 4, "nat": 30},
    trees=(ChainId("nat", "KUBE-SERVICES"),),
    quarantined=(
        Quarantined(
            service=ServiceName("default", "bad"),
            reason="line 3 failed",
            since=NOW - 60,
            retry_at=NOW + 30,
            attempts=1,
        ),
    ),
)
WATCH = WatchState(
    kind="Service",
    objects=3,
    resource_version="304",
    last_event_at=NOW - 10,
    silent_for_s=10.0,
    failing_for_s=None,
    error="",
)


def gatherer(**fields):
    return status.Gatherer(
        **{
            "node_name": "node1",
            "version": "0.1.0",
            "source": "files: objects",
            "started_at": NOW - 100,
            "dispatch": "auto",
            "unreadiness": list,
            "pending": dict,
            "clock": lambda: NOW,
            **fields,
        }
    )


def parts(
    history=History(),  # noqa: B008 - immutable
    programmed=None,
    failure=None,
    contests=(),
    wait=None,
    *,
    is_restored=False,
):
    return status.FamilyParts(
        programs=PROGRAMS,
        history=lambda: history,
        programmed=lambda: programmed,
        last_failure=lambda: failure,
        contested=lambda: contests,
        lock_wait=lambda: wait,
        lock_waited_s=lambda: 1.5,
        missing_capabilities=("nfacct",),
        is_restored=lambda: is_restored,
        audited=lambda: (40, 1),
    )


def family(found=None, **fields):
    gathering = gatherer(**fields)
    gathering.add_family(V4, found or parts())
    return gathering.status().families[0]


def test_before_anything_is_there_it_says_what_it_is_about():
    gathering = gatherer(unreadiness=lambda: ["nothing has been started"])
    gathering.phase = "waiting for Node node1"
    found = gathering.status()

    assert (found.state, found.reasons) == ("not ready", ("nothing has been started",))
    assert (found.phase, found.node) == ("waiting for Node node1", NodeStatus(name="node1"))
    assert (found.families, found.watches, found.pid > 0) == ((), (), True)


def test_the_node_is_told_as_it_is_known():
    gathering = gatherer()
    gathering.node = lambda: Node(name="node1", ips=("10.0.0.1",), zone="a", is_eligible=False)

    assert gathering.status().node == NodeStatus(
        name="node1", is_known=True, is_eligible=False, ips=("10.0.0.1",), zone="a"
    )


def test_a_family_that_has_not_synced_has_programs_and_nothing_else():
    assert family() == FamilyStatus(
        ip_family="IPv4",
        program="/sbin/iptables-nft-restore",
        program_version="1.8.9",
        missing_capabilities=("nfacct",),
        lock=LockStatus(waited_seconds=1.5),
        audit=AuditStatus(services_compared=40, services_differed=1),
    )


def test_who_has_the_lock_is_told():
    found = family(parts(wait=LockWait(2.25, (Holder(7, "iptables", "iptables -L"),)))).lock

    assert found.waiting_seconds == 2.25
    assert found.holders == ("iptables (pid 7): iptables -L",)


def test_what_is_programmed_and_how_it_went_is_told():
    history = History().with_done(Done(NOW - 5, RESULT))
    found = family(parts(history, PROGRAMMED), pending=lambda: {V4: 1.5})

    assert (found.services, found.endpoints, found.rules["nat"]) == (3, 7, 30)
    assert found.trees == ("nat/KUBE-SERVICES",)
    assert found.pending_seconds == 1.5
    assert found.last_sync == found.last_write == found.last_full_sync
    assert (found.last_sync.kind, found.last_sync.restores) == ("full", 2)
    assert found.last_sync.at.isoformat() == "2026-11-21T11:59:55+00:00"
    (case,) = found.quarantined
    assert (case.service, case.attempts) == ("default/bad", 1)
    (repair,) = found.repairs
    assert repair.processes == ("iptables (started by bash)",)


def test_history_keeps_the_last_of_each_kind_and_a_screenful_of_repairs():
    history = History(error="broken")
    for number in range(30):
        history = history.with_done(Done(float(number), RESULT))
    idle = SyncResult(
        is_full=False, batches=0, rules_written={}, chains_written=0, chains_deleted=0, seconds=0.0
    )
    history = history.with_done(Done(99.0, idle))

    assert (history.last.at, history.last_write.at, history.last_full.at) == (99.0, 29.0, 29.0)
    assert (len(history.repairs), history.error) == (20, None)


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        (
            conntrack.Outcome(deleted=2, failed=1, seconds=0.1, complete=True),
            {"deleted": 2, "failed": 1, "error": ""},
        ),
        ("not permitted", {"deleted": 0, "failed": 0, "error": "not permitted"}),
    ],
)
def test_the_last_clean_up_of_connections_is_told(ended, told):
    gathering = gatherer()
    gathering.add_family(V4, parts())
    gathering.conntrack = lambda: {V4: (NOW - 1, ended)}
    (found,) = gathering.status().families

    assert {name: getattr(found.conntrack, name) for name in told} == told


def test_where_no_state_file_is_kept_none_is_told():
    assert gatherer().status().state_file is None


@pytest.mark.parametrize("is_restored", [False, True])
def test_the_state_file_is_in_use_while_a_familys_rules_come_from_it(is_restored):
    gathering = gatherer()
    gathering.add_family(V4, parts(is_restored=is_restored))
    gathering.add_family(IPFamily.V6, parts())
    gathering.state_file = lambda: FileState("/state", saved_at=NOW - 90, size_bytes=7)
    found = gathering.status()

    assert found.state_file == StateFileStatus(
        path="/state", is_in_use=is_restored, saved_at=status._time(NOW - 90), size_bytes=7
    )
    assert [family.is_restored for family in found.families] == [is_restored, False]


def test_the_last_failure_of_the_state_file_is_told():
    gathering = gatherer()
    failed = Failed(NOW - 3, "save", "No space left on device")
    gathering.state_file = lambda: FileState("/state", last_failure=failed, is_failing=True)
    found = gathering.status()

    assert found.state_file.last_failure == StateFileFailure(
        at=status._time(NOW - 3), operation="save", reason="No space left on device"
    )
    assert found.state == "degraded"


def test_the_input_of_a_failure_is_told_only_where_it_is_asked_for():
    failure = failures.Failure(
        at=NOW, message="line 3 failed", table="nat", refused=(3,), lines=("-A X",), total_lines=9
    )
    gathering = gatherer()
    gathering.add_family(V4, parts(failure=failure))
    gathering.add_family(IPFamily.V6, parts())

    assert gathering.status().families[0].last_failure.lines == ()
    (found,) = gathering.failures()
    assert (found.ip_family, found.table, found.lines) == ("IPv4", "nat", ("-A X",))


@pytest.mark.parametrize(
    ("fields", "is_stale"),
    [
        ({}, False),
        ({"silent_for_s": 301.0}, True),
        # The wall clock has been put forward.
        ({"last_event_at": NOW - 3600}, False),
        ({"last_event_at": None, "silent_for_s": None}, False),
    ],
)
def test_a_watch_that_is_silent_for_minutes_is_stale(fields, is_stale):
    gathering = gatherer()
    gathering.add_watch(lambda: msgspec.structs.replace(WATCH, **fields))

    assert gathering.status().watches[0].is_stale == is_stale


# Judgement ---------------------------------------------------------------------------------------

NODE = NodeStatus(name="node1", is_known=True, is_eligible=True)


def judge(reasons=(), node=NODE, families=(), watches=(), state_file=None):
    return status.judge(
        reasons, node=node, families=families, watches=watches, state_file=state_file
    )


def test_nothing_wrong_is_ready():
    assert judge(families=[FamilyStatus(ip_family="IPv4")]) == ("ready", ())


def test_a_reason_not_to_be_ready_outweighs_all_else():
    assert judge(["no"], families=[FamilyStatus(ip_family="IPv4", error="x")])[0] == "not ready"


def watch(**fields):
    return WatchStatus(
        **{
            "kind": "Service",
            "objects": 1,
            "resource_version": "1",
            "last_event_at": None,
            "is_stale": False,
            **fields,
        }
    )


MOMENT = status._time(NOW)


def state_file(operation, *, is_failing=True):
    failed = StateFileFailure(at=MOMENT, operation=operation, reason="EIO")
    return StateFileStatus(path="/state", last_failure=failed, is_failing=is_failing)


DEGRADED = [
    ({"families": [FamilyStatus(ip_family="IPv4", error="boom")]}, "last sync failed: boom"),
    (
        {
            "families": [
                FamilyStatus(
                    ip_family="IPv4",
                    contested=(
                        ContestedChains(chains=("nat/X",), processes=("foo",), wait_seconds=2.0),
                    ),
                )
            ]
        },
        "IPv4: foo changes nat/X again and again; repairs wait 2 s",
    ),
    (
        {
            "families": [
                FamilyStatus(
                    ip_family="IPv4",
                    contested=(ContestedChains(chains=(), processes=(), wait_seconds=1.0),),
                )
            ]
        },
        "an unknown process changes all chains",
    ),
    (
        {
            "families": [
                FamilyStatus(ip_family="IPv4", conntrack=ConntrackStatus(at=MOMENT, error="EPERM"))
            ]
        },
        "stale UDP connections are not cleaned up: EPERM",
    ),
    (
        {"families": [FamilyStatus(ip_family="IPv4", missing_capabilities=("nfacct", "recent"))]},
        "lacks recent, which",
    ),
    (
        {
            "families": [
                FamilyStatus(
                    ip_family="IPv4",
                    lock=LockStatus(waited_seconds=9, waiting_seconds=2.04, holders=("x",)),
                )
            ]
        },
        "waits for the xtables lock for 2.0 s; who has it: x",
    ),
    (
        {
            "families": [
                FamilyStatus(
                    ip_family="IPv4", lock=LockStatus(waited_seconds=9, waiting_seconds=2.04)
                )
            ]
        },
        "who has it: nobody that can be seen from here",
    ),
    ({"watches": [watch(failing_seconds=60.0, error="refused")]}, "cannot be read"),
    ({"state_file": state_file("prepare")}, "the state file /state cannot be kept: EIO"),
    ({"state_file": state_file("load")}, "cannot be used: EIO"),
    ({"state_file": state_file("save")}, "cannot be written: EIO"),
    ({"watches": [watch(is_stale=True)]}, "silent for more than 300 s"),
    ({"node": msgspec.structs.replace(NODE, is_eligible=False)}, "/healthz is 503"),
]


@pytest.mark.parametrize(("what", "told"), DEGRADED, ids=[told for _, told in DEGRADED])
def test_what_works_but_not_as_it_should_is_degraded(what, told):
    state, warnings = judge(**what)

    assert state == "degraded"
    assert told in warnings[0]


@pytest.mark.parametrize(
    "what",
    [
        {"watches": [watch(failing_seconds=59.0, error="refused")]},
        {"node": NodeStatus(name="node1")},
        {"state_file": state_file("save", is_failing=False)},
        {
            "families": [
                FamilyStatus(
                    ip_family="IPv4",
                    missing_capabilities=("sctp",),
                    lock=LockStatus(waited_seconds=9),
                )
            ]
        },
        {
            "families": [
                FamilyStatus(ip_family="IPv4", conntrack=ConntrackStatus(at=MOMENT, deleted=3))
            ]
        },
    ],
)
def test_what_passes_by_itself_is_no_degradation(what):
    assert judge(**what) == ("ready", ())


def test_contests_name_their_chains():
    contest = drift.Contest(frozenset([ChainId("nat", "X")]), (CULPRIT,), 1.0)
    (found,) = family(parts(contests=[contest])).contested

    assert (found.chains, found.wait_seconds) == (("nat/X",), 1.0)


# The document ------------------------------------------------------------------------------------


def schema():
    return json.dumps(msgspec.json.schema(Status), indent=2) + "\n"


def test_addresses_that_are_refused_and_doubts_are_asked_for_each_time():
    asked = gatherer()
    assert (asked.status().refused_addresses, asked.status().doubts) == ((), ())

    asked.refused_addresses = lambda: ["Service 'a/b': x"]
    asked.doubts = lambda: ["Service 'c/d': y"]
    found = asked.status()
    assert (found.refused_addresses, found.doubts) == (("Service 'a/b': x",), ("Service 'c/d': y",))
    # A policy that works is no trouble of the daemon's.
    assert found.warnings == ()


def test_the_published_schema_is_that_of_the_document():
    # To renew it: python -m tests.unit.test_status
    assert SCHEMA.read_text() == schema()


def test_a_document_with_fields_of_a_later_version_is_understood():
    document = json.loads(msgspec.json.encode(gatherer().status()))
    document["later"] = {"more": 1}

    assert msgspec.json.decode(json.dumps(document), type=Status).node.name == "node1"


if __name__ == "__main__":
    SCHEMA.write_text(schema())
