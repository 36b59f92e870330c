"""Trees of chains in the kernel: written, read back, passed by packets, changed under them."""

import functools
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from kubeproxy_py.dispatch import tree_depth
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    PortKey,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)
from kubeproxy_py.ruleset import Ruleset
from tests.support import kube_proxy, states
from tests.support.addresses import PLANS
from tests.support.object_files import ObjectFiles
from tests.support.proxy import own_rules, running
from tests.support.traffic import Ticker, connect
from tests.support.webs import cluster_ip, web

pytestmark = pytest.mark.packet

KEYS = [PortKey("", "tcp"), PortKey("dns", "udp"), PortKey("sig", "sctp")]
# Where addresses of Services are: next to each other, scattered, and at both ends of all addresses.
NETWORKS = {
    IPFamily.V4: ["172.30.0.{}", "172.30.{}.1", "10.96.{}.9", "1.{}.2.3", "0.{}.0.1", "223.255.255.{}"],
    IPFamily.V6: [
        "fd00:172:30::{:x}", "fd00:172:30::{:x}:1", "fd00:{:x}::9", "{:x}::1", "64:ff9b::{:x}00",
        "2001:db8:{:x}:ffff:ffff:ffff:ffff:ffff",
    ],
}  # fmt: skip


def crowd(family, count=240):
    """Return Services of all kinds at addresses of all kinds: a tree with every kind of rule."""
    choice = random.Random(count)
    pods = [PLANS[family].local_pod(1), PLANS[family].remote_pod(1)]
    known = {}
    for number in range(count):
        name, key = ServiceName("ns", f"svc{number}"), KEYS[number % len(KEYS)]
        networks = NETWORKS[family]
        host = 1 + number // len(networks)
        cluster_ip = networks[number % len(networks)].format(host)
        external = networks[(number + 1) % len(networks)].format(host + 100)
        endpoints = tuple(
            Endpoint(ip, 8000 + number, is_local=ip == pods[0])
            for ip in choice.choice([pods, pods[1:], []])
        )
        if not number:
            endpoints = tuple(Endpoint(pods[0], port) for port in range(9000, 9100))
        port = ServicePort(
            name=ServicePortName(*name, *key),
            cluster_ip=cluster_ip,
            port=80 + number,
            node_port=choice.choice([0, 1 + number, 30000 + number * 11, 65535 - number]),
            external_ips=choice.choice([(), (external,)]),
            lb_vips=choice.choice([(), (external,)]),
            source_ranges=choice.choice([(), (PLANS[family].outside_cidr,)]),
            is_external_local=choice.random() < 0.5,
            health_check_node_port=choice.choice([0, 32000 + number]),
            is_externally_accessible=True,
        )
        known[name] = ServiceState({key: port}, {key: endpoints})
    return known


def ruleset_of(family, known, layout):
    options = states.golden_options(family)
    ruleset = Ruleset(msgspec.structs.replace(options, layout=layout, has_nfacct=False))
    ruleset.apply(known)
    return ruleset


class Node:
    """The tables of the lab's node, read and written."""

    def __init__(self, lab, iptables):
        self._node = lab.node
        self._programs = iptables

    def live(self):
        saved = self._node.run([self._programs.save]).stdout
        return chains.parse_save(saved.splitlines())

    def restore(self, text):
        self._node.run([self._programs.restore, "--noflush"], input=text)

    def program(self, ruleset, *, max_rules=None):
        for batch in plan.plan(
            ruleset.tables, self.live(), groups=ruleset.groups(), max_rules=max_rules
        ):
            self.restore(batch.render())


@pytest.fixture
def node(clean_lab, iptables):
    return Node(clean_lab, iptables)


def wanted(ruleset):
    return own_rules(ruleset.tables)


def test_every_rule_of_a_tree_reads_back_as_it_was_written(node, family):
    ruleset = ruleset_of(family, crowd(family), "tree")
    node.program(ruleset)
    depths = {tree_depth(name) for by_name in ruleset.tables.values() for name in by_name}

    assert own_rules(node.live()) == wanted(ruleset)
    # Short prefixes, such that are no whole bytes, single addresses and ports.
    assert depths >= {4, 16, 20, 24, 28, 32 if family is IPFamily.V4 else 124}


@pytest.mark.parametrize("max_rules", [None, 100])
def test_the_kernel_takes_every_change_of_layout_and_of_services(node, family, max_rules):
    for layout, count in [("flat", 200), ("tree", 200), ("tree", 60), ("auto", 240), ("auto", 12)]:
        ruleset = ruleset_of(family, crowd(family, count), layout)
        node.program(ruleset, max_rules=max_rules)

        assert own_rules(node.live()) == wanted(ruleset)


