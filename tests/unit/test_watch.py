"""The watch against a real HTTP server, which misbehaves on demand."""

import json
import random
import threading
import time
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kubeproxy_py import api, objects, watch
from kubeproxy_py.metrics import Metrics
from tests.support import builders
from tests.support.api_server import ApiServer

DEADLINE_S = 30.0


class Shelf:
    """A sink that remembers objects and calls, and whose changes can be waited for."""

    def __init__(self):
        self._changed = threading.Condition()
        self.objects = {}
        self.calls = []

    def listed(self, kind):
        """Take what came since the last list for the list that is complete now."""
        with self._changed:
            last = max((n for n, call in enumerate(self.calls) if call[0] == "listed"), default=-1)
            del self.calls[last + 1 :]
            self.calls.append(("listed", kind))
            self._changed.notify_all()

    def upsert(self, kind, obj):
        self._change(("upsert", kind, *_key(obj)), {_key(obj): obj})

    def delete(self, kind, namespace, name):
        with self._changed:
            self.calls.append(("delete", kind, namespace, name))
            self.objects.pop((namespace, name), None)
            self._changed.notify_all()

    def count(self, call):
        return sum(made[0] == call for made in self.calls)

    @property
    def names(self):
        return {name for _, name in self.objects}

    def wait_for(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), (self.calls, self.names)

    def _change(self, call, added):
        with self._changed:
            self.calls.append(call)
            self.objects.update(added)
            self._changed.notify_all()


class Watching:
    """A Watcher at work in its thread, and all it produces."""

    def __init__(self, server, kind, settings):
        self.kind = kind
        self.server = server
        self.shelf = Shelf()
        self.problems = []
        self.metrics = Metrics(CollectorRegistry())
        self.stop = threading.Event()
        self.failures = []
        self.connection = api.connect(master=server.url, user_agent="test", metrics=self.metrics)
        self.watcher = watch.Watcher(
            kind,
            self.connection,
            self.shelf,
            self.problems.append,
            self.metrics,
            stop=self.stop,
            **{"pause_s": 0.01, "silence_s": DEADLINE_S, **settings},
        )
        self.thread = threading.Thread(target=self._run, name="watcher")
        self.thread.start()

    def _run(self):
        try:
            self.watcher.run()
        except Exception as error:  # noqa: BLE001 - told to the test, in its own thread
            self.failures.append(error)

    def wait_for_names(self, *names):
        self.shelf.wait_for(lambda: self.shelf.names == set(names) and self.shelf.count("listed"))

    def wait_for_open_watch(self):
        self.shelf.wait_for(lambda: self.shelf.count("listed"))
        self.server.wait_for(lambda: self.server.open_watches() > 0, DEADLINE_S)

    def reconnects(self, reason):
        return self.metrics.watch_reconnects.labels(self.kind, reason)._value.get()

    def wait_for_reconnect(self, reason):
        until(lambda: self.reconnects(reason) > 0)

    def end(self):
        self.stop.set()
        self.connection.close()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        tick.wait(0.005)


def _key(obj):
    return obj.metadata.namespace, obj.metadata.name


@pytest.fixture
def serve():
    with ExitStack() as stack:

        def serve(**settings):
            return stack.enter_context(ApiServer(**settings))

        yield serve


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def follow(serve):
    # After the servers of *serve*, so that watchers end before them.
    with ExitStack() as stack:

        def follow(server, kind="Service", **settings):
            watching = Watching(server, kind, settings)
            stack.callback(watching.end)
            return watching

        yield follow


def event(kind, obj):
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def versioned(obj, version):
    obj["metadata"]["resourceVersion"] = str(version)
    return obj


# -- lists ---------------------------------------------------------------------------------------


def test_initial_state_is_delivered_once_and_whole(server, follow):
    server.apply_many(builders.make_service(f"svc{n}") for n in range(3))

    watching = follow(server)
    watching.wait_for_names("svc0", "svc1", "svc2")

    watching.shelf.wait_for(lambda: watching.shelf.calls == [("listed", "Service")])
    assert server.count("list") == 0


