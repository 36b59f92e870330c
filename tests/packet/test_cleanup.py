"""Cleaning up on a real kernel: both backends, both families, and what may be in the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kubeproxy_py import nfacct, rules
from kubeproxy_py.iptables import backends, chains
from kubeproxy_py.model import IPFamily
from tests.support.builders import make_node, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.proxy import own_rules, running

pytestmark = pytest.mark.packet

CHAINS = {
    "mangle": {"KUBE-PROXY-CANARY": ()},
    "filter": {
        "KUBE-SERVICES": (),
        "KUBE-EXTERNAL-SERVICES": (),
        "KUBE-FORWARD": ("-j ACCEPT",),
        "KUBE-NODEPORTS": (),
        "KUBE-PROXY-FIREWALL": (),
        "KUBE-FIREWALL": (),
        "KUBE-PROXY-CANARY": (),
    },
    "nat": {
        "KUBE-SERVICES": ("-j KUBE-SVC-ABCDEFGHIJKLMNOP", "-j KUBE-NODEPORTS"),
        "KUBE-NODEPORTS": ("-j KUBE-EXT-ABCDEFGHIJKLMNOP",),
        "KUBE-POSTROUTING": (),
        "KUBE-MARK-MASQ": (),
        "KUBE-EXT-ABCDEFGHIJKLMNOP": ("-j KUBE-MARK-MASQ", "-j KUBE-SVC-ABCDEFGHIJKLMNOP"),
        "KUBE-SVC-ABCDEFGHIJKLMNOP": ("-j KUBE-SEP-ABCDEFGHIJKLMNOP",),
        "KUBE-SEP-ABCDEFGHIJKLMNOP": (),
        "KUBE-PROXY-CANARY": (),
    },
}


@pytest.fixture
def command(clean_lab):
    """Run a command in the node's namespace; returns the finished process."""

    def command(*arguments, check=True) -> subprocess.CompletedProcess[str]:
        return clean_lab.node.run([sys.executable, "-m", "kubeproxy_py", *arguments], check=check)

    return command


@pytest.fixture
def node(clean_lab):
    return Node(clean_lab)


class Node:
    """The node's tables, by backend and family."""

    def __init__(self, lab):
        self.lab = lab

    def fill(self, backend, family, *, copies=1):
        """Write rules such as kube-proxy writes, with *copies* of each jump."""
        lines = []
        for table, found in CHAINS.items():
            lines.append(f"*{table}")
            lines += [f":{name} - [0:0]" for name in found]
            lines += [f"-A {name} {text}" for name, texts in found.items() for text in texts]
            jumps = [jump for jump in rules.JUMPS if jump.table == table]
            lines += [f"-I {jump.builtin} {jump.rule}" for jump in jumps] * copies
            lines.append("COMMIT")
        programs = iptables_programs(backend, family)
        self.lab.node.run([programs.restore, "--noflush"], input="\n".join([*lines, ""]))

    def live(self, backend, family=IPFamily.V4):
        saved = self.lab.node.run([iptables_programs(backend, family).save])
        return chains.parse_save(saved.stdout.splitlines())

    def left(self, backend, family=IPFamily.V4):
        """Return our chains, and the rules in built-in chains."""
        tables = self.live(backend, family)
        builtin = {
            name: texts
            for found in tables.values()
            for name, texts in found.items()
            if name in chains.BUILTIN and texts
        }
        return own_rules(tables), builtin

    def legacy_tables(self):
        with self.lab.node.entered():
            return Path("/proc/thread-self/net/ip_tables_names").read_text().split()


FIREWALL_JUMPS = {"INPUT": ("-j KUBE-FIREWALL",), "OUTPUT": ("-j KUBE-FIREWALL",)}


def test_all_goes_but_what_is_the_kubelet_s_as_well(command, node, backend, family):
    node.fill(backend, family)
    command("cleanup")

    assert node.left(backend, family) == ({}, FIREWALL_JUMPS)
    assert "KUBE-FIREWALL" in node.live(backend, family)["filter"]


def test_every_copy_of_a_jump_goes(command, node, backend):
    node.fill(backend, IPFamily.V4, copies=3)
    command("cleanup")

    own, builtin = node.left(backend)
    assert own == {}
    assert builtin == {name: texts * 3 for name, texts in FIREWALL_JUMPS.items()}


def test_both_backends_are_cleaned_unless_told(command, node):
    for backend in ("nft", "legacy"):
        node.fill(backend, IPFamily.V4)
    command("cleanup", "--backend=legacy")
    assert own_rules(node.live("nft"))
    assert not own_rules(node.live("legacy"))
    command("cleanup")

    assert not own_rules(node.live("nft"))


def test_run_cleanup_is_the_same(command, node, backend):
    node.fill(backend, IPFamily.V4)
    # kube-proxy's way; neither an API server nor a Node is needed for it.
    command("run", "--cleanup")

    assert node.left(backend) == ({}, FIREWALL_JUMPS)


def test_looking_creates_no_legacy_tables(command, clean_lab):
    # A fresh node; a table that exists has a hook that every packet passes.
    clean_lab.node.run(["nft", "flush", "ruleset"])
    before = Node(clean_lab).legacy_tables()
    command("cleanup")

    assert Node(clean_lab).legacy_tables() == before


def test_cleaning_twice_is_no_error(command, node, backend):
    node.fill(backend, IPFamily.V4)
    command("cleanup")
    before = node.live(backend)

    assert command("cleanup").returncode == 0
    assert node.live(backend) == before


