"""Rules of others in the same tables, with the daemon: they survive whatever it does."""

import signal
import sys

import pytest

from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.netns import iptables_programs
from tests.support.object_files import ObjectFiles
from tests.support.proxy import running
from tests.support.scenario import service
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

#: A network plugin's, a kubelet's and an administrator's; with names that begin as ours do.
FOREIGN = """\
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -m comment --comment "an administrator's" -j MARK --set-xmark 0x1/0x1
COMMIT
*filter
:INPUT ACCEPT [0:0]
:CNI-FORWARD - [0:0]
:KUBE-SERVICES-OF-OTHERS - [0:0]
-A INPUT -p tcp -m tcp --dport 23 -j DROP
-A FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD
-A CNI-FORWARD -p tcp -m tcp --dport 25 -j DROP
-A KUBE-SERVICES-OF-OTHERS -j RETURN
COMMIT
*nat
:CNI-HOSTPORT-MASQ - [0:0]
:KUBE-POSTROUTING-OF-OTHERS - [0:0]
-A POSTROUTING -m comment --comment "CNI portmap masquerade" -j CNI-HOSTPORT-MASQ
-A POSTROUTING -p tcp -m tcp --dport 26 -j MASQUERADE
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A KUBE-POSTROUTING-OF-OTHERS -j RETURN
COMMIT
"""


@pytest.fixture
def files(tmp_path):
    return ObjectFiles(tmp_path)


@pytest.fixture
def foreign(clean_lab, backend):
    """Put them into both families; give a function that returns what is left of them."""

    def left():
        found = {}
        for family in IPFamily:
            save = iptables_programs(backend, family).save
            tables = chains.parse_save(clean_lab.node.run([save]).stdout.splitlines())
            for table, by_name in tables.items():
                for name, texts in by_name.items():
                    others = tuple(text for text in texts if "kubernetes" not in text)
                    others = tuple(text for text in others if text != "-j KUBE-FIREWALL")
                    is_kept = not chains.is_ours(table, name) and name != "KUBE-FIREWALL"
                    # A built-in chain without rules may come and go with its table.
                    if is_kept and (others or name not in chains.BUILTIN):
                        found[family, table, name] = others
        return found

    for family in IPFamily:
        restore = iptables_programs(backend, family).restore
        clean_lab.node.run([restore, "--noflush"], input=FOREIGN)
    return left


def rich(plan, *endpoints, **fields):
    """Return a Service with rules of all kinds."""
    return service(
        plan,
        *endpoints,
        **{
            "type": "LoadBalancer",
            "lb_ips": [plan.lb_vip],
            "externalIPs": [plan.external_ip],
            "node_port": 30080,
            "loadBalancerSourceRanges": [plan.outside_cidr],
            "sessionAffinity": "ClientIP",
        }
        | fields,
    )


def test_they_survive_every_change_a_restart_and_the_cleanup(
    clean_lab, servers, backend, files, foreign, tmp_path
):
    plan = PLANS[IPFamily.V4]
    before = foreign()
    assert len(before) == 2 * 10  # or the test would prove nothing

    def changes_to(proxy, condition, *objects):
        files.write([item for found in objects for item in found])
        proxy.wait(condition)
        assert foreign() == before

    def answers():
        return connect(clean_lab.outside, plan.lb_vip, 80, timeout_s=0.3).is_answered

    arguments = (clean_lab, backend, tmp_path / "log", f"--manifests={files.directory}")
    files.write(rich(plan, "pod1"))
    with running(*arguments) as proxy:
        proxy.wait_synced()
        changes_to(proxy, answers, rich(plan, "pod1", "remote1"))
        changes_to(proxy, lambda: not answers(), rich(plan))
        changes_to(proxy, answers, rich(plan, "pod1"))
        changes_to(proxy, lambda: not answers())
        changes_to(proxy, answers, rich(plan, "pod2", externalTrafficPolicy="Local"))
        proxy.end(signal.SIGTERM)
        assert foreign() == before
    with running(*arguments) as proxy:
        proxy.wait(answers)
        proxy.end(signal.SIGKILL)
        assert foreign() == before
    clean_lab.node.run([sys.executable, "-m", "kubeproxy_py", "cleanup"])

    assert foreign() == before
    assert not answers()


def test_a_chain_of_ours_that_others_use_is_not_taken_from_them(
    clean_lab, servers, backend, files, tmp_path
):
    """A stale chain cannot be deleted while a foreign rule leads to it; everything else goes on."""
    plan = PLANS[IPFamily.V4]
    files.write(rich(plan, "pod1"))
    with running(clean_lab, backend, tmp_path / "log", f"--manifests={files.directory}") as proxy:
        proxy.wait_synced()
        chain = next(name for name in proxy.live()["nat"] if name.startswith("KUBE-SVC-"))
        rule = f"*nat\n-A OUTPUT -d 192.0.2.1/32 -j {chain}\nCOMMIT\n"
        restore = iptables_programs(backend, IPFamily.V4).restore
        clean_lab.node.run([restore, "--noflush"], input=rule)
        files.write(service(plan, "pod2", name="other"))
        proxy.wait(
            lambda: connect(clean_lab.outside, plan.cluster_ip, 80, timeout_s=0.3).server == "pod2"
        )

        assert f"-d 192.0.2.1/32 -j {chain}" in proxy.live()["nat"]["OUTPUT"]
