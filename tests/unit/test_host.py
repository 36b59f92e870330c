"""What is learned of this host, as far as no kernel is needed for it."""

import gc
import socket
import sys

import pytest
import structlog

from kubeproxy_py import host
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "name"),
    [("node1", "node1"), ("  Node1.Example.COM ", "node1.example.com")],
)
def test_the_node_s_name_is_lower_case_without_blanks(override, name):
    assert host.node_name(override) == name


def test_without_an_override_the_host_s_own_name_is_the_node_s():
    assert host.node_name("") == socket.gethostname().lower()


def test_a_name_of_blanks_is_none():
    with pytest.raises(ConfigError, match="empty hostname is invalid"):
        host.node_name("  ")


class Waits:
    """Counts how long was waited, without waiting."""

    def __init__(self, *, is_stopped=False):
        self.lengths = []
        self._is_stopped = is_stopped

    def __call__(self, seconds):
        self.lengths.append(seconds)
        return self._is_stopped


def test_what_is_true_is_not_waited_for():
    waits = Waits()

    assert host.wait_until(lambda: True, waits, 30)
    assert waits.lengths == []


def test_it_is_looked_at_once_a_second():
    waits = Waits()
    answers = iter([False, False, True])

    assert host.wait_until(lambda: next(answers), waits, 30)
    assert waits.lengths == [1.0, 1.0]


def test_without_patience_there_is_one_look():
    waits = Waits()

    assert not host.wait_until(lambda: False, waits, 0)
    assert waits.lengths == []


def test_waiting_ends_early_when_it_is_time_to_stop():
    waits = Waits(is_stopped=True)

    assert not host.wait_until(lambda: False, waits, 30)
    assert waits.lengths == [1.0]


def test_an_unknown_node_ip_is_told():
    with structlog.testing.capture_logs() as logs:
        host.warn_if_unknown(KubeProxyConfiguration(), is_known=False)
        host.warn_if_unknown(KubeProxyConfiguration(), is_known=True)

    assert [entry["event"] for entry in logs] == ["node.ip_unknown"]
    assert "--bind-address" in logs[0]["message"]


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_a_backend_that_was_asked_for_is_not_looked_for(backend):
    # The unit tests' guard against programs is the proof.
    assert host.choose_backend(backend) == backend


def test_releasing_memory_is_harmless():
    assert host.release_memory() is None


def test_cycles_are_looked_for_seldom_and_threads_wait_for_each_other_shortly():
    before = gc.get_threshold(), sys.getswitchinterval()
    try:
        host.tune_interpreter()

        assert gc.get_threshold()[0] >= 10_000
        assert sys.getswitchinterval() < 0.001
    finally:
        gc.set_threshold(*before[0])
        sys.setswitchinterval(before[1])


def test_giving_memory_back_leaves_nothing_for_a_look_for_cycles():
    host.release_memory()
    gc.collect()
    for _ in range(3):
        host.release_memory()

    assert gc.collect() == 0
