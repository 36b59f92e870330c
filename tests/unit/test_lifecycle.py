"""Whole or gone: what ends the process, and in which order things are undone."""

import signal
import threading

import pytest
from structlog.testing import capture_logs

from kubeproxy_py.health import ProxyHealth
from kubeproxy_py.lifecycle import Lifecycle


class Notes:
    """What systemd is told."""

    watchdog_s = None

    def __init__(self):
        self.alive_count = 0

    def alive(self):
        self.alive_count += 1


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def health():
    return ProxyHealth(30.0)


@pytest.fixture
def life(notes, health, monkeypatch):
    """Give a Lifecycle that notes crashes, as it does while the daemon runs."""
    life = Lifecycle(notes, health)
    monkeypatch.setattr(threading, "excepthook", life._note_crash)
    return life


def joined(life):
    for thread in life._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_thread_that_crashes_is_told_with_its_stack_and_stops_everything(life):
    def crash():
        raise ValueError("why")

    with capture_logs() as logs:
        life.spawn("sync-IPv4", crash)
        joined(life)

    (entry,) = logs
    assert (entry["event"], entry["thread"]) == ("thread.crashed", "sync-IPv4")
    assert isinstance(entry["exc_info"], ValueError)
    assert life.stop.is_set()
    assert life.failure == "thread sync-IPv4 crashed: ValueError: why"


def test_a_thread_that_ends_unasked_stops_everything(life):
    life.spawn("manifests", lambda: None)
    joined(life)

    assert life.stop.is_set()
    assert life.failure == "thread manifests ended"


def test_a_thread_that_ends_when_asked_is_no_failure(life):
    life.spawn("manifests", lambda: life.stop.wait(10))
    life.shut_down()
    joined(life)

    assert life.failure is None


def test_the_first_failure_is_the_reason(life):
    life.fail("first")
    life.fail("second")

    assert life.failure == "first"


def test_a_signal_is_noted_while_the_main_thread_holds_every_lock(life):
    # As it may, between any two steps of waiting.
    thread = threading.Thread(target=life._stop_by_signal)
    thread.start()
    with life.stop._cond:
        life._note_signal(signal.SIGTERM, None)
        assert not life.stop._flag
    thread.join(10)

    assert life.stop.is_set()
    assert life.failure is None


def test_what_was_begun_last_is_undone_first_and_told_to_stop_before(life):
    undone = []
    for name in ("http", "recorder", "loop"):
        life.at_end(lambda name=name: undone.append((name, life.stop.is_set())))
    life.shut_down()

    assert undone == [("loop", True), ("recorder", True), ("http", True)]


def test_systemd_is_not_told_that_all_is_well_while_a_thread_hangs(life, notes, monkeypatch):
    life.expect_thread("watch-Service")
    life.rest(0.0)
    assert notes.alive_count == 1
    monkeypatch.setattr("kubeproxy_py.lifecycle._LONGEST_TURN_S", -1.0)
    life.expect_thread("sync-IPv4")
    life.rest(0.0)

    assert notes.alive_count == 1


def test_a_thread_that_hangs_is_named_on_livez(life, health, monkeypatch):
    life.expect_thread("watch-Service")
    monkeypatch.setattr("kubeproxy_py.lifecycle._LONGEST_TURN_S", -1.0)
    life.expect_thread("sync-IPv4")
    found = health.liveness()

    assert found["watch-Service"] is None
    assert "no sign of life" in found["sync-IPv4"]


def test_resting_ends_as_soon_as_it_is_time_to_stop(life):
    assert not life.rest(0.0)
    life.stop.set()
    assert life.rest(1000.0)
