"""`kubeproxy-py check` on real hosts: a sound one has no findings, each broken one exactly its own."""

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import preflight
from tests.support.addresses import PLANS
from tests.support.api_server import ApiServer
from tests.support.builders import make_node, make_port, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.proxy import running
from tests.support.traffic import wait_until

pytestmark = pytest.mark.packet

V4, V6 = PLANS[IPFamily.V4], PLANS[IPFamily.V6]
CIDRS = f"{V4.cluster_cidr},{V6.cluster_cidr}"
NODE_PORT = 30080
FLAGS = (
    "--hostname-override=node1",
    f"--cluster-cidr={CIDRS}",
    "--nodeport-addresses=primary",
    "--iptables-backend=nft",
    # nf_conntrack_max cannot be written outside of the first namespace.
    "--conntrack-max-per-core=0",
)
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/conf/all/route_localnet": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/ip_local_port_range": "32768 60999",
}
BRIDGE_SYSCTLS = {
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/bridge/bridge-nf-call-ip6tables": "1",
}
NODE = make_node(ips=[V4.node, V6.node], pod_cidrs=[V4.pod_cidr, V6.pod_cidr])
OBJECTS = (
    NODE,
    make_service("web", type="NodePort", ports=[make_port(80, nodePort=NODE_PORT)]),
    make_slice("web"),
)


@pytest.fixture
def node(clean_lab):
    """Give a node that is as it should be, and put it right again."""
    there = SYSCTLS | (BRIDGE_SYSCTLS if Path("/proc/sys/net/bridge").exists() else {})
    before = {name: clean_lab.node.read_sysctl(name) for name in there}
    clean_lab.node.write_sysctls(there)
    yield clean_lab.node
    clean_lab.node.write_sysctls(before)


class Host:
    """The node, its manifests and replaced files; what a check of it finds."""

    def __init__(self, node, checker, directory):
        self.node = node
        self.path = os.environ["PATH"]
        self._checker = checker
        self.overlay = directory / "overlay"
        self.overlay.mkdir()
        self.objects = directory / "objects.json"
        self.put(*OBJECTS)

    def put(self, *items):
        document = {"apiVersion": "v1", "kind": "List", "items": list(items)}
        self.objects.write_text(json.dumps(document))

    def replace(self, name, text):
        path = self.overlay / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def check(self, *arguments, manifests=True):
        source = [f"--manifests={self.objects}"] if manifests else []
        return self._checker.check([*FLAGS, *source, *arguments], self.overlay, self.path)

    def troubles(self, *arguments, **options):
        """Return id and severity of all that is worse than information."""
        return {
            (entry["id"], entry["severity"])
            for entry in self.check(*arguments, **options)
            if entry["severity"] in {"error", "warning"}
        }


@pytest.fixture(scope="module")
def checker(lab):
    return preflight.Checker(lab.node)


@pytest.fixture
def host(node, checker, tmp_path):
    return Host(node, checker, tmp_path)


def test_a_sound_host_has_no_warning_and_no_error(host):
    found = host.check()

    assert [entry for entry in found if entry["severity"] in {"error", "warning"}] == []
    assert {entry["id"] for entry in found if entry["severity"] == "ok"} >= {
        "privileges", "iptables-backend", "other-backend", "rule-events", "ip-forward", "conntrack",
        "node-object", "cluster-cidr", "node-port-listeners", "node-port-range", "ports",
    }  # fmt: skip


# Sysctls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "flags", "wanted"),
    [
        ("net/ipv4/ip_forward", "0", (), ("ip-forward", "error")),
        ("net/ipv6/conf/all/forwarding", "0", (), ("ip-forward", "error")),
        ("net/bridge/bridge-nf-call-iptables", "0", (), ("bridge-nf", "warning")),
        (
            "net/ipv4/conf/all/route_localnet",
            "1",
            ("--iptables-localhost-nodeports=false",),
            ("route-localnet", "warning"),
        ),
        ("net/ipv4/ip_local_port_range", "1024 65535", (), ("node-port-range", "warning")),
    ],
)
def test_a_sysctl_that_is_wrong(host, name, value, flags, wanted):
    if not Path("/proc/sys", name).exists():
        pytest.skip("this kernel has no such sysctl")
    host.node.write_sysctls({name: value})

    assert host.troubles(*flags) == {wanted}


