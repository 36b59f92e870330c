"""The daemon and its Node: what it waits for at the start, and what of the Node it follows."""

import contextlib
import datetime as dt
import json
import os
import resource
import signal
import socket
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.api_server import ApiServer
from tests.support.builders import make_endpoint, make_node, make_port, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.proxy import HEALTH_PORT, METRICS_PORT, own_rules, running

pytestmark = pytest.mark.packet

V4, V6 = PLANS[IPFamily.V4], PLANS[IPFamily.V6]
BACKEND = "nft"
TAINT = {"key": "ToBeDeletedByClusterAutoscaler", "value": "1", "effect": "NoSchedule"}


@pytest.fixture
def api(clean_lab):
    """Give an API server on the node, with one Service and no Node."""
    with clean_lab.node.entered():
        server = ApiServer()
    with server:
        server.apply(make_service("web"))
        server.apply(make_slice("web"))
        yield server


@pytest.fixture
def start(clean_lab, api, tmp_path):
    """Start the daemon against the API server."""
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
    with contextlib.ExitStack() as stack:

        def start(*arguments, backend=BACKEND):
            log = tmp_path / "log"
            return stack.enter_context(
                running(clean_lab, backend, log, f"--kubeconfig={kubeconfig}", *arguments)
            )

        yield start


@pytest.fixture
def environment(clean_lab, monkeypatch):
    """Set variables for programs that are started on the node."""

    def environment(**variables):
        for name, value in variables.items():
            monkeypatch.setitem(clean_lab.node._env, name, str(value))

    return environment


def synced(proxy, *families):
    """Tell whether exactly *families* have been programmed."""
    return {event["ip_family"] for event in proxy.events("sync.completed")} == {
        family.value for family in families
    }


def status(proxy, path="/healthz"):
    return proxy.get(path, HEALTH_PORT)[0]


def syncs(proxy):
    """Return what grows with every sync, and with every wish for one."""
    return (
        len(proxy.events("sync.completed")),
        proxy.metric("kubeproxy_iptables_restores_total"),
        proxy.metric("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds"),
    )


def marker(api, proxy, name="marker"):
    """Make a change that needs a sync, and wait until it is done."""
    api.apply(make_service(name, cluster_ip="172.30.7.7"))
    proxy.wait(
        lambda: any(f"default/{name}" in rule for rule in proxy.live()["filter"]["KUBE-SERVICES"])
    )


# Waiting for the Node ------------------------------------------------------------------------------


def test_a_node_that_registers_late_is_waited_for(start, api):
    proxy = start("--nodeport-addresses=primary")
    proxy.wait(lambda: any(event["kind"] == "Node" for event in proxy.events("watch.listed")))
    assert not own_rules(proxy.live())
    api.apply(make_node(ips=()))
    api.apply(make_node(ips=["192.168.0.3"]))
    proxy.wait_synced()

    assert not proxy.events("node.wait_ended")
    assert not proxy.events("node.ip_unknown")
    jumps = [rule for rule in proxy.live()["nat"]["KUBE-SERVICES"] if "KUBE-NODEPORTS" in rule]
    assert [rule.split(" ")[1] for rule in jumps] == ["192.168.0.3/32"]


def node_port_addresses(proxy):
    """Return the addresses that have node ports."""
    rules = proxy.live()["nat"]["KUBE-SERVICES"]
    return {rule.split(" ")[1] for rule in rules if rule.endswith("-j KUBE-NODEPORTS")}


@pytest.fixture
def late_address(clean_lab):
    """Give an address that the node does not have yet, what adds it, and take it away again."""

    def change(verb):
        clean_lab.node.run(["ip", "address", verb, "192.168.0.77/24", "dev", "eth0"], check=False)

    yield "192.168.0.77/32", lambda: change("add")
    change("del")


