"""Traffic metrics on the real kernel: what clients did is what Prometheus is told."""

import itertools
import json
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import make_endpoint, make_service, make_slice
from tests.support.proxy import running
from tests.support.traffic import connect, conversation

pytestmark = pytest.mark.packet

CONNECTIONS = "kubeproxy_service_connections_total"
REFUSED = "kubeproxy_service_refused_packets_total"
ENDPOINT = "kubeproxy_endpoint_connections_total"
V4, V6 = IPFamily.V4, IPFamily.V6


def cluster_ip(family, number):
    return PLANS[family].cluster_ip[:-2] + str(50 + number)


class Files:
    """Services of both families in files, which the daemon follows."""

    def __init__(self, directory):
        self.directory = directory
        directory.mkdir()

    def write(self, name, number, pods, node="node1", **spec):
        """Let Service NAME (IPv4) and NAME-v6 lead to *pods*, which are on *node*."""
        for family in IPFamily:
            suffix = "" if family is V4 else "-v6"
            ips = [pod.address(family) for pod in pods]
            self._put(
                name + suffix,
                make_service(
                    name + suffix,
                    cluster_ip=cluster_ip(family, number),
                    ports=[80],
                    labels={"app": name},
                    **spec,
                ),
                make_slice(
                    name + suffix,
                    endpoints=[make_endpoint(ip, node=node) for ip in ips],
                    address_type=family.value,
                ),
            )

    def write_others(self, numbers, pods):
        """Let IPv4 Services of these numbers be there or, without *pods*, be gone."""
        for number in numbers:
            name = f"other-{number}"
            service = make_service(name, cluster_ip=f"172.30.200.{number + 1}", ports=[80])
            endpoints = [make_endpoint(pod.address(V4)) for pod in pods]
            if pods:
                self._put(name, service, make_slice(name, endpoints=endpoints))
            else:
                (self.directory / f"{name}.json").unlink()

    def _put(self, name, *objects):
        new = self.directory / ".new"
        new.write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": list(objects)}))
        new.rename(self.directory / f"{name}.json")


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "objects")


@pytest.fixture
def start(clean_lab, servers, backend, files, tmp_path):
    """Start the daemon on the files; give a function that does it."""
    numbers = itertools.count()

    @contextmanager
    def start(*arguments, mode="service"):
        with running(
            clean_lab,
            backend,
            tmp_path / f"log-{next(numbers)}",
            f"--manifests={files.directory}",
            f"--traffic-metrics={mode}",
            f"--traffic-metrics-state={tmp_path / 'traffic.json'}",
            *arguments,
        ) as proxy:
            yield proxy

    return start


def wait(proxy, condition):
    # Looks take at most a tenth of the time, so on a busy machine the next one may be far away.
    try:
        proxy.wait(condition, 90)
    except AssertionError as error:
        lines = proxy.get("/metrics")[1].splitlines()
        shown = [line for line in lines if line.startswith(("kubeproxy_service", "kubeproxy_traf"))]
        raise AssertionError("\n".join([str(error), *shown])) from None


def counted(proxy, name, family=V4, metric=CONNECTIONS, **labels):
    return proxy.metric(metric, service=name, ip_family=family.value, **labels)


def visit(lab, family, number, times=100):
    for _ in range(times):
        # Closed by the client. A server that closes keeps the connection in TIME_WAIT, may take a later
        # one of another Service for it, and lets its SYN be sent, and counted, a second time.
        with conversation(lab.node, cluster_ip(family, number), 80) as talk:
            assert talk.ask().is_answered


def endpoint(pod, family):
    ip = pod.address(family)
    return f"{ip}:8080" if family is V4 else f"[{ip}]:8080"


def endpoints_of(proxy, name):
    return {
        rule.rpartition(" ")[2]
        for texts in proxy.live()["nat"].values()
        for rule in texts
        if f'"default/{name}"' in rule and "-j DNAT" in rule
    }


def is_tree(proxy):
    return any(chain.startswith("KUBE-SVL-172.") for chain in proxy.live()["nat"])


