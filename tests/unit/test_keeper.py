"""The state file: offered where no API server answers, written beside the real work."""

import errno
import os
import threading
import time

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import keeper, snapshot
from kubeproxy_py.model import IPFamily, Node, ServiceName
from kubeproxy_py.store import Store
from tests.support import states
from tests.support.builders import make_node, make_service, make_slice

V4 = IPFamily.V4
DEADLINE_S = 20.0
NODE = Node(name="node1", ips=("192.168.0.2",))
ITEMS = [make_node("node1"), make_service("web"), make_slice("web")]


class Kept:
    """A Keeper at work in its thread, its store and its file."""

    def __init__(self, metrics, path, **options):
        self.metrics = metrics
        self.nodes = []
        self.store = Store(
            node_name="node1",
            families=(V4,),
            metrics=metrics,
            report=lambda problem: None,
            changed=lambda family: self.keeper.note(),
            node_changed=self.nodes.append,
        )
        self.stop = threading.Event()
        self.file = keeper.StateFile(path)
        self.keeper = keeper.Keeper(
            self.file,
            self.store,
            metrics,
            node="node1",
            identity="id",
            stop=self.stop,
            **{
                "grace_s": 0.0,
                "settle_s": 0.0,
                "interval_s": 0.0,
                "listing_s": 0.0,
                "now": lambda: 1000.0,
                **options,
            },
        )
        self.thread = threading.Thread(target=self.keeper.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.keeper.stop()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()

    def listed(self, *items):
        for kind in ("Node", "Service", "EndpointSlice"):
            found = [states.decode(item) for item in items if item["kind"] == kind]
            self.store.replace(kind, found)

    def names(self):
        """Return the Services in the file, or None if there is none for us."""
        try:
            last = snapshot.parse(self.file.read() or b"", node="node1", identity="id")
        except snapshot.Unusable:
            return None
        return {name.name for name in last.state.services[V4]}

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"kubeproxy_snapshot_{name}", labels)


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        tick.wait(0.005)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "state"


@pytest.fixture
def prepared(path):
    """Give the path of a file that holds Service old, of Unix time 900."""
    services = states.service_states([make_service("old"), make_slice("old")], V4)
    packed = snapshot.pack(NODE, {V4: services.values()})
    path.parent.mkdir()
    path.write_bytes(snapshot.render(packed, node="node1", identity="id", saved_at=900.0))
    return path


def test_changes_are_written_and_what_did_not_change_is_not(metrics, path):
    with Kept(metrics, path) as kept:
        kept.listed(*ITEMS)
        until(lambda: kept.names() == {"web"})
        kept.store.upsert("Service", states.decode(make_service("more", cluster_ip="172.30.0.9")))
        until(lambda: kept.names() == {"web", "more"})
        before = path.stat().st_ino
        kept.keeper.note()
        until(lambda: not kept.keeper._changed.is_set())

    assert path.stat().st_ino == before
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept.value("saved_timestamp_seconds") == 1000.0
    assert kept.value("bytes") == path.stat().st_size
    assert kept.keeper.state == keeper.FileState(
        str(path), saved_at=1000.0, size_bytes=path.stat().st_size
    )
    assert [file.name for file in path.parent.iterdir()] == ["state"]


def test_nothing_is_written_before_everything_was_listed(metrics, prepared):
    with Kept(metrics, prepared) as kept:
        kept.store.upsert("Service", states.decode(make_service("web")))
        kept.keeper.note()
        until(lambda: not kept.keeper._changed.is_set())

        assert kept.names() == {"old"}


def test_the_state_is_offered_when_nothing_was_listed_in_time(metrics, prepared):
    with capture_logs() as logs, Kept(metrics, prepared) as kept:
        until(lambda: kept.store.restored_at == 900.0)
        changes = kept.store.take_restored(V4)

    assert list(changes.services) == [ServiceName("default", "old")]
    assert changes.is_restored
    assert kept.store.node == NODE
    assert kept.nodes == [NODE]
    assert kept.keeper.state.saved_at == 900.0
    (entry,) = [entry for entry in logs if entry["event"] == "snapshot.offered"]
    assert entry["age_s"] == 100.0
    assert entry["services"] == {"IPv4": 1}


def test_a_state_of_the_future_has_no_negative_age(metrics, prepared):
    # A board without a battery begins at 1970.
    with capture_logs() as logs, Kept(metrics, prepared, now=lambda: 1.0) as kept:
        until(lambda: any(entry["event"] == "snapshot.offered" for entry in logs))

    assert kept.store.restored_at == 900.0
    assert [entry["age_s"] for entry in logs if "age_s" in entry] == [0.0]


def test_the_state_is_not_offered_when_everything_was_listed_in_time(metrics, prepared):
    kept = Kept(metrics, prepared)
    kept.listed(*ITEMS)
    with capture_logs() as logs, kept:
        until(lambda: kept.names() == {"web"})

    assert kept.store.restored_at is None
    assert logs == []


