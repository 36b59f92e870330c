"""
Others change our rules while the daemon runs: noticed in a moment, put right chain by chain, named.

The sync period stays at 30 s, so that only what the kernel tells can explain how soon it happens.
"""

import os
import queue
import socket
import subprocess
import threading
import time

import pytest

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.iptables import chains, events, runner
from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import cluster, make_endpoint, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.object_files import ObjectFiles
from tests.support.proxy import own_rules, running

pytestmark = pytest.mark.packet

#: From the fault to the repaired rules, a program that looks at them included, on a machine that is
#: busy with other things. How long it takes is measured by `make bench ONLY=drift`.
DEADLINE_S = {"nft": 8.0, "legacy": 8.0}
SAVES = "kubeproxy_sync_full_proxy_rules_duration_seconds_count"


def objects():
    """Return a cluster of both families."""
    plan = PLANS[IPFamily.V6]
    return [
        *cluster(20, 3),
        make_service("six", cluster_ip=plan.cluster_ip, ports=[80]),
        make_slice("six", endpoints=[make_endpoint(plan.local_pod(1))]),
    ]


@pytest.fixture
def files(tmp_path):
    files = ObjectFiles(tmp_path)
    files.write(objects())
    return files


@pytest.fixture
def proxy(clean_lab, backend, files, tmp_path):
    """Give a daemon that has programmed a small cluster, and nobody has disturbed."""
    log = tmp_path / "log"
    with running(clean_lab, backend, log, f"--manifests={files.directory}") as proxy:
        proxy.wait_synced()
        yield proxy


def command(proxy, family=IPFamily.V4):
    return iptables_programs(proxy.backend, family).command


def service_chain(proxy):
    return sorted(name for name in proxy.live()["nat"] if name.startswith("KUBE-SVC-"))[3]


def is_whole(proxy, before, family=IPFamily.V4):
    """Tell whether our chains, and our jumps in others', are what they were."""
    live = proxy.live(family)
    return own_rules(live) == own_rules(before) and all(
        set(texts) <= set(live.get(table, {}).get(chain, ()))
        for table, found in before.items()
        for chain, texts in found.items()
        if chain in chains.BUILTIN
    )


def repaired(proxy, before, fault, family=IPFamily.V4):
    """Do *fault*, wait until all is as it was, and return the log lines about it."""
    fault()
    proxy.wait(lambda: is_whole(proxy, before, family), DEADLINE_S[proxy.backend])
    proxy.wait(lambda: has_told_all(proxy))
    return proxy.events("drift.repaired")


def has_told_all(proxy):
    """Tell whether there are lines about a repair, and the sync that wrote them has ended."""
    names = [line["event"] for line in proxy.events()]
    return (
        "drift.repaired" in names
        and "sync.completed" in names[len(names) - names[::-1].index("drift.repaired") :]
    )


def told(lines):
    return {(line["table"], line["kind"]) for line in lines}


def restored(proxy, text, *flags, family=IPFamily.V4):
    proxy.lab.node.run([iptables_programs(proxy.backend, family).restore, *flags], input=text)


# One fault each ----------------------------------------------------------------------------------


def test_a_deleted_rule_is_put_back_with_its_chain_only(proxy):
    before, chain = proxy.live(), service_chain(proxy)
    written = proxy.metric("kubeproxy_iptables_restore_lines_total")
    lines = repaired(
        proxy, before, lambda: proxy.lab.node.run([command(proxy), "-t", "nat", "-D", chain, "1"])
    )

    assert told(lines) == {("nat", "rule_removed")}
    assert lines[0]["chains"] == [chain]
    # *nat, the chain and COMMIT.
    assert proxy.metric("kubeproxy_iptables_restore_lines_total") - written == 3 + len(
        before["nat"][chain]
    )
    assert proxy.metric("kubeproxy_iptables_drift_total", table="nat", kind="rule_removed") == 1


def test_a_deleted_jump_is_put_back(proxy):
    before = proxy.live()
    jump = next(rule for rule in before["nat"]["PREROUTING"] if "KUBE-SERVICES" in rule)
    lines = repaired(
        proxy, before, lambda: restored(proxy, f"*nat\n-D PREROUTING {jump}\nCOMMIT\n", "-n")
    )

    assert told(lines) == {("nat", "jump_removed")}
    assert lines[0]["chains"] == ["PREROUTING"]


