"""The daemon as a process: in a namespace, against an API server or files, on both backends."""

import json
import shutil
import signal
import time

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.api_server import ApiServer
from tests.support.builders import cluster, make_endpoint, make_node, make_service, make_slice
from tests.support.proxy import HEALTH_PORT, own_rules, running
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

V4 = PLANS[IPFamily.V4]
SERVICES = 1000
ENDPOINTS = 5


@pytest.fixture
def api(clean_lab):
    with clean_lab.node.entered():
        server = ApiServer()
    with server:
        server.apply(make_node("node1"))
        yield server


def service_chains(tables):
    return {name for name in tables.get("nat", {}) if name.startswith("KUBE-SVC-")}


def test_a_thousand_services_appear_and_a_small_change_is_a_small_restore(start, api):
    objects = list(cluster(SERVICES, ENDPOINTS))
    api.apply_many(objects)
    proxy = start()
    proxy.wait_synced(60)
    assert len(service_chains(proxy.live())) == SERVICES
    lines = proxy.metric("kubeproxy_iptables_restore_lines_total")
    syncs = len(proxy.events("sync.completed"))
    changed = next(obj for obj in objects if obj["kind"] == "EndpointSlice")
    changed["endpoints"][0]["addresses"] = ["10.99.99.99"]
    api.apply(changed)
    proxy.wait(lambda: len(proxy.events("sync.completed")) > syncs)
    proxy.wait(lambda: proxy.metric("kubeproxy_iptables_restore_lines_total") > lines)

    assert proxy.metric("kubeproxy_iptables_restore_lines_total") - lines < 40
    assert any(
        "10.99.99.99" in rule for _, rules in own_rules(proxy.live()).items() for rule in rules
    )


def test_killed_and_started_again_with_nothing_changed_it_writes_nothing(start, api):
    api.apply_many(cluster(100, ENDPOINTS))
    first = start()
    first.wait_synced()
    before = first.live()
    first.end(signal.SIGKILL)
    second = start()
    second.wait_synced()

    assert second.metric("kubeproxy_iptables_restores_total") == 0
    assert second.live() == before


def test_an_api_server_that_was_away_costs_nothing(start, api):
    api.apply_many(cluster(50, ENDPOINTS))
    proxy = start()
    proxy.wait_synced()
    before = own_rules(proxy.live())
    restores = proxy.metric("kubeproxy_iptables_restores_total")
    api.stop()
    proxy.wait(lambda: bool(proxy.events("watch.failed")))
    # What happens meanwhile is learned afterwards; what did not happen costs no sync.
    api.apply(make_service("late", cluster_ip="172.31.255.1"))
    api.start()
    proxy.wait(
        lambda: any("default/late" in rule for rule in proxy.live()["filter"]["KUBE-SERVICES"]), 60
    )

    after = own_rules(proxy.live())
    assert {key: texts for key, texts in after.items() if key[1] != "KUBE-SERVICES"} == {
        key: texts for key, texts in before.items() if key[1] != "KUBE-SERVICES"
    }
    assert proxy.metric("kubeproxy_iptables_restores_total") - restores <= 2


def test_sigterm_leaves_the_rules_and_ends_within_two_seconds(start, api):
    api.apply_many(cluster(20, ENDPOINTS))
    proxy = start()
    proxy.wait_synced()
    before = proxy.live()
    asked = time.monotonic()
    status = proxy.end(signal.SIGTERM)

    assert status == 0
    assert time.monotonic() - asked < 2
    assert proxy.live() == before


def test_nothing_is_written_before_slices_are_listed(start, api):
    api.apply_many(cluster(5, ENDPOINTS))
    api.fail(503, resource="endpointslices", times=None)
    proxy = start()
    proxy.wait(lambda: any(event["kind"] == "Service" for event in proxy.events("watch.listed")))
    proxy.wait(lambda: bool(proxy.events("watch.failed")))

    assert not own_rules(proxy.live())
    api.heal()
    proxy.wait_synced()
    assert len(service_chains(proxy.live())) == 5


def test_what_is_invalid_is_named_counted_and_left_out(start, api):
    api.apply(make_service("good", cluster_ip="172.30.0.10"))
    api.apply(
        make_slice(
            "good",
            endpoints=[make_endpoint("10.180.1.10"), make_endpoint("not-an-address")],
        )
    )
    bad_port = make_service("bad-port", cluster_ip="172.30.0.11")
    bad_port["spec"]["ports"][0]["port"] = 0
    bad_protocol = make_service("bad-protocol", cluster_ip="172.30.0.12")
    bad_protocol["spec"]["ports"][0]["protocol"] = "QUIC"
    for bad in (bad_port, bad_protocol):
        api.apply(bad)
    proxy = start()
    proxy.wait_synced()

    problems = {(event["name"], event["field"]) for event in proxy.events("object.invalid")}
    assert {field for name, field in problems if name == "bad-port"} == {"spec.ports[0].port"}
    assert {field for name, field in problems if name == "bad-protocol"} == {
        "spec.ports[0].protocol"
    }
    assert any(field == "endpoints[1].addresses[0]" for _, field in problems)
    assert proxy.metric("kubeproxy_invalid_objects_total", kind="Service") == 2
    assert proxy.metric("kubeproxy_invalid_objects_total", kind="EndpointSlice") == 1
    text = json.dumps([list(rules) for rules in own_rules(proxy.live()).values()])
    assert "10.180.1.10:" in text
    assert "bad-" not in text


def test_healthy_pages_are_served(start, api):
    api.apply_many(cluster(3, 1))
    proxy = start()
    proxy.wait_synced()

    status, body = proxy.get("/healthz", HEALTH_PORT)
    assert status == 200
    assert json.loads(body)["healthy"] is True
    assert proxy.get("/proxyMode")[1] == "iptables"
    assert json.loads(proxy.get("/configz")[1])["kubeproxy.config.k8s.io"]["mode"] == "iptables"
    assert proxy.metric("kubeproxy_sync_proxy_rules_iptables_total", table="nat") > 0


def test_a_flush_is_repaired_and_named(start, api, clean_lab, backend):
    api.apply_many(cluster(10, 2))
    # The shortest audit interval there is in a test's patience.
    proxy = start("--iptables-sync-period=2s", "--iptables-min-sync-period=0")
    proxy.wait_synced()
    before = proxy.live()
    clean_lab.node.run([f"iptables-{backend}", "-t", "nat", "-F"])
    proxy.wait(lambda: proxy.live() == before, 20)

    assert proxy.events("drift.repaired")


def test_a_service_from_files_answers_and_follows_its_file(
    clean_lab, servers, backend, family, tmp_path
):
    plan = PLANS[family]
    objects = tmp_path / "objects"
    objects.mkdir()

    def write(*ips):
        service = make_service("web", cluster_ip=plan.cluster_ip, ports=[80])
        port = make_slice("web", endpoints=[make_endpoint(ip) for ip in ips])
        for number, obj in enumerate((service, port)):
            (objects / ".new").write_text(json.dumps(obj))
            shutil.move(objects / ".new", objects / f"{number}.json")

    pods = clean_lab.local_pods
    write(pods[0].address(family))
    with running(clean_lab, backend, tmp_path / "log", f"--manifests={objects}") as proxy:
        proxy.wait_synced()
        client = clean_lab.node
        assert connect(client, plan.cluster_ip, 80).server_ip == pods[0].address(family)
        write(pods[1].address(family))
        proxy.wait(
            lambda: connect(client, plan.cluster_ip, 80).server_ip == pods[1].address(family)
        )
