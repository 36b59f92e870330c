"""The wall clock is shown and never waited by: an NTP step of an hour changes times in logs, and nothing else."""

import ast
from pathlib import Path

from tests.support.builders import make_service, make_slice
from tests.support.world import World, desired

PACKAGE = Path(__file__).parents[2] / "kubeproxy_py"
# Who reads it, and what for.
READERS = {
    "ask.py": "facts that `check` shows",
    "conntrack.py": "when the last clean-up ended",
    "daemon.py": "when this process began",
    "families.py": "how old the state file's state is",
    "health.py": "times in bodies",
    "keeper.py": "when the state was saved",
    "pages.py": "how long this process has run",
    "recorder.py": "times of Events",
    "status.py": "times and ages on the status page",
    "store.py": "changes that were triggered before the start are nobody's latency",
    "sync.py": "the programming latency, and when a sync last succeeded",
    "sync_loop.py": "when syncs ended, for the status page",
    "watch.py": "when the server last sent anything",
}


def wall_clock_readers():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {
                "time.time",
                "time.time_ns",
                "datetime.now",
                "dt.datetime.now",
            }:
                yield path.name


def test_only_those_read_the_wall_clock_who_show_it():
    assert set(wall_clock_readers()) <= set(READERS)


def test_syncs_and_retries_do_not_care_for_the_wall_clock(metrics):
    world = World(metrics)
    hour = 3600.0
    times = iter([1e9, 1e9 - hour, 1e9 + hour, 1e9])
    world.syncer._wall_clock = lambda: next(times)
    items = [make_service(), make_slice()]
    items[1]["metadata"]["annotations"] = {
        "endpoints.kubernetes.io/last-change-trigger-time": "2001-09-09T01:46:39Z"
    }
    world.listed(*items)
    world.sync()
    for number in range(2):
        world.put(make_service(f"svc{number}", cluster_ip=f"172.30.1.{number}"))
        items.append(make_service(f"svc{number}", cluster_ip=f"172.30.1.{number}"))
        world.sync()

    assert world.own() == desired(*items)
    # Never negative, whichever way it jumped.
    assert world.value("network_programming_duration_seconds_sum") >= 0
