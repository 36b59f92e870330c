import contextlib
import shutil
import threading

import msgspec
import pytest

from kubeproxy_py import errors, inotify, manifest_parser, manifests

DEADLINE_S = 30.0
# No poll within a test's life: what a test sees, inotify has told.
NEVER_S = 3600.0


def service(name, cluster_ip="172.30.0.41"):
    return (
        "---\napiVersion: v1\nkind: Service\n"
        f"metadata: {{name: {name}}}\nspec: {{clusterIP: {cluster_ip}, selector: {{app: {name}}}, "
        "ports: [{port: 80}]}\n"
    )


def pod(name, ip, app):
    return (
        "---\napiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: {name}, labels: {{app: {app}}}}}\n"
        f"status: {{podIP: {ip}, conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )


class RecordingSink:
    """Keeps what a store would, and every call as (verb, kind, name)."""

    def __init__(self):
        self.changed = threading.Condition()
        self.calls = []
        self.objects = {}

    def listed(self, kind):
        """Take the calls for the first objects together."""
        with self.changed:
            self.calls = [call for call in self.calls if call[:2] != ("upsert", kind)]
            self.calls.append(("listed", kind, len(self.objects.setdefault(kind, {}))))
            self.changed.notify_all()

    def upsert(self, kind, obj):
        with self.changed:
            self.objects.setdefault(kind, {})[obj.metadata.name] = obj
            self.calls.append(("upsert", kind, obj.metadata.name))
            self.changed.notify_all()

    def delete(self, kind, namespace, name):
        with self.changed:
            del self.objects[kind][name]
            self.calls.append(("delete", kind, name))
            self.changed.notify_all()

    def report(self, problem):
        with self.changed:
            self.calls.append(("problem", problem.kind, problem.message))
            self.changed.notify_all()

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE_S), self.calls

    def wait_for_calls(self, number):
        self.wait_for(lambda: len(self.calls) >= number)

    def wait_for_services(self, *names):
        self.wait_for(lambda: set(self.objects.get("Service", ())) == set(names))

    def services(self):
        return {name: item.spec.clusterIP for name, item in self.objects["Service"].items()}


@pytest.fixture
def sink():
    return RecordingSink()


@contextlib.contextmanager
def running(sink, *paths, poll_s=NEVER_S):
    """Run a source in a thread until its first objects are there; forget the calls for them."""
    stop = threading.Event()
    source = manifests.ManifestSource(list(paths), sink, sink.report, stop=stop, poll_s=poll_s)
    thread = threading.Thread(target=source.run)
    thread.start()
    try:
        sink.wait_for(lambda: len(sink.objects) == 3)
        with sink.changed:
            sink.calls = [call for call in sink.calls if call[0] == "problem"]
        yield
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert not thread.is_alive()


