"""The laboratory itself, without any Service: what other packet tests take for granted."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import netns, sctp, traffic
from tests.support.netns import Lab
from tests.support.servers import Servers

pytestmark = pytest.mark.packet

PROTOCOLS = ["tcp", "udp", "sctp"]


def own_namespace() -> Path:
    """Return what tells the current thread's network namespace from others."""
    return Path("/proc/thread-self/ns/net").readlink()


def listed() -> set[str]:
    """Return the names of this process's namespaces."""
    return {path.name for path in Path("/run/netns").glob(f"kpp-{os.getpid()}-*")}


@pytest.fixture(scope="module")
def everywhere(lab, servers):
    """Let the hosts serve as the pods do."""
    for ns in (lab.node, lab.node2, lab.outside):
        servers.serve(ns, tcp=[80], udp=[80], sctp=[80])
    return servers


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(("pod1", "pod2"), id="pod to pod on the same node"),
        pytest.param(("pod1", "pod1"), id="pod to itself"),
        pytest.param(("pod1", "remote1"), id="pod to pod on another node"),
        pytest.param(("remote2", "pod2"), id="pod on another node to pod"),
        pytest.param(("outside", "pod1"), id="outside to pod"),
        pytest.param(("pod2", "outside"), id="pod to outside"),
        pytest.param(("node2", "pod1"), id="other node to pod"),
        pytest.param(("outside", "node"), id="outside to node"),
        pytest.param(("remote1", "node"), id="pod on another node to node"),
    ],
)
def test_everybody_reaches_everybody_without_translation(lab, everywhere, family, ends, protocol):
    client, server = (lab.namespace(name) for name in ends)
    outcome = traffic.connect(client, server.address(family), 80, protocol)

    assert (outcome.kind, outcome.server) == ("answered", server.name)
    assert outcome.client_ip == client.address(family)
    assert outcome.server_ip == server.address(family)


def test_node_reaches_its_pods_from_the_address_of_its_bridge(lab, servers, plan):
    outcome = traffic.connect(lab.node, plan.local_pod(1), 80)

    assert (outcome.server, outcome.client_ip) == ("pod1", plan.pod_gateway)


def test_node_reaches_the_world_from_its_first_address(lab, everywhere, plan):
    outcome = traffic.connect(lab.node, plan.outside, 80)

    assert (outcome.server, outcome.client_ip) == ("outside", plan.node)


def test_node_is_reached_at_its_alternate_address(lab, servers, plan):
    servers.serve(lab.node, name="alternate", tcp=[81], ips=[plan.node_alternate])
    outcome = traffic.connect(lab.outside, plan.node_alternate, 81)
    servers.stop("alternate")

    assert (outcome.server, outcome.server_ip) == ("alternate", plan.node_alternate)


def test_outside_has_a_second_address_to_be_blocked(lab, servers, plan):
    outcome = traffic.connect(lab.outside, plan.local_pod(1), 80, source_ip=plan.outside_blocked)

    assert outcome.client_ip == plan.outside_blocked


@pytest.mark.parametrize("which", ["cluster_ip", "external_ip", "lb_vip"])
def test_addresses_of_rules_are_routed_to_the_node(clean_lab, servers, iptables, plan, which):
    address = getattr(plan, which)
    target = f"[{plan.local_pod(1)}]" if ":" in address else plan.local_pod(1)
    rules = (
        f"*nat\n-A PREROUTING -d {address} -p tcp -j DNAT --to-destination {target}:80\nCOMMIT\n"
    )
    clean_lab.node.run([iptables.restore, "--noflush"], input=rules)

    assert traffic.connect(clean_lab.outside, address, 1234).server == "pod1"
    assert traffic.connect(clean_lab.local_pods[1], address, 1234).server == "pod1"
    assert traffic.connect(clean_lab.remote_pods[0], address, 1234).server == "pod1"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_translated_packets_come_back_to_a_pod_beside_the_endpoint(
    clean_lab, servers, iptables, plan, protocol
):
    target = f"[{plan.local_pod(2)}]:81" if ":" in plan.cluster_ip else f"{plan.local_pod(2)}:81"
    rules = (
        f"*nat\n-A PREROUTING -d {plan.cluster_ip} -p {protocol} -m {protocol} --dport 80"
        f" -j DNAT --to-destination {target}\nCOMMIT\n"
    )
    clean_lab.node.run([iptables.restore, "--noflush"], input=rules)
    outcome = traffic.connect(clean_lab.local_pods[0], plan.cluster_ip, 80, protocol)

    assert (outcome.server, outcome.server_port) == ("pod2", 81)
    assert outcome.client_ip == plan.local_pod(1)


def test_tcp_port_without_a_server_is_refused_by_reset(lab, plan):
    outcome = traffic.connect(lab.outside, plan.local_pod(1), 9)

    assert (outcome.kind, outcome.cause) == ("refused", "RST")


