"""What the daemon tells the cluster of its node, as Events."""

import pytest

from tests.support.api_server import ApiServer
from tests.support.builders import cluster, make_node
from tests.support.netns import iptables_programs
from tests.support.proxy import running

pytestmark = pytest.mark.packet

#: Of so many repairs, some have the same words: the process is known, or it is not.
TIMES = 5


def events(api):
    """Return the Events on the Node, by reason."""
    found = {}
    for event in api.objects("Event"):
        if event["regarding"] == {
            "kind": "Node",
            "apiVersion": "v1",
            "name": "node1",
            "uid": "node1",
        }:
            found.setdefault(event["reason"], []).append(event)
    return found


def counted_repair(api):
    """Return the Event of a repair that has come more than once, if there is one."""
    return next((one for one in events(api).get("RulesRepaired", ()) if "series" in one), None)


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
            # Where the kernel does not tell in time who it was, it is another Event: so, a few times.
            for _ in range(TIMES):
                repairs = len(proxy.events("drift.repaired"))
                clean_lab.node.run([programs.command, "-t", "nat", "-F", "KUBE-MARK-MASQ"])
                proxy.wait(lambda: len(proxy.events("drift.repaired")) > repairs)  # noqa: B023 - called at once
            proxy.wait(lambda: counted_repair(api) is not None)

    told = events(api)
    repair = counted_repair(api)
    assert told["Starting"][0]["type"] == "Normal"
    (adopted,) = told["RulesAdopted"]
    assert adopted["note"].startswith(
        f"{family.value}: of 1 chains of kube-proxy's, or of an earlier run"
    )
    assert "flushed chains in nat: KUBE-MARK-MASQ" in repair["note"]
    assert repair["series"]["count"] >= 2