def test_empty_cluster_is_delivered_as_an_empty_list(server, follow):
    watching = follow(server, "EndpointSlice")

    watching.shelf.wait_for(lambda: watching.shelf.calls == [("listed", "EndpointSlice")])


def test_query_of_a_streaming_list_is_kube_proxys(server, follow):
    follow(server, random=lambda: 0.5).wait_for_open_watch()

    assert server.requests[0].query == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "timeoutSeconds": "450",
        "labelSelector": "!service.kubernetes.io/service-proxy-name",
        "fieldSelector": "spec.clusterIP!=None",
    }


def test_only_the_own_node_is_watched(server, follow):
    server.apply_many([builders.make_node("node1"), builders.make_node("node2")])

    watching = follow(server, "Node", node_name="node2")

    watching.wait_for_names("node2")


def test_headless_services_and_those_of_other_proxies_are_not_delivered(server, follow):
    foreign = {"service.kubernetes.io/service-proxy-name": "other"}
    server.apply(builders.make_service("headless", cluster_ip="None"))
    server.apply(builders.make_service("foreign", labels=foreign))
    server.apply(builders.make_service("ours"))

    watching = follow(server)

    watching.wait_for_names("ours")


def test_server_without_streaming_lists_is_listed_by_pages(serve, follow):
    server = serve(streaming_lists=False)
    server.apply_many(builders.make_service(f"svc{n}") for n in range(3))

    watching = follow(server)
    watching.wait_for_names("svc0", "svc1", "svc2")
    server.apply(builders.make_service("later"))
    watching.wait_for_names("svc0", "svc1", "svc2", "later")

    assert watching.shelf.count("listed") == 1


def test_pages_are_put_together(serve, follow):
    server = serve(streaming_lists=False)
    server.apply_many(builders.make_service(f"svc{n}") for n in range(1200))
    # Resource version 0 is answered from the cache in one piece, so only a relist has pages.
    watching = follow(server)
    watching.shelf.wait_for(lambda: len(watching.shelf.names) == 1200)
    watching.wait_for_open_watch()
    server.forget_requests()

    server.stop()
    server.apply(builders.make_service("new"))
    server.compact()
    server.start()
    watching.shelf.wait_for(lambda: watching.shelf.count("listed") == 2)

    assert [request.query.get("limit") for request in server.requests if request.verb == "list"] == [
        "500", "500", "500",
    ]  # fmt: skip


def test_list_begins_anew_in_one_piece_when_its_continue_token_expires(serve, follow):
    server = serve(streaming_lists=False)
    server.apply_many(builders.make_service(f"svc{n}") for n in range(1200))
    watching = follow(server)
    watching.wait_for_open_watch()
    server.forget_requests()

    server.stop()
    server.apply(builders.make_service("new"))
    server.compact()
    server.expire_next_continue()
    server.start()
    watching.shelf.wait_for(lambda: watching.shelf.count("listed") == 2)

    limits = [request.query.get("limit") for request in server.requests if request.verb == "list"]
    assert limits == ["500", "500", None]


def test_server_that_ignores_the_wish_for_initial_events_is_listed_by_pages(serve, follow):
    server = serve(bookmark_interval_s=0.05)
    server.apply(builders.make_service("svc1"))
    # Answers as a plain watch does: objects, then bookmarks without the mark.
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
    bookmark = event("BOOKMARK", {"metadata": {"resourceVersion": "1"}})
    server.spoil(head + bookmark, verb="watch")

    watching = follow(server)
    watching.wait_for_names("svc1")

    assert server.count("list") == 1


def test_stream_that_falls_silent_within_the_initial_state_is_listed_by_pages(server, follow):
    server.apply(builders.make_service("svc1"))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    added = event("ADDED", versioned(builders.make_service("svc1"), 1))
    server.spoil(head + added, verb="watch")

    watching = follow(server)
    watching.wait_for_names("svc1")

    watching.shelf.wait_for(lambda: watching.shelf.calls == [("listed", "Service")])


def test_stream_that_ends_within_the_initial_state_is_listed_by_pages(server, follow):
    server.apply_many([builders.make_service("svc1"), builders.make_service("svc2")])
    body = event("ADDED", versioned(builders.make_service("svc1"), 1))
    server.spoil(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body, verb="watch")

    watching = follow(server)
    watching.wait_for_names("svc1", "svc2")

    watching.shelf.wait_for(lambda: watching.shelf.calls == [("listed", "Service")])


