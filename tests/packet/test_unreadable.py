"""
Rules in iptables' own tables that only `nft` can show: others' are left alone, and ours kept up.

iptables-nft-save shows nothing of a table in which there is one. On iptables 1.8.9, `-C` and `-D` fail
at it as well, and `-S` of its chain, while `-S` of the other chains, `-I` and restores work.
"""

import itertools
import json
import sys
from collections import Counter

import pytest

from kubeproxy_py import rules
from kubeproxy_py.iptables import backends, chains, runner
from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import cluster
from tests.support.netns import iptables_programs
from tests.support.object_files import ObjectFiles
from tests.support.proxy import own_rules, running
from tests.support.scenario import service
from tests.support.traffic import connect

pytestmark = [pytest.mark.packet, pytest.mark.parametrize("backend", ["nft"], indirect=True)]

NFT = {IPFamily.V4: "ip", IPFamily.V6: "ip6"}
#: In each of our tables a built-in chain.
PLACES = (("filter", "INPUT"), ("nat", "PREROUTING"), ("mangle", "FORWARD"))
#: One that iptables says it cannot show, and one that it begins to show. Both mean nothing here.
WORDS = {"incompatible": "ct state established accept", "unparsed": "vlan id 4 accept"}


class Node:
    """The node's tables, with and without the programs that cannot show them."""

    def __init__(self, lab):
        self.lab = lab

    def nft(self, *words):
        return self.lab.node.run(["nft", *words]).stdout

    def make_tables(self):
        """Let there be all built-in chains, with a rule of somebody else's in each of PLACES."""
        for family in IPFamily:
            command = iptables_programs("nft", family).command
            for table, chain in PLACES:
                said = ("-p", "tcp", "--dport", "9", "-j", "RETURN")
                self.lab.node.run([command, "-t", table, "-A", chain, *said])

    def put(self, words="ct state established accept", places=PLACES, families=tuple(IPFamily)):
        """Put a native rule before all others, where `-D` and `-C` of iptables have to pass it."""
        for family in families:
            for table, chain in places:
                self.nft("insert", "rule", NFT[family], table, chain, *words.split())

    def handles(self, family, table, chain, words):
        """Return the handles of the rules of a chain that contain *words*, as nft shows them."""
        lines = self.nft("-a", "list", "chain", NFT[family], table, chain).splitlines()
        return [line.rpartition(" ")[2] for line in lines if words in line and "# handle" in line]

    def delete(self, family, table, chain, words):
        [handle, *_] = self.handles(family, table, chain, words)
        self.nft("delete", "rule", NFT[family], table, chain, "handle", handle)

    def save(self, family):
        with self.lab.node.entered():
            return runner.Iptables(runner.find_programs(family, "nft")).save()

    def has_all_jumps_once(self, family):
        found = Counter(
            rules.Jump(table, chain, text)
            for table, by_name in self.save(family).items()
            for chain, texts in by_name.items()
            for text in texts
        )
        return all(found[jump] == 1 for jump in rules.JUMPS)


@pytest.fixture
def node(clean_lab, backend):
    node = Node(clean_lab)
    node.make_tables()
    return node


@pytest.fixture
def files(tmp_path):
    return ObjectFiles(tmp_path)


def objects(*endpoints):
    """Return a Service of each family, with more beside it than are looked at one by one."""
    return [
        *cluster(20, 3),
        *(
            item
            for family in IPFamily
            for item in service(PLANS[family], *endpoints, name=f"echo-{family.value.lower()}")
        ),
    ]


@pytest.fixture
def start(clean_lab, backend, files, tmp_path):
    """Give a function that starts a daemon."""
    numbers = itertools.count()

    def start():
        log = tmp_path / f"log-{next(numbers)}"
        return running(clean_lab, backend, log, f"--manifests={files.directory}")

    return start


def reaches(lab, pod):
    return all(
        connect(lab.outside, PLANS[family].cluster_ip, 80, timeout_s=0.5).server == pod
        for family in IPFamily
    )


def saves(proxy, family):
    return proxy.metric(
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count", ip_family=family.value
    )


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_daemon_starts_goes_on_and_starts_again_beside_them(
    node, clean_lab, servers, files, start, words
):
    node.put(words)
    files.write(objects("pod1"))
    with start() as proxy:
        proxy.wait_synced()
        assert reaches(clean_lab, "pod1")
        assert {tuple(line["chains"]) for line in proxy.events("iptables.chains_unreadable")} == {
            ("filter/INPUT", "mangle/FORWARD", "nat/PREROUTING")
        }
        assert proxy.metric("kubeproxy_iptables_unreadable_chains") == 2 * len(PLACES)

        files.write(objects("pod2"))
        proxy.wait(lambda: reaches(clean_lab, "pod2"))
        assert all(map(node.has_all_jumps_once, IPFamily))
        assert proxy.plan(f"--manifests={files.directory}") == 0
        assert not proxy.events("sync.failed")

    before = {family: node.save(family) for family in IPFamily}
    with start() as proxy:
        proxy.wait_synced()
        assert proxy.metric("kubeproxy_iptables_restores_total") == 0

    assert {family: node.save(family) for family in IPFamily} == before
    assert all(
        node.handles(family, *place, words.partition(" ")[0])
        for family in IPFamily
        for place in PLACES
    )