def test_udp_port_without_a_server_is_refused_by_icmp(lab, plan):
    outcome = traffic.connect(lab.outside, plan.local_pod(1), 9, "udp")

    icmp = "ICMPv6 1/4" if ":" in plan.outside else "ICMP 3/3"
    assert (outcome.kind, outcome.cause) == ("refused", f"{icmp} from {plan.local_pod(1)}")


def test_host_without_sctp_is_unreachable_for_it(lab, plan):
    outcome = traffic.connect(lab.pods[0], plan.gateway, 9, "sctp")

    assert outcome.kind == "unreachable"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rejected_packets_are_refused_by_icmp_from_the_node(
    clean_lab, servers, iptables, plan, protocol
):
    rules = f"*filter\n-A FORWARD -p {protocol} -j REJECT\nCOMMIT\n"
    clean_lab.node.run([iptables.restore, "--noflush"], input=rules)
    outcomes = [
        traffic.connect(clean_lab.outside, plan.local_pod(1), 80, protocol) for _ in range(200)
    ]

    icmp = "ICMPv6 1/4" if ":" in plan.outside else "ICMP 3/3"
    # So many in a row: none is silent because of the kernel's limits on ICMP errors.
    assert {(o.kind, o.cause) for o in outcomes} == {("refused", f"{icmp} from {plan.node}")}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dropped_packets_time_out(clean_lab, servers, iptables, plan, protocol):
    rules = f"*filter\n-A FORWARD -p {protocol} -j DROP\nCOMMIT\n"
    clean_lab.node.run([iptables.restore, "--noflush"], input=rules)
    outcome = traffic.connect(clean_lab.outside, plan.local_pod(1), 80, protocol, timeout_s=0.2)

    assert outcome.kind == "timeout"
    assert 0.2 <= outcome.seconds < 1


def test_reset_removes_rules_chains_and_connections_of_both_backends(clean_lab, servers, plan):
    for name in ("nft", "legacy"):
        programs = netns.iptables_programs(name, plan.family)
        rules = "*filter\n:FORWARD DROP\n:KUBE-X -\n-A FORWARD -j KUBE-X\nCOMMIT\n"
        clean_lab.node.run([programs.restore, "--noflush"], input=rules)
    assert (
        traffic.connect(clean_lab.outside, plan.local_pod(1), 80, timeout_s=0.2).kind == "timeout"
    )

    clean_lab.reset_rules()

    assert traffic.connect(clean_lab.outside, plan.local_pod(1), 80).is_answered
    for name in ("nft", "legacy"):
        programs = netns.iptables_programs(name, plan.family)
        assert "KUBE-X" not in clean_lab.node.run([programs.save]).stdout


def test_shares_count_servers_and_failures(clean_lab, servers, iptables, plan):
    target = f"[{plan.local_pod(2)}]" if ":" in plan.cluster_ip else plan.local_pod(2)
    rules = (
        "*nat\n"
        f"-A PREROUTING -d {plan.cluster_ip} -p tcp -m statistic --mode random --probability 0.5"
        f" -j DNAT --to-destination {target}:80\n"
        f"-A PREROUTING -d {plan.cluster_ip} -p tcp -j DNAT --to-destination {target}:9\nCOMMIT\n"
    )
    clean_lab.node.run([iptables.restore, "--noflush"], input=rules)
    got = traffic.shares(clean_lab.outside, plan.cluster_ip, 80, 100, concurrency=4)

    assert got.keys() == {"pod2", "(refused)"}
    assert got.total() == 100


def test_conversation_keeps_its_server_and_notices_its_end(lab, servers, plan):
    servers.serve(lab.local_pods[0], name="short-lived", tcp=[82])
    with traffic.conversation(lab.outside, plan.local_pod(1), 82) as talk:
        answers = [talk.ask().server, talk.ask().server]
        servers.stop("short-lived")

        assert answers == ["short-lived"] * 2
        assert talk.ask().kind == "reset"


def test_ticker_records_the_failures_of_an_outage_and_no_others(lab, servers, plan):
    servers.serve(lab.local_pods[0], name="moody", tcp=[82])
    with traffic.Ticker(lab.outside, plan.local_pod(1), 82) as ticker:
        ticker.wait_for_ticks(5)
        servers.stop("moody")
        ticker.wait_for(lambda ticks: ticks[-1].outcome.kind == "refused")
        servers.serve(lab.local_pods[0], name="moody", tcp=[82])
        recovered = time.monotonic()
        ticker.wait_for_ticks(5)
    servers.stop("moody")

    assert ticker.failures
    assert all(tick.started_at < recovered for tick in ticker.failures)


def test_udp_of_one_source_port_is_one_flow(lab, servers, plan):
    first, second = (
        traffic.connect(lab.outside, plan.local_pod(1), 80, "udp", source_port=5353)
        for _ in range(2)
    )

    assert first.client_port == second.client_port == 5353


