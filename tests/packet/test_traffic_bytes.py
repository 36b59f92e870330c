"""Packets and bytes on the real kernel: what went over a Service is what Prometheus is told."""

import itertools
import json
import signal
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import make_endpoint, make_service, make_slice
from tests.support.proxy import running
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

PACKETS = "kubeproxy_service_packets_total"
BYTES = "kubeproxy_service_bytes_total"
V4, V6 = IPFamily.V4, IPFamily.V6
ACCOUNTING = "net/netfilter/nf_conntrack_acct"
SINK = 9000
NODE_PORT = {V4: 30090, V6: 30096}
NAMES = {V4: "web", V6: "web-v6"}
OPENED_S = 20.0


def cluster_ip(family):
    return PLANS[family].cluster_ip[:-2] + "77"


def overhead(octets):
    """Return the most that headers of so many bytes may come to, with a connection's begin and end.

    A TCP segment has 52 or 72 bytes of headers for more than 1,200; what is small is one packet each.
    """
    return octets // 10 + 5000


class Sink:
    """Servers in pods that take what comes and answer each block of it with a byte."""

    def __init__(self):
        self.listeners = []

    def listen(self, pod):
        with pod.entered():
            listener = socket.create_server(("::", SINK), family=socket.AF_INET6, dualstack_ipv6=True)  # fmt: skip
        self.listeners.append(listener)
        threading.Thread(target=self.serve, args=(listener,), daemon=True).start()

    def serve(self, listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(sock,), daemon=True).start()

    @staticmethod
    def answer(sock):
        # A block: its size and that of the answer in ten digits each, and itself.
        with sock:
            while head := sock.recv(20, socket.MSG_WAITALL):
                size = int(head[:10])
                while size:
                    size -= len(sock.recv(min(size, 65536)))
                sock.sendall(bytes(int(head[10:])))

    def close(self):
        for listener in self.listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@contextmanager
def transfer(ns, address, port):
    """Open a connection; give a function that sends and receives so many bytes over it."""
    with ns.entered():
        sock = socket.create_connection((address, port), timeout=OPENED_S)

    def move(there, back):
        sock.sendall(f"{there:010}{back:010}".encode() + bytes(there))
        while back:
            back -= len(sock.recv(min(back, 65536)))

    with sock:
        yield move


@pytest.fixture(scope="module")
def sink(lab):
    opened = Sink()
    for pod in lab.pods[:2]:
        opened.listen(pod)
    yield opened
    opened.close()


@pytest.fixture
def start(clean_lab, servers, sink, backend, tmp_path):
    """Start the daemon with a Service of each family; give a function that does it."""
    numbers = itertools.count()
    clean_lab.node.write_sysctls({ACCOUNTING: "0"})
    directory = tmp_path / "objects"
    directory.mkdir()
    ports = [{"name": "sink", "port": SINK}, {"name": "echo", "port": 53, "protocol": "UDP"}]
    for family, name in NAMES.items():
        service = make_service(
            name,
            cluster_ip=cluster_ip(family),
            type="NodePort",
            ports=[
                {**ports[0], "nodePort": NODE_PORT[family]},
                {**ports[1], "nodePort": NODE_PORT[family] + 1},
            ],
        )
        endpoints = [make_endpoint(pod.address(family)) for pod in clean_lab.pods[:2]]
        slices = make_slice(
            name,
            endpoints=endpoints,
            ports=[ports[0], {**ports[1], "port": 8080}],
            address_type=family.value,
        )
        items = {"kind": "List", "apiVersion": "v1", "items": [service, slices]}
        (directory / f"{name}.json").write_text(json.dumps(items))

    @contextmanager
    def start(*arguments):
        with running(
            clean_lab,
            backend,
            tmp_path / f"log-{next(numbers)}",
            f"--manifests={directory}",
            "--traffic-metrics=service",
            f"--traffic-metrics-state={tmp_path / 'traffic.json'}",
            *arguments,
        ) as proxy:
            proxy.wait_synced()
            yield proxy

    yield start
    clean_lab.node.write_sysctls({ACCOUNTING: "0"})


@pytest.fixture
def once(backend):
    """Run a test on one backend only: it is about connections, which are the same on both."""
    if backend != "nft":
        pytest.skip("the connection table does not know who wrote the rules")


def wait(proxy, condition):
    # Looks take at most a tenth of the time, so on a busy machine the next one may be far away.
    proxy.wait(condition, 90)


def wait_counting(proxy):
    """Wait until connections are counted: not before the first look."""
    wait(proxy, lambda: BYTES + "{" in proxy.get("/metrics")[1])


def counted(proxy, metric, direction, family=V4, port="sink"):
    return proxy.metric(
        metric,
        service=NAMES[family],
        port=port,
        ip_family=family.value,
        direction=direction,
    )


def settle(proxy, family, there, back):
    """Wait until so many bytes are counted; return how many packets and bytes there are."""
    wait(
        proxy,
        lambda: (
            counted(proxy, BYTES, "to_service", family) >= there
            and counted(proxy, BYTES, "from_service", family) >= back
        ),
    )
    return {
        (metric, direction): counted(proxy, metric, direction, family)
        for metric in (PACKETS, BYTES)
        for direction in ("to_service", "from_service")
    }