def test_a_foreign_rule_in_our_chain_is_removed(proxy):
    before, chain = proxy.live(), service_chain(proxy)
    lines = repaired(
        proxy,
        before,
        lambda: proxy.lab.node.run([command(proxy), "-t", "nat", "-I", chain, "-j", "RETURN"]),
    )

    assert told(lines) == {("nat", "rule_added")}


def test_a_rule_replaced_by_one_as_long_is_repaired(proxy):
    before = proxy.live()
    lines = repaired(
        proxy,
        before,
        lambda: proxy.lab.node.run(
            [
                *(command(proxy), "-t", "nat", "-R", "KUBE-MARK-MASQ", "1"),
                *("-j", "MARK", "--set-xmark", "0x8000/0x8000"),
            ]
        ),
    )

    assert told(lines) == {("nat", "rule_changed")}


def test_a_flush_of_nat_alone_is_repaired(proxy):
    before = proxy.live()
    lines = repaired(proxy, before, lambda: proxy.lab.node.run([command(proxy), "-t", "nat", "-F"]))

    assert told(lines) == {("nat", "chain_flushed"), ("nat", "jump_removed")}


def test_a_flush_of_one_chain_is_repaired(proxy):
    before = proxy.live()
    lines = repaired(
        proxy,
        before,
        lambda: proxy.lab.node.run([command(proxy), "-t", "nat", "-F", "KUBE-MARK-MASQ"]),
    )

    assert told(lines) == {("nat", "chain_flushed")}


def test_a_flush_of_everything_is_repaired(proxy):
    before = proxy.live()

    def flush():
        for table in ("nat", "filter", "mangle"):
            proxy.lab.node.run([command(proxy), "-t", table, "-F"])
            proxy.lab.node.run([command(proxy), "-t", table, "-X"], check=False)

    lines = repaired(proxy, before, flush)

    assert {table for table, _ in told(lines)} >= {"nat", "filter"}


def test_a_renamed_chain_is_written_again_and_its_stray_left_alone(proxy):
    before = proxy.live()
    lines = repaired(
        proxy,
        before,
        lambda: proxy.lab.node.run(
            [command(proxy), "-t", "nat", "-E", "KUBE-MARK-MASQ", "SOMETHING-ELSE"]
        ),
    )

    assert ("nat", "chain_removed") in told(lines)


def test_a_renamed_chain_of_a_service_is_found_without_reading_everything(proxy, backend):
    before, chain = proxy.live(), service_chain(proxy)
    looks = proxy.metric(SAVES)
    lines = repaired(
        proxy,
        before,
        lambda: proxy.lab.node.run([command(proxy), "-t", "nat", "-E", chain, "SOMETHING"]),
    )

    assert told(lines) == {("nat", "chain_removed"), ("nat", "rule_changed")}
    assert backend == "legacy" or proxy.metric(SAVES) == looks


def test_a_restore_of_nat_without_our_chains_is_repaired(proxy):
    before = proxy.live()
    lines = repaired(
        proxy,
        before,
        lambda: restored(
            proxy,
            "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"
            ":POSTROUTING ACCEPT [0:0]\n-A PREROUTING -d 203.0.113.9/32 -j ACCEPT\nCOMMIT\n",
        ),
    )

    assert told(lines) == {("nat", "chain_removed"), ("nat", "jump_removed")}


def test_a_chain_that_bears_a_name_of_ours_is_removed(proxy):
    before = proxy.live()
    lines = repaired(
        proxy,
        before,
        lambda: restored(proxy, "*nat\n:KUBE-SVC-STRAY - [0:0]\nCOMMIT\n", "-n"),
    )

    assert told(lines) == {("nat", "chain_added")}


def test_a_fault_in_the_other_family_is_repaired_there(proxy):
    before = proxy.live(IPFamily.V6)
    chain = min(name for name in before["nat"] if name.startswith("KUBE-SEP-"))
    lines = repaired(
        proxy,
        before,
        lambda: proxy.lab.node.run([command(proxy, IPFamily.V6), "-t", "nat", "-D", chain, "1"]),
        IPFamily.V6,
    )

    assert {line["ip_family"] for line in lines} == {"IPv6"}


