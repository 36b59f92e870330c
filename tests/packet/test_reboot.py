"""A node that comes up without an API server: Services answer from the state file."""

import functools
import json
import shutil
import signal
import time

import pytest

from tests.support.duos import addresses, answers, names, web
from tests.support.proxy import HEALTH_PORT, own_rules

pytestmark = pytest.mark.packet

# Grace, start of Python and of iptables take about three on an idle machine.
DEADLINE_S = 60


@pytest.fixture
def start(start, tmp_path):
    """Let the daemon have a state file."""
    return functools.partial(start, f"--state-file={tmp_path / 'state'}")


def test_a_node_that_reboots_without_an_api_server_has_its_services(
    start, api, clean_lab, servers, tmp_path
):
    client, near, far = clean_lab.local_pods[0], clean_lab.local_pods[1], clean_lab.remote_pods[0]
    api.apply_many([*web(1, far), *web(2, near)])
    before = start()
    before.wait_synced()
    before.wait((tmp_path / "state").exists)
    before.end(signal.SIGKILL)
    # The reboot.
    api.stop()
    clean_lab.reset_rules()
    began = time.monotonic()
    proxy = start()
    proxy.wait(lambda: answers(client, 1) == addresses(far), DEADLINE_S)
    took_s = time.monotonic() - began

    proxy.wait_synced()
    assert proxy.metric("kubeproxy_snapshot_in_use") == 2
    assert proxy.events("snapshot.offered")
    told = json.loads(proxy.ask("--output=json").stdout)
    assert told["stateFile"]["isInUse"]
    assert [family["isRestored"] for family in told["families"]] == [True, True]
    status, body = proxy.get("/readyz", HEALTH_PORT)
    assert status == 503
    assert "from the state file of" in json.loads(body)["reasons"][0]
    assert proxy.get("/healthz", HEALTH_PORT)[0] == 200
    print(f"Services answered {took_s:.1f} s after the start")

    # The API server comes back, and other objects with it.
    for name in names(2).values():
        api.delete("Service", "default", name)
    api.apply_many([*web(1, near), *web(3, far)])
    api.start()
    proxy.wait(lambda: answers(client, 3) == addresses(far), DEADLINE_S)
    proxy.wait(lambda: proxy.get("/readyz", HEALTH_PORT)[0] == 200, DEADLINE_S)

    assert answers(client, 1) == addresses(near)
    assert set(answers(client, 2).values()) == {""}
    proxy.wait(lambda: proxy.metric("kubeproxy_snapshot_in_use") == 0)


def test_rules_that_are_there_are_never_rolled_back_but_a_flush_is_mended(
    start, api, clean_lab, servers, backend, tmp_path
):
    client, near, far = clean_lab.local_pods[0], clean_lab.local_pods[1], clean_lab.remote_pods[0]
    api.apply_many(web(1, near))
    first = start()
    first.wait_synced()
    first.wait((tmp_path / "state").exists)
    shutil.copy(tmp_path / "state", tmp_path / "old")
    api.apply_many(web(1, far))
    first.wait(lambda: answers(client, 1) == addresses(far))
    first.end(signal.SIGKILL)
    shutil.copy(tmp_path / "old", tmp_path / "state")
    before = own_rules(first.live())
    api.stop()
    second = start()
    second.wait(lambda: bool(second.events("snapshot.offered")), DEADLINE_S)

    assert own_rules(second.live()) == before
    assert second.events("sync.completed") == []
    assert answers(client, 1) == addresses(far)

    # Whatever flushed them: old rules are better than none now.
    for program in (f"iptables-{backend}", f"ip6tables-{backend}"):
        clean_lab.node.run([program, "-t", "nat", "-F"])
    second.wait(lambda: answers(client, 1) == addresses(near), DEADLINE_S)