def test_node_ports_follow_addresses_though_they_could_not_be_read(start, api, late_address):
    address, add = late_address
    api.apply(make_node())
    proxy = start("--nodeport-addresses=192.168.0.0/24")
    proxy.wait_synced()
    before = node_port_addresses(proxy)
    assert before
    assert address not in before
    # No file can be opened any more, which no other part of it wants to just now.
    limits = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    add()
    proxy.wait(lambda: bool(proxy.events("addresses.watch_failed")))
    assert node_port_addresses(proxy) == before
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, limits)
    proxy.wait(lambda: node_port_addresses(proxy) == {*before, address})

    assert proxy.events("addresses.watch_recovered")


def test_in_node_cidr_mode_pod_cidrs_are_waited_for(start, api):
    api.apply(make_node(pod_cidrs=()))
    proxy = start("--detect-local-mode=NodeCIDR")
    proxy.wait(lambda: any(event["kind"] == "Node" for event in proxy.events("watch.listed")))
    assert not own_rules(proxy.live())
    api.apply(make_node(pod_cidrs=["10.180.1.0/24"]))
    proxy.wait_synced()

    assert any(
        "! -s 10.180.1.0/24" in rule for rules in own_rules(proxy.live()).values() for rule in rules
    )


def test_services_are_read_while_the_node_is_waited_for(start, api):
    proxy = start()
    kinds = {"Node", "Service", "EndpointSlice"}
    proxy.wait(lambda: {event["kind"] for event in proxy.events("watch.listed")} == kinds)
    assert not own_rules(proxy.live())
    api.apply(make_node())
    proxy.wait_synced()

    assert own_rules(proxy.live())


def test_a_signal_ends_the_wait_for_the_node(start):
    proxy = start()
    proxy.wait(lambda: any(event["kind"] == "Node" for event in proxy.events("watch.listed")))

    assert proxy.end(signal.SIGTERM) == 0
    assert not proxy.events("node.wait_ended")


def test_the_node_s_name_is_lower_case_without_blanks(start, api):
    api.apply(make_node("node7"))
    proxy = start("--hostname-override=  NODE7 ")
    proxy.wait_synced()

    assert proxy.events("daemon.starting")[0]["node"] == "node7"
    assert status(proxy) == 200


def test_an_ipv6_node_is_ipv6_primary(start, api):
    api.apply(make_node(ips=[V6.node], pod_cidrs=[V6.pod_cidr]))
    proxy = start("--nodeport-addresses=primary")
    proxy.wait_synced()

    jumps = {
        family: [
            rule for rule in proxy.live(family)["nat"]["KUBE-SERVICES"] if "KUBE-NODEPORTS" in rule
        ]
        for family in IPFamily
    }
    assert jumps[IPFamily.V6][0].startswith(f"-d {V6.node}/128 ")
    # A family whose address is not known has no limits.
    assert "--dst-type LOCAL" in jumps[IPFamily.V4][0]
    assert not proxy.events("node.ip_unknown")


# Following the Node ---------------------------------------------------------------------------------


def hinted(name, zones):
    endpoints = [
        make_endpoint(f"10.180.2.{number}", node="node2", zone_hints=[zone])
        for number, zone in enumerate(zones, start=1)
    ]
    return make_slice(name, endpoints=endpoints)


def used_endpoints(proxy):
    return sum(name.startswith("KUBE-SEP-") for name in proxy.live()["nat"])


def test_a_new_zone_is_followed_in_both_families(start, api):
    api.apply(make_node())
    api.apply(hinted("web", ["zone-a", "zone-b", "zone-b"]))
    proxy = start()
    proxy.wait_synced()
    assert used_endpoints(proxy) == 1
    counts = {
        family: proxy.metric(
            "kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family=family.value
        )
        for family in IPFamily
    }
    api.apply(make_node(zone="zone-b"))
    proxy.wait(lambda: used_endpoints(proxy) == 2)

    proxy.wait(
        lambda: all(
            proxy.metric(
                "kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family=family.value
            )
            > before
            for family, before in counts.items()
        )
    )
    api.apply(make_node(zone=None))
    proxy.wait(lambda: used_endpoints(proxy) == 3)