# Who, and who not --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["nft"], indirect=True)
def test_a_flush_of_the_whole_ruleset_is_repaired_and_its_author_named(proxy):
    before, other = proxy.live(), proxy.live(IPFamily.V6)
    lines = repaired(proxy, before, lambda: proxy.lab.node.run(["nft", "flush", "ruleset"]))
    proxy.wait(lambda: is_whole(proxy, other, IPFamily.V6), DEADLINE_S["nft"])

    assert {line["process"] for line in lines} == {"nft"}
    assert all(line["pid"] for line in lines)


def test_the_process_that_deleted_a_rule_is_named(proxy):
    before, chain = proxy.live(), service_chain(proxy)
    children = []

    def delete():
        children.append(proxy.lab.node.popen([command(proxy), "-t", "nat", "-D", chain, "1"]))
        children[-1].wait(10)

    # It is gone within milliseconds: on a busy machine, before it can be asked for its name.
    while not (lines := repaired(proxy, before, delete)) or lines[-1]["process"] == "unknown":
        assert len(children) < 5

    assert [line["pid"] for line in lines] == [[child.pid] for child in children]
    assert lines[-1]["process"] == command(proxy)


@pytest.mark.parametrize("backend", ["nft"], indirect=True)
def test_foreign_rules_in_foreign_chains_are_not_even_looked_at(proxy):
    looks = proxy.metric(SAVES)
    syncs = len(proxy.events("sync.completed"))
    node = proxy.lab.node
    node.run(["iptables-nft", "-t", "nat", "-N", "CNI-SOMETHING"])
    node.run(["iptables-nft", "-t", "nat", "-A", "CNI-SOMETHING", "-j", "RETURN"])
    node.run(["iptables-nft", "-t", "nat", "-I", "POSTROUTING", "-j", "CNI-SOMETHING"])
    node.run(["iptables-nft", "-t", "nat", "-D", "CNI-SOMETHING", "1"])
    node.run(["iptables-nft", "-t", "mangle", "-N", "KUBE-KUBELET-CANARY"])
    # What comes after it has been looked at; so what came before has not been.
    repaired(
        proxy,
        proxy.live(),
        lambda: node.run(["iptables-nft", "-t", "nat", "-F", "KUBE-MARK-MASQ"]),
    )

    assert proxy.metric(SAVES) == looks
    assert len(proxy.events("sync.completed")) == syncs + 1


def test_our_own_syncs_are_not_looked_at(proxy, files):
    looks = proxy.metric(SAVES)
    for number in range(5):
        more = f"more-{number}"
        files.write([*objects(), make_service(more, cluster_ip="172.30.99.9"), make_slice(more)])
        proxy.wait(
            lambda name=more: any(name in rule for rule in proxy.live()["nat"]["KUBE-SERVICES"])
        )

    assert proxy.metric(SAVES) == looks
    assert not proxy.events("drift.repaired")


def test_who_undoes_repairs_in_a_loop_is_named_once_and_left_waiting(proxy):
    chain = service_chain(proxy)
    before = proxy.live()
    deadline = time.monotonic() + 60
    while not proxy.events("drift.contested"):
        assert time.monotonic() < deadline, proxy.events("drift.repaired")[-3:]
        proxy.lab.node.run([command(proxy), "-t", "nat", "-F", chain])
        proxy.wait(lambda: bool(proxy.live()["nat"][chain]), 5)
    repairs = proxy.metric("kubeproxy_iptables_chains_repaired_total")
    # It waits now, while others' changes, and what we are asked for, are still done at once.
    for _ in range(5):
        proxy.lab.node.run([command(proxy), "-t", "nat", "-F", chain])

    assert proxy.metric("kubeproxy_iptables_chains_repaired_total") - repairs <= 1
    assert len(proxy.events("drift.contested")) == 1
    proxy.wait(lambda: is_whole(proxy, before), 10)