def test_bytes_of_a_transfer_are_those_of_its_service(start, clean_lab):
    with start("--traffic-metrics-bytes") as proxy:
        wait_counting(proxy)
        for family in IPFamily:
            with transfer(clean_lab.pods[0], cluster_ip(family), SINK) as move:
                move(300_000, 100_000)
            found = settle(proxy, family, 300_000, 100_000)
            assert found[BYTES, "to_service"] <= 300_000 + overhead(400_000)
            assert found[BYTES, "from_service"] <= 100_000 + overhead(400_000)
            assert 4 <= found[PACKETS, "to_service"] < 1000
            assert 4 <= found[PACKETS, "from_service"] < 1000
        # The last packets of the connections, which may come after a look.
        for family in IPFamily:
            wait(proxy, is_closed(clean_lab, family))
        looks = proxy.metric("kubeproxy_traffic_flow_look_duration_seconds_count")
        wait(
            proxy,
            lambda: proxy.metric("kubeproxy_traffic_flow_look_duration_seconds_count") > looks + 1,
        )
        before = {family: settle(proxy, family, 0, 0) for family in IPFamily}
        assert proxy.metric("kubeproxy_traffic_flows", state="tracked") >= 2
        clean_lab.node.run(["conntrack", "-F"])
        wait(proxy, lambda: proxy.metric("kubeproxy_traffic_flows", state="tracked") == 0)

        # They have ended: nothing is counted twice.
        assert {family: settle(proxy, family, 0, 0) for family in IPFamily} == before


def is_closed(lab, family):
    def is_closed():
        listed = lab.node.run(
            ["conntrack", "-L", "-f", family.value.lower(), "-p", "tcp", f"--dport={SINK}"]
        )
        return "TIME_WAIT" in listed.stdout

    return is_closed


def test_what_ends_between_two_looks_is_counted(once, start, clean_lab):
    with start("--traffic-metrics-bytes") as proxy:
        wait_counting(proxy)
        for _ in range(3):
            for family in IPFamily:
                with transfer(clean_lab.pods[0], cluster_ip(family), SINK) as move:
                    move(50_000, 0)
            clean_lab.node.run(["conntrack", "-F"])
        for family in IPFamily:
            found = settle(proxy, family, 150_000, 0)

            assert found[BYTES, "to_service"] <= 150_000 + 3 * overhead(50_000)


def test_a_long_connection_shows_progress_before_it_ends(once, start, clean_lab):
    with start("--traffic-metrics-bytes") as proxy:
        wait_counting(proxy)
        seen = [0.0]
        with transfer(clean_lab.pods[0], cluster_ip(V4), SINK) as move:
            for number in range(1, 4):
                move(100_000, 0)
                seen.append(settle(proxy, V4, number * 100_000, 0)[BYTES, "to_service"])

        assert all(later - before >= 90_000 for before, later in itertools.pairwise(seen))
        assert seen[-1] <= 300_000 + overhead(300_000)


def test_a_killed_daemon_s_bytes_go_on(start, clean_lab):
    with start("--traffic-metrics-bytes") as proxy:
        wait_counting(proxy)
        with transfer(clean_lab.pods[0], cluster_ip(V4), SINK) as move:
            move(100_000, 0)
            first = settle(proxy, V4, 100_000, 0)[BYTES, "to_service"]
            proxy.end(signal.SIGKILL)
            move(100_000, 0)
            with start("--traffic-metrics-bytes") as again:
                wait_counting(again)
                second = counted(again, BYTES, "to_service")
                assert second >= first
                move(100_000, 0)
                third = settle(again, V4, 300_000, 0)[BYTES, "to_service"]

                assert third <= 300_000 + overhead(300_000)


@pytest.mark.parametrize("family", list(IPFamily), ids=lambda family: family.value)
def test_a_datagram_to_a_node_port_is_one_packet_each_way(start, clean_lab, family):
    outside = clean_lab.namespace("outside")
    with start("--traffic-metrics-bytes") as proxy:
        wait_counting(proxy)
        node = PLANS[family].node
        assert connect(outside, node, NODE_PORT[family] + 1, "udp", source_port=4444).is_answered
        wait(proxy, lambda: counted(proxy, PACKETS, "from_service", family, "echo") >= 1)

        assert counted(proxy, PACKETS, "to_service", family, "echo") == 1
        assert counted(proxy, PACKETS, "from_service", family, "echo") == 1
        header = 28 if family is V4 else 48
        assert counted(proxy, BYTES, "to_service", family, "echo") == header + len(b"ask\n")


def test_what_goes_past_services_is_not_counted(once, start, clean_lab):
    with start("--traffic-metrics-bytes") as proxy:
        wait_counting(proxy)
        with transfer(clean_lab.node, clean_lab.pods[0].address(V4), SINK) as move:
            move(100_000, 0)
        with transfer(clean_lab.node, cluster_ip(V6), SINK) as move:
            move(50_000, 0)
        settle(proxy, V6, 50_000, 0)

        assert counted(proxy, BYTES, "to_service", V4) == 0
        # Connections to a pod are sorted out by the kernel.
        assert proxy.metric("kubeproxy_traffic_flows", state="tracked") == 1


def test_off_means_that_nothing_is_switched_on(start, clean_lab):
    with start() as proxy:
        with transfer(clean_lab.pods[0], cluster_ip(V4), SINK) as move:
            move(1000, 0)
        wait(proxy, lambda: proxy.metric("kubeproxy_service_connections_total") == 1)

        assert BYTES + "{" not in proxy.get("/metrics")[1]
        assert PACKETS + "{" not in proxy.get("/metrics")[1]
        assert clean_lab.node.read_sysctl(ACCOUNTING) == "0"
        tasks = Path("/proc", str(proxy.process.pid), "task").glob("*/comm")
        assert "flows" not in {path.read_text().strip() for path in tasks}
