"""``top`` on a real kernel, without a daemon: rules as they are, real traffic, a terminal."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager

import pytest

from kubeproxy_py.model import IPFamily
from kubeproxy_py.ruleset import Ruleset
from tests.support import states
from tests.support.addresses import PLANS
from tests.support.builders import make_endpoint, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.planning import planned
from tests.support.traffic import Ticker, conversation

pytestmark = pytest.mark.packet

COMMAND = (sys.executable, "-m", "kubeproxy_py", "top", "--interval=0.5")


@pytest.fixture
def programmed(clean_lab, servers, backend):
    """Give the lab with a Service that answers, one that is idle, and one that refuses."""
    for family in IPFamily:
        plan = PLANS[family]
        pods = [make_endpoint(pod.address(family)) for pod in clean_lab.pods[:2]]
        items = [
            make_service("web", cluster_ip=plan.cluster_ip),
            make_slice("web", endpoints=pods, address_type=family.value),
            make_service("idle", cluster_ip=plan.cluster_ip[:-1] + "2"),
            make_slice("idle", endpoints=pods[:1], address_type=family.value),
            make_service("none", namespace="other", cluster_ip=plan.cluster_ip[:-1] + "3"),
        ]
        ruleset = Ruleset(states.golden_options(family))
        ruleset.apply(states.service_states(items, family))
        restore = iptables_programs(backend, family).restore
        for batch in planned(ruleset, {}):
            text = re.sub(r"-m nfacct \S+ \S+ ", "", batch.render())
            clean_lab.node.run([restore, "--noflush"], input=text)
    return clean_lab


def top(lab, backend, *arguments, check=True):
    argv = [*COMMAND, f"--iptables-backend={backend}", *arguments]
    return lab.node.run(argv, check=check)


@contextmanager
def traffic(lab, family):
    plan = PLANS[family]
    with (
        Ticker(lab.node, plan.cluster_ip, 80, interval_s=0.01) as ticker,
        Ticker(lab.local_pods[0], plan.cluster_ip[:-1] + "3", 80, interval_s=0.01) as refused,
    ):
        ticker.wait_for_ticks(5)
        refused.wait_for_ticks(5)
        yield ticker


def test_once_tells_rates_of_both_families_for_scripts(programmed, backend, family):
    with traffic(programmed, family) as ticker:
        began = time.monotonic()
        found = json.loads(top(programmed, backend, "--once", "--output=json").stdout)
        ticks = len(ticker.since(began))
    web, none, idle = (
        next(each for each in found["services"] if each["service"] == name)
        for name in ("web", "none", "idle")
    )

    assert found["services"][0] == web
    assert 0 < web["connectionsPerSecond"] * found["seconds"] <= ticks + 1
    assert web["share"] == 1
    assert (web["endpoints"], idle["endpoints"], none["endpoints"]) == (2, 1, 0)
    assert none["refusedPacketsPerSecond"] > 0
    assert none["namespace"] == "other"
    assert idle["connections"] == 0


def test_totals_of_both_families_are_exact(programmed, backend):
    for family in IPFamily:
        for _ in range(20):
            # Closed by the client: a server's TIME_WAIT may cost a SYN more, which is counted.
            with conversation(programmed.node, PLANS[family].cluster_ip, 80) as talk:
                assert talk.ask().is_answered
    argv = ("--once", "--output=json", "--namespace=default")
    found = json.loads(top(programmed, backend, *argv).stdout)

    assert [each["service"] for each in found["services"]] == ["web", "idle"]
    assert found["services"][0]["connections"] == 40
    assert found["connectionsPerSecond"] == 0


def test_a_table_has_a_line_for_each_service(programmed, backend):
    with traffic(programmed, IPFamily.V4):
        told = top(programmed, backend, "--once", "--sort=name").stdout
    lines = [line.split() for line in told.splitlines() if "/" in line]

    assert [line[0] for line in lines[-3:]] == ["default/idle", "default/web", "other/none"]
    assert "100%" in told


def test_on_a_terminal_it_is_live_until_interrupted(programmed, backend):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    process = programmed.node.popen(
        # Who starts the tests in the background has SIGINT ignored, by them and all they start.
        ["env", "--default-signal=INT", *COMMAND, f"--iptables-backend={backend}"],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.DEVNULL,
        env=programmed.env | {"TERM": "xterm-256color"},
    )
    os.close(slave)
    try:
        with traffic(programmed, IPFamily.V4):
            screen = wait_for_screen(master, r"([1-9][\d.]*) new connections/s to 3 Service ports")
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
    finally:
        process.kill()
        os.close(master)

    last = screen.rpartition("new connections/s")[2]
    assert re.search(r"default/web +-/tcp +[1-9][\d.]* +\d+ +2 +0\.0 +█+ +100%", last)
    assert re.search(r"other/none +-/tcp +0\.0 +0 +0 +[1-9]", last)


def wait_for_screen(master, pattern, timeout_s=60.0):
    """Return what was written to the terminal, without colours, when *pattern* and more stood there."""
    seen, deadline = "", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            seen += os.read(master, 65536).decode(errors="replace")
        elif re.search(pattern, plain(seen)):
            return plain(seen)
    raise AssertionError(f"the screen never had {pattern!r}:\n{plain(seen)[-3000:]}")


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_without_a_terminal_live_is_refused(programmed, backend):
    done = top(programmed, backend, check=False)

    assert done.returncode == 1
    assert "--once" in done.stderr
