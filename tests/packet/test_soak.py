"""Churn for a while: memory, descriptors and threads stay what they were, and rules right."""

import statistics
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import storm
from tests.support.duos import web
from tests.support.proxy import running

pytestmark = pytest.mark.packet

DEADLINE_S = 90
MIB = 1 << 20
# In the short form: what a process still takes after its first seconds, with room for a busy machine.
SHORT_GROWTH = 8 * MIB
LONG_GROWTH_PER_S = MIB / 600
# Connections to the API server and to us, and iptables programs, come and go.
DESCRIPTORS, THREADS = 24, 6


class Sample(NamedTuple):
    """The process at one moment."""

    at_s: float
    memory: int
    descriptors: int
    threads: int


def sample(pid):
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return Sample(
        time.monotonic(),
        int(status["VmRSS"].split()[0]) * 1024,
        len(list((proc / "fd").iterdir())),
        int(status["Threads"]),
    )


# Python keeps some of the tuples that come and go for later use, up to a few MiB, which takes it about ten
# minutes of churn.
@pytest.mark.parametrize(
    ("backend", "seconds", "warm_up_s"),
    [
        pytest.param("nft", 30.0, 10.0, id="half a minute on nft"),
        pytest.param("nft", 1800.0, 600.0, id="half an hour on nft", marks=pytest.mark.soak),
        pytest.param("legacy", 1800.0, 600.0, id="half an hour on legacy", marks=pytest.mark.soak),
    ],
)
@pytest.mark.timeout(2400)
def test_churn_leaves_the_process_as_it_was_and_the_rules_right(
    clean_lab, backend, api, tmp_path, seconds, warm_up_s
):
    kubeconfig = f"--kubeconfig={api.kubeconfig(tmp_path / 'kubeconfig')}"
    flags = (kubeconfig, f"--state-file={tmp_path / 'state'}", "--v=0")
    api.apply_many([item for number in storm.NUMBERS for item in web(number, *clean_lab.pods)])
    pause = threading.Event()
    with running(clean_lab, backend, tmp_path / "log", *flags) as proxy:
        proxy.wait_synced(DEADLINE_S)
        with storm.Storm(api, clean_lab.pods, seed=1) as churn:
            began = time.monotonic()
            samples = []
            while time.monotonic() - began < seconds:
                # Not to wait for something, but to let time pass: that is what is tested.
                pause.wait(1.0)
                assert proxy.process.poll() is None
                # Now and then all connections are lost as well.
                if len(samples) % 20 == 19:
                    api.cut_watches()
                if time.monotonic() - began >= warm_up_s:
                    samples.append(sample(proxy.process.pid))
        proxy.wait(lambda: proxy.plan(kubeconfig) == 0, DEADLINE_S)
        audited = proxy.metric("kubeproxy_audited_services_total")
        mismatches = proxy.metric("kubeproxy_audit_mismatches_total")

    slope, _ = statistics.linear_regression(
        [at.at_s for at in samples], [at.memory for at in samples]
    )
    descriptors = [at.descriptors for at in samples]
    threads = [at.threads for at in samples]
    print(
        f"{backend}: {churn.changes} changes, {slope * 600 / MIB:+.2f} MiB in 10 minutes, "
        f"{samples[-1].memory / MIB:.0f} MiB, descriptors {min(descriptors)}-{max(descriptors)}, "
        f"threads {min(threads)}-{max(threads)}, {audited:.0f} Services audited"
    )
    if seconds > 60:
        assert slope < LONG_GROWTH_PER_S
    assert samples[-1].memory - samples[0].memory < SHORT_GROWTH
    third = len(samples) // 3
    for counts, room in ((descriptors, DESCRIPTORS), (threads, THREADS)):
        assert max(counts) - min(counts) <= room
        # What is never given back raises the floor.
        assert min(counts[-third:]) <= min(counts[:third]) + 1
    assert churn.changes > 20 * seconds
    assert audited > 0
    assert mismatches == 0