def rename_into_place(path, text):
    """Replace *path* as most editors do."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.rename(path)


def test_every_kind_is_listed_once_at_first(tmp_path, sink):
    (tmp_path / "a.yaml").write_text(service("web") + pod("web-1", "10.0.0.1", "web"))
    stop = threading.Event()

    class StoppingSink(RecordingSink):
        def listed(self, kind):
            super().listed(kind)
            if len(self.objects) == 3:
                stop.set()

    sink = StoppingSink()
    manifests.ManifestSource([tmp_path], sink, sink.report, stop=stop).run()

    assert sorted(sink.calls) == [
        ("listed", "EndpointSlice", 1),
        ("listed", "Node", 0),
        ("listed", "Service", 1),
    ]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path, text: path.write_text(text), id="written in place"),
        pytest.param(rename_into_place, id="renamed into place"),
    ],
)
def test_change_of_a_file_reaches_the_sink(tmp_path, sink, write):
    path = tmp_path / "a.yaml"
    path.write_text(service("web") + service("other"))
    with running(sink, tmp_path):
        write(path, service("web", "172.30.0.99") + service("other"))
        sink.wait_for_calls(1)

    assert sink.calls == [("upsert", "Service", "web")]
    assert sink.services()["web"] == "172.30.0.99"


def test_new_and_deleted_files_reach_the_sink(tmp_path, sink):
    (tmp_path / "a.yaml").write_text(service("a"))
    with running(sink, tmp_path):
        (tmp_path / "b.yaml").write_text(service("b"))
        sink.wait_for_services("a", "b")
        (tmp_path / "a.yaml").unlink()
        sink.wait_for_services("b")

    assert sink.calls == [("upsert", "Service", "b"), ("delete", "Service", "a")]


def test_new_directory_is_watched_with_what_is_in_it(tmp_path, sink):
    with running(sink, tmp_path):
        deep = tmp_path / "sub" / "deep"
        deep.mkdir(parents=True)
        (deep / "a.yaml").write_text(service("a"))
        sink.wait_for_services("a")
        (deep / "b.yaml").write_text(service("b"))
        sink.wait_for_services("a", "b")


def test_one_of_2000_objects_changes_one_upsert_follows(tmp_path, sink):
    for number in range(1000):
        app = f"app-{number}"
        (tmp_path / f"{app}.yaml").write_text(service(app, f"172.30.{number >> 8}.{number & 255}"))
        (tmp_path / f"pod-{number}.json").write_bytes(
            msgspec.json.encode(
                manifest_parser.parse_yaml(pod(app, f"10.0.{number >> 8}.9", app).encode())[0].value
            )
        )
    with running(sink, tmp_path):
        (tmp_path / "app-7.yaml").write_text(service("app-7", "172.30.9.9"))
        sink.wait_for_calls(1)

    assert sink.calls == [("upsert", "Service", "app-7")]


def test_changed_pod_changes_only_its_slice(tmp_path, sink):
    (tmp_path / "services.yaml").write_text(service("a") + service("b", "172.30.0.42"))
    (tmp_path / "a.yaml").write_text(pod("a-1", "10.0.0.1", "a"))
    (tmp_path / "b.yaml").write_text(pod("b-1", "10.0.0.2", "b"))
    with running(sink, tmp_path):
        (slice_of_b,) = (name for name in sink.objects["EndpointSlice"] if name.startswith("b-"))
        rename_into_place(tmp_path / "b.yaml", pod("b-1", "10.0.0.3", "b"))
        sink.wait_for_calls(1)

    assert sink.calls == [("upsert", "EndpointSlice", slice_of_b)]


def test_new_slices_are_there_before_old_ones_go(tmp_path, sink):
    path = tmp_path / "a.yaml"
    path.write_text(service("a") + pod("a-1", "10.0.0.1", "a"))
    with running(sink, tmp_path):
        rename_into_place(
            path, service("a").replace("port: 80", "port: 81") + pod("a-1", "10.0.0.1", "a")
        )
        sink.wait_for_calls(3)

    assert [verb for verb, _, _ in sink.calls] == ["upsert", "upsert", "delete"]


def test_configmap_volume_is_followed(tmp_path, sink):
    """The kubelet writes a new directory and renames the link ..data to point at it."""
    for version, cluster_ip in (("1", "172.30.0.1"), ("2", "172.30.0.2")):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "a.yaml").write_text(service("web", cluster_ip))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    with running(sink, tmp_path):
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        shutil.rmtree(tmp_path / "..1")
        sink.wait_for_calls(1)

    assert sink.calls == [("upsert", "Service", "web")]
    assert sink.services() == {"web": "172.30.0.2"}


def test_single_file_of_a_configmap_volume_is_followed(tmp_path, sink):
    for version, cluster_ip in (("1", "172.30.0.1"), ("2", "172.30.0.2")):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "a.yaml").write_text(service("web", cluster_ip))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    with running(sink, tmp_path / "a.yaml"):
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        sink.wait_for_calls(1)

    assert sink.services() == {"web": "172.30.0.2"}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("", id="truncated to nothing"),
        pytest.param(service("web", "172.30.0.99")[:-3], id="cut in the middle"),
        pytest.param("apiVersion: v1", id="cut after the first line"),
        pytest.param("<<<<<<< HEAD\n" + service("web"), id="with a merge conflict"),
    ],
)
def test_broken_file_keeps_its_objects_until_it_is_whole_again(tmp_path, sink, broken):
    path = tmp_path / "a.yaml"
    path.write_text(service("web"))
    with running(sink, tmp_path):
        path.write_text(broken)
        sink.wait_for_calls(1)
        assert sink.services() == {"web": "172.30.0.41"}
        path.write_text(service("web", "172.30.0.99"))
        sink.wait_for_calls(2)

    (problem, upsert) = sink.calls
    assert problem[:2] == ("problem", "File")
    assert problem[2].endswith("; what it held before stays")
    assert upsert == ("upsert", "Service", "web")


def test_object_that_lost_its_name_stays_as_it_was(tmp_path, sink):
    path = tmp_path / "a.yaml"
    path.write_text(service("web") + service("other"))
    with running(sink, tmp_path):
        rename_into_place(path, service("123") + service("other", "172.30.0.99"))
        sink.wait_for_calls(2)

    assert [call[0] for call in sink.calls] == ["problem", "upsert"]
    assert "web" in sink.services()


def test_object_that_became_invalid_stays_as_it_was(tmp_path, sink):
    path = tmp_path / "a.yaml"
    path.write_text(service("web") + service("other"))
    with running(sink, tmp_path):
        rename_into_place(
            path, service("web").replace("port: 80", "port: x") + service("other", "172.30.0.99")
        )
        sink.wait_for_calls(2)

    assert [call[0] for call in sink.calls] == ["problem", "upsert"]
    assert sink.services() == {"web": "172.30.0.41", "other": "172.30.0.99"}


def test_deleted_directory_keeps_its_objects_and_counts_again_when_it_is_back(tmp_path, sink):
    directory = tmp_path / "manifests"
    directory.mkdir()
    (directory / "a.yaml").write_text(service("web"))
    with running(sink, directory):
        directory.rename(tmp_path / "aside")
        sink.wait_for_calls(1)
        assert sink.services() == {"web": "172.30.0.41"}
        shutil.rmtree(tmp_path / "aside")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "b.yaml").write_text(service("other"))
        (tmp_path / "new").rename(directory)
        sink.wait_for_services("other")

    assert sink.calls == [
        (
            "problem",
            "File",
            "cannot be read: No such file or directory; its objects stay",
        ),
        ("upsert", "Service", "other"),
        ("delete", "Service", "web"),
    ]


def test_problem_is_reported_again_when_its_file_is_written_again(tmp_path, sink):
    (tmp_path / "a.yaml").write_text("a: b: c")
    (tmp_path / "b.yaml").write_text("d: e: f")
    with running(sink, tmp_path):
        assert len(sink.calls) == 2
        (tmp_path / "a.yaml").write_text("\na: b: c")
        sink.wait_for_calls(3)
        (tmp_path / "c.yaml").write_text(service("web"))
        sink.wait_for_services("web")

    assert [call[0] for call in sink.calls] == ["problem", "problem", "problem", "upsert"]
    assert "line 2" in sink.calls[2][2]


def test_problem_is_not_reported_on_every_poll(tmp_path, sink):
    (tmp_path / "a.yaml").symlink_to("missing")
    with running(sink, tmp_path, poll_s=0.01):
        (tmp_path / "b.yaml").write_text(service("web"))
        sink.wait_for_services("web")

    assert [call[0] for call in sink.calls] == ["problem", "upsert"]


def test_polling_finds_changes_where_inotify_is_not_available(tmp_path, sink, monkeypatch):
    def refuse(_self):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(inotify.Inotify, "__init__", refuse)
    with running(sink, tmp_path, poll_s=0.01):
        (tmp_path / "a.yaml").write_text(service("web"))
        sink.wait_for_services("web")


def test_polling_goes_on_when_there_are_no_more_watches(tmp_path, sink, monkeypatch):
    def refuse(_self, _directories):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inotify.Inotify, "watch", refuse)
    with running(sink, tmp_path, poll_s=0.01):
        (tmp_path / "a.yaml").write_text(service("web"))
        sink.wait_for_services("web")


def test_failing_sink_gets_the_change_again(tmp_path):
    class FailingSink(RecordingSink):
        fails = True

        def upsert(self, kind, obj):
            if self.fails:
                self.fails = False
                raise RuntimeError("cannot take it now")
            super().upsert(kind, obj)

    sink = FailingSink()
    with running(sink, tmp_path, poll_s=0.01):
        (tmp_path / "a.yaml").write_text(service("web"))
        sink.wait_for_services("web")


def test_it_shows_that_it_turns(tmp_path, sink):
    stop = threading.Event()
    turned = threading.Semaphore(0)
    source = manifests.ManifestSource(
        [tmp_path], sink, sink.report, stop=stop, poll_s=0.01, beat=turned.release
    )
    thread = threading.Thread(target=source.run)
    thread.start()
    has_turned = [turned.acquire(timeout=DEADLINE_S) for _ in range(3)]
    stop.set()
    thread.join(DEADLINE_S)

    assert all(has_turned)


def test_nothing_is_given_at_first_while_a_path_is_gone(tmp_path, sink):
    directory = tmp_path / "manifests"
    directory.mkdir()
    stop = threading.Event()
    source = manifests.ManifestSource([directory], sink, sink.report, stop=stop, poll_s=0.01)
    directory.rmdir()
    thread = threading.Thread(target=source.run)
    thread.start()
    try:
        sink.wait_for_calls(1)
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "a.yaml").write_text(service("web"))
        (tmp_path / "new").rename(directory)
        sink.wait_for(lambda: len(sink.objects) == 3)
    finally:
        stop.set()
        thread.join(DEADLINE_S)

    assert [call[0] for call in sink.calls] == ["problem", "listed", "listed", "listed"]
    assert sink.services() == {"web": "172.30.0.41"}


def test_path_that_cannot_be_read_at_start_is_an_error(tmp_path, sink):
    with pytest.raises(errors.ConfigError, match=f"cannot read manifests: {tmp_path}/missing: "):
        manifests.ManifestSource([tmp_path / "missing"], sink, sink.report, stop=threading.Event())


def test_inotify_reports_only_names_that_matter(tmp_path):
    with inotify.Inotify() as watcher:
        watcher.watch({str(tmp_path): frozenset({"wanted"}), str(tmp_path / "missing"): None})
        (tmp_path / "noise").write_text("")
        noticed_noise = watcher.wait(0)
        (tmp_path / "wanted").write_text("")
        noticed_wanted = watcher.wait(0)

    assert (noticed_noise, noticed_wanted) == (False, True)


def test_inotify_forgets_directories_that_are_no_longer_named(tmp_path):
    with inotify.Inotify() as watcher:
        watcher.watch({str(tmp_path): None})
        watcher.watch({})
        (tmp_path / "a").write_text("")

        assert watcher.wait(0) is False


def test_inotify_tells_when_a_watched_directory_goes(tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    with inotify.Inotify() as watcher:
        watcher.watch({str(directory): None})
        directory.rmdir()

        assert watcher.wait(0) is True
