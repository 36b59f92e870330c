"""
The daemon's own promise: whole or gone. What it does on a kernel is in tests/packet.

Built here, but never run: running touches the host.
"""

import signal
import threading

import pytest
import structlog

from kubeproxy_py import config, daemon
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.flags import Settings
from kubeproxy_py.model import Node


@pytest.fixture
def settings(tmp_path):
    """Give settings with which a Daemon can be built without a cluster."""
    return Settings(config=KubeProxyConfiguration(), manifests=(str(tmp_path),))


@pytest.fixture
def built(settings, monkeypatch):
    """Give a Daemon that notes crashes, as it does while it runs."""
    built = daemon.Daemon(settings)
    monkeypatch.setattr(threading, "excepthook", built._note_crash)
    return built


def joined(built):
    for thread in built._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_thread_that_crashes_is_told_with_its_stack_and_stops_everything(built):
    def crash():
        raise ValueError("why")

    with structlog.testing.capture_logs() as logs:
        built._spawn("sync-IPv4", crash)
        joined(built)

    (entry,) = logs
    assert (entry["event"], entry["thread"]) == ("thread.crashed", "sync-IPv4")
    assert isinstance(entry["exc_info"], ValueError)
    assert built._stop.is_set()
    assert built._failure == "thread sync-IPv4 crashed: ValueError: why"


def test_a_thread_that_ends_unasked_stops_everything(built):
    built._spawn("manifests", lambda: None)
    joined(built)

    assert built._stop.is_set()
    assert built._failure == "thread manifests ended"


def test_a_thread_that_ends_when_asked_is_no_failure(built):
    built._spawn("manifests", lambda: built._stop.wait(10))
    built._stop.set()
    joined(built)

    assert built._failure is None


def test_the_first_failure_is_the_reason(built):
    built._fail("first")
    built._fail("second")

    assert built._failure == "first"


def test_a_signal_is_noted_while_the_main_thread_holds_every_lock(built):
    # As it may, between any two steps of waiting.
    thread = threading.Thread(target=built._stop_by_signal)
    thread.start()
    with built._stop._cond:
        built._note_signal(signal.SIGTERM, None)
        assert not built._stop._flag
    thread.join(10)

    assert built._stop.is_set()
    assert built._failure is None


@pytest.mark.parametrize(
    ("mode", "before", "after", "is_failure"),
    [
        ("NodeCIDR", ("10.0.0.0/24",), ("10.0.1.0/24",), True),
        ("NodeCIDR", ("10.0.0.0/24", "fd00::/64"), ("fd00::/64", "10.0.0.0/24"), True),
        ("NodeCIDR", ("10.0.0.0/24",), (), True),
        ("NodeCIDR", ("10.0.0.0/24",), ("10.0.0.0/24",), False),
        ("ClusterCIDR", ("10.0.0.0/24",), ("10.0.1.0/24",), False),
        # Still starting: what is there at the end of the wait counts.
        ("NodeCIDR", None, ("10.0.1.0/24",), False),
    ],
)
def test_changed_pod_cidrs_end_it_in_node_cidr_mode_alone(
    settings, mode, before, after, is_failure
):
    changed = config.replace(settings.config, "detect_local_mode", mode)
    built = daemon.Daemon(Settings(config=changed, manifests=settings.manifests))
    built._pod_cidrs = before
    built._node_changed(Node(name="node1", pod_cidrs=after))

    assert built._stop.is_set() is is_failure


def test_node_ips_that_change_are_told_and_nothing_more(built):
    built._node_ips, built._pod_cidrs = ("192.168.0.2",), ()
    with structlog.testing.capture_logs() as logs:
        built._node_changed(Node(name="node1", ips=("192.168.0.2",), zone="zone-b"))
        built._node_changed(Node(name="node1", ips=("192.168.0.3",)))

    assert [entry["event"] for entry in logs] == ["node.ips_changed"]
    assert not built._stop.is_set()


def test_an_interface_that_no_node_can_have_is_refused_before_anything_starts(settings):
    changed = config.replace(settings.config, "detect_local_mode", "BridgeInterface")
    changed = config.replace(changed, "detect_local.bridge_interface", "a b")

    with pytest.raises(ConfigError, match="bridgeInterface"):
        daemon.Daemon(Settings(config=changed, manifests=settings.manifests))


def test_a_configuration_file_that_is_gone_is_named(settings, tmp_path):
    path = str(tmp_path / "gone.yaml")
    built = daemon.Daemon(
        Settings(config=settings.config, manifests=settings.manifests, config_file=path)
    )

    with pytest.raises(ConfigError, match=f"^cannot watch configuration file {path}: "):
        built._open_config_file()


class Notes:
    """What systemd is told."""

    watchdog_s = None

    def __init__(self):
        self.alive_count = 0

    def alive(self):
        self.alive_count += 1


def test_systemd_is_not_told_that_all_is_well_while_a_thread_hangs(built):
    notes = built._notifier = Notes()
    built._threads_alive.expect("watch-Service", 1000.0)
    built._rest(0.0)
    assert notes.alive_count == 1
    built._threads_alive.expect("sync-IPv4", -1.0)
    built._rest(0.0)

    assert notes.alive_count == 1


def test_invalid_objects_count_from_zero_so_that_an_alert_sees_the_first(built):
    sample = built._metrics.registry.get_sample_value

    assert sample("kubeproxy_invalid_objects_total", {"kind": "EndpointSlice"}) is not None
