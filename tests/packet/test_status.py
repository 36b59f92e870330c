"""What the running daemon says of itself on its socket, and to whom."""

import json
import tempfile
from pathlib import Path

import pytest

from tests.support.api_server import ApiServer
from tests.support.builders import cluster, make_node
from tests.support.proxy import Proxy, running

pytestmark = pytest.mark.packet


@pytest.fixture
def api(clean_lab):
    with clean_lab.node.entered():
        server = ApiServer()
    with server:
        server.apply(make_node("node1"))
        server.apply_many(cluster(5, 2))
        yield server


@pytest.fixture
def start(clean_lab, backend, api, tmp_path):
    """Return a context in which the daemon runs."""
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")

    def start(*arguments):
        log = tmp_path / "log"
        return running(clean_lab, backend, log, f"--kubeconfig={kubeconfig}", *arguments)

    return start


def document(proxy: Proxy) -> dict:
    return json.loads(proxy.ask("--output=json").stdout)


def test_a_daemon_that_is_well_says_so_in_text_and_json(start, backend):
    with start() as proxy:
        proxy.wait_synced()
        asked = proxy.ask()
        found = document(proxy)

    assert (asked.returncode, asked.stdout.splitlines()[0]) == (0, "node1: ready")
    assert (found["state"], found["backend"], found["node"]["isEligible"]) == (
        "ready",
        backend,
        True,
    )
    v4 = found["families"][0]
    assert (v4["ipFamily"], v4["services"], v4["endpoints"]) == ("IPv4", 5, 10)
    assert {watch["kind"]: watch["objects"] for watch in found["watches"]} == {
        "Node": 1,
        "Service": 5,
        "EndpointSlice": 5,
    }


def test_before_services_are_listed_it_says_what_is_missing(start, api):
    api.fail(503, resource="services", times=None)
    with start() as proxy:
        proxy.wait(lambda: bool(proxy.events("watch.failed")))
        asked = proxy.ask()
        found = document(proxy)

    assert asked.returncode == 2
    assert asked.stdout.startswith(
        "node1: not ready\n  programmed-IPv4: not synced since the start\n"
    )
    assert found["families"][0]["lastSync"] is None
    assert [watch["kind"] for watch in found["watches"] if watch["error"]] == ["Service"]


def test_while_it_waits_for_its_node_it_can_be_asked(start, api):
    api.fail(503, resource="nodes", times=None)
    with start() as proxy:
        proxy.wait(lambda: bool(proxy.events("watch.failed")))
        found = document(proxy)

    assert (found["state"], found["phase"]) == ("not ready", "waiting for Node node1")


def test_an_api_server_that_is_away_is_told_and_is_no_reason_to_be_unready_at_once(start, api):
    with start() as proxy:
        proxy.wait_synced()
        api.stop()
        proxy.wait(lambda: all(watch["error"] for watch in document(proxy)["watches"]))
        asked = proxy.ask()
        found = document(proxy)

    assert all(watch["failingSeconds"] >= 0 for watch in found["watches"])
    assert found["families"][0]["services"] == 5
    # After a minute of it the state is degraded; on a slow machine it may be by now.
    assert (found["state"], asked.returncode) in {("ready", 0), ("degraded", 2), ("degraded", 0)}


def test_nobody_but_root_is_answered(start):
    other = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    # Unlike a test's own directory, one that everybody may enter.
    with tempfile.TemporaryDirectory(prefix="kpp-") as directory:
        Path(directory).chmod(0o755)
        socket = Path(directory) / "status.sock"
        with start(f"--status-socket={socket}") as proxy:
            proxy.wait_synced()
            shut_out = proxy.ask(f"--status-socket={socket}", prefix=other)
            # Even if somebody gives the file away, the daemon looks at who connects.
            socket.chmod(0o666)
            refused = proxy.ask(f"--status-socket={socket}", prefix=other)

    assert (shut_out.returncode, refused.returncode) == (1, 1)
    assert "only root may open it" in shut_out.stderr
    assert "only root may ask" in refused.stderr


def test_what_others_changed_is_told_with_who_it_was(start, clean_lab, backend):
    with start() as proxy:
        proxy.wait_synced()
        clean_lab.node.run([f"iptables-{backend}", "-t", "nat", "-F", "KUBE-MARK-MASQ"])
        proxy.wait(lambda: bool(proxy.events("drift.repaired")))
        proxy.wait(lambda: bool(document(proxy)["families"][0]["repairs"]))
        (repair,) = document(proxy)["families"][0]["repairs"]

    assert (repair["table"], repair["kind"], repair["chains"]) == (
        "nat",
        "chain_flushed",
        ["KUBE-MARK-MASQ"],
    )


def test_after_its_end_nobody_answers_and_the_socket_is_gone(start):
    with start() as proxy:
        proxy.wait_synced()
        assert proxy.status_socket.exists()
        proxy.end(15)
        asked = proxy.ask()

        assert not proxy.status_socket.exists()
    assert asked.returncode == 1
    assert "nobody listens there" in asked.stderr
