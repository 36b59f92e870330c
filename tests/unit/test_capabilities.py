"""Nothing is written before a probe has found that it may be: how long that lasts, and what is said."""

import pytest
from structlog.testing import capture_logs

from kubeproxy_py.capabilities import Prober
from kubeproxy_py.errors import IptablesError, LockTimeout
from tests.support.fake_iptables import FakeIptables


class World:
    """A Prober, and what happens while it waits."""

    def __init__(self, metrics):
        self.kernel = FakeIptables()
        self.waits = []
        self.meanwhile = []
        self.has_counters = True
        self.metrics = metrics
        self.prober = Prober(
            self.kernel, metrics, ensure_counters=lambda: self.has_counters, wait=self._wait
        )

    def _wait(self, seconds):
        self.waits.append((seconds, self.prober.refusal))
        if not self.meanwhile:
            return True
        self.meanwhile.pop(0)()
        return False

    def run(self):
        with capture_logs() as logs:
            found = self.prober.run()
        return found, [(line["event"], line.get("capability")) for line in logs]

    def has(self, name):
        return self.metrics.registry.get_sample_value(
            "kubeproxy_iptables_capability", {"capability": name, "ip_family": "IPv4"}
        )


@pytest.fixture
def world(metrics):
    return World(metrics)


def test_a_host_that_has_everything_is_not_waited_for(world):
    found, logs = world.run()

    assert (found.lacks, logs, world.waits) == (frozenset(), [], [])
    assert (world.has("recent"), world.has("comment")) == (1, 1)


def test_what_is_missing_is_told_with_what_follows_and_is_no_reason_to_wait(world):
    world.kernel.refuses = lambda line: "-m recent" in line
    world.has_counters = False
    found, logs = world.run()

    assert found.lacks == {"recent", "nfacct"}
    assert logs == [("capability.missing", "recent"), ("capability.missing", "nfacct")]
    assert (world.has("recent"), world.has("nfacct"), world.has("sctp")) == (0, 0, 1)


def test_a_host_that_cannot_be_programmed_is_asked_until_it_can(world):
    world.kernel.refuses = lambda line: "--comment" in line

    def load_module():
        world.kernel.refuses = lambda line: False

    world.meanwhile = [*[lambda: None] * 6, load_module]
    found, logs = world.run()

    assert found.lacks == frozenset()
    assert [wait for wait, _ in world.waits] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert all("without comment" in reason for _, reason in world.waits)
    assert logs == [("capability.missing", "comment"), ("capability.refused", None)]
    assert world.prober.refusal == ""


def test_what_reads_back_otherwise_is_told_and_stops_everything(world):
    world.kernel.misreads = lambda text: text.replace("-m mark ! --mark 0x4000/0x4000 ", "")
    found, logs = world.run()

    assert found is None
    assert logs == [("capability.missing", "mark"), ("capability.refused", None)]
    assert "back as `-j RETURN`" in world.prober.refusal


def test_a_lock_that_is_held_is_tried_again_soon(world):
    world.kernel.fail_restore(LockTimeout("held by iptables"))
    world.kernel.fail_restore(LockTimeout("held by iptables"))
    world.meanwhile = [lambda: None] * 2
    found, logs = world.run()

    assert found is not None
    assert world.waits == [(0.2, "held by iptables")] * 2
    assert logs == []


def test_a_probe_that_fails_is_a_reason_to_wait(world):
    # Neither the rules nor their removal.
    world.kernel.fail_restore(IptablesError("no"))
    world.kernel.fail_restore(IptablesError("no"))
    world.meanwhile = [lambda: None]
    found, logs = world.run()

    assert found is not None
    assert logs == [("capability.refused", None)]