def test_a_hundred_connections_are_a_hundred_on_that_service(start, clean_lab, files):
    pods = clean_lab.pods[:2]
    files.write("web", 1, pods)
    files.write("idle", 2, pods)
    with start(mode="endpoint") as proxy:
        proxy.wait_synced()
        for family, name in ((V4, "web"), (V6, "web-v6")):
            visit(clean_lab, family, 1)
            wait(proxy, lambda name=name, family=family: counted(proxy, name, family) == 100)
            shares = [
                counted(proxy, name, family, ENDPOINT, endpoint=endpoint(pod, family))
                for pod in pods
            ]
            assert sum(shares) == 100
            assert min(shares) > 0
        text = proxy.get("/metrics")[1]

        # Present, with zero: a rate needs a first value.
        assert (
            f'{CONNECTIONS}{{ip_family="IPv4",namespace="default",port="",protocol="tcp",service="idle"}} 0.0'
            in (text)
        )
        assert proxy.metric(CONNECTIONS) == 200


def test_totals_go_on_while_chains_are_written_anew(start, clean_lab, files):
    pods = clean_lab.pods
    files.write("web", 1, pods[:1])
    with start() as proxy:
        proxy.wait_synced()
        seen = [counted(proxy, "web")]

        def wait_for(total):
            wait(proxy, lambda: seen.append(counted(proxy, "web")) or seen[-1] == total)

        visit(clean_lab, V4, 1, 10)
        # Nobody looks in between: what the endpoint had counted would be gone with its chain.
        files.write("web", 1, pods[1:2])
        wait(proxy, lambda: endpoints_of(proxy, "web") == {endpoint(pods[1], V4)})
        wait_for(10)
        # A tree in the place of a flat chain, and affinity: all endpoints' chains are written anew.
        visit(clean_lab, V4, 1, 10)
        files.write_others(range(80), pods[:1])
        files.write("web", 1, pods[1:3], sessionAffinity="ClientIP")
        wait(proxy, lambda: len(endpoints_of(proxy, "web")) == 2 and is_tree(proxy))
        visit(clean_lab, V4, 1, 10)
        wait_for(30)
        # And all of it undone, without one look in between.
        files.write_others(range(80), [])
        visit(clean_lab, V4, 1, 10)
        files.write("web", 1, pods[2:4])
        wait(proxy, lambda: endpoint(pods[3], V4) in endpoints_of(proxy, "web"))
        wait(proxy, lambda: not is_tree(proxy))
        visit(clean_lab, V4, 1, 10)
        wait_for(50)

        assert seen == sorted(seen)
        assert not proxy.events("traffic.look_failed")


def test_a_killed_daemon_s_totals_go_on(start, clean_lab, files):
    pods = clean_lab.pods
    files.write("web", 1, pods[:2])
    with start() as proxy:
        proxy.wait_synced()
        visit(clean_lab, V4, 1, 10)
        # These are in no counter of the kernel afterwards.
        files.write("web", 1, pods[2:4])
        wait(proxy, lambda: endpoint(pods[2], V4) in endpoints_of(proxy, "web"))
        visit(clean_lab, V4, 1, 10)
        wait(proxy, lambda: counted(proxy, "web") == 20)
        visit(clean_lab, V4, 1, 10)
        proxy.end(signal.SIGKILL)
    visit(clean_lab, V4, 1, 10)
    with start() as again:
        again.wait_synced()
        first = []
        wait(again, lambda: first.append(counted(again, "web")) or first[-1] > 0)

        assert first[-1] == 40


def test_without_its_file_a_restarted_daemon_begins_at_zero(start, clean_lab, files, tmp_path):
    files.write("web", 1, clean_lab.pods[:2])
    with start() as proxy:
        proxy.wait_synced()
        visit(clean_lab, V4, 1, 10)
        wait(proxy, lambda: counted(proxy, "web") == 10)
        proxy.end(signal.SIGTERM)
    (tmp_path / "traffic.json").unlink()
    with start() as again:
        again.wait_synced()
        wait(again, lambda: 'service="web"' in again.get("/metrics")[1])
        assert counted(again, "web") == 0
        visit(clean_lab, V4, 1, 7)

        wait(again, lambda: counted(again, "web") == 7)


