"""The tests of e2e/ on two nodes of the lab: their bodies run for real, with the daemon on both nodes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.packet

ROOT = Path(__file__).parents[2]
# Two nodes, clients in Pods and on hosts, TCP and UDP, in seconds; `make soak` runs all.
FEW = (
    "test_should_implement_node_port_and_health_check_node_port_correctly"
    "_when_external_traffic_policy_changes[IPv6]",
    "test_should_be_able_to_preserve_udp_traffic_when_initial_unready_endpoints_get_ready[IPv4]",
)
LIMIT_S = 1500.0  # all take 5 minutes on an idle machine of two cores


def run(backend, *arguments):
    """Run pytest on e2e/ and return its last line; its failures are this test's."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "e2e",
            "-q",
            "-p",
            "tests.support.lab_cluster",
            *arguments,
        ],
        env=os.environ | {"LAB_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_a_few_pass_on_the_lab():
    chosen = " or ".join(f"({_expression(name)})" for name in FEW)

    assert run("nft", "-k", chosen).startswith(f"{len(FEW)} passed")


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S + 60)
def test_all_pass_on_the_lab(backend):
    last = run(backend, "--disruptive")

    assert "skipped" not in last
    assert int(last.split()[0]) >= 100


def _expression(name):
    # -k knows no brackets: a test's name and its parameters are words of the expression.
    return name.replace("[", " and ").replace("]", "")
