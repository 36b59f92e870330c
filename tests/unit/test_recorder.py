"""Events, posted to a real API server on loopback."""

import threading
import time
from collections import deque
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kubeproxy_py import api
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.recorder import Recorder
from tests.support import builders
from tests.support.api_server import ApiServer

# 2026-11-21T02:55:00.123456789Z
NOW_NS = 1_795_229_700_123_456_789


@pytest.fixture
def server():
    with ApiServer() as server:
        yield server


@pytest.fixture
def record(server):
    """Return a function that makes a Recorder, not started; it is stopped in the end."""
    with ExitStack() as stack:

        def record(**settings):
            metrics = Metrics(CollectorRegistry())
            connection = api.connect(master=server.url, user_agent="test", metrics=metrics)
            stack.callback(connection.close)
            recorder = Recorder(
                connection, host="vm", **{"now_ns": lambda: NOW_NS, "retry_s": 0.01, **settings}
            )
            stack.callback(recorder.stop)
            return recorder

        yield record


def starting(recorder, node="node1", note=""):
    recorder.node_event(
        node, event_type="Normal", reason="Starting", action="StartKubeProxy", note=note
    )


def wait_for_events(server, count):
    server.wait_for(lambda: server.count("create", "events") >= count)
    deadline = time.monotonic() + 5
    tick = threading.Event()
    while len(events := server.objects("Event")) < count:
        assert time.monotonic() < deadline, events
        tick.wait(0.005)
    return events


def test_node_event_has_the_shape_of_kube_proxys(server, record):
    recorder = record()
    recorder.start()

    starting(recorder)

    (event,) = wait_for_events(server, 1)
    metadata = event.pop("metadata")
    assert (metadata["name"], metadata["namespace"]) == (f"node1.{NOW_NS:x}", "default")
    assert event == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "eventTime": "2026-11-21T02:55:00.123456Z",
        "reportingController": "kube-proxy",
        "reportingInstance": "kube-proxy-vm",
        "action": "StartKubeProxy",
        "reason": "Starting",
        "regarding": {"kind": "Node", "apiVersion": "v1", "name": "node1", "uid": "node1"},
        "note": "",
        "type": "Normal",
    }


def test_service_event_stands_in_the_services_namespace(server, record):
    recorder = record()
    recorder.start()

    recorder.service_event(
        "shop", "web", event_type="Warning", reason="FailedToStartServiceHealthcheck",
        action="Listen", note="node n failed",
    )  # fmt: skip

    (event,) = wait_for_events(server, 1)
    assert event["metadata"]["namespace"] == "shop"
    assert event["regarding"] == {
        "kind": "Service", "apiVersion": "v1", "namespace": "shop", "name": "web", "uid": "",
    }  # fmt: skip
    assert event["note"] == "node n failed"


def test_service_event_names_the_uid_that_kubectl_describe_asks_for(server, record):
    service = server.apply(builders.make_service("web", namespace="shop"))
    recorder = record()
    recorder.start()

    recorder.service_event("shop", "web", event_type="Warning", reason="R", action="A")

    (event,) = wait_for_events(server, 1)
    assert event["regarding"]["uid"] == service["metadata"]["uid"]


def test_who_may_not_list_services_may_still_post_events(server, record):
    server.apply(builders.make_service("web", namespace="shop"))
    server.fail(403, resource="services")
    recorder = record()
    recorder.start()

    recorder.service_event("shop", "web", event_type="Warning", reason="R", action="A")

    (event,) = wait_for_events(server, 1)
    assert event["regarding"]["uid"] == ""


class Clock:
    """Seconds that a test moves on, and the wall clock that goes with them."""

    def __init__(self):
        self.now = 100.0

    def settings(self):
        return {"clock": lambda: self.now, "now_ns": lambda: int(self.now * 1e9)}

    def move(self, recorder, seconds):
        """Move on, and wake whoever waits by the old time."""
        with recorder._changed:
            self.now += seconds
            recorder._changed.notify_all()


@pytest.fixture
def clock():
    return Clock()


def series_of(server):
    return [event.get("series") for event in server.objects("Event")]


def wait_until(condition):
    deadline = time.monotonic() + 5
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        tick.wait(0.005)


def test_what_comes_again_is_counted_on_the_first_event(server, record, clock):
    recorder = record(**clock.settings())
    recorder.start()
    starting(recorder)
    wait_for_events(server, 1)
    clock.move(recorder, 1)
    starting(recorder)

    wait_until(
        lambda: (
            series_of(server) == [{"count": 2, "lastObservedTime": "1970-01-01T00:01:41.000000Z"}]
        )
    )


def test_further_repetitions_are_posted_when_it_has_been_quiet(server, record, clock):
    recorder = record(**clock.settings())
    recorder.start()
    starting(recorder)
    wait_for_events(server, 1)
    for _ in range(5):
        clock.move(recorder, 10)
        starting(recorder)
    wait_until(lambda: server.count("patch", "events") == 1)
    starting(recorder)
    clock.move(recorder, 359)
    assert server.count("patch", "events") == 1

    clock.move(recorder, 1)
    wait_until(lambda: series_of(server)[0]["count"] == 7)