def test_other_changes_of_the_node_cause_no_sync(start, api):
    api.apply(make_node())
    proxy = start()
    proxy.wait_synced()
    before = syncs(proxy)
    events = proxy.metric("kubeproxy_watch_last_event_timestamp_seconds", kind="Node")
    node = make_node(
        ips=["192.168.0.9"],
        pod_cidrs=["10.9.0.0/24"],
        labels={"topology.kubernetes.io/region": "r", "a": "b"},
        annotations={"c": "d"},
    )
    node["status"]["conditions"] = []
    api.apply(node)
    proxy.wait(
        lambda: proxy.metric("kubeproxy_watch_last_event_timestamp_seconds", kind="Node") > events
    )

    assert syncs(proxy) == before


def test_a_node_that_is_to_be_removed_takes_no_new_traffic_but_is_alive(start, api):
    api.apply(make_node())
    proxy = start()
    proxy.wait_synced()
    assert status(proxy) == 200
    api.apply(make_node(taints=[TAINT]))
    proxy.wait(lambda: status(proxy) == 503)

    body = json.loads(proxy.get("/healthz", HEALTH_PORT)[1])
    assert (body["healthy"], body["nodeEligible"]) == (True, False)
    assert status(proxy, "/livez") == 200
    api.apply(make_node(taints=[{"key": "other", "effect": "NoSchedule"}]))
    proxy.wait(lambda: status(proxy) == 200)


