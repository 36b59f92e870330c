"""The status document as text."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from kubeproxy_py import status_text
from kubeproxy_py.status_document import (
    AuditStatus,
    ConntrackStatus,
    DriftRepair,
    FailureStatus,
    FamilyStatus,
    LockStatus,
    NodeStatus,
    QuarantinedService,
    StateFileFailure,
    StateFileStatus,
    Status,
    SyncStatus,
    WatchStatus,
)

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


def ago(seconds):
    return NOW - timedelta(seconds=seconds)


def sync(seconds=3, **fields):
    return SyncStatus(
        **{
            "at": ago(seconds),
            "seconds": 0.0123,
            "kind": "partial",
            "restores": 1,
            "chains_written": 1,
            "chains_deleted": 0,
            "rules_written": {"filter": 0, "nat": 2},
            **fields,
        }
    )


FAMILY = FamilyStatus(
    ip_family="IPv4",
    program="/usr/sbin/iptables-nft-restore",
    program_version="1.8.9",
    services=2,
    endpoints=3,
    rules={"filter": 4, "nat": 20},
    last_sync=sync(),
    last_write=sync(),
    last_full_sync=sync(),
)
STATUS = Status(
    now=NOW,
    state="ready",
    phase="programming Services",
    node=NodeStatus(name="node1", is_known=True, is_eligible=True, ips=("192.168.0.2",)),
    version="0.1.0",
    pid=42,
    started_at=ago(7200),
    source="API server https://10.0.0.1:6443",
    backend="nft",
    dispatch="auto",
    families=(FAMILY,),
)


def text(status=STATUS, **fields):
    return status_text.status_text(msgspec.structs.replace(status, **fields))


def test_addresses_that_are_left_out_or_doubtful_stand_at_the_end():
    lines = text(
        refused_addresses=("Service 'a/b': x",) * 13, doubts=("Service 'c/d': y",)
    ).splitlines()

    assert lines[-3:-2] == [""]
    assert lines[-2].startswith("served, but")
    assert "Service 'c/d': y" in lines[-1]
    assert sum("Service 'a/b': x" in line for line in lines) == 10
    assert any("and 3 more" in line for line in lines)


def family_text(**fields):
    return text(families=(msgspec.structs.replace(FAMILY, **fields),))


def row(text, name):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{name}  ")]
    return line.strip().removeprefix(name).strip()


def test_who_is_well_says_so_in_one_line_and_the_rest_follows():
    assert text().splitlines()[:3] == [
        "node1: ready",
        "",
        "  version  0.1.0, pid 42, up 2 h, programming Services",
    ]


def test_what_is_wrong_comes_first():
    lines = text(
        state="not ready", reasons=("IPv4: not synced since the start",), warnings=("careful",)
    ).splitlines()

    assert lines[:3] == ["node1: not ready", "  IPv4: not synced since the start", "  careful"]


def test_the_state_is_coloured():
    coloured = status_text.status_text(STATUS, lambda text, state: f"<{state}>{text}")

    assert coloured.splitlines()[0] == "node1: <ready>ready"


def test_no_line_is_wider_than_a_hundred_columns():
    long = text(warnings=("word " * 60,))

    assert max(map(len, long.splitlines())) <= 100


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (NodeStatus(name="node1"), "node1 (not seen yet)"),
        (NodeStatus(name="node1", is_known=True), "node1 (no IPs)"),
        (
            NodeStatus(name="node1", is_known=True, ips=("10.0.0.1",), zone="a"),
            "node1 (10.0.0.1, zone a)",
        ),
    ],
)
def test_the_node_is_told_as_far_as_it_is_known(node, told):
    assert row(text(node=node), "node") == told


def test_before_anything_is_programmed_it_says_that():
    found = text(
        backend="",
        families=(FamilyStatus(ip_family="IPv4"),),
    )

    assert row(found, "last sync") == "none yet"
    assert "none written yet" in found
    assert "iptables-?" in found


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "3 s ago, partial, took 12 ms, 1 restore: 1 chain with 2 rules written, 0 deleted"),
        ({"restores": 0}, "3 s ago, partial, took 12 ms, wrote nothing"),
        (
            {"restores": 2, "rules_written": {"nat": 1}, "chains_written": 3},
            "3 s ago, partial, took 12 ms, 2 restores: 3 chains with 1 rule written, 0 deleted",
        ),
    ],
)
def test_a_sync_is_told_in_a_line(fields, told):
    assert row(family_text(last_sync=sync(**fields)), "last sync") == told


def test_earlier_syncs_are_told_where_they_differ():
    found = family_text(
        last_sync=sync(1, restores=0), last_write=sync(60), last_full_sync=sync(600)
    )

    assert row(found, "last write").startswith("60 s ago")
    assert row(found, "last full look").startswith("10 min ago")
    assert "last write" not in text()


def test_a_change_that_waits_is_told_with_its_age():
    assert row(family_text(pending_seconds=12.4), "queue") == "a change waits for 12 s"


def test_what_the_host_lacks_and_waits_for_the_lock_are_told():
    found = family_text(missing_capabilities=("nfacct", "sctp"), lock=LockStatus(waited_seconds=9))

    assert row(found, "lacks") == "nfacct, sctp"
    assert row(found, "xtables lock") == "waited for it for 9 s since the start"
    assert "lacks" not in text()
    assert "xtables" not in family_text(lock=LockStatus(waited_seconds=0))


def test_the_layout_names_the_trees():
    assert row(family_text(trees=("nat/KUBE-SERVICES",)), "layout") == "trees: nat/KUBE-SERVICES"


@pytest.mark.parametrize(
    ("ran", "told"),
    [
        (None, "nothing to clean up yet"),
        (ConntrackStatus(at=ago(5), deleted=2), "cleaned up 5 s ago, 2 deleted, 0 refused"),
        (ConntrackStatus(at=ago(5), error="not permitted"), "failed 5 s ago: not permitted"),
    ],
)
def test_the_clean_up_of_connections_is_told(ran, told):
    assert row(family_text(conntrack=ran), "conntrack") == told


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "/state, nothing saved yet"),
        (
            {"saved_at": ago(200), "size_bytes": 1536},
            "/state, not in use, state of 3 min ago, 1.5 KiB",
        ),
        (
            {"saved_at": ago(200), "is_in_use": True},
            "/state, IN USE, state of 3 min ago, 0.0 KiB",
        ),
        (
            {"last_failure": StateFileFailure(at=ago(5), operation="save", reason="EIO")},
            "/state, nothing saved yet; last failure (save) 5 s ago: EIO",
        ),
    ],
)
def test_the_state_file_is_told_in_a_line(fields, told):
    assert row(text(state_file=StateFileStatus(path="/state", **fields)), "state file") == told


def test_without_a_state_file_nothing_is_said_of_one():
    assert "state file" not in text()


@pytest.mark.parametrize(
    ("compared", "differed", "told"),
    [
        (1, 0, "1 comparison with a build from nothing, none differed"),
        (9, 2, "9 comparisons with a build from nothing, 2 differed: a bug, please report it"),
    ],
)
def test_what_the_audit_found_is_told(compared, differed, told):
    audit = AuditStatus(services_compared=compared, services_differed=differed)

    assert row(family_text(audit=audit), "audit") == told


def test_before_the_audit_has_compared_anything_it_is_left_out():
    assert "audit" not in text()
    assert "audit" not in family_text(audit=AuditStatus(services_compared=0, services_differed=0))


def quarantined(name):
    return QuarantinedService(
        service=name,
        reason="line 3: RULE_APPEND failed",
        since=ago(90),
        retry_at=ago(-30),
        attempts=2,
    )


def test_services_that_are_set_aside_stand_with_what_is_wrong():
    found = family_text(quarantined=(quarantined("default/bad"),)).splitlines()

    assert found[1].startswith(
        "  IPv4: default/bad has been set aside for 90 s (2 attempts, next in 30 s): line 3:"
    )


def test_of_many_services_that_are_set_aside_the_first_are_named():
    many = tuple(quarantined(f"default/bad-{number}") for number in range(13))

    assert "and 3 more" in family_text(quarantined=many)


def repair(seconds, chains=("KUBE-SERVICES",), processes=("nft",), count=1):
    return DriftRepair(
        at=ago(seconds), table="nat", kind="chain_flushed", count=count, chains=chains, processes=processes
    )  # fmt: skip


def test_repairs_are_told_newest_first_and_what_repeats_once():
    found = family_text(
        repairs=(
            repair(100),
            repair(50, chains=("A", "B", "C"), processes=(), count=5),
            repair(20),
            repair(10),
        )
    ).splitlines()
    start = found.index("  repaired, because others had changed it:")

    assert found[start + 1 : start + 3] == [
        "    10 s ago (3 times since 100 s ago): chain_flushed in nat: KUBE-SERVICES, by nft",
        "    50 s ago: chain_flushed in nat: A, B, C and 2 more, by an unknown process",
    ]


def test_of_many_kinds_of_repairs_the_newest_are_told():
    many = tuple(repair(number, chains=(str(number),)) for number in range(12))

    assert "and 2 more" in family_text(repairs=many)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "7, last event 40 s ago, at resourceVersion 304"),
        ({"is_stale": True}, "7, last event 40 s ago, at resourceVersion 304, STALE"),
        ({"resource_version": ""}, "7, last event 40 s ago"),
        ({"last_event_at": None, "silent_seconds": None}, "nothing has come yet"),
        ({"failing_seconds": 200.0, "error": "refused"}, "failing for 3 min: refused"),
    ],
)
def test_a_watch_is_told_in_a_line(fields, told):
    watch = WatchStatus(
        **{
            "kind": "Service",
            "objects": 7,
            "resource_version": "304",
            # The wall clock has been put back since.
            "last_event_at": ago(-3600),
            "is_stale": False,
            "silent_seconds": 40.0,
            **fields,
        }
    )

    assert row(text(watches=(watch,)), "Service") == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0, "0 s"), (0.25, "250 ms"), (1, "1 s"), (119, "119 s"), (120, "2 min"),
        (7200, "2 h"), (172_800, "2 d"),
    ],
)  # fmt: skip
def test_ages_are_as_rough_as_people_speak_of_them(seconds, told):
    assert status_text.age_text(seconds) == told


# Failures ----------------------------------------------------------------------------------------


def test_without_a_failure_it_says_so():
    assert status_text.failures_text([]) == "No iptables call has failed since the start."


def test_a_failure_shows_the_input_with_the_refused_line_marked():
    failure = FailureStatus(
        ip_family="IPv4",
        at=NOW,
        message="cannot restore rules: line 12 failed",
        table="nat",
        refused=(12,),
        first_line=11,
        total_lines=40,
        lines=("-A X a", "-A X b"),
    )

    assert status_text.failures_text([failure]).splitlines() == [
        "IPv4, 2026-11-21 12:00:00 UTC, table nat",
        "  cannot restore rules: line 12 failed",
        "  lines 11 to 12 of 40 (* refused):",
        "        11  -A X a",
        "  *     12  -A X b",
    ]


def test_a_failure_without_input_says_that_there_was_none():
    failure = FailureStatus(ip_family="IPv6", at=NOW, message="cannot get the xtables lock")
    found = status_text.failures_text([failure])

    assert found.splitlines()[-1] == "  iptables was given nothing that it could have refused."
    assert "last failure  0 s ago (--last-failure)" in family_text(last_failure=failure)