# Reading one chain -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["nft"], indirect=True)
def test_a_chain_that_is_read_alone_reads_as_among_all(proxy):
    with proxy.lab.node.entered():
        programs = runner.find_programs(IPFamily.V4, "nft")
        kernel = runner.Iptables(programs)
        alone = {
            (table, name): kernel.read_chain(ChainId(table, name))
            for table, found in proxy.live().items()
            for name in found
        }
        missing = kernel.read_chain(ChainId("nat", "KUBE-SVC-NONE"))

    assert alone == {
        (table, name): texts
        for table, found in proxy.live().items()
        for name, texts in found.items()
    }
    assert missing is None


# The watcher of nft alone ------------------------------------------------------------------------

FLOOD = "*nat\n:KUBE-SVC-FLOOD - [0:0]\n" + "-A KUBE-SVC-FLOOD -j RETURN\n" * 500 + "COMMIT\n"
OURS = ChainId("nat", "KUBE-SVC-A")


@pytest.fixture
def watch(clean_lab):
    """Give a function that starts a watcher; it returns the watcher and a queue of suspicions."""
    started = []

    def start(opener=events.connect, pause=lambda: None):
        told = queue.SimpleQueue()

        def tell(suspicion):
            told.put(suspicion)
            pause()

        watcher = events.NftWatcher(tell, opener)
        with clean_lab.node.entered():
            watcher.start()
        started.append(watcher)
        return watcher, told

    yield start
    for watcher in started:
        watcher.stop()


def test_what_our_own_process_does_is_kept_away_and_what_others_do_meanwhile_is_not(
    watch, clean_lab
):
    watcher, told = watch()
    node = clean_lab.node
    child = node.popen(
        ["iptables-nft-restore", "-n"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with watcher.own(IPFamily.V4, child.pid):
        node.run(["iptables-nft", "-t", "nat", "-N", OURS.chain])
        child.communicate(FLOOD, timeout=10)
    node.run(["iptables-nft", "-t", "nat", "-F", "KUBE-SVC-FLOOD"])
    suspicions = [told.get(timeout=5) for _ in range(2)]

    assert child.returncode == 0
    assert [(found.culprit.process, found.chains) for found in suspicions] == [
        ("iptables-nft", {OURS}), ("iptables-nft", {ChainId("nat", "KUBE-SVC-FLOOD")}),
    ]  # fmt: skip
    assert told.empty()


def test_lost_events_are_a_reason_to_look_everywhere_and_their_author_is_known(watch, clean_lab):
    opened = []

    def opener():
        sock = events.connect()
        if opened:
            # The second one has the details: two kilobytes of them, the least there can be.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        opened.append(sock)
        return sock

    may_read_on = threading.Event()
    _, told = watch(opener, lambda: may_read_on.wait(10))
    clean_lab.node.run(["iptables-nft", "-t", "nat", "-N", OURS.chain])
    assert told.get(timeout=5).chains == {OURS}
    clean_lab.node.run(["iptables-nft-restore", "-n"], input=FLOOD)
    may_read_on.set()
    suspicions = [told.get(timeout=5) for _ in range(2)]

    assert {(found.family, found.chains, found.culprit.process) for found in suspicions} == {
        (family, None, "iptables-nft-re") for family in IPFamily
    }
    # And after that it sees as well as before.
    clean_lab.node.run(["iptables-nft", "-t", "nat", "-X", OURS.chain])
    assert told.get(timeout=5).chains == {OURS}


def test_sockets_that_fail_are_opened_again_and_everything_looked_at(watch, clean_lab):
    opened = []

    def opener():
        with clean_lab.node.entered():
            sock = events.connect()
        opened.append(sock)
        return sock

    _, told = watch(opener)
    # Shut from below, as by a kernel that has had enough.
    broken = socket.socket()
    broken.setblocking(False)
    os.dup2(broken.fileno(), opened[0].fileno())
    broken.close()
    clean_lab.node.run(["iptables-nft", "-t", "nat", "-N", "WAKES-IT"])
    suspicions = [told.get(timeout=10) for _ in range(2)]

    assert {(found.family, found.chains) for found in suspicions} == {
        (family, None) for family in IPFamily
    }
    clean_lab.node.run(["iptables-nft", "-t", "nat", "-N", OURS.chain])
    assert told.get(timeout=5).chains == {OURS}
