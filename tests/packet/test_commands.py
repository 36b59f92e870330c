"""The other commands on a real kernel: render, plan, cleanup, and runs that end by themselves."""

import json
import signal
import subprocess
import sys

import pytest
import yaml

from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import cluster, make_node
from tests.support.netns import iptables_programs
from tests.support.proxy import own_rules, running

pytestmark = pytest.mark.packet

CIDRS = ",".join(PLANS[family].cluster_cidr for family in IPFamily)


@pytest.fixture
def objects(tmp_path):
    directory = tmp_path / "objects"
    directory.mkdir()
    items = list(cluster(20, 3))
    (directory / "all.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    )
    return directory


@pytest.fixture
def command(clean_lab, tmp_path):
    """Run a command in the node's namespace; returns the finished process."""

    def command(*arguments, check=True) -> subprocess.CompletedProcess[str]:
        return clean_lab.node.run([sys.executable, "-m", "kubeproxy_py", *arguments], check=check)

    return command


def without_nodes(objects):
    return [obj for obj in objects if obj["kind"] != "Node"]


def live(lab, backend, family=IPFamily.V4):
    saved = lab.node.run([iptables_programs(backend, family).save])
    return chains.parse_save(saved.stdout.splitlines())


def flags(objects, backend=None):
    return [
        f"--manifests={objects}",
        "--hostname-override=node1",
        f"--cluster-cidr={CIDRS}",
        *([f"--iptables-backend={backend}"] if backend else []),
    ]


def test_rendered_rules_read_back_as_they_were_rendered(
    clean_lab, command, objects, backend, family, iptables
):
    name = "ipv4" if family is IPFamily.V4 else "ipv6"
    text = command("render", f"--ip-family={name}", "--no-nfacct", *flags(objects)).stdout
    clean_lab.node.run([iptables.restore, "--noflush"], input=text)

    rendered = chains.parse_save(text.splitlines())
    found = live(clean_lab, backend, family)
    assert {
        (table, chain): texts
        for table, there in rendered.items()
        for chain, texts in there.items()
        if chains.is_ours(table, chain)
    } == own_rules(found)


def test_plan_says_2_before_and_0_after_the_daemon_ran(
    clean_lab, command, objects, backend, tmp_path
):
    before = command("plan", *flags(objects, backend), check=False)
    with running(clean_lab, backend, tmp_path / "log", f"--manifests={objects}") as proxy:
        proxy.wait_synced()
    after = command("plan", *flags(objects, backend), check=False)

    assert (before.returncode, after.returncode) == (2, 0), after.stdout
    assert "+ default/svc-0 (5 chains; endpoints +" in before.stdout
    assert "IPv4: 20 new, 0 changed, 0 gone (of 20 Services)" in before.stdout
    assert after.stdout.splitlines() == [
        "IPv4: nothing to change (20 Services)",
        "IPv6: nothing to change (0 Services)",
    ]


def test_what_plan_prints_as_restore_input_makes_the_plan_true(
    clean_lab, command, objects, backend
):
    planned = ("plan", "--ip-family=ipv4", *flags(objects, backend))
    text = command(*planned, "--output=restore", check=False).stdout
    programs = iptables_programs(backend, IPFamily.V4)
    clean_lab.node.run([programs.restore, "--noflush"], input=text)

    assert command(*planned).stdout == "IPv4: nothing to change (20 Services)\n"


def test_plan_changes_nothing_on_a_host_without_counters(clean_lab, command, objects, backend):
    clean_lab.node.run(["nfacct", "flush"])
    before = live(clean_lab, backend)
    command("plan", *flags(objects, backend), check=False)

    assert live(clean_lab, backend) == before
    assert clean_lab.node.run(["nfacct", "list"]).stdout == ""


def test_cleanup_removes_ours_and_nothing_else(clean_lab, command, objects, backend, tmp_path):
    programs = iptables_programs(backend, IPFamily.V4)
    foreign = (
        "*nat\n:CNI-ONE - [0:0]\n-A CNI-ONE -j RETURN\n-A PREROUTING -j CNI-ONE\nCOMMIT\n"
        "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"
        "*filter\n-A INPUT -s 192.0.2.1/32 -j DROP\nCOMMIT\n"
    )
    clean_lab.node.run([programs.restore, "--noflush"], input=foreign)
    before = live(clean_lab, backend)
    with running(clean_lab, backend, tmp_path / "log", f"--manifests={objects}") as proxy:
        proxy.wait_synced()
    command("cleanup")

    after = live(clean_lab, backend)
    left = {name: texts for name, texts in after["filter"].items() if name != "KUBE-FIREWALL"}
    # KUBE-FIREWALL and its jumps are the kubelet's as well.
    without_jumps = {
        name: tuple(text for text in texts if text != "-j KUBE-FIREWALL")
        for name, texts in left.items()
    }
    assert {**after, "filter": without_jumps} == before


def test_cleanup_of_a_clean_host_is_no_error(clean_lab, command):
    assert command("cleanup").returncode == 0


def test_init_only_prepares_the_host_and_writes_no_rule(clean_lab, command, objects, backend):
    clean_lab.node.write_sysctls({"net/ipv4/conf/all/route_localnet": "0"})
    done = command("run", "--init-only", "--conntrack-max-per-core=0", *flags(objects, backend))

    assert done.returncode == 0
    assert clean_lab.node.read_sysctl("net/ipv4/conf/all/route_localnet") == "1"
    assert not own_rules(live(clean_lab, backend))


def test_a_sysctl_that_cannot_be_set_ends_it_with_the_reason(clean_lab, command, objects):
    # nf_conntrack_max belongs to the first namespace alone.
    done = command("run", "--conntrack-max-per-core=12345", *flags(objects, "nft"), check=False)

    assert done.returncode == 1
    assert "could not set conntrack parameters" in done.stderr
    assert "nf_conntrack_max" in done.stderr


@pytest.mark.parametrize(
    ("left", "missing"),
    [("net_raw", "CAP_NET_ADMIN"), ("net_admin", "CAP_NET_RAW")],
)
@pytest.mark.parametrize("name", ["run", "plan", "cleanup", "explain"])
def test_without_its_rights_a_command_ends_with_their_name(clean_lab, objects, name, left, missing):
    arguments = {
        "run": flags(objects),
        "plan": flags(objects),
        "cleanup": [],
        "explain": ["--live", "--to=10.0.0.1:80"],
    }[name]
    done = clean_lab.node.run(
        [
            *("setpriv", f"--bounding-set=-all,+{left}"),
            *(sys.executable, "-m", "kubeproxy_py", name, *arguments),
        ],
        check=False,
    )

    assert done.returncode == 1
    assert f"without {missing}, which" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_two_rights_it_names_are_enough(clean_lab, objects, backend):
    done = clean_lab.node.run(
        [
            *("setpriv", "--bounding-set=-all,+net_admin,+net_raw"),
            *(sys.executable, "-m", "kubeproxy_py", "plan", *flags(objects, backend)),
        ],
        check=False,
    )

    assert done.returncode == 2
    assert "KUBE-SERVICES" in done.stdout


def test_a_rewritten_configuration_file_ends_it(clean_lab, objects, tmp_path):
    config = tmp_path / "config.yaml"
    document = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clusterCIDR": CIDRS,
        "conntrack": {"maxPerCore": 0},
    }
    config.write_text(yaml.safe_dump(document))
    arguments = (f"--manifests={objects}", f"--config={config}")
    with running(clean_lab, "nft", tmp_path / "log", *arguments) as proxy:
        proxy.wait_synced()
        config.write_text(yaml.safe_dump({**document, "clusterCIDR": ""}))

        assert proxy.process.wait(10) == 1
        (failed,) = proxy.events("daemon.failed")
        assert "configuration file was updated" in failed["reason"]