def test_refused_packets_are_told_with_the_reason(start, clean_lab, files):
    files.write("none", 1, [])
    files.write("far", 2, clean_lab.remote_pods, "node2", internalTrafficPolicy="Local")
    client = clean_lab.local_pods[0]
    with start() as proxy:
        proxy.wait_synced()
        for family, suffix in ((V4, ""), (V6, "-v6")):
            for _ in range(5):
                assert connect(client, cluster_ip(family, 1), 80).kind == "refused"
            assert connect(client, cluster_ip(family, 2), 80, timeout_s=0.5).kind == "timeout"
            wait(
                proxy,
                lambda family=family, suffix=suffix: (
                    counted(proxy, f"none{suffix}", family, REFUSED, reason="no_endpoints") >= 5
                ),
            )
            assert counted(proxy, f"far{suffix}", family, REFUSED, reason="no_local_endpoints") >= 1
        assert proxy.metric(CONNECTIONS) == 0


def test_what_is_above_the_cap_is_counted_together(start, clean_lab, files):
    for number in range(1, 4):
        files.write(f"web-{number}", number, clean_lab.pods[:1])
    with start("--traffic-metrics-max-series=2") as proxy:
        proxy.wait_synced()
        proxy.metric(CONNECTIONS)
        for number in range(1, 4):
            visit(clean_lab, V4, number, 10 * number)
        wait(proxy, lambda: proxy.metric(CONNECTIONS) == 60)

        # The busiest have the places.
        assert counted(proxy, "web-3") == 30
        assert counted(proxy, "web-2") == 20
        assert counted(proxy, "other", namespace="") == 10


def test_only_the_namespaces_asked_for_are_counted(start, clean_lab, files):
    files.write("web", 1, clean_lab.pods[:1])
    with start("--traffic-metrics-namespaces=elsewhere") as proxy:
        proxy.wait_synced()
        visit(clean_lab, V4, 1, 3)
        wait(proxy, lambda: proxy.metric("kubeproxy_traffic_look_duration_seconds_count") > 1)

        assert CONNECTIONS + "{" not in proxy.get("/metrics")[1]


def test_only_services_with_the_labels_asked_for_are_shown(start, clean_lab, files):
    for number, name in enumerate(("web", "api", "db"), 1):
        files.write(name, number, clean_lab.pods[:1])
    with start("--traffic-metrics-selector=app in (web, db),!legacy") as proxy:
        proxy.wait_synced()
        wait(proxy, lambda: CONNECTIONS + "{" in proxy.get("/metrics")[1])
        for number in (1, 2, 3):
            visit(clean_lab, V4, number, 3)
        wait(proxy, lambda: counted(proxy, "web") == counted(proxy, "db") == 3)

        assert 'service="api' not in proxy.get("/metrics")[1]


def test_off_means_no_series_no_thread_and_no_file(start, clean_lab, files, tmp_path):
    files.write("web", 1, clean_lab.pods[:1])
    with start(mode="off") as proxy:
        proxy.wait_synced()
        visit(clean_lab, V4, 1, 3)
        text = proxy.get("/metrics")[1]

        assert "kubeproxy_service_" not in text
        assert not (tmp_path / "traffic.json").exists()
        comms = [
            path.read_text().strip()
            for path in Path("/proc", str(proxy.process.pid), "task").glob("*/comm")
        ]
        assert "traffic" not in comms


def test_on_legacy_looks_are_not_taken_for_somebody_else_s_writing(
    start, clean_lab, files, backend
):
    if backend != "legacy":
        pytest.skip("nobody needs a lock to read nft's counters")
    files.write("web", 1, clean_lab.pods[:1])
    with start() as proxy:
        proxy.wait_synced()
        full = proxy.metric("kubeproxy_sync_full_proxy_rules_duration_seconds_count")
        looks = proxy.metric("kubeproxy_traffic_look_duration_seconds_count")
        wait(
            proxy,
            lambda: proxy.metric("kubeproxy_traffic_look_duration_seconds_count") >= looks + 3,
        )

        assert proxy.metric("kubeproxy_sync_full_proxy_rules_duration_seconds_count") == full