def test_neighbour_can_aim_packets_at_the_loopback_address_of_the_node(lab, servers):
    servers.serve(lab.node, name="private", tcp=[83], ips=["127.0.0.1"])
    with lab.loopback_over_the_wire() as neighbour:
        guarded = traffic.connect(neighbour, "127.0.0.1", 83, timeout_s=0.2)
        # The kernel's own guard, which localhost node ports need to be down.
        lab.node.write_sysctls({"net/ipv4/conf/*/route_localnet": "1"})
        open_ = traffic.connect(neighbour, "127.0.0.1", 83)
        lab.node.write_sysctls({"net/ipv4/conf/*/route_localnet": "0"})
    afterwards = traffic.connect(lab.node2, "127.0.0.1", 83)
    servers.stop("private")

    assert guarded.kind == "timeout"
    assert (open_.server, open_.client_ip) == ("private", lab.node2.address(IPFamily.V4))
    assert afterwards.cause == "RST"  # node2 asks itself again


def test_sockets_stay_in_the_namespace_where_they_were_opened(lab, plan):
    before = own_namespace()
    with lab.local_pods[0].entered():
        inside = own_namespace()
        sock = socket.socket(socket.AF_INET6 if ":" in plan.node else socket.AF_INET)

    with sock:
        sock.bind((plan.local_pod(1), 0))  # fails outside, where nobody has this address
    assert inside != before
    assert own_namespace() == before


def test_entering_moves_no_other_thread(lab):
    entered, looked = threading.Event(), threading.Event()
    seen = []

    def stay_inside() -> None:
        with lab.node.entered():
            seen.append(own_namespace())
            entered.set()
            looked.wait(timeout=10)

    home = own_namespace()
    thread = threading.Thread(target=stay_inside)
    thread.start()
    entered.wait(timeout=10)
    meanwhile = own_namespace()
    looked.set()
    thread.join()

    assert meanwhile == home
    assert seen != [home]


def test_programs_run_inside_with_a_lock_of_their_own(lab):
    script = "import os; print(os.readlink('/proc/self/ns/net'), os.environ['XTABLES_LOCKFILE'])"
    inside, lock = lab.node.run([sys.executable, "-c", script]).stdout.split()

    assert inside != own_namespace()
    assert Path(lock).parent == lab.directory


def test_failing_program_is_reported_with_its_words(lab):
    with pytest.raises(AssertionError, match=r"in node ended with 1: .*nowhere"):
        lab.node.run(["ip", "link", "show", "nowhere"])


def test_two_labs_at_once_do_not_meet(lab, servers, plan):
    with Lab.build(local_pods=1, remote_pods=1) as other, Servers() as more:
        more.serve(other.local_pods[0], name="other", tcp=[80])

        assert traffic.connect(lab.outside, plan.local_pod(1), 80).server == "pod1"
        assert traffic.connect(other.outside, plan.local_pod(1), 80).server == "other"


def test_closing_removes_namespaces_programs_and_scratch_space(lab):
    before = listed()
    with Lab.build() as other:
        child = other.node.popen(["sleep", "1000"], stdout=subprocess.PIPE)
        assert listed() > before

    assert listed() == before
    assert child.returncode is not None
    assert not other.directory.exists()


def test_failure_in_the_middle_of_a_test_removes_the_namespaces(lab):
    before = listed()
    with contextlib.suppress(ZeroDivisionError), Lab.build():
        raise ZeroDivisionError

    assert listed() == before


def test_lab_of_a_killed_process_is_removed_by_the_next_one(lab):
    script = (
        "import os, signal\n"
        "from tests.support.netns import Lab\n"
        "lab = Lab.build()\n"
        "print(lab.node.netns, lab.directory, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False
    )
    name, directory = killed.stdout.split()
    left = [Path("/run/netns", name), Path(directory)]
    assert all(path.exists() for path in left)

    netns.remove_stale()

    assert not any(path.exists() for path in left)


def test_building_is_fast(lab):
    started = time.monotonic()
    with Lab.build():
        built = time.monotonic()
    closed = time.monotonic()

    # What it is promised to take at most, on a slow machine; measured: 0.05 s and 0.003 s.
    assert built - started < 1.5
    assert closed - built < 0.5


def test_nothing_appears_in_the_namespace_of_the_host(lab):
    def host_state() -> str:
        commands = (["ip", "-o", "link"], ["ip", "route", "show", "table", "all"], ["ip", "rule"])
        return "".join(
            subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            for argv in commands
        )

    before = host_state()
    with Lab.build() as other:
        other.reset_rules()
        during = host_state()

    assert during == before


def test_sctp_checksum_is_the_published_one():
    # RFC 3720, appendix B.4: 32 bytes of zeros.
    assert sctp.crc32c(bytes(32)) == 0x8A9136AA


def test_damaged_sctp_packet_is_ignored():
    packet = bytearray(sctp.render_init(1000, 80, tag=7))
    packet[-1] ^= 1

    assert sctp.parse(bytes(packet)) is None