def test_a_node_that_is_being_deleted_takes_no_new_traffic(start, api):
    node = make_node()
    api.apply(node)
    proxy = start()
    proxy.wait_synced()
    node["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    node["metadata"]["finalizers"] = ["example.com/wait"]
    api.apply(node)
    proxy.wait(lambda: status(proxy) == 503)

    assert status(proxy, "/livez") == 200


@pytest.mark.parametrize(
    ("taints", "verdict"), [([], 200), ([TAINT], 503)], ids=["eligible", "not eligible"]
)
def test_a_node_that_is_gone_keeps_its_verdict(start, api, taints, verdict):
    api.apply(make_node(taints=taints))
    proxy = start()
    proxy.wait_synced()
    assert status(proxy) == verdict
    events = proxy.metric("kubeproxy_watch_last_event_timestamp_seconds", kind="Node")
    api.delete("Node", "", "node1")
    proxy.wait(
        lambda: proxy.metric("kubeproxy_watch_last_event_timestamp_seconds", kind="Node") > events
    )
    marker(api, proxy)

    assert status(proxy) == verdict


# What needs no sync ---------------------------------------------------------------------------------


def labelled(service):
    service["metadata"]["labels"] = {"a": "b"}


def annotated(service):
    service["metadata"]["annotations"] = {"a": "b"}


def conditioned(service):
    service["status"]["conditions"] = [{"type": "X", "status": "True", "reason": "Y"}]


def retargeted(service):
    service["spec"]["ports"][0]["targetPort"] = 9999


@pytest.mark.parametrize("change", [labelled, annotated, conditioned, retargeted])
def test_changes_of_a_service_that_rules_do_not_show_cause_no_sync(start, api, change):
    api.apply(make_node())
    proxy = start()
    proxy.wait_synced()
    before = syncs(proxy)
    seen = proxy.metric("kubeproxy_sync_proxy_rules_service_changes_total")
    service = make_service("web")
    change(service)
    api.apply(service)
    proxy.wait(lambda: proxy.metric("kubeproxy_sync_proxy_rules_service_changes_total") > seen)

    assert syncs(proxy) == before


def test_changes_of_an_endpoint_slice_s_metadata_cause_no_sync(start, api):
    api.apply(make_node())
    proxy = start()
    proxy.wait_synced()
    before = syncs(proxy)
    seen = proxy.metric("kubeproxy_sync_proxy_rules_endpoint_changes_total")
    changed = make_slice("web", labels={"x": "y"})
    changed["metadata"]["annotations"] = {"a": "b"}
    api.apply(changed)
    proxy.wait(lambda: proxy.metric("kubeproxy_sync_proxy_rules_endpoint_changes_total") > seen)

    assert syncs(proxy) == before


# Servers ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def taken(namespace, port, family=socket.AF_INET):
    """Hold a port of all addresses."""
    with namespace.entered():
        sock = socket.socket(family, socket.SOCK_STREAM)
    with contextlib.closing(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::" if family is socket.AF_INET6 else "0.0.0.0", port))
        sock.listen()
        yield


@pytest.mark.parametrize("port", [HEALTH_PORT, METRICS_PORT])
def test_with_hard_fail_a_taken_port_ends_it(start, api, clean_lab, port):
    api.apply(make_node())
    with taken(clean_lab.node, port):
        proxy = start("--bind-address-hard-fail")

        assert proxy.process.wait(20) == 1
    (failed,) = proxy.events("command.failed")
    assert str(port) in failed["error"]
    assert "in use" in failed["error"]


def test_without_hard_fail_a_taken_port_is_tried_again_and_rules_are_written(start, api, clean_lab):
    api.apply(make_node())
    with taken(clean_lab.node, HEALTH_PORT):
        proxy = start()
        proxy.wait_synced()
        (failed,) = proxy.events("http.listen_failed")
        assert failed["server"] == "healthz"
    proxy.wait(lambda: "healthz" in {event["server"] for event in proxy.events("http.listening")})

    assert status(proxy) == 200


def local_service(port=32100):
    return make_service(
        "lb",
        type="LoadBalancer",
        cluster_ip="172.30.0.50",
        ports=[make_port(80, nodePort=30050)],
        externalTrafficPolicy="Local",
        healthCheckNodePort=port,
        lb_ips=["1.2.3.4"],
    )


def test_without_a_health_server_health_check_node_ports_answer_as_healthy(start, api):
    api.apply(make_node())
    api.apply(local_service())
    api.apply(make_slice("lb"))
    proxy = start("--healthz-port=0")
    proxy.wait_synced()

    with pytest.raises(ConnectionRefusedError):
        proxy.get("/healthz", HEALTH_PORT)
    code, body = proxy.get("/", 32100)
    assert code == 200
    assert json.loads(body)["serviceProxyHealthy"] is True
    assert proxy.get("/proxyMode")[0] == 200


def test_a_taken_health_check_node_port_is_told_in_an_event(start, api, clean_lab):
    api.apply(make_node())
    api.apply(local_service())
    api.apply(make_slice("lb"))
    with taken(clean_lab.node, 32100):
        proxy = start()
        proxy.wait_synced()
        api.wait_for(lambda: len(api.objects("Event")) == 2)
        events = {event["reason"]: event for event in api.objects("Event")}
    event = events["FailedToStartServiceHealthcheck"]

    assert event["regarding"]["kind"] == "Service"
    assert (event["type"], event["action"]) == ("Warning", "Listen")
    assert event["note"].startswith(
        'node node1 failed to start healthcheck "default/lb" on port 32100: '
    )
    # Tried again with the next sync.
    marker(api, proxy)
    proxy.wait(lambda: proxy.get("/", 32100)[0] == 200)


def test_its_start_is_told_in_an_event(start, api):
    api.apply(make_node())
    start()
    api.wait_for(lambda: bool(api.objects("Event")), 20)
    (event,) = api.objects("Event")

    assert (event["reason"], event["action"], event["type"]) == (
        "Starting",
        "StartKubeProxy",
        "Normal",
    )
    assert event["regarding"]["kind"] == "Node"
    assert event["regarding"]["name"] == "node1"
    assert event["metadata"]["namespace"] == "default"
    assert event["reportingController"] == "kube-proxy"
    assert event["reportingInstance"] == f"kube-proxy-{socket.gethostname().lower()}"


# What kube-proxy's /metrics shows once everything has been used: type, and labels of its series.
FAMILY = {"ip_family"}
TABLE = {"table", "ip_family"}
METRICS = {
    "kubeproxy_sync_proxy_rules_duration_seconds": ("histogram", FAMILY),
    "kubeproxy_sync_full_proxy_rules_duration_seconds": ("histogram", FAMILY),
    "kubeproxy_sync_partial_proxy_rules_duration_seconds": ("histogram", FAMILY),
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds": ("gauge", FAMILY),
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": ("gauge", FAMILY),
    "kubeproxy_network_programming_duration_seconds": ("histogram", FAMILY),
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending": ("gauge", set()),
    "kubeproxy_sync_proxy_rules_endpoint_changes": ("counter", set()),
    "kubeproxy_sync_proxy_rules_service_changes_pending": ("gauge", set()),
    "kubeproxy_sync_proxy_rules_service_changes": ("counter", set()),
    "kubeproxy_sync_proxy_rules_iptables_total": ("gauge", TABLE),
    "kubeproxy_sync_proxy_rules_iptables_last": ("gauge", TABLE),
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total": (
        "gauge", {"traffic_policy", "ip_family"},
    ),
    "kubeproxy_proxy_healthz": ("counter", {"code"}),
    "kubeproxy_proxy_livez": ("counter", {"code"}),
    "kubeproxy_conntrack_reconciler_sync_duration_seconds": ("histogram", FAMILY),
    "kubeproxy_conntrack_reconciler_deleted_entries": ("counter", FAMILY),
    "kubernetes_build_info": ("gauge", {
        "build_date", "compiler", "git_commit", "git_tree_state", "git_version", "go_version",
        "major", "minor", "platform",
    }),
    "kubernetes_feature_enabled": ("gauge", {"name", "stage"}),
    "rest_client_requests": ("counter", {"code", "host", "method"}),
    "rest_client_request_duration_seconds": ("histogram", {"host", "verb"}),
    "process_start_time_seconds": ("gauge", set()),
}  # fmt: skip
# Only where something failed; their types are there all the same.
FAILURES = {
    "kubeproxy_sync_proxy_rules_iptables_restore_failures",
    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures",
}
COUNTERS = {
    "kubeproxy_iptables_ct_state_invalid_dropped_packets",
    "kubeproxy_iptables_localhost_nodeports_accepted_packets",
}


def test_all_metrics_of_kube_proxy_are_there_after_use(start, api):
    api.apply(make_node())
    dns = make_port(53, protocol="UDP", name="dns")
    api.apply(make_service("dns", cluster_ip="172.30.0.53", ports=[dns]))
    api.apply(make_slice("dns", ports=[dns]))
    proxy = start()
    proxy.wait_synced()
    now = dt.datetime.now(dt.UTC) + dt.timedelta(milliseconds=1)
    triggered = make_slice("dns", ports=[dns], endpoints=["10.180.1.12"])
    triggered["metadata"]["annotations"] = {
        "endpoints.kubernetes.io/last-change-trigger-time": f"{now:%Y-%m-%dT%H:%M:%S.%fZ}"
    }
    api.apply(triggered)
    for path in ("/healthz", "/livez"):
        status(proxy, path)
    for name in (
        "kubeproxy_network_programming_duration_seconds_count",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds_count",
    ):
        proxy.wait(lambda name=name: proxy.metric(name) > 0)
    code, text = proxy.get("/metrics")
    shown = {family.name: family for family in text_string_to_metric_families(text)}

    assert code == 200
    for name, (kind, labels) in METRICS.items():
        assert shown[name].type == kind, name
        assert {frozenset(sample.labels.keys() - {"le"}) for sample in shown[name].samples} == {
            frozenset(labels)
        }, name
    for name in FAILURES:
        assert shown[name].type == "counter"
        assert shown[name].samples == []
    is_counted = shown["kubeproxy_iptables_capability"].samples and all(
        sample.value
        for sample in shown["kubeproxy_iptables_capability"].samples
        if sample.labels["capability"] == "nfacct"
    )
    assert (shown.keys() >= COUNTERS) is bool(is_counted)


# This host ----------------------------------------------------------------------------------------------


@pytest.fixture
def without_ipv6(clean_lab):
    clean_lab.node.write_sysctls({"net/ipv6/conf/all/disable_ipv6": "1"})
    yield
    clean_lab.node.write_sysctls({"net/ipv6/conf/all/disable_ipv6": "0"})


def test_with_ipv6_switched_off_only_ipv4_is_programmed(start, api, without_ipv6):
    api.apply(make_node())
    proxy = start()
    proxy.wait(lambda: synced(proxy, IPFamily.V4))

    assert proxy.events("iptables.family_unavailable")[0]["ip_family"] == "IPv6"
    assert not own_rules(proxy.live(IPFamily.V6))
    assert json.loads(proxy.get("/healthz", HEALTH_PORT)[1])["status"].keys() == {"IPv4"}


def test_with_ipv6_switched_off_an_ipv6_node_cannot_be_served(start, api, without_ipv6):
    api.apply(make_node(ips=["fd00::1"]))
    proxy = start()

    assert proxy.process.wait(20) == 1
    (failed,) = proxy.events("command.failed")
    assert failed["error"] == 'no support for primary IP family "IPv6"'


@pytest.fixture
def broken(tmp_path, environment):
    """Put programs that always fail before those of the host."""
    directory = tmp_path / "bin"
    directory.mkdir()
    environment(PATH=f"{directory}{os.pathsep}{os.environ['PATH']}")

    def broken(prefix):
        for backend in ("", "-nft", "-legacy"):
            for part in ("", "-save", "-restore"):
                program = directory / f"{prefix}{backend}{part}"
                program.write_text("#!/bin/sh\nexit 1\n")
                program.chmod(0o755)

    yield broken
    # Before the lab is cleaned with the same programs.
    for program in directory.iterdir():
        program.unlink()


def test_without_ip6tables_only_ipv4_is_programmed(start, api, broken):
    broken("ip6tables")
    api.apply(make_node())
    proxy = start()
    proxy.wait(lambda: synced(proxy, IPFamily.V4))

    (left_out,) = proxy.events("iptables.family_unavailable")
    assert left_out["ip_family"] == "IPv6"
    assert "ip6tables" in left_out["reason"]


def test_a_plan_is_made_for_the_families_that_run_would_program(clean_lab, broken, tmp_path):
    broken("ip6tables")
    objects = tmp_path / "objects.json"
    objects.write_text(json.dumps(make_service()))
    argv = [sys.executable, "-m", "kubeproxy_py", "plan", f"--manifests={objects}"]
    both = clean_lab.node.run([*argv, f"--iptables-backend={BACKEND}"], check=False)
    v6 = clean_lab.node.run(
        [*argv, f"--iptables-backend={BACKEND}", "--ip-family=ipv6"], check=False
    )

    assert both.returncode == 2
    assert "IPv4, iptables-nft" in both.stdout
    assert "IPv6" not in both.stdout
    assert v6.returncode == 1
    assert "ip6tables" in v6.stderr


def test_without_iptables_an_ipv6_node_is_served_all_the_same(start, api, broken):
    broken("iptables")
    api.apply(make_node(ips=[V6.node]))
    proxy = start()
    proxy.wait(lambda: synced(proxy, IPFamily.V6))

    assert proxy.events("iptables.family_unavailable")[0]["ip_family"] == "IPv4"


@pytest.mark.parametrize("backend", ["nft", "auto"])
def test_without_any_iptables_it_ends_with_the_reason(start, broken, backend):
    broken("iptables")
    broken("ip6tables")
    proxy = start(f"--iptables-backend={backend}")

    assert proxy.process.wait(20) == 1
    (failed,) = proxy.events("command.failed")
    assert "iptables" in failed["error"]


@pytest.mark.parametrize("hinted_backend", ["nft", "legacy"])
def test_the_kubelet_s_hint_decides_the_backend(start, api, clean_lab, hinted_backend):
    programs = iptables_programs(hinted_backend, IPFamily.V4)
    clean_lab.node.run([programs.command, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT"])
    other = iptables_programs("legacy" if hinted_backend == "nft" else "nft", IPFamily.V4)
    # More rules than in the other, which would decide without the hint.
    clean_lab.node.run([other.command, "-A", "INPUT", "-j", "ACCEPT"])
    api.apply(make_node())
    proxy = start("--iptables-backend=auto", backend=hinted_backend)
    proxy.wait_synced()

    (found,) = proxy.events("iptables.backend_detected")
    assert found["backend"] == hinted_backend
    assert own_rules(proxy.live())


def test_systemd_hears_that_it_is_ready_and_alive(start, api, environment, tmp_path):
    path = tmp_path / "notify"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(str(path))
        sock.settimeout(20)
        environment(NOTIFY_SOCKET=path, WATCHDOG_USEC=400_000)

        def heard(text):
            while (said := sock.recv(200).decode()) != text:
                assert said.startswith(("WATCHDOG=", "STATUS=", "READY=", "STOPPING="))
            return True

        # No Node yet: units that wait for this one must not wait for the API server.
        proxy = start()
        assert heard("READY=1")
        assert heard("WATCHDOG=1")
        assert heard("WATCHDOG=1")
        api.apply(make_node())
        assert heard("STATUS=programming Services")
        assert heard("WATCHDOG=1")
        assert heard("WATCHDOG=1")
        assert proxy.end(signal.SIGTERM) == 0
        assert heard("STOPPING=1")


# Configuration --------------------------------------------------------------------------------------------


def test_doubts_about_the_configuration_are_logged(start, api):
    api.apply(make_node())
    proxy = start("--cluster-cidr=fd00:10:180::/56", "--ipvs-scheduler=rr")
    proxy.wait_synced()

    doubts = [event["error"] for event in proxy.events("config.doubtful")]
    assert any(text.startswith("nodePortAddresses is unset") for text in doubts)
    assert "cluster is IPv4-primary but clusterCIDRs contains only IPv6 addresses" in doubts
    (warned,) = proxy.events("config.warned")
    assert "--ipvs-scheduler" in warned["message"]


def test_a_configuration_that_cannot_work_on_this_node_ends_it(start, api):
    api.apply(make_node(pod_cidrs=["fd00:10::/64"]))
    proxy = start("--detect-local-mode=NodeCIDR")

    assert proxy.process.wait(20) == 1
    (failed,) = proxy.events("command.failed")
    assert failed["error"] == (
        "kube-proxy configuration is incorrect: "
        "cluster is IPv4-primary but node.spec.podCIDRs contains only IPv6 addresses"
    )
    assert not own_rules(proxy.live())


def test_manifests_that_are_not_there_end_it(clean_lab, tmp_path):
    with running(clean_lab, BACKEND, tmp_path / "log", "--manifests=/nowhere") as proxy:
        assert proxy.process.wait(20) == 1

    assert "/nowhere" in proxy.events("command.failed")[0]["error"]


def test_a_file_rewritten_while_it_waits_for_the_node_ends_it(clean_lab, api, tmp_path):
    path = tmp_path / "config.yaml"
    document = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(api.kubeconfig(tmp_path / "kubeconfig"))},
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
    path.write_text(json.dumps(document))
    with running(clean_lab, BACKEND, tmp_path / "log", f"--config={path}") as proxy:
        proxy.wait(lambda: any(event["kind"] == "Node" for event in proxy.events("watch.listed")))
        path.write_text(json.dumps({**document, "clusterCIDR": "10.0.0.0/8"}))
        api.apply(make_node())

        assert proxy.process.wait(20) == 1
        assert "configuration file was updated" in proxy.events("daemon.failed")[0]["reason"]