def test_strict_reverse_path_filtering_on_one_of_two_uplinks(host):
    host.node.run(["ip", "route", "add", "default", "dev", "cni0", "metric", "99"])
    try:
        host.node.write_sysctls({"net/ipv4/conf/eth0/rp_filter": "1"})

        assert host.troubles() == {("rp-filter", "warning")}
    finally:
        host.node.write_sysctls({"net/ipv4/conf/eth0/rp_filter": "0"})
        host.node.run(["ip", "route", "delete", "default", "dev", "cni0", "metric", "99"])


def test_sysctls_that_run_could_not_set(host):
    # As in a container that has a network namespace of its own.
    assert host.troubles("--conntrack-max-per-core=12345") == {("conntrack-settings", "error")}


def test_a_table_of_connections_that_is_nearly_full(host):
    host.replace("proc/sys/net/netfilter/nf_conntrack_max", "1000")
    host.replace("proc/sys/net/netfilter/nf_conntrack_count", "990")

    assert host.troubles() == {("conntrack-table", "error")}


def test_connections_that_were_dropped(host):
    host.replace("proc/self/net/stat/nf_conntrack", "entries drop early_drop\n1 a 0\n")

    assert host.troubles() == {("conntrack-drops", "warning")}


# Other rules and programs ------------------------------------------------------------------------


def test_rules_in_the_other_backend(host):
    rules = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n"
    host.node.run([iptables_programs("legacy", IPFamily.V4).restore, "--noflush"], input=rules)

    assert host.troubles() == {("other-backend", "warning")}
    (found,) = [entry for entry in host.check() if entry["id"] == "other-backend"]
    assert found["command"] == "kubeproxy-py cleanup --backend legacy"


def test_a_kubelet_that_uses_the_other_backend(host):
    rules = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"
    host.node.run([iptables_programs("legacy", IPFamily.V4).restore, "--noflush"], input=rules)

    assert host.troubles() == {("kubelet-backend", "warning")}


@pytest.mark.parametrize(
    ("table", "wanted"), [("ip kube-proxy", "nft-mode-tables"), ("inet firewalld", "firewalld")]
)
def test_nft_tables_of_others(host, table, wanted):
    host.node.run(["nft", "add", "table", *table.split()])

    assert host.troubles() == {(wanted, "warning")}


@contextlib.contextmanager
def program(node, path):
    """Run something that sleeps and is called as *path* is."""
    shutil.copy2("/bin/sleep", path)
    child = node.popen([str(path), "600"])
    wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text().strip() == path.name)
    try:
        yield child
    finally:
        child.kill()
        child.wait(10)


def test_a_kube_proxy_that_runs_here(host, tmp_path):
    with program(host.node, tmp_path / "kube-proxy") as child:
        found = [entry for entry in host.check() if entry["id"] == "other-proxy"]

    assert [(entry["severity"], entry["found"]) for entry in found] == [
        ("warning", f"kube-proxy runs here (pid {child.pid})")
    ]


def test_a_kube_proxy_of_another_host_is_none_of_ours(host, clean_lab, tmp_path):
    with program(clean_lab.node2, tmp_path / "kube-proxy"):
        assert host.troubles() == set()


def test_a_firewalld_that_runs_here(host, tmp_path):
    with program(host.node, tmp_path / "firewalld"):
        assert host.troubles() == {("firewalld", "warning")}