def test_kube_proxy_takes_over_in_one_restore(node, family):
    node.program(ruleset_of(family, crowd(family), "tree"))
    flat = ruleset_of(family, crowd(family, 100), "flat")
    node.restore(kube_proxy.first_sync(flat.tables, node.live()))
    found = own_rules(node.live())

    assert {key: texts for key, texts in found.items() if key in wanted(flat)} == wanted(flat)
    # Chains of a tree in filter are nothing it knows. Nobody jumps there any more, and we remove
    # them when we come back.
    left = {chain for table, chain in found.keys() - wanted(flat).keys() if table == "filter"}
    assert {table for table, _ in found.keys() - wanted(flat).keys()} <= {"filter"}
    assert all(tree_depth(chain) is not None for chain in left)

    again = ruleset_of(family, crowd(family, 50), "flat")
    node.program(again)
    assert own_rules(node.live()) == wanted(again)


def test_cleanup_removes_a_tree(node, clean_lab, family):
    node.program(ruleset_of(family, crowd(family), "tree"))
    clean_lab.node.run([sys.executable, "-m", "kubeproxy_py", "cleanup"])

    assert own_rules(node.live()) == {}


# Packets -----------------------------------------------------------------------------------------


def test_two_hundred_services_answer_and_an_address_beside_them_does_not(
    clean_lab, servers, node, family
):
    count, (first, second) = 200, clean_lab.local_pods
    objects = [
        item
        for number in range(count)
        for item in web(family, number, second if number % 2 else first)
    ]
    node.program(ruleset_of(family, states.service_states(objects, family), "tree"))

    def server_of(number):
        return connect(clean_lab.outside, cluster_ip(family, number), 80, timeout_s=5.0).server

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(server_of, range(count)))
    beside = connect(clean_lab.outside, cluster_ip(family, count), 80, timeout_s=0.3)
    other_port = connect(clean_lab.outside, cluster_ip(family, 0), 81, timeout_s=0.3)

    assert answers == [("pod2" if number % 2 else "pod1") for number in range(count)]
    assert not beside.is_answered
    assert not other_port.is_answered


def has_tree(tables):
    return any(tree_depth(name) is not None for name in tables.get("nat", {}))


@pytest.fixture
def clients(clean_lab, servers):
    """Connect to one Service all the time, every few milliseconds, in both families.

    From a pod, whose port is kept. The random one of a masqueraded client may be one at which the
    server still waits for stray segments of a connection that conntrack was made to forget between
    two tests; such a SYN is answered a second late.
    """
    return {
        family: Ticker(clean_lab.local_pods[1], cluster_ip(family, 0), 80, interval_s=0.002)
        for family in IPFamily
    }


@pytest.fixture
def files(tmp_path):
    return ObjectFiles(tmp_path)


def all_webs(count, pod):
    """Return Services of both families, with so many rules that they are written in several inputs.

    The first, which the clients connect to, never changes and always answers.
    """
    return [
        item
        for family in IPFamily
        for number in range(count)
        for item in web(family, number, pod, silent=8 if number else 0)
    ]


def is_programmed(proxy, count, *, as_tree):
    """Tell whether both families have *count* Services, and of what form the way there is."""
    for family in IPFamily:
        tables = proxy.live(family)
        services = sum(
            name.startswith("KUBE-SVC-") and tree_depth(name) is None
            for name in tables.get("nat", ())
        )
        if services != count or has_tree(tables) != as_tree:
            return False
    return True


def test_nobody_notices_when_a_chain_becomes_a_tree_and_a_chain_again(
    clean_lab, clients, backend, files, tmp_path
):
    pod = clean_lab.local_pods[0]
    arguments = (clean_lab, backend, tmp_path / "log", f"--manifests={files.directory}")
    files.write(all_webs(10, pod))
    with running(*arguments) as proxy:
        proxy.wait(lambda: is_programmed(proxy, 10, as_tree=False), 30)
        with clients[IPFamily.V4] as v4, clients[IPFamily.V6] as v6:
            for count in (300, 10, 300, 10):
                files.write(all_webs(count, pod))
                reached = functools.partial(is_programmed, proxy, count, as_tree=count > 64)
                proxy.wait(reached, 60)
                for ticker in (v4, v6):
                    ticker.wait_for_ticks(20)
            restores = proxy.metric("kubeproxy_iptables_restores_total")

    assert (v4.failures, v6.failures) == ([], [])
    # Five changes of two families; legacy takes each in one input. Otherwise there was a time between
    # two inputs, in which somebody might have noticed.
    assert backend == "legacy" or restores > 5 * 2


def test_nobody_notices_a_restart_with_another_layout(clean_lab, clients, backend, files, tmp_path):
    files.write(all_webs(100, clean_lab.local_pods[0]))

    def run_once(layout, then):
        log = tmp_path / f"log-{len(list(tmp_path.iterdir()))}"
        arguments = [f"--manifests={files.directory}", f"--dispatch={layout}"]
        with running(clean_lab, backend, log, *arguments) as proxy:
            proxy.wait(lambda: is_programmed(proxy, 100, as_tree=layout != "flat"), 60)
            then()

    run_once("flat", lambda: None)
    with clients[IPFamily.V4] as v4, clients[IPFamily.V6] as v6:

        def go_on():
            for ticker in (v4, v6):
                ticker.wait_for_ticks(20)

        for layout in ("tree", "flat", "auto", "flat"):
            run_once(layout, go_on)

    assert (v4.failures, v6.failures) == ([], [])