def test_what_others_do_beside_them_is_repaired_and_told_and_no_jump_multiplies(
    node, clean_lab, servers, family, files, start
):
    files.write(objects("pod1"))
    with start() as proxy:
        proxy.wait_synced()
        wanted = node.save(family)
        node.put(families=[family])
        # A jump behind the native rule.
        for count in range(1, 4):
            node.delete(family, "filter", "INPUT", "jump KUBE-NODEPORTS")
            proxy.wait(lambda: node.has_all_jumps_once(family))
            proxy.wait(lambda many=count: len(proxy.events("drift.repaired")) == many)
        files.write(objects("pod2"))
        proxy.wait(lambda: reaches(clean_lab, "pod2"))
        [told] = proxy.events("iptables.chains_unreadable")
        assert (told["ip_family"], told["chains"]) == (family.value, ["filter/INPUT"])

        # Everything is looked at.
        looks = saves(proxy, family)
        files.write(objects("pod1"))
        proxy.wait(lambda: reaches(clean_lab, "pod1"))
        node.nft("delete", "table", NFT[family], "nat")
        proxy.wait(lambda: own_rules(node.save(family)) == own_rules(wanted))
        proxy.wait(lambda: saves(proxy, family) > looks)
        assert node.has_all_jumps_once(family)
        # Gone with the table are all but these.
        assert proxy.events("iptables.chains_unreadable")[-1]["chains"] == [
            "filter/INPUT", "mangle/FORWARD",
        ]  # fmt: skip

        # They are taken away again.
        for table, chain in PLACES[::2]:
            node.delete(family, table, chain, "ct state established")
        node.nft("delete", "table", NFT[family], "nat")
        proxy.wait(lambda: bool(proxy.events("iptables.chains_readable")))
        proxy.wait(lambda: own_rules(proxy.live(family)) == own_rules(wanted))
        assert proxy.metric("kubeproxy_iptables_unreadable_chains") == 0
        assert not proxy.events("sync.failed")
        assert {line["kind"] for line in proxy.events("drift.repaired")} == {
            "jump_removed", "chain_removed",
        }  # fmt: skip


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_one_in_a_chain_of_ours_is_removed_with_nothing_else_written(
    node, family, files, start, words
):
    files.write(objects("pod1"))
    with start() as proxy:
        proxy.wait_synced()
        wanted = proxy.live(family)
        node.put(words, places=[("nat", "KUBE-SERVICES"), ("filter", "KUBE-FORWARD")])
        proxy.wait(lambda: len(proxy.events("drift.repaired")) == 2 * len(IPFamily))
        found = proxy.live(family)

        assert own_rules(found) == own_rules(wanted)
        assert {chain for line in proxy.events("drift.repaired") for chain in line["chains"]} == {
            "KUBE-SERVICES", "KUBE-FORWARD",
        }  # fmt: skip
        assert not proxy.events("iptables.chains_unreadable")
        assert not proxy.events("sync.failed")


def test_cleanup_removes_ours_and_leaves_them(node, clean_lab, files, start):
    files.write(objects("pod1"))
    with start() as proxy:
        proxy.wait_synced()
    node.put()
    # In a chain of ours it goes with the chain.
    node.put(places=[("nat", "KUBE-SERVICES")])
    clean_lab.node.run([sys.executable, "-m", "kubeproxy_py", "cleanup"])

    for family in IPFamily:
        left = node.save(family)
        assert own_rules(left) == {}
        ours = {jump for jump in rules.JUMPS if not jump.rule.endswith(f"-j {rules.FIREWALL}")}
        assert not any(jump.rule in left[jump.table][jump.builtin] for jump in ours)
        assert all(node.handles(family, *place, "established") for place in PLACES)


def test_the_backend_is_chosen_by_rules_that_iptables_cannot_show_as_well(node, clean_lab):
    node.put()
    for family in IPFamily:
        restore = iptables_programs("legacy", family).restore
        text = "*filter\n-A INPUT -p tcp -m tcp --dport 24 -j DROP\nCOMMIT\n"
        clean_lab.node.run([restore, "--noflush"], input=text)
    with clean_lab.node.entered():
        found = runner.detect_backend(IPFamily)

    assert found == runner.Detection("nft", "number of rules")


def test_a_leftover_beside_them_is_known_to_be_met_by_packets(node, clean_lab, files, start):
    files.write(objects("pod1"))
    with start() as proxy:
        proxy.wait_synced()
    node.put()
    with clean_lab.node.entered():
        found = backends.survey("legacy", IPFamily)

    met = {f"{jump.table}/{jump.builtin}" for jump in rules.JUMPS}
    assert [leftover.jumps for leftover in found.leftovers] == 2 * [tuple(sorted(met))]


def test_check_says_so(node, clean_lab, files, start):
    node.put()
    argv = (sys.executable, "-m", "kubeproxy_py", "check", "--iptables-backend=nft")
    done = clean_lab.node.run([*argv, "--output=json"], check=False)
    [finding] = [one for one in json.loads(done.stdout)["findings"] if one["id"] == "nft-rules"]

    assert finding["severity"] == "info"
    assert "filter/INPUT" in finding["found"]


def test_explain_reads_on_behind_them(node, clean_lab, files, start):
    plan = PLANS[IPFamily.V4]
    files.write(objects("pod1"))
    with start() as proxy:
        proxy.wait_synced()
        node.put(families=[IPFamily.V4])
        said = clean_lab.node.run(
            [
                *(sys.executable, "-m", "kubeproxy_py", "explain", "--live"),
                *("--iptables-backend=nft", f"--from={plan.outside}"),
                f"--to={plan.cluster_ip}:80",
            ],
            check=False,
        )

    assert chains.PROBE not in said.stdout
    assert "KUBE-SEP-" in said.stdout, said.stderr