def test_what_comes_all_the_time_is_posted_every_half_hour(server, record, clock):
    recorder = record(**clock.settings())
    recorder.start()
    starting(recorder)
    wait_for_events(server, 1)
    for _ in range(33):
        clock.move(recorder, 60)
        starting(recorder)
        wait_until(lambda: server.count("patch", "events") >= 1)

    wait_until(lambda: server.count("patch", "events") == 2)
    assert 29 <= series_of(server)[0]["count"] <= 34


def test_repetitions_before_it_could_be_posted_are_posted_with_it(server, record):
    recorder = record()
    for _ in range(3):
        starting(recorder)
    recorder.start()

    (event,) = wait_for_events(server, 1)
    assert event["series"]["count"] == 3


def test_a_series_goes_on_though_its_event_has_expired(server, record, clock):
    recorder = record(**clock.settings())
    recorder.start()
    starting(recorder)
    (event,) = wait_for_events(server, 1)
    server.delete("Event", event["metadata"]["namespace"], event["metadata"]["name"])
    starting(recorder)

    wait_until(lambda: server.count("create", "events") == 2)
    wait_until(
        lambda: (
            series_of(server) == [{"count": 2, "lastObservedTime": "1970-01-01T00:01:40.000000Z"}]
        )
    )


def test_repetition_after_six_minutes_is_another_event(record, clock):
    recorder = record(**clock.settings())
    starting(recorder)
    clock.now += 360
    starting(recorder)

    assert len(recorder._queue) == 2


def test_many_different_events_about_one_object_are_too_many(record, clock):
    recorder = record(**clock.settings())
    for number in range(30):
        starting(recorder, note=str(number))
    assert (len(recorder._queue), recorder._dropped) == (25, 5)

    starting(recorder, node="node2")
    clock.now += 300
    for number in range(2):
        starting(recorder, note=f"later {number}")
    assert (len(recorder._queue), recorder._dropped) == (27, 6)


def test_what_is_remembered_is_bounded(record, clock):
    recorder = record(**clock.settings())
    for number in range(2000):
        starting(recorder, node=f"node{number}")

    assert len(recorder._series) <= 500
    assert len(recorder._budgets) <= 500


def test_what_is_over_is_forgotten(record, clock):
    recorder = record(**clock.settings())
    recorder._queue = deque(maxlen=0)
    starting(recorder)
    clock.now += 360
    starting(recorder, node="node2")

    assert len(recorder._series) == 1


def test_other_notes_and_objects_are_other_events(server, record):
    recorder = record()
    starting(recorder)
    starting(recorder, note="again")
    starting(recorder, node="node2")

    assert len(recorder._queue) == 3


def test_latest_hundred_events_are_kept_and_the_loss_is_told(server, record):
    moments = iter(range(1000))
    recorder = record(now_ns=lambda: next(moments))
    for n in range(103):
        starting(recorder, node=f"node{n}")

    with capture_logs() as logs:
        recorder.start()
        events = wait_for_events(server, 100)

    names = {event["regarding"]["name"] for event in events}
    assert names == {f"node{n}" for n in range(3, 103)}
    assert [log["count"] for log in logs if log["event"] == "recorder.events_dropped"] == [3]


def test_event_is_posted_once_the_server_is_back(server, record):
    server.stop()
    recorder = record()
    recorder.start()
    starting(recorder)

    server.start()

    wait_for_events(server, 1)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_event_is_posted_again_when_the_server_is_overwhelmed(server, record, status):
    server.fail(status, verb="create", times=2)
    recorder = record()
    recorder.start()

    starting(recorder)

    wait_for_events(server, 1)


def test_refused_event_is_dropped_and_the_next_one_is_posted(server, record):
    server.fail(403, verb="create", times=1)
    moments = iter(range(1000))
    recorder = record(now_ns=lambda: next(moments))
    recorder.start()

    starting(recorder, note="refused")
    starting(recorder, note="taken")

    server.wait_for(lambda: server.count("create") == 2)
    (event,) = wait_for_events(server, 1)
    assert event["note"] == "taken"


def test_long_note_is_cut_to_what_the_server_takes(server, record):
    recorder = record()

    starting(recorder, note="é" * 600)

    (series,) = recorder._queue
    assert series.event["note"] == "é" * 512


def test_without_a_connection_events_go_nowhere():
    recorder = Recorder(None, host="vm")
    recorder.start()
    starting(recorder)
    recorder.stop()

    assert not recorder._queue


def test_stops_while_the_server_is_frozen(server, record):
    server.freeze()
    recorder = record()
    recorder.start()
    starting(recorder)
    server.wait_for(lambda: server.open_connections() == 1)

    started = time.monotonic()
    recorder.stop(timeout_s=0.1)
    recorder._connection.close()
    recorder._thread.join(2)

    assert time.monotonic() - started < 2
    assert not recorder._thread.is_alive()
