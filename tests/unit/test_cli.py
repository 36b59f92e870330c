"""The command line from end to end: what it prints, and the exit status."""

import contextlib
import json
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest
import structlog
import yaml

import kubeproxy_py
from kubeproxy_py import cli, config, log
from kubeproxy_py.iptables import chains
from tests.support.api_server import ApiServer
from tests.support.builders import (
    cluster,
    make_endpoint,
    make_node,
    make_port,
    make_service,
    make_slice,
)

COMMANDS = ("run", "render", "plan", "explain", "status", "cleanup")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command line to its end, as the console script does."""
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    before = structlog.get_config()

    def command(*argv):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in argv])
        return Ended(ended.value.code or 0, *capsys.readouterr())

    yield command
    structlog.configure(**before)
    log.set_verbosity(0)


@pytest.fixture
def manifests(tmp_path):
    """Write objects into a directory of manifests; returns the directory."""
    directory = tmp_path / "objects"
    directory.mkdir()

    def manifests(*objects):
        items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        (directory / "all.json").write_text(json.dumps(items))
        return directory

    return manifests


def tables(text):
    """Return what a restore input amounts to."""
    merged = {}
    for table, found in _sections(text):
        merged.setdefault(table, {}).update(found)
    return merged


def _sections(text):
    for section in text.split("COMMIT\n"):
        # A section that only jumps into built-in chains inserts; parse_save knows of -A alone.
        lines = [line for line in section.splitlines() if not line.startswith("-I ")]
        yield from chains.parse_save([*lines, "COMMIT"]).items() if lines else ()


def rules_of(text, chain, table="nat"):
    return tables(text)[table][chain]


# Help and usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_each_command_explains_itself(command, name, flag):
    ended = command(name, flag)

    assert ended.status == 0
    assert ended.out.startswith(f"Usage: kubeproxy-py {name} [OPTIONS]")
    assert "--help" in ended.out
    assert ended.err == ""


def test_the_program_names_its_commands(command):
    ended = command("--help")

    assert ended.status == 0
    assert all(f"  {name} " in ended.out for name in COMMANDS)


def test_the_program_says_which_version_it_is_and_behaves_as(command):
    ended = command("--version")

    assert ended == (
        0,
        f"kubeproxy-py {kubeproxy_py.__version__}, behaving as Kubernetes v1.36.2\n",
        "",
    )


def test_run_says_the_version_as_kube_proxy_does(command):
    assert command("run", "--version") == (0, "Kubernetes v1.36.2\n", "")


def test_without_a_command_it_says_which_there_are(command):
    ended = command()

    assert ended.status == 1
    assert "Commands:" in ended.out + ended.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fly"], "No such command 'fly'"),
        *[([name, "extra"], "extra") for name in COMMANDS if name != "explain"],
        *[([name, "--no-such-flag"], "--no-such-flag") for name in COMMANDS],
        (["run", "--healthz-bind-address=foo"], "--healthz-bind-address"),
        (["run", "--iptables-sync-period=soon"], "--iptables-sync-period"),
        (["run", "--oom-score-adj=high"], "--oom-score-adj"),
        (["render", "--node-ip=10.0.0"], "--node-ip"),
        (["render", "--interface-address=10.0.0.1/8"], "eth0=192.168.0.2/24"),
        (["render", "--interface-address=eth0=10.0.0.1"], "--interface-address"),
        (["render", "--interface-address=eth0=10.0.0.1/33"], "--interface-address"),
        (["render", "--topology-label=zone-a"], "topology.kubernetes.io/zone=zone-a"),
        (["render", "--ip-family=ipv5"], "--ip-family"),
        (["render", "--bind-address=here"], "--bind-address"),
        (["plan", "--iptables-backend=ebpf"], "--iptables-backend"),
        (["cleanup", "--backend=ebpf"], "--backend"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_command_line_ends_with_1_and_the_flag(command, argv, words):
    ended = command(*argv)

    assert ended.status == 1
    assert words in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("name", ["run", "render", "plan", "explain"])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--proxy-mode=ebpf", "Mode.ProxyMode"),
        ("--detect-local-mode=ebpf", "DetectLocalMode"),
        ("--detect-local-mode=BridgeInterface", "InterfaceName"),
        ("--cluster-cidr=10.0.0.0", "ClusterCIDRs"),
        ("--iptables-masquerade-bit=32", "MasqueradeBit"),
        ("--nodeport-addresses=10.0.0.1", "NodePortAddresses"),
        ("--feature-gates=MultiCIDRServiceAllocator=false", "MultiCIDRServiceAllocator"),
        ("--hostname-override=  ", "hostname-override"),
        ("--config=/nowhere/config.yaml", "/nowhere/config.yaml"),
    ],
)
def test_bad_settings_end_with_1_and_the_field(command, name, flag, words):
    ended = command(name, flag)

    assert ended.status == 1
    assert words in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("name", "flag", "words"),
    [
        # More needs a look at this host first, which is the packet tests' business.
        ("run", "--proxy-mode=nftables", "cannot run in mode 'nftables'"),
        ("plan", "--proxy-mode=nftables", "cannot run in mode 'nftables'"),
        ("render", "--proxy-mode=nftables", "cannot run in mode 'nftables'"),
        ("run", "--kubeconfig=/nowhere/kubeconfig", "/nowhere/kubeconfig"),
        ("render", "--kubeconfig=/nowhere/kubeconfig", "/nowhere/kubeconfig"),
        ("render", "--manifests=/nowhere/objects", "/nowhere/objects"),
    ],
)
def test_what_cannot_be_used_ends_it_with_1_and_its_name(command, name, flag, words):
    ended = command(name, flag)

    assert ended.status == 1
    assert words in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--metrics-port=0", "MetricsBindAddress"),
        ("--conntrack-min=-1", "ConntrackConfiguration.Min"),
        ("--oom-score-adj=2000", "OOMScoreAdj"),
        ("--write-config-to=/nowhere/config.yaml", "/nowhere/config.yaml"),
        ("--logging-format=xml", "xml"),
    ],
)
def test_bad_settings_of_run_end_with_1_and_the_field(command, flag, words):
    ended = command("run", flag)

    assert ended.status == 1
    assert words in ended.err


def test_all_problems_are_told_at_once(command):
    ended = command("run", "--conntrack-min=-1", "--oom-score-adj=2000", "--cluster-cidr=x")

    assert ended.status == 1
    for field in ("ConntrackConfiguration.Min", "OOMScoreAdj", "ClusterCIDRs"):
        assert field in ended.err


@pytest.mark.parametrize("name", ["run", "render"])
def test_without_any_source_of_objects_it_says_what_is_missing(command, name):
    ended = command(name)

    assert ended.status == 1
    assert "KUBERNETES_SERVICE_HOST" in ended.err


def test_errors_follow_the_logging_format(command):
    ended = command("render", "--logging-format=json", "--manifests=/nowhere")

    event = json.loads(ended.err.splitlines()[-1])
    assert event["event"] == "command.failed"
    assert "/nowhere" in event["error"]


def test_warnings_of_the_configuration_are_logged(command, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"apiVersion": config.API_VERSION, "kind": config.KIND, "unknown": 1})
    )
    ended = command("run", f"--config={path}", f"--write-config-to={tmp_path / 'out'}")

    assert ended.status == 0
    assert "config.warned" in ended.err
    assert "unknown" in ended.err


def test_a_written_configuration_is_what_was_set(command, tmp_path):
    path = tmp_path / "config.yaml"
    first = command("run", "--cluster-cidr=10.0.0.0/8", f"--write-config-to={path}")
    text = path.read_text()
    second = command("run", f"--config={path}", f"--write-config-to={path}")

    assert (first.status, second.status) == (0, 0)
    assert yaml.safe_load(text)["clusterCIDR"] == "10.0.0.0/8"
    assert path.read_text() == text


def test_version_is_that_of_the_kube_proxy_it_behaves_as(command):
    assert command("run", "--version") == Ended(0, "Kubernetes v1.36.2\n", "")


# render: where objects come from ------------------------------------------------------------------

FLAGS = ("--hostname-override=node1", "--cluster-cidr=10.0.0.0/8,fd00:10::/64")


def objects():
    yield from cluster(5, 3)
    yield make_service("six", cluster_ip="fd00:172:30::6", ports=[53])
    yield make_slice("six", endpoints=["fd00:10::6"], ports=[5353])
    yield make_service("empty", cluster_ip="172.30.9.9")


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_the_api_server_s_objects_render_as_the_same_objects_from_files(
    command, manifests, tmp_path, family
):
    with ApiServer() as server:
        server.apply_many(objects())
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        from_api = command("render", f"--kubeconfig={kubeconfig}", f"--ip-family={family}", *FLAGS)
    from_files = command(
        "render", f"--manifests={manifests(*objects())}", f"--ip-family={family}", *FLAGS
    )

    assert (from_api.status, from_files.status) == (0, 0)
    assert from_api.out == from_files.out
    assert "KUBE-SVC-" in from_files.out


def test_rendering_twice_gives_the_same_text(command, manifests):
    directory = manifests(*objects())

    first, second = (command("render", f"--manifests={directory}", *FLAGS) for _ in range(2))

    assert first.out == second.out


def test_broken_manifests_end_with_1_naming_objects_and_fields(command, manifests):
    bad_port = make_service("bad-port", cluster_ip="172.30.0.11")
    bad_port["spec"]["ports"][0]["port"] = 0
    bad_slice = make_slice("good", endpoints=[make_endpoint("not-an-address")])
    directory = manifests(make_service("good"), bad_port, bad_slice)
    ended = command("render", f"--manifests={directory}", *FLAGS)

    assert ended.status == 1
    assert ended.out == ""
    assert "Service 'default/bad-port': spec.ports[0].port" in ended.err
    assert "EndpointSlice 'default/good-abcde': endpoints[0].addresses[0]" in ended.err


def test_a_file_that_does_not_parse_ends_with_1_naming_it(command, manifests):
    directory = manifests(make_service())
    (directory / "broken.yaml").write_text("a: [")
    ended = command("render", f"--manifests={directory}", *FLAGS)

    assert ended.status == 1
    assert "broken.yaml" in ended.err


def test_what_is_invalid_on_the_api_server_is_left_out_and_named(command, tmp_path):
    bad = make_service("bad", cluster_ip="172.30.0.11")
    bad["spec"]["ports"][0]["port"] = 0
    with ApiServer() as server:
        server.apply_many([make_service("good"), bad])
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        ended = command("render", f"--kubeconfig={kubeconfig}", *FLAGS)

    assert ended.status == 0
    assert "Service 'default/bad': spec.ports[0].port" in ended.err
    assert "default/good" in ended.out
    assert "default/bad" not in ended.out


def exposed_services():
    yield make_service("web", externalIPs=["192.168.99.22", "172.30.0.42"], lb_ips=["1.2.3.4"])
    yield make_slice("web")
    yield make_service("db", cluster_ip="172.30.0.42")


@pytest.mark.parametrize(
    ("allowed", "served"),
    [
        ((), ["1.2.3.4", "192.168.99.22"]),
        (("--external-ips-allow=192.168.99.0/24,172.30.0.0/16",), ["192.168.99.22"]),
    ],
)
def test_external_addresses_that_are_refused_are_named_and_all_else_is_rendered(
    command, manifests, allowed, served
):
    ended = command("render", f"--manifests={manifests(*exposed_services())}", *FLAGS, *allowed)

    assert ended.status == 0
    rules = rules_of(ended.out, "KUBE-SERVICES")
    assert sorted(r.split()[1].split("/")[0] for r in rules if "KUBE-EXT-" in r) == served
    assert any("cluster IP" in rule for rule in rules)
    assert "Service 'default/web': spec.externalIPs: 172.30.0.42 is the cluster IP" in ended.err
    assert ("1.2.3.4 is outside of --external-ips-allow" in ended.err) is bool(allowed)


def test_a_service_is_explained_with_the_addresses_it_is_served_on(command, manifests):
    directory = manifests(*exposed_services())
    ended = command("explain", f"--manifests={directory}", *FLAGS, "default/web")

    assert ended.status == 0
    assert "192.168.99.22" in ended.out
    assert "172.30.0.42" not in ended.out
    assert "172.30.0.42 is the cluster IP of Service 'default/db'" in ended.err


# render: facts of the node --------------------------------------------------------------------------


def hinted(*zones):
    """Return a Service with an endpoint for each of *zones*."""
    endpoints = [
        make_endpoint(f"10.180.0.{number}", node="node2", zone_hints=[zone])
        for number, zone in enumerate(zones, start=1)
    ]
    return make_service("web"), make_slice("web", endpoints=endpoints)


@pytest.mark.parametrize(
    ("node_zone", "label", "shown"),
    [
        ("zone-a", None, "10.180.0.1"),
        ("zone-a", "zone-b", "10.180.0.2"),
        (None, "zone-b", "10.180.0.2"),
    ],
    ids=["the Node's", "stated against the Node's", "stated alone"],
)
def test_a_stated_zone_comes_before_the_node_s(command, manifests, node_zone, label, shown):
    nodes = [make_node(zone=node_zone)] if node_zone else []
    directory = manifests(*hinted("zone-a", "zone-b"), *nodes)
    stated = [f"--topology-label=topology.kubernetes.io/zone={label}"] if label else []
    out = command("render", f"--manifests={directory}", *FLAGS, *stated).out
    (chain,) = (name for name in tables(out)["nat"] if name.startswith("KUBE-SVC-"))

    # One goes to the endpoint, one marks what comes from outside of the cluster.
    assert [rule for rule in rules_of(out, chain) if "-> 10." in rule and shown in rule]
    assert sum("KUBE-SEP-" in rule for rule in rules_of(out, chain)) == 1


def test_without_a_zone_all_endpoints_are_used(command, manifests):
    directory = manifests(*hinted("zone-a", "zone-b"))
    out = command("render", f"--manifests={directory}", *FLAGS).out

    assert sum(name.startswith("KUBE-SEP-") for name in tables(out)["nat"]) == 2


def test_other_labels_are_no_zone(command, manifests):
    directory = manifests(*hinted("zone-a", "zone-b"))
    label = "--topology-label=failure-domain.beta.kubernetes.io/zone=zone-a"
    out = command("render", f"--manifests={directory}", *FLAGS, label).out

    assert sum(name.startswith("KUBE-SEP-") for name in tables(out)["nat"]) == 2


def load_balancer(source_range):
    service = make_service(
        "web",
        type="LoadBalancer",
        lb_ips=["1.2.3.4"],
        ports=[make_port(80, nodePort=30080)],
        loadBalancerSourceRanges=[source_range],
        allocateLoadBalancerNodePorts=True,
    )
    return service, make_slice("web")


@pytest.mark.parametrize(
    ("stated", "is_node"),
    [((), True), (("--node-ip=10.99.0.1",), False), (("--bind-address=10.99.0.1",), False)],
    ids=["the Node's", "stated", "bound"],
)
def test_a_stated_node_ip_comes_before_the_node_s(command, manifests, stated, is_node):
    # A source range that holds this node lets its own traffic to the VIP through.
    directory = manifests(*load_balancer("192.168.0.0/24"), make_node(ips=["192.168.0.2"]))
    out = command("render", f"--manifests={directory}", *FLAGS, *stated).out
    (firewall,) = (name for name in tables(out)["nat"] if name.startswith("KUBE-FW-"))

    assert any("-s 1.2.3.4/32" in rule for rule in rules_of(out, firewall)) is is_node


def node_port_rules(out):
    return [rule for rule in rules_of(out, "KUBE-SERVICES") if "-j KUBE-NODEPORTS" in rule]


def test_node_ports_are_on_all_addresses_unless_told(command, manifests):
    directory = manifests(make_service())
    (rule,) = node_port_rules(command("render", f"--manifests={directory}", *FLAGS).out)

    assert "--dst-type LOCAL" in rule


def test_node_ports_are_on_the_stated_interface_addresses_within_the_cidrs(command, manifests):
    directory = manifests(make_service())
    found = node_port_rules(
        command(
            "render",
            f"--manifests={directory}",
            *FLAGS,
            "--nodeport-addresses=192.168.0.0/16,10.1.0.0/16",
            "--interface-address=eth0=192.168.0.2/24",
            "--interface-address=eth1=10.1.0.1/16",
            "--interface-address=eth2=172.16.0.1/16",
            "--interface-address=eth0=fd00::2/64",
        ).out
    )

    assert [rule.split(" ")[1] for rule in found] == ["10.1.0.1/32", "192.168.0.2/32"]


@pytest.mark.parametrize(
    ("stated", "address"),
    [((), "192.168.0.2"), (("--node-ip=192.168.0.9",), "192.168.0.9")],
    ids=["of the Node", "stated"],
)
def test_primary_is_the_node_s_own_address(command, manifests, stated, address):
    directory = manifests(make_service(), make_node(ips=["192.168.0.2"]))
    (rule,) = node_port_rules(
        command(
            "render",
            f"--manifests={directory}",
            *FLAGS,
            "--nodeport-addresses=primary",
            *stated,
        ).out
    )

    assert rule.startswith(f"-d {address}/32 ")


def test_pod_cidrs_of_the_node_tell_local_traffic_in_node_cidr_mode(command, manifests):
    directory = manifests(make_service(), make_slice(), make_node(pod_cidrs=["10.180.7.0/24"]))
    out = command(
        "render",
        f"--manifests={directory}",
        "--hostname-override=node1",
        "--detect-local-mode=NodeCIDR",
    ).out

    assert "! -s 10.180.7.0/24" in out


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--no-random-fully", "--random-fully"),
        ("--no-nfacct", "nfacct"),
        ("--conntrack-tcp-be-liberal", "--ctstate INVALID"),
    ],
)
def test_what_the_host_lacks_is_not_in_the_rules(command, manifests, flag, text):
    directory = manifests(make_service())
    with_it = command("render", f"--manifests={directory}", *FLAGS)
    without = command("render", f"--manifests={directory}", *FLAGS, flag)

    assert text in with_it.out
    assert text not in without.out


def test_a_file_s_settings_reach_the_rules(command, manifests, tmp_path):
    path = tmp_path / "config.yaml"
    document = {
        "apiVersion": config.API_VERSION,
        "kind": config.KIND,
        "iptables": {"masqueradeBit": 7},
        "conntrack": {"tcpBeLiberal": True},
    }
    path.write_text(yaml.safe_dump(document))
    out = command("render", f"--manifests={manifests(make_service())}", f"--config={path}").out

    assert "--set-xmark 0x80/0x80" in out
    assert "--ctstate INVALID" not in out


@pytest.mark.parametrize(("endpoints", "is_large"), [(1000, False), (1001, True)])
def test_a_large_cluster_s_endpoints_have_no_comments(command, manifests, endpoints, is_large):
    directory = manifests(*cluster(1, endpoints))
    out = command("render", f"--manifests={directory}", *FLAGS).out
    seps = [rule for name, texts in tables(out)["nat"].items() if "-SEP-" in name for rule in texts]

    assert len(seps) == 2 * endpoints
    assert any("--comment" in rule for rule in seps) is not is_large
    assert (" -> " not in out) is is_large


# Interruptions -------------------------------------------------------------------------------------


def test_render_needs_no_iptables(command, manifests, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert command("render", f"--manifests={manifests(make_service())}").status == 0


@contextlib.contextmanager
def process(*arguments):
    """Run a command in a process of its own, which is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "kubeproxy_py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets its children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no thread of ours holds a lock here
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def test_an_interrupt_ends_it_without_a_stack(tmp_path):
    with ApiServer() as server:
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        server.fail(503, resource="services")
        with process("render", f"--kubeconfig={kubeconfig}") as running:
            server.wait_for(lambda: server.count(resource="services") > 0, 20)
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=20)

    assert running.returncode == 1
    assert "Traceback" not in err


def test_a_reader_that_goes_away_causes_no_stack(manifests):
    with process("render", f"--manifests={manifests(*cluster(500, 5))}", *FLAGS) as running:
        running.stdout.readline()
        running.stdout.close()
        err = running.stderr.read()
        running.wait(20)

    assert "Traceback" not in err