def test_a_chain_that_others_lead_to_is_emptied_and_the_rest_goes(command, node, backend):
    node.fill(backend, IPFamily.V4)
    programs = iptables_programs(backend, IPFamily.V4)
    theirs = ["-s", "192.0.2.1/32", "-j", "KUBE-SERVICES"]
    node.lab.node.run([programs.command, "-t", "nat", "-A", "PREROUTING", *theirs])
    command("cleanup")

    own, builtin = node.left(backend)
    assert own == {("nat", "KUBE-SERVICES"): ()}
    assert builtin == {**FIREWALL_JUMPS, "PREROUTING": (" ".join(theirs),)}


def test_a_backend_that_cannot_be_cleaned_is_told_and_the_other_is_cleaned(
    command, node, backend, tmp_path, monkeypatch
):
    other = "legacy" if backend == "nft" else "nft"
    for used in (backend, other):
        node.fill(used, IPFamily.V4)
    # A program that is found and then fails, before the host's own.
    refusing = tmp_path / iptables_programs(backend, IPFamily.V4).restore
    refusing.write_text("#!/bin/sh\nexit 1\n")
    refusing.chmod(0o755)
    with monkeypatch.context() as changed:
        changed.setitem(node.lab.node._env, "PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        done = command("cleanup", "--logging-format=json", check=False)

    events = [json.loads(line) for line in done.stderr.splitlines()]
    (failed,) = (event for event in events if event["event"] == "cleanup.failed")
    assert (failed["backend"], failed["ip_family"]) == (backend, "IPv4")
    assert events[-1]["error"] == "encountered an error while tearing down rules"
    assert done.returncode == 1
    assert own_rules(node.live(backend))
    assert not own_rules(node.live(other))


def test_rules_that_no_program_is_there_for_are_told(command, node, backend, tmp_path, monkeypatch):
    node.fill(backend, IPFamily.V4)
    for name in (iptables_programs(backend, IPFamily.V4).command, "iptables"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    with monkeypatch.context() as changed:
        changed.setitem(node.lab.node._env, "PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        done = command("cleanup", f"--backend={backend}", "--logging-format=json", check=False)

    events = [json.loads(line) for line in done.stderr.splitlines()]
    (failed,) = (event for event in events if event["event"] == "cleanup.failed")
    assert (failed["backend"], failed["ip_family"]) == (backend, "IPv4")
    assert done.returncode == 1


KUBE_PROXY_TABLES = "add table ip kube-proxy\nadd chain ip kube-proxy x\nadd table ip6 kube-proxy\n"
FOREIGN_TABLE = "add table ip mine\n"


def nft_tables(lab):
    listed = lab.node.run(["nft", "-j", "list", "tables"]).stdout
    return {
        (item["table"]["family"], item["table"]["name"])
        for item in json.loads(listed)["nftables"]
        if "table" in item
    }


def test_the_tables_of_nftables_mode_go_and_others_stay(command, clean_lab):
    clean_lab.node.run(["nft", "-f", "-"], input=KUBE_PROXY_TABLES + FOREIGN_TABLE)
    command("cleanup")

    assert nft_tables(clean_lab) == {("ip", "mine")}


def test_the_daemon_removes_the_tables_of_nftables_mode_when_its_rules_are_there(
    clean_lab, tmp_path
):
    clean_lab.node.run(["nft", "-f", "-"], input=KUBE_PROXY_TABLES + FOREIGN_TABLE)
    objects = tmp_path / "objects.json"
    items = [make_node(), make_service(), make_slice()]
    objects.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    with running(clean_lab, "legacy", tmp_path / "log", f"--manifests={objects}") as proxy:
        # Each is told after it is gone.
        proxy.wait(lambda: len(proxy.events("cleanup.nft_table_deleted")) == 2)

        assert nft_tables(clean_lab) == {("ip", "mine")}
        told = [event["event"] for event in proxy.events()]
        order = [name for name in told if name in ("sync.completed", "cleanup.nft_table_deleted")]
        assert order[0] == "sync.completed"
        tables = [event["table"] for event in proxy.events("cleanup.nft_table_deleted")]
        assert sorted(tables) == [["ip", "kube-proxy"], ["ip6", "kube-proxy"]]


def test_an_nft_table_is_found_by_family_and_name(clean_lab):
    clean_lab.node.run(["nft", "add", "table", "ip", "kube-proxy"])
    with clean_lab.node.entered():
        found = [
            backends.has_nft_table(family, name)
            for family in IPFamily
            for name in ("kube-proxy", "kube-prox", "kube-proxyy")
        ]

    assert found == [True, *[False] * 5]


def test_nothing_is_removed_by_a_daemon_that_refuses_to_start(clean_lab, tmp_path):
    clean_lab.node.run(["nft", "-f", "-"], input=KUBE_PROXY_TABLES)
    with running(clean_lab, "nft", tmp_path / "log", "--manifests=/nowhere") as proxy:
        assert proxy.process.wait(20) == 1

    assert {name for _, name in nft_tables(clean_lab)} == {"kube-proxy"}


def test_sysctls_and_counters_stay(command, node, backend):
    name = rules.INVALID_DROPPED_COUNTER
    with node.lab.node.entered():
        has_counters = nfacct.supported() and nfacct.ensure(name)
    node.lab.node.write_sysctls({"net/ipv4/conf/all/route_localnet": "1"})
    node.fill(backend, IPFamily.V4)
    command("cleanup")

    assert node.lab.node.read_sysctl("net/ipv4/conf/all/route_localnet") == "1"
    with node.lab.node.entered():
        assert not has_counters or nfacct.read(name) is not None
