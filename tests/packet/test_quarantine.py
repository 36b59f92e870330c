"""The daemon where iptables refuses the rules of one Service."""

import json

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.api_server import ApiServer
from tests.support.builders import make_endpoint, make_node, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.proxy import HEALTH_PORT, running
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

PLAN = PLANS[IPFamily.V4]
REFUSED = "10.180.66.6"
# A missing extension or a kernel that says no, as far as the caller can tell: the words of each
# backend's own program, and everything else goes to it.
SHIM = """\
#!/bin/bash
input=$(cat)
line=$(grep -n -m1 -e '--to-destination {refused}:' <<<"$input" | cut -d: -f1)
if [ -n "$line" ]; then echo "{words}" >&2; exit 2; fi
exec {program} "$@" <<<"$input"
"""
WORDS = {
    "nft": "iptables-nft-restore: line $line: RULE_APPEND failed (No such file or directory)",
    "legacy": "iptables-restore: line $line failed",
}


@pytest.fixture
def refusing(clean_lab, backend, tmp_path, monkeypatch):
    """Put programs first in the path that refuse rules to one address."""
    directory = tmp_path / "bin"
    directory.mkdir()
    name = iptables_programs(backend, IPFamily.V4).restore
    shim = directory / name
    text = SHIM.format(refused=REFUSED, words=WORDS[backend], program=f"/usr/sbin/{name}")
    shim.write_text(text)
    shim.chmod(0o755)
    for program in (name.replace("-restore", ""), name.replace("restore", "save")):
        (directory / program).symlink_to(f"/usr/sbin/{program}")
    path = f"{directory}:/usr/sbin:/usr/bin:/bin"
    monkeypatch.setitem(clean_lab.node._env, "PATH", path)
    return shim


def test_one_refused_service_does_not_keep_the_others_from_working(
    clean_lab, servers, backend, refusing, tmp_path
):
    pod = clean_lab.local_pods[0].address(IPFamily.V4)
    with clean_lab.node.entered():
        api = ApiServer()
    with api:
        api.apply(make_node("node1"))
        api.apply(make_service("good", cluster_ip=PLAN.cluster_ip))
        api.apply(make_slice("good", endpoints=[make_endpoint(pod)]))
        api.apply(make_service("bad", cluster_ip="172.30.0.66"))
        api.apply(make_slice("bad", endpoints=[make_endpoint(REFUSED)]))
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        with running(clean_lab, backend, tmp_path / "log", f"--kubeconfig={kubeconfig}") as proxy:
            proxy.wait_synced()
            assert connect(clean_lab.node, PLAN.cluster_ip, 80).is_answered
            (event,) = proxy.events("service.quarantined")
            assert event["name"] == "bad"
            assert proxy.metric("kubeproxy_quarantined_services") == 1
            status, body = proxy.get("/readyz", HEALTH_PORT)
            assert status == 503
            assert "default/bad" in json.dumps(json.loads(body)["reasons"])
            proxy.wait(lambda: any(b"RulesRefused" in request.body for request in api.requests))
            told = proxy.ask()
            assert told.returncode == 2
            assert "default/bad has been set aside" in told.stdout
            failure = proxy.ask("--last-failure").stdout
            (line,) = [line for line in failure.splitlines() if line.startswith("  *")]
            assert f"--to-destination {REFUSED}" in line

            api.apply(make_slice("bad", endpoints=[make_endpoint(pod)]))
            proxy.wait(lambda: connect(clean_lab.node, "172.30.0.66", 80).is_answered)
            proxy.wait(lambda: proxy.get("/readyz", HEALTH_PORT)[0] == 200)
