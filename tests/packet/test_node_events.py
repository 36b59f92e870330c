"""What the daemon tells the cluster of its node, as Events."""

import pytest

from tests.support.api_server import ApiServer
from tests.support.builders import cluster, make_node
from tests.support.netns import iptables_programs
from tests.support.proxy import running

pytestmark = pytest.mark.packet


def events(api):
    """Return the Events on the Node, by reason."""
    return {
        event["reason"]: event
        for event in api.objects("Event")
        if event["regarding"] == {"kind": "Node", "apiVersion": "v1", "name": "node1"}
    }


def test_the_start_rules_that_were_there_and_repairs_are_told(clean_lab, backend, family, tmp_path):
    programs = iptables_programs(backend, family)
    stale = "*nat\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\nCOMMIT\n"
    clean_lab.node.run([programs.restore, "--noflush"], input=stale)
    with clean_lab.node.entered():
        api = ApiServer()
    with api:
        api.apply(make_node("node1"))
        api.apply_many(cluster(3, 2))
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        with running(clean_lab, backend, tmp_path / "log", f"--kubeconfig={kubeconfig}") as proxy:
            proxy.wait_synced()
            proxy.wait(lambda: {"Starting", "RulesAdopted"} <= events(api).keys())
            for times in (1, 2):
                clean_lab.node.run([programs.command, "-t", "nat", "-F", "KUBE-MARK-MASQ"])
                proxy.wait(lambda: len(proxy.events("drift.repaired")) >= times)  # noqa: B023 - called at once
            proxy.wait(lambda: "series" in events(api).get("RulesRepaired", {}))

    told = events(api)
    assert told["Starting"]["type"] == "Normal"
    assert told["RulesAdopted"]["note"].startswith(
        f"{family.value}: of 1 chains of kube-proxy's, or of an earlier run"
    )
    assert "flushed chains in nat: KUBE-MARK-MASQ" in told["RulesRepaired"]["note"]
    assert told["RulesRepaired"]["series"]["count"] >= 2