def test_pod_cidrs_that_change_end_it_in_node_cidr_mode(clean_lab, objects, tmp_path):
    node = make_node("node1", pod_cidrs=["10.180.1.0/24"])
    (objects / "node.json").write_text(json.dumps(node))
    (objects / "all.json").unlink()
    arguments = (f"--manifests={objects}", "--detect-local-mode=NodeCIDR")
    with running(clean_lab, "nft", tmp_path / "log", *arguments) as proxy:
        proxy.wait_synced()
        node["spec"]["podCIDRs"] = ["10.180.9.0/24"]
        (objects / "node.json").write_text(json.dumps(node))

        assert proxy.process.wait(10) == 1
        assert "PodCIDRs changed" in proxy.events("daemon.failed")[0]["reason"]


def test_sigint_ends_it_like_sigterm(clean_lab, objects, tmp_path):
    with running(clean_lab, "nft", tmp_path / "log", f"--manifests={objects}") as proxy:
        proxy.wait_synced()

        assert proxy.end(signal.SIGINT) == 0


def test_without_a_node_in_the_files_it_is_healthy_all_the_same(clean_lab, objects, tmp_path):
    (objects / "all.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": without_nodes(cluster(1, 1))})
    )
    with running(clean_lab, "nft", tmp_path / "log", f"--manifests={objects}") as proxy:
        proxy.wait_synced()

        assert proxy.get("/healthz", 10256)[0] == 200