def test_stopped_within_the_grace_it_offers_nothing(metrics, prepared):
    with Kept(metrics, prepared, grace_s=1000.0) as kept:
        pass

    assert kept.store.restored_at is None


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 100])
def test_a_file_that_is_not_ours_is_told_counted_ignored_and_replaced(metrics, path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with capture_logs() as logs, Kept(metrics, path) as kept:
        until(lambda: kept.value("failures_total", operation="load") == 1)
        kept.listed(*ITEMS)
        until(lambda: kept.names() == {"web"})

    assert [entry["event"] for entry in logs] == ["snapshot.ignored"]
    assert (kept.keeper.state.last_failure.operation, kept.keeper.state.saved_at) == (
        "load",
        1000.0,
    )
    assert kept.store.restored_at is None


def test_a_file_that_is_too_big_is_not_read_into_memory(metrics, path):
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(snapshot.MAX_BYTES + 2)

    with pytest.raises(snapshot.Unusable, match="more than"):
        keeper.StateFile(path).read()


def test_a_pipe_in_its_place_keeps_nobody_waiting(path):
    path.parent.mkdir()
    os.mkfifo(path)

    assert keeper.StateFile(path).read() == b""


def test_a_directory_in_its_place_is_told_and_survived(metrics, path):
    path.mkdir(parents=True)
    with capture_logs() as logs, Kept(metrics, path) as kept:
        until(lambda: kept.value("failures_total", operation="load") == 1)
        kept.listed(*ITEMS)
        until(lambda: kept.value("failures_total", operation="save") > 1)

    events = [entry["event"] for entry in logs]
    assert events == ["snapshot.ignored", "snapshot.save_failed"]


def test_a_disk_that_is_full_is_told_once_and_the_old_file_stays(metrics, prepared, monkeypatch):
    real = keeper.StateFile.write
    is_full = threading.Event()
    is_full.set()

    def write(self, data):
        if is_full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(keeper.StateFile, "write", write)
    with capture_logs() as logs, Kept(metrics, prepared, grace_s=0.0) as kept:
        kept.listed(*ITEMS)
        until(lambda: kept.value("failures_total", operation="save") > 2)
        assert kept.names() == {"old"}
        failing = kept.keeper.state
        is_full.clear()
        until(lambda: kept.keeper.state.saved_at == 1000.0)
        assert kept.names() == {"web"}

    assert failing.last_failure == keeper.Failed(1000.0, "save", os.strerror(errno.ENOSPC))
    assert (failing.is_failing, kept.keeper.state.is_failing) == (True, False)
    events = [entry["event"] for entry in logs if entry["event"] != "snapshot.offered"]
    assert events == ["snapshot.save_failed", "snapshot.save_recovered"]


def test_a_write_that_fails_leaves_no_draft(path, monkeypatch):
    file = keeper.StateFile(path)
    file.prepare()
    file.write(b"old")

    def fsync(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        file.write(b"new")

    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["state"]


def test_a_state_that_is_too_big_is_not_written(path, monkeypatch):
    file = keeper.StateFile(path)
    file.prepare()
    monkeypatch.setattr(snapshot, "MAX_BYTES", 10)

    with pytest.raises(snapshot.Unusable, match="would have more than 10 bytes"):
        file.write(b"x" * 11)


def test_a_draft_that_is_a_link_is_not_followed(path, tmp_path):
    file = keeper.StateFile(path)
    file.prepare()
    (path.parent / "state.tmp").symlink_to(tmp_path / "victim")

    with pytest.raises(OSError, match="symbolic links"):
        file.write(b"x")
    assert not (tmp_path / "victim").exists()


def test_a_directory_that_cannot_be_made_is_told_once_and_tried_again(metrics, tmp_path):
    (tmp_path / "file").write_text("")
    kept = Kept(metrics, tmp_path / "file" / "state")
    kept.listed(*ITEMS)
    with capture_logs() as logs, kept:
        until(lambda: kept.value("failures_total", operation="save") > 1)
        assert kept.value("failures_total", operation="prepare") == 1
        assert kept.keeper.state.is_failing
        (tmp_path / "file").unlink()
        until(lambda: kept.names() == {"web"})
        until(lambda: not kept.keeper.state.is_failing)

    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("snapshot.unavailable", "warning"),
        ("snapshot.save_recovered", "info"),
    ]


def test_a_disk_that_cannot_be_written_is_read(metrics, prepared, monkeypatch):
    is_read_only = threading.Event()
    is_read_only.set()
    real = keeper.StateFile._open_draft

    def open_draft(self):
        if is_read_only.is_set():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(self)

    monkeypatch.setattr(keeper.StateFile, "_open_draft", open_draft)
    with capture_logs() as logs, Kept(metrics, prepared) as kept:
        until(lambda: kept.store.restored_at == 900.0)
        until(lambda: any(entry["event"] == "snapshot.offered" for entry in logs))
        assert (kept.keeper.state.saved_at, kept.keeper.state.is_failing) == (900.0, True)
        kept.listed(*ITEMS)
        until(lambda: kept.value("failures_total", operation="save") > 1)
        assert kept.names() == {"old"}
        is_read_only.clear()
        until(lambda: kept.names() == {"web"})

    assert [entry["event"] for entry in logs] == [
        "snapshot.unavailable",
        "snapshot.offered",
        "snapshot.save_recovered",
    ]


def test_a_directory_that_is_missing_is_made(path):
    keeper.StateFile(path).prepare()

    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == []


def test_a_server_that_has_told_of_the_node_has_longer(metrics, prepared):
    kept = Kept(metrics, prepared, listing_s=1000.0)
    kept.store.replace("Node", [states.decode(make_node("node1"))])
    with kept:
        kept.stop.wait(0.05)

    assert kept.store.restored_at is None


def test_what_was_listed_in_time_is_saved_without_more_waiting(metrics, path):
    kept = Kept(metrics, path, listing_s=1000.0)
    kept.listed(*ITEMS)
    with kept:
        until(lambda: kept.names() == {"web"})


def test_a_server_that_has_told_of_the_node_has_not_for_ever(metrics, prepared):
    kept = Kept(metrics, prepared, listing_s=0.0)
    kept.store.replace("Node", [states.decode(make_node("node1"))])
    with kept:
        until(lambda: kept.store.restored_at == 900.0)