def test_changes_before_the_end_of_the_initial_state_are_part_of_it(server, follow):
    body = b"".join([
        event("ADDED", versioned(builders.make_service("stays"), 1)),
        event("ADDED", versioned(builders.make_service("gone"), 2)),
        event("DELETED", versioned(builders.make_service("gone"), 3)),
        event("MODIFIED", versioned(builders.make_service("stays", ports=[443]), 4)),
        b"\n",
        event("BOOKMARK", {"metadata": {
            "resourceVersion": "5", "annotations": {"k8s.io/initial-events-end": "true"},
        }}),
    ])  # fmt: skip
    server.spoil(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body, verb="watch")

    watching = follow(server, pause_s=60.0)
    watching.wait_for_names("stays")

    assert watching.shelf.objects["default", "stays"].spec.ports[0].port == 443
    watching.shelf.wait_for(lambda: watching.shelf.calls == [("listed", "Service")])


def test_page_that_is_no_list_is_asked_for_again(serve, follow):
    server = serve(streaming_lists=False)
    server.apply(builders.make_service("svc1"))
    server.spoil(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", verb="list")

    watching = follow(server)
    watching.wait_for_names("svc1")

    assert watching.reconnects("damaged") == 1


def test_half_a_list_is_not_taken_for_the_whole(serve, follow):
    server = serve(streaming_lists=False)
    server.apply_many(builders.make_service(f"svc{n}") for n in range(20))
    server.halve(verb="list")

    watching = follow(server)
    watching.shelf.wait_for(lambda: watching.shelf.calls)

    assert len(watching.shelf.names) == 20
    assert watching.reconnects("unreachable") == 1


# -- changes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming_lists", [True, False], ids=["after a stream", "after pages"])
def test_changes_follow_the_list(serve, follow, streaming_lists):
    server = serve(streaming_lists=streaming_lists)
    server.apply(builders.make_service("old"))
    watching = follow(server)
    watching.wait_for_names("old")

    server.apply(builders.make_service("new"))
    watching.wait_for_names("old", "new")
    server.delete("Service", "default", "old")
    watching.wait_for_names("new")
    server.apply(builders.make_service("new", ports=[443]))
    watching.shelf.wait_for(
        lambda: watching.shelf.objects["default", "new"].spec.ports[0].port == 443
    )

    assert watching.shelf.calls == [
        ("listed", "Service"),
        ("upsert", "Service", "default", "new"),
        ("delete", "Service", "default", "old"),
        ("upsert", "Service", "default", "new"),
    ]


def test_service_that_leaves_the_selection_is_deleted(server, follow):
    server.apply(builders.make_service("svc1"))
    watching = follow(server)
    watching.wait_for_names("svc1")

    foreign = {"service.kubernetes.io/service-proxy-name": "other"}
    server.apply(builders.make_service("svc1", labels=foreign))

    watching.wait_for_names()


def test_bookmarks_count_as_signs_of_life(serve, follow):
    server = serve(bookmark_interval_s=0.02)
    times = iter(range(1000, 100_000))
    watching = follow(server, now=lambda: next(times))
    last = watching.metrics.watch_last_event_timestamp.labels("Service")._value
    # The first is the end of the initial state.
    until(lambda: last.get() >= 1000)
    server.apply(builders.make_node("node1"))  # no event here, but a new version

    until(lambda: last.get() >= 1002)


def test_unknown_event_is_passed_over(server, follow):
    watching = follow(server)
    watching.wait_for_open_watch()

    with capture_logs() as logs:
        server.send_raw("services", event("NEWS", {"metadata": {}}))
        server.apply(builders.make_service("svc1"))
        watching.wait_for_names("svc1")

    assert [log["type"] for log in logs if log["event"] == "watch.unknown_event_ignored"] == [
        "NEWS"
    ]


def test_what_nobody_reads_is_not_kept(server, follow):
    last_applied = {watch._LAST_APPLIED: "{...}", "other": "value"}
    server.apply(builders.make_service("svc1", annotations=last_applied))

    watching = follow(server)
    watching.wait_for_names("svc1")

    assert watching.shelf.objects["default", "svc1"].metadata.annotations == {"other": "value"}


def test_strings_that_repeat_are_kept_once(server, follow):
    endpoint = builders.make_endpoint("10.0.1.1", zone_hints=["zone-of-some-name"])
    server.apply_many(builders.make_slice(name=f"slice{n}", endpoints=[endpoint]) for n in range(2))

    watching = follow(server, "EndpointSlice")
    watching.wait_for_names("slice0", "slice1")

    one, other = (obj.endpoints[0] for obj in watching.shelf.objects.values())
    assert one.nodeName is other.nodeName
    assert one.hints.forZones[0].name is other.hints.forZones[0].name


def test_ten_thousand_services_arrive(server, follow):
    server.apply_many(builders.make_service(f"svc{n}") for n in range(10_000))

    watching = follow(server)

    watching.shelf.wait_for(lambda: len(watching.shelf.names) == 10_000)


# -- interruptions -------------------------------------------------------------------------------


def test_watch_that_is_cut_resumes_where_it_was(server, follow):
    server.apply(builders.make_service("old"))
    watching = follow(server)
    watching.wait_for_names("old")
    watching.wait_for_open_watch()

    server.cut_watches()
    server.apply(builders.make_service("new"))
    watching.wait_for_names("old", "new")

    assert watching.shelf.count("listed") == 1
    assert watching.reconnects("cut") == 1


def test_watch_ended_by_its_time_limit_resumes_at_once(server, follow):
    times = iter(range(100_000))  # each look at the clock is a second later: no watch is brief
    watching = follow(server, pause_s=60.0, silence_s=1000.0, clock=lambda: next(times))
    watching.wait_for_open_watch()

    server.end_watches()
    watching.wait_for_reconnect("ended")
    server.apply(builders.make_service("new"))
    watching.wait_for_names("new")

    assert watching.shelf.count("listed") == 1


def test_watch_that_ends_at_once_is_not_repeated_without_a_pause(server, follow):
    watching = follow(server, clock=lambda: 0.0)
    watching.wait_for_open_watch()

    # The watch of the list is ended at second zero, as seen by a clock that stands still.
    server.end_watches()

    watching.wait_for_reconnect("cut")


def test_resumes_from_the_version_of_the_last_bookmark(serve, follow):
    server = serve(bookmark_interval_s=0.02)
    watching = follow(server)
    watching.wait_for_open_watch()
    server.apply(builders.make_node("node1"))  # no event here, but a new version
    version = server.resource_version
    until(lambda: watching.watcher._resource_version == version)

    server.forget_requests()
    server.compact()
    server.cut_watches()
    server.wait_for(lambda: server.count("watch") == 1)

    assert server.requests[0].query["resourceVersion"] == version
    assert watching.shelf.count("listed") == 1


def test_changes_while_the_server_was_down_arrive_after_its_return(server, follow):
    server.apply_many([builders.make_service("old"), builders.make_service("gone")])
    watching = follow(server)
    watching.wait_for_names("old", "gone")

    with capture_logs() as logs:
        server.stop()
        watching.wait_for_reconnect("unreachable")
        server.apply(builders.make_service("new"))
        server.delete("Service", "default", "gone")
        assert watching.shelf.names == {"old", "gone"}
        server.start()
        watching.wait_for_names("old", "new")

    assert watching.shelf.count("listed") == 1
    events = [log["event"] for log in logs]
    assert events.count("watch.failed") == 1
    assert events.count("watch.reconnected") == 1


def test_server_that_is_down_at_the_start_is_waited_for(server, follow):
    server.apply(builders.make_service("svc1"))
    server.stop()
    watching = follow(server)
    watching.wait_for_reconnect("unreachable")

    server.start()

    watching.wait_for_names("svc1")


def test_long_outage_is_told_once_a_minute(server, follow):
    times = iter(range(0, 1_000_000, 10))  # ten seconds pass between two looks at the clock
    server.stop()

    with capture_logs() as logs:
        watching = follow(server, clock=lambda: next(times), pause_s=0.0)
        until(lambda: watching.reconnects("unreachable") >= 30)
        watching.end()

    told = [log for log in logs if log["event"] == "watch.failed"]
    assert 2 <= len(told) <= watching.reconnects("unreachable") / 2
    assert "cannot GET" in told[0]["error"]


def test_lost_history_leads_to_a_list_that_drops_what_vanished(server, follow):
    server.apply_many([builders.make_service("old"), builders.make_service("gone")])
    watching = follow(server)
    watching.wait_for_names("old", "gone")

    server.stop()
    server.delete("Service", "default", "gone")
    server.apply(builders.make_service("new"))
    server.compact()
    with capture_logs() as logs:
        server.start()
        watching.wait_for_names("old", "new")
        until(lambda: any(log["event"] == "watch.listed" for log in logs))

    assert watching.reconnects("expired") == 1
    assert [log["vanished"] for log in logs if log["event"] == "watch.listed"] == [1]


def test_history_lost_while_listing_by_pages_leads_to_a_fresh_list(serve, follow):
    server = serve(streaming_lists=False)
    watching = follow(server)
    watching.wait_for_open_watch()
    server.forget_requests()

    server.stop()
    server.apply(builders.make_service("new"))
    server.compact()
    server.start()
    watching.wait_for_names("new")

    # From etcd, not from a cache that may be as old as what expired.
    assert [r.query.get("resourceVersion") for r in server.requests if r.verb == "list"] == [None]


def test_error_event_is_survived(server, follow):
    watching = follow(server)
    watching.wait_for_open_watch()

    server.send_raw("services", event("ERROR", {"code": 500, "message": "etcdserver: no leader"}))
    watching.wait_for_reconnect("refused")
    server.apply(builders.make_service("new"))
    watching.wait_for_names("new")

    assert watching.shelf.count("listed") == 1


def test_server_that_went_back_in_time_is_listed_again(server, follow):
    server.apply(builders.make_service("svc1"))
    watching = follow(server)
    watching.wait_for_names("svc1")
    watching.wait_for_open_watch()

    # etcd was restored from a backup: its versions are lower than what this watch has seen.
    server.send_raw("services", event("BOOKMARK", {"metadata": {"resourceVersion": "1"}}))
    watching.shelf.wait_for(lambda: watching.shelf.count("listed") == 2)

    assert watching.reconnects("expired") == 1


def test_etcd_restored_from_a_backup_is_noticed_though_the_watch_stays_silent(server, follow):
    server.apply(builders.make_service("svc1"))
    backup = server.resource_version
    server.apply(builders.make_service("svc2"))
    watching = follow(server, silence_s=0.2)
    watching.wait_for_names("svc1", "svc2")
    watching.wait_for_open_watch()

    server.roll_back(backup)

    watching.wait_for_names("svc1")
    assert watching.reconnects("expired") == 1


def test_server_behind_what_was_seen_is_listed_again(server, follow):
    watching = follow(server)
    watching.wait_for_open_watch()

    status = {"code": 504, "message": "Too large resource version: 900, current: 7"}
    server.send_raw("services", event("ERROR", status))
    watching.shelf.wait_for(lambda: watching.shelf.count("listed") == 2)

    assert watching.reconnects("expired") == 1


def test_silent_watch_is_replaced(serve, follow):
    watching = follow(serve(), silence_s=0.1)

    watching.wait_for_reconnect("silent")
    watching.server.apply(builders.make_service("new"))

    watching.wait_for_names("new")


def test_quiet_server_is_asked_and_no_failure(serve, follow):
    server = serve(has_progress=False, bookmark_interval_s=0.02)
    server.apply(builders.make_service("svc1"))
    heard = []
    with capture_logs() as logs:
        watching = follow(server, silence_s=0.2, heard=lambda: heard.append(True))
        watching.wait_for_open_watch()
        heard.clear()
        until(lambda: watching.reconnects("silent") >= 2 and len(heard) >= 2)

    assert "watch.failed" not in {log["event"] for log in logs}
    assert watching.shelf.count("listed") == 1
    asked = [request for request in server.requests if request.query.get("limit") == "1"]
    assert asked
    assert all("resourceVersion" not in request.query for request in asked)


def test_frozen_server_is_followed_again_once_it_thaws(server, follow):
    server.apply(builders.make_service("old"))
    watching = follow(server, silence_s=0.2)
    watching.wait_for_names("old")

    server.freeze()
    watching.wait_for_reconnect("silent")
    server.apply(builders.make_service("new"))
    server.thaw()

    watching.wait_for_names("old", "new")


def test_slow_stream_is_read(server, follow):
    server.apply(builders.make_service("svc1"))
    server.trickle(20_000)

    watching = follow(server)

    watching.wait_for_names("svc1")


def test_stream_too_slow_for_a_line_is_silence(server, follow):
    server.apply(builders.make_service("svc1", annotations={"long": "x" * 10_000}))
    server.trickle(1000)  # a piece every 50 ms: the socket is never silent

    watching = follow(server, silence_s=0.3)

    watching.wait_for_reconnect("silent")


def test_page_that_never_ends_is_given_up(serve, follow):
    server = serve(streaming_lists=False)
    server.apply_many(
        builders.make_service(f"svc{number}", cluster_ip=f"172.30.1.{number}")
        for number in range(1, 100)
    )
    server.trickle(200)
    # Never silent, and never done.
    watching = follow(server, silence_s=0.3)
    watching.wait_for_reconnect("silent")
    server.trickle(None)
    watching.shelf.wait_for(lambda: len(watching.shelf.objects) == 99)


def test_page_that_is_too_big_is_given_up(serve, follow, monkeypatch):
    monkeypatch.setattr(watch, "_MAX_PAGE", 300)
    server = serve(streaming_lists=False)
    server.apply_many([builders.make_service("a"), builders.make_service("b")])
    watching = follow(server)
    watching.wait_for_reconnect("damaged")
    monkeypatch.setattr(watch, "_MAX_PAGE", 1 << 20)
    watching.wait_for_names("a", "b")


def test_signs_of_life_are_given_and_stop_with_the_server(server, follow):
    heard, beats = [], []
    watching = follow(
        server, heard=lambda: heard.append(1), beat=lambda: beats.append(1), silence_s=0.2
    )
    watching.wait_for_open_watch()
    until(lambda: heard and beats)
    server.freeze()
    watching.wait_for_reconnect("silent")
    heard.clear()
    beats.clear()
    # The thread turns on; the server is not heard.
    until(lambda: len(beats) > 2)

    assert not heard


def test_endless_line_is_given_up(server, follow):
    watching = follow(server)
    watching.wait_for_open_watch()

    server.send_raw("services", b"x" * 9_000_000)

    watching.wait_for_reconnect("damaged")


@pytest.mark.parametrize(
    "status", [403, 429, 500, 503], ids=["forbidden", "too many", "internal", "unavailable"]
)
def test_error_answers_are_waited_out(server, follow, status):
    server.apply(builders.make_service("svc1"))
    server.fail(status, times=2)

    watching = follow(server)
    watching.wait_for_names("svc1")

    assert watching.reconnects("refused") == 2


def test_who_may_list_but_not_watch_lists_again_and_again(server, follow):
    server.apply(builders.make_service("svc1"))
    server.fail(403, verb="watch")

    watching = follow(server)
    watching.wait_for_names("svc1")
    server.apply(builders.make_service("svc2"))

    watching.wait_for_names("svc1", "svc2")


@pytest.mark.parametrize("streaming_lists", [True, False], ids=["streaming", "pages"])
def test_server_without_a_field_selector_for_services_is_listed_without(
    serve, follow, streaming_lists
):
    server = serve(service_fields=False, streaming_lists=streaming_lists)
    server.apply(builders.make_service("svc1"))

    watching = follow(server)
    watching.wait_for_names("svc1")
    watching.wait_for_open_watch()
    server.apply(builders.make_service("svc2"))

    watching.wait_for_names("svc1", "svc2")


def test_pauses_grow_and_are_spread(server):
    metrics = Metrics(CollectorRegistry())
    connection = api.connect(master="http://127.0.0.1:9", user_agent="test", metrics=metrics)
    watcher = watch.Watcher(
        "Service", connection, Shelf(), print, metrics, stop=threading.Event(), random=lambda: 0.5
    )

    class State:
        attempt_number = 1

    pauses = []
    for State.attempt_number in range(1, 8):
        pauses.append(round(watcher._pause(State), 2))

    assert pauses == [1.2, 2.4, 4.8, 9.6, 19.2, 22.5, 22.5]


def test_progress_makes_the_next_pause_short(server):
    metrics = Metrics(CollectorRegistry())
    connection = api.connect(master="http://127.0.0.1:9", user_agent="test", metrics=metrics)
    watcher = watch.Watcher(
        "Service", connection, Shelf(), print, metrics, stop=threading.Event(), random=lambda: 0.0
    )
    watcher._advance("7")

    class State:
        attempt_number = 9

    assert watcher._pause(State) == 0.8


# -- damage --------------------------------------------------------------------------------------


def test_garbage_once_is_transport_damage_and_loses_nothing(server, follow):
    watching = follow(server)
    watching.wait_for_open_watch()

    server.send_raw("services", b"\x00garbage\n")
    watching.wait_for_reconnect("damaged")
    server.apply(builders.make_service("svc1"))
    watching.wait_for_names("svc1")

    assert watching.problems == []
    assert watching.shelf.count("listed") == 1


def test_event_that_is_never_readable_is_left_out_and_told(server, follow):
    watching = follow(server)

    def is_told():
        server.send_raw("services", b'{"type":"ADDED","object":{]}\n')
        return watching.problems

    until(is_told)
    server.apply(builders.make_service("svc1"))
    watching.wait_for_names("svc1")

    assert watching.reconnects("damaged") == 1
    assert "cannot decode an event" in watching.problems[0].message


def test_half_an_event_is_asked_for_again(server, follow):
    watching = follow(server)
    watching.wait_for_open_watch()

    server.send_raw("services", event("ADDED", builders.make_service("half"))[:100], close=True)
    watching.wait_for_reconnect("cut")
    server.apply(builders.make_service("svc1"))
    watching.wait_for_names("svc1")

    assert watching.problems == []


def test_broken_chunk_is_survived(server, follow):
    watching = follow(server)
    watching.wait_for_open_watch()

    server.send_raw("services", b"not a chunk size\r\n", framed=False)
    watching.wait_for_reconnect("cut")
    server.apply(builders.make_service("svc1"))

    watching.wait_for_names("svc1")


def test_answer_that_is_no_http_is_survived(server, follow):
    server.apply(builders.make_service("svc1"))
    server.spoil(b"SSH-2.0-OpenSSH_9.2p1\r\n")

    watching = follow(server)
    watching.wait_for_names("svc1")

    assert watching.reconnects("unreachable") == 1


def spoiled(name):
    service = builders.make_service(name)
    service["spec"]["ports"][0]["port"] = "eighty"
    return service


@pytest.mark.parametrize("streaming_lists", [True, False], ids=["in a stream", "in pages"])
def test_bad_object_is_left_out_and_named_and_the_others_are_there(serve, follow, streaming_lists):
    server = serve(streaming_lists=streaming_lists)
    server.apply_many([spoiled("bad"), builders.make_service("good")])

    watching = follow(server)
    watching.wait_for_names("good")

    (problem,) = watching.problems
    assert (problem.kind, problem.namespace, problem.name, problem.field) == (
        "Service", "default", "bad", "spec.ports[0].port",
    )  # fmt: skip
    assert problem.message == "Expected `int | null`, got `str`"


def test_good_version_stays_when_the_object_turns_bad(server, follow):
    server.apply(builders.make_service("svc1"))
    watching = follow(server)
    watching.wait_for_names("svc1")

    server.apply(spoiled("svc1"))
    server.apply(builders.make_service("later"))
    watching.wait_for_names("svc1", "later")

    assert watching.shelf.objects["default", "svc1"].spec.ports[0].port == 80
    assert len(watching.problems) == 1


def test_good_version_stays_when_a_list_shows_the_object_bad(server, follow):
    server.apply_many([builders.make_service("svc1"), builders.make_service("gone")])
    watching = follow(server)
    watching.wait_for_names("svc1", "gone")

    server.stop()
    server.apply_many([spoiled("svc1"), builders.make_service("new")])
    server.delete("Service", "default", "gone")
    server.compact()
    server.start()
    watching.wait_for_names("svc1", "new")

    assert watching.shelf.objects["default", "svc1"].spec.ports[0].port == 80


def test_bad_object_can_be_deleted(server, follow):
    server.apply(builders.make_service("svc1"))
    watching = follow(server)
    watching.wait_for_names("svc1")
    server.apply(spoiled("svc1"))

    server.delete("Service", "default", "svc1")

    watching.wait_for_names()


def test_nothing_is_dropped_when_a_list_has_an_object_without_a_readable_name(serve, follow):
    server = serve(streaming_lists=False)
    server.apply(builders.make_service("svc1"))
    watching = follow(server)
    watching.wait_for_open_watch()
    nameless = builders.make_service("svc1")
    nameless["metadata"]["name"] = 5
    page = json.dumps({"metadata": {"resourceVersion": "9"}, "items": [nameless]}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(page)

    server.spoil(head + page, verb="list")
    server.send_raw("services", event("ERROR", {"code": 410}))
    until(lambda: len(watching.problems) == 1)
    watching.wait_for_open_watch()

    assert watching.shelf.names == {"svc1"}


# -- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["watching", "frozen", "down"])
def test_stops_within_two_seconds(server, follow, moment):
    watching = follow(server, pause_s=30.0)
    watching.wait_for_open_watch()
    if moment == "down":
        server.stop()
        watching.wait_for_reconnect("cut")
    if moment == "frozen":
        server.freeze()
        server.cut_watches()

    started = time.monotonic()
    watching.end()

    assert time.monotonic() - started < 2
    assert watching.failures == []


def test_stops_while_a_frozen_server_owes_the_first_answer(server, follow):
    server.freeze()
    watching = follow(server)
    server.wait_for(lambda: server.open_connections() == 1)

    started = time.monotonic()
    watching.end()

    assert time.monotonic() - started < 2


def test_unexpected_exception_ends_the_watcher(server, follow):
    class Full(Shelf):
        def listed(self, kind):
            raise MemoryError

    watching = follow(server)
    watching.wait_for_open_watch()
    watching.watcher._sink = Full()

    server.send_raw("services", event("ERROR", {"code": 410}))
    watching.thread.join(DEADLINE_S)

    assert [type(error) for error in watching.failures] == [MemoryError]


def test_lines_are_the_same_however_the_stream_is_cut_into_pieces(server):
    lines = [b"one", b"", b"x" * 1000, b"last"]
    stream = b"\n".join(lines) + b"\n"
    metrics = Metrics(CollectorRegistry())
    connection = api.connect(master="http://127.0.0.1:9", user_agent="test", metrics=metrics)
    watcher = watch.Watcher("Service", connection, Shelf(), print, metrics, stop=threading.Event())
    dice = random.Random(7)

    for _ in range(50):
        cuts = sorted(dice.randrange(len(stream)) for _ in range(dice.randrange(10)))
        pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

        assert list(watcher._lines(pieces)) == lines


def test_every_kind_has_a_type():
    assert set(watch._PATHS) == set(objects.TYPES)


# -- what is told of it ---------------------------------------------------------------------------


def test_who_asks_is_told_where_a_watch_stands(server, follow):
    server.apply(builders.make_service())
    watching = follow(server)
    watching.shelf.wait_for(lambda: watching.shelf.names)
    until(lambda: watching.watcher.state().resource_version)
    state = watching.watcher.state()

    assert (state.kind, state.objects, state.failing_for_s, state.error) == ("Service", 1, None, "")
    assert abs(time.time() - state.last_event_at) < 60
    assert 0 <= state.silent_for_s < 60


def test_a_watch_that_fails_says_for_how_long_and_why(server, follow):
    server.fail(503, times=None)
    watching = follow(server)
    until(lambda: watching.watcher.state().error)
    state = watching.watcher.state()

    assert state.failing_for_s >= 0
    assert "503" in state.error
    assert (state.objects, state.resource_version) == (0, "")
    assert (state.last_event_at, state.silent_for_s) == (None, None)