def test_programs_that_do_not_work(host, tmp_path):
    broken = tmp_path / "bin"
    broken.mkdir()
    for name in ("iptables", "ip6tables"):
        for stem in (name, f"{name}-nft"):
            path = broken / stem
            path.write_text("#!/bin/sh\nexit 1\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
    host.path = f"{broken}:{host.path}"

    assert host.troubles() == {("iptables-backend", "error")}


# Sockets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [10249, 10256])
def test_a_server_s_port_that_is_taken(host, port):
    with host.node.entered():
        taken = socket.create_server(("127.0.0.1", port))
    with taken:
        assert host.troubles() == {("ports", "warning")}


@pytest.mark.parametrize("address", ["0.0.0.0", V4.node])
def test_a_process_on_a_node_port(host, address):
    with host.node.entered():
        taken = socket.create_server((address, NODE_PORT))
    with taken:
        found = [entry for entry in host.check() if entry["id"] == "node-port-listeners"]

    assert [entry["severity"] for entry in found] == ["warning"]
    assert f"node port {NODE_PORT}/TCP of Service 'default/web'" in found[0]["found"]


def test_a_process_where_node_ports_are_not_served(host):
    with host.node.entered():
        taken = socket.create_server((V4.pod_gateway, NODE_PORT))
    with taken:
        assert host.troubles() == set()


def test_the_daemon_s_own_ports_and_process_are_no_trouble(host, clean_lab, tmp_path):
    arguments = (f"--manifests={host.objects}", "--nodeport-addresses=primary")
    with running(clean_lab, "nft", tmp_path / "log", *arguments) as proxy:
        proxy.wait_synced()
        found = host.check()

    assert {e["id"] for e in found if e["severity"] in {"error", "warning"}} == set()
    assert {"own-process", "ports"} <= {e["id"] for e in found if e["severity"] == "ok"}


# Objects -----------------------------------------------------------------------------------------


def test_pods_outside_of_the_cluster_cidr(host):
    assert host.troubles("--cluster-cidr=10.99.0.0/16") == {("cluster-cidr", "warning")}


def test_a_node_that_is_another_host(host):
    host.put(make_node(ips=[V4.node2], pod_cidrs=[V4.pod_cidr]), *OBJECTS[1:])

    assert ("node-object", "warning") in host.troubles()


def test_an_external_ip_that_takes_another_service_s_traffic(host):
    thief = make_service("thief", cluster_ip="172.30.0.99", externalIPs=[V4.cluster_ip])
    host.put(*OBJECTS, thief)

    assert host.troubles() == {("external-addresses", "warning")}


def test_an_address_that_is_not_allowed(host):
    host.put(*OBJECTS, make_service("x", cluster_ip="172.30.0.99", externalIPs=[V4.external_ip]))

    assert host.troubles() == set()
    assert host.troubles("--external-ips-allow=203.0.113.0/24") == {
        ("external-addresses", "warning")
    }


def test_manifests_with_mistakes(host):
    bad = make_service("bad", cluster_ip="172.30.0.98")
    bad["spec"]["ports"][0]["port"] = 0
    host.put(*OBJECTS, bad)

    assert host.troubles() == {("manifests", "error")}


# The API server ----------------------------------------------------------------------------------


@pytest.fixture
def api(host):
    """Give an API server on the node."""
    with host.node.entered():
        server = ApiServer()
    with server:
        server.apply_many(OBJECTS)
        yield server


@pytest.fixture
def ask(host, api, tmp_path):
    """Check with that API server; returns id and severity of what is wrong."""
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")

    def ask(*arguments):
        # What this machine's disks are like is no matter here.
        flags = (f"--kubeconfig={kubeconfig}", "--state-file=")
        return host.troubles(*flags, *arguments, manifests=False)

    return ask


def test_an_api_server_that_is_well(ask):
    assert ask() == set()


def test_an_api_server_that_is_away(ask, api):
    api.stop()

    assert ask() == {("api-reachable", "error")}


def test_an_api_server_that_is_old(ask, api):
    api.settings.version = "v1.20.15"

    assert ask() == {("api-version", "error")}


def test_clocks_that_differ(ask, api):
    api.settings.clock_ahead_s = -3600

    assert ask() == {("clock", "warning")}


@pytest.mark.parametrize(
    ("denied", "severity"),
    [(("list", "services"), "error"), (("watch", "endpointslices"), "error"), (("create", "events"), "warning")],
)  # fmt: skip
def test_permissions_that_are_missing(ask, api, denied, severity):
    api.settings.authorize = lambda request, route: (request.verb, route.resource.plural) != denied

    assert ("api-permissions", severity) in ask()


def test_a_proxy_that_would_depend_on_itself(ask, api):
    api.apply(make_service("kubernetes", cluster_ip="127.0.0.1", ports=[api.port]))

    assert ask() == {("api-cluster-ip", "error")}


def test_a_node_that_does_not_exist(ask, api):
    assert ("node-object", "error") in ask("--hostname-override=node7")


def test_a_kubeconfig_that_does_not_exist(host):
    assert host.troubles("--kubeconfig=/nowhere", manifests=False) == {("api-config", "error")}


# The command -------------------------------------------------------------------------------------


@pytest.fixture
def command(node):
    def command(*arguments, wrapper=()) -> subprocess.CompletedProcess[str]:
        program = (*wrapper, sys.executable, "-m", "kubeproxy_py", "check")
        return node.run([*program, *arguments], check=False)

    return command


@pytest.mark.parametrize(
    ("option", "found"),
    [("ro", "is not writable"), ("rw", "is in memory (tmpfs)")],
)
def test_a_state_file_that_a_reboot_would_not_leave(command, tmp_path, option, found):
    mount = f'mount -t tmpfs -o {option},mode=755 tmpfs {tmp_path} && exec "$@"'
    done = command(
        "--conntrack-max-per-core=0",
        f"--state-file={tmp_path}/state",
        wrapper=("unshare", "--mount", "sh", "-c", mount, "sh"),
    )

    assert done.returncode == 2
    assert found in " ".join(done.stdout.split())


def test_without_any_flag_the_host_alone_is_checked(command):
    done = command("--conntrack-max-per-core=0")

    assert (done.returncode, done.stderr) == (0, "")
    assert "unchecked" in done.stdout
    assert "the cluster: none of --kubeconfig" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 errors, 0 warnings, ")


def test_the_worst_decides_the_exit_status(command, node):
    node.write_sysctls({"net/ipv4/conf/all/route_localnet": "1"})
    warned = command("--conntrack-max-per-core=0", "--iptables-localhost-nodeports=false")
    node.write_sysctls({"net/ipv4/ip_forward": "0"})
    failed = command("--conntrack-max-per-core=0")

    assert (warned.returncode, failed.returncode) == (2, 1)
    assert warned.stdout.startswith("warning  route-localnet ")
    assert failed.stdout.startswith("error    ip-forward ")
    assert "$ sysctl -w net.ipv4.ip_forward=1" in failed.stdout


def test_a_configuration_that_is_wrong_is_told_completely_and_the_host_is_looked_at(
    command, tmp_path
):
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "clusterCIDR": "x",
                "oomScoreAdj": 5000,
            }
        )
    )
    done = command(f"--config={path}", "--output=json")
    found = {entry["id"]: entry for entry in json.loads(done.stdout)["findings"]}

    assert done.returncode == 1
    assert found["config"]["severity"] == "error"
    assert all(field in found["config"]["found"] for field in ("ClusterCIDR", "OOMScoreAdj"))
    assert found["ip-forward"]["severity"] == "ok"
    assert found["unchecked"]["severity"] == "info"


def test_checking_changes_nothing(command, node):
    def everything():
        rules = node.run(["nft", "list", "ruleset"]).stdout
        legacy = node.run(["cat", "/proc/net/ip_tables_names"], check=False).stdout
        return rules, legacy, [node.read_sysctl(name) for name in SYSCTLS]

    before = everything()
    command("--conntrack-max-per-core=0")

    assert everything() == before


def test_without_root_it_says_what_it_could_not_see(command):
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = command("--conntrack-max-per-core=0", "--output=json", wrapper=nobody)
    found = json.loads(done.stdout)["findings"]

    assert "Traceback" not in done.stderr
    assert ("privileges", "warning") in {(e["id"], e["severity"]) for e in found}
    assert any("no CAP_NET_ADMIN" in e["found"] for e in found if e["id"] == "unchecked")
    assert ("ip-forward", "ok") in {(e["id"], e["severity"]) for e in found}


def test_help_names_the_exit_status(command):
    done = command("--help")

    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "Exit status: 0 nothing above information, 2 warnings, 1 errors." in text
