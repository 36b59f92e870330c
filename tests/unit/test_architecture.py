"""Rules for the whole repository that no linter knows; who may import whom is `make check`'s."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kubeproxy_py import nfacct, pages, traffic_meter, traffic_state
from kubeproxy_py.preflight import findings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kubeproxy_py"
OPERATIONS = ROOT / "docs" / "operations.md"
DIRECTORIES = {"benchmarks", "deploy", "docs", "e2e", "kubeproxy_py", "tests"}


def sources(directory: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(directory.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield what is called, as it is written, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def table_rows(section: str) -> list[list[str]]:
    """Return the cells of the tables under a heading of docs/operations.md, without their heads."""
    text = OPERATIONS.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    return [
        row
        for row in rows
        if row[0] not in {"name", "event", "page", "alert", "regarding", "fault"}
    ]


@pytest.mark.parametrize("directory", ["kubeproxy_py", "tests/unit"])
def test_nobody_sleeps(directory):
    # The daemon must be able to stop at any moment; a unit test gets its time as an argument.
    assert [
        f"{path}:{call.lineno}"
        for path, tree in sources(ROOT / directory)
        for name, call in calls(tree)
        if name == "time.sleep"
    ] == []


# Where one thread alone asks for a type, whenever that is.
TYPES_OF_ONE_THREAD = {
    "config_file.py": "read before there are threads",
    "manifest_objects.py": "the thread that reads files, and commands",
    "status_socket.py": "a command's",
}


def test_types_are_learned_before_there_are_threads():
    # watch.py says why: two threads that are the first to decode a type crash the process.
    found = {
        path.name
        for path, tree in sources(PACKAGE)
        for name, call in calls(tree)
        if name == "msgspec.convert"
        or (name == "msgspec.json.decode" and any(key.arg == "type" for key in call.keywords))
    } | {
        path.name
        for path, tree in sources(PACKAGE)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for name, _ in calls(function)
        if name == "msgspec.json.Decoder"
    }

    assert found == TYPES_OF_ONE_THREAD.keys()


def test_every_metric_is_set_by_someone(metrics):
    names = {name for name in vars(metrics) if name != "registry"}
    used = {
        node.attr
        for path, tree in sources(PACKAGE)
        if path.name != "metrics.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }

    assert names - used == set()


def test_the_documented_metrics_are_those_there_are(metrics):
    pages.register_process_metrics(metrics.registry)
    # Registered by what it describes: the kernel is not asked.
    metrics.registry.register(nfacct.NfacctCollector())
    metrics.registry.register(
        traffic_meter.TrafficCollector(
            detail="endpoint", max_series=1, state=traffic_state.StateFile(None)
        )
    )
    there = {
        _exposed(name, kind): (kind, labels)
        for collector, names in metrics.registry._collector_to_names.items()
        for name, kind, labels in _described(collector, names)
    }
    documented = {row[0]: (row[1], _labels(row[2])) for row in table_rows("Metrics")}

    assert documented == there


def _described(collector, names):
    own = getattr(collector, "_labelnames", ())
    families = collector.describe() if hasattr(collector, "describe") else collector.collect()
    found = [
        (family.name, family.type, getattr(family, "_labelnames", ()) or own) for family in families
    ] or [(name, "gauge", own) for name in names]
    return [(name, kind, tuple(sorted(labels))) for name, kind, labels in found]


def _exposed(name, kind):
    return f"{name}_total" if kind == "counter" else name


def _labels(cell):
    return tuple(sorted(filter(None, (label.strip() for label in cell.split(",")))))


def test_the_documented_events_are_those_that_are_logged():
    logged, named = set(), set()
    for _, tree in sources(PACKAGE):
        for name, call in calls(tree):
            if not call.args or not isinstance(call.args[0], ast.Constant):
                continue
            if isinstance(event := call.args[0].value, str) and re.fullmatch(
                r"[a-z_]+\.[a-z_]+", event
            ):
                named.add(event)
                if name in {"log.info", "log.warning", "log.error", "log.exception"}:
                    logged.add(event)
    documented = {event for row in table_rows("Logs") for event in row[0].split(", ")}

    assert logged - documented == set()
    assert documented - named == set()


def test_the_documented_kubernetes_events_are_those_that_are_posted():
    posted = {
        argument.value.value
        for _, tree in sources(PACKAGE)
        for _, call in calls(tree)
        if {"event_type", "reason", "action"} <= {keyword.arg for keyword in call.keywords}
        for argument in call.keywords
        if argument.arg == "reason" and isinstance(argument.value, ast.Constant)
    }

    assert {row[1] for row in table_rows("Events")} == posted


def test_every_test_that_the_table_of_faults_names_exists():
    rows = table_rows("Faults")
    assert len(rows) > 15
    for fault, *_, test in rows:
        named = re.fullmatch(r"`(\w+)::(\w+)`", test)
        assert named, f"no test is named for: {fault}"
        path = ROOT / "tests/packet" / f"{named[1]}.py"
        there = {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
        assert named[2] in there, test


def test_the_documented_findings_are_those_of_check():
    lines = (ROOT / "docs" / "check.md").read_text().splitlines()
    table = lines[lines.index("|---|---|---|") + 1 :]

    assert table == [
        f"| {name} | {topic.meaning} | {topic.action} |" for name, topic in findings.TOPICS.items()
    ]


def test_every_finding_of_check_can_be_found():
    # A judge that names a topic nobody explains fails here, and so does a topic of no judge.
    named = {
        call.args[0].value
        for _, tree in sources(PACKAGE / "preflight")
        for name, call in calls(tree)
        if name in {"Finding", "_works"}
        if isinstance(call.args[0], ast.Constant)
    }
    # Chosen by what the objects come from.
    named |= {"manifests", "objects"}

    assert named == findings.TOPICS.keys()


def test_the_daemon_does_not_load_what_only_top_needs():
    # structlog would, and each process would have its 3 MiB.
    script = "import sys, kubeproxy_py.cli; print(sorted(m for m in sys.modules if 'rich' in m))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)

    assert found.stdout.decode() == "['rich']\n"


def test_only_known_directories_stand_at_the_top():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    there = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not any(path.match(pattern) for pattern in ignored)
    }

    assert {name for name in there if not name.startswith(".")} <= DIRECTORIES


def test_operations_is_short_enough_to_be_read():
    assert len(OPERATIONS.read_text().splitlines()) < 520
