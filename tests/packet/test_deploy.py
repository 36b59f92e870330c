"""The rendered manifests, run: arguments, mounts, capabilities and permissions are enough, and used."""

import http.client
import json

import pytest
import yaml

from kubeproxy_py.model import IPFamily
from tests.support import containers, kubeadm, manifests, rbac
from tests.support.addresses import PLANS
from tests.support.api_server import ApiServer
from tests.support.builders import make_node, make_service, make_slice
from tests.support.containers import ContainerRunner
from tests.support.traffic import connect, wait_until

pytestmark = pytest.mark.packet

V4 = PLANS[IPFamily.V4]


def kubeadm_config():
    """Return what kubeadm writes, for the lab."""
    document = yaml.safe_load(kubeadm.CONFIG)
    document["clusterCIDR"] = V4.cluster_cidr
    # A namespace of the lab does not own nf_conntrack_max, which kubeadm leaves at kube-proxy's default.
    document["conntrack"] |= {
        "maxPerCore": 0,
        "min": 0,
        "tcpCloseWaitTimeout": "0s",
        "tcpEstablishedTimeout": "0s",
    }
    return yaml.safe_dump(document)


def kubeadm_kubeconfig(server):
    directory = containers.ACCOUNT
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "cluster": {
                        "certificate-authority": f"{directory}/ca.crt",
                        "server": server.url,
                    },
                    "name": "default",
                }
            ],
            "contexts": [
                {
                    "context": {"cluster": "default", "namespace": "default", "user": "default"},
                    "name": "default",
                }
            ],
            "current-context": "default",
            "users": [{"name": "default", "user": {"tokenFile": f"{directory}/token"}}],
        }
    )


@pytest.fixture
def api(clean_lab):
    with clean_lab.node.entered():
        server = ApiServer(tls=True, tokens=["the-token"])
    with server:
        server.apply(make_node("node1"))
        server.apply(make_service("web", ports=[80]))
        server.apply(make_slice("web", endpoints=[V4.local_pod(1)], ports=[8080]))
        yield server


class Deployed:
    """What one of the kustomizations amounts to on the lab's node."""

    def __init__(self, kustomization, lab, server, directory, backend):
        self.objects = manifests.build(kustomization)
        self.lab = lab
        self.log = directory / "log"
        self.log.touch()
        self.authorizer = rbac.Authorizer(self.objects, "kubeproxy-py", "kube-system")
        server.settings.authorize = self.authorizer
        pod = manifests.pod(self.objects)
        for container in [*pod["initContainers"], *pod["containers"]]:
            # The node of the lab could use either; and the API server is not where kind's would be.
            container["args"].append(f"--iptables-backend={backend}")
            container["args"].append("--logging-format=json")
            for variable in container["env"]:
                if variable["name"] == "KUBERNETES_SERVICE_HOST":
                    variable["value"] = "127.0.0.1"
                if variable["name"] == "KUBERNETES_SERVICE_PORT":
                    variable["value"] = str(server.port)
        config_maps = {
            obj["metadata"]["name"]: obj["data"]
            for obj in self.objects
            if obj["kind"] == "ConfigMap"
        }
        config_maps["kube-proxy"] = {
            "config.conf": kubeadm_config(),
            "kubeconfig.conf": kubeadm_kubeconfig(server),
        }
        self.volumes = directory / "volumes"
        self.volumes.mkdir()
        self.daemons = []
        self.runner = ContainerRunner(
            pod,
            node=lab.node,
            directory=self.volumes,
            config_maps=config_maps,
            account={
                "token": "the-token",
                "ca.crt": server.certificates.authority.read_text(),
                "namespace": "kube-system",
            },
            environ={"NODE_NAME": "node1"},
        )

    def probe(self, kind):
        """Return the status that the kubelet would see."""
        asked = manifests.container(self.objects, "kubeproxy-py")[kind]["httpGet"]
        ports = manifests.container(self.objects, "kubeproxy-py")["ports"]
        (port,) = (p["containerPort"] for p in ports if p["name"] == asked["port"])
        with self.lab.node.entered():
            # The Pod's IP is the node's.
            connection = http.client.HTTPConnection(V4.node, port, timeout=5)
            try:
                connection.request("GET", asked["path"])
                return connection.getresponse().status
            except OSError:
                return 0
            finally:
                connection.close()

    def scrape(self):
        """Return what /metrics says on the node itself."""
        with self.lab.node.entered():
            connection = http.client.HTTPConnection("127.0.0.1", 10249, timeout=5)
            try:
                connection.request("GET", "/metrics")
                return connection.getresponse().read()
            finally:
                connection.close()

    def run(self):
        """Run the init container to its end and start the daemon; wait until it is ready."""
        initialised = self.runner.start("init", self.log)
        assert initialised.wait(60) == 0, self.said()
        daemon = self.runner.start("kubeproxy-py", self.log)
        self.daemons.append(daemon)
        try:
            wait_until(
                lambda: daemon.poll() is not None or self.probe("readinessProbe") == 200,
                timeout_s=60,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None
        assert daemon.poll() is None, self.said()
        return daemon

    def run_command(self, command, arguments=None):
        """Run another command in the daemon's container, by default with the daemon's flags; return its exit status."""
        container = manifests.container(self.objects, "kubeproxy-py")
        given = container["args"]
        assert given[0] == "run"
        container["args"] = [command, *(given[1:] if arguments is None else arguments)]
        try:
            return self.runner.start("kubeproxy-py", self.log).wait(60)
        finally:
            container["args"] = given

    def end(self):
        """End what runs: its ports are those of the next test's."""
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait(60)

    def said(self):
        return self.log.read_text(errors="replace")


@pytest.fixture
def deploy(clean_lab, api, tmp_path):
    """Return a function that makes a Deployed; what it runs ends with the test."""
    made = []

    def deploy(kustomization, backend):
        made.append(Deployed(kustomization, clean_lab, api, tmp_path, backend))
        return made[-1]

    yield deploy
    for deployed in made:
        deployed.end()


@pytest.mark.parametrize(
    ("kustomization", "backend"), [("overlays/kind", "nft"), ("overlays/kubeadm", "legacy")]
)
def test_what_the_manifest_gives_is_enough_and_used(
    kustomization, deploy, clean_lab, servers, backend
):
    deployed = deploy(kustomization, backend)
    deployed.run()

    # Traffic, and what the kubelet asks.
    assert connect(clean_lab.local_pods[1], V4.cluster_ip, 80).is_answered
    assert [deployed.probe(kind) for kind in ("startupProbe", "livenessProbe")] == [200, 200]
    # Permissions: none is missing, and none is given beyond kube-proxy's role.
    event = rbac.Permission("create", "events.k8s.io", "events")
    wait_until(lambda: event in deployed.authorizer.used, what="the Event of the start")
    assert deployed.authorizer.refused == []
    assert {(p.verb, p.resource) for p in deployed.authorizer.used} >= {
        ("watch", "services"),
        ("watch", "endpointslices"),
        ("watch", "nodes"),
    }
    only_upstream = rbac.Authorizer(
        [obj for obj in deployed.objects if obj["kind"] != "ClusterRole"],
        "kubeproxy-py",
        "kube-system",
    )
    assert deployed.authorizer.permissions == only_upstream.permissions
    assert "config.warned" not in deployed.said()
    # What the documents say to look at: nothing is left to be changed.
    assert deployed.run_command("plan") == 0, deployed.said()
    # Capabilities: nothing was refused but what the documents say.
    words = ("permitted", "read-only", "denied")
    refused = {
        json.loads(line)["event"]
        for line in deployed.said().splitlines()
        if any(word in line.lower() for word in words)
    }
    # No kubelet here gives the process the OOM score that the configuration asks for.
    assert refused - {"drift.lock_unwatched", "oom_score_adj.set_failed"} == set(), deployed.said()
    assert ("drift.lock_unwatched" in deployed.said()) == (backend == "legacy")


@pytest.mark.parametrize(
    ("kustomization", "backend"), [("overlays/kind", "nft"), ("overlays/kubeadm", "legacy")]
)
def test_what_the_daemon_keeps_is_on_the_host_without_any_flag(kustomization, deploy, backend):
    deployed = deploy(kustomization, backend)
    args = manifests.container(deployed.objects, "kubeproxy-py")["args"]
    assert not any("state" in flag or "socket" in flag for flag in args)
    args.append("--traffic-metrics=service")
    deployed.run()
    state, totals = deployed.volumes / "state/state", deployed.volumes / "run/traffic.json"
    wait_until(state.exists, what="the state file", timeout_s=60)
    # Who is asked by `kubectl exec` says that it is well, the state file included.
    assert deployed.run_command("status", []) == 0, deployed.said()
    # Totals are kept once somebody has asked for them.
    wait_until(lambda: deployed.scrape() and totals.exists(), what="the totals", timeout_s=60)

    assert json.loads(state.read_bytes().partition(b"\n")[0])["node"] == "node1"
    for event in ("snapshot.", "status.listen_failed", "traffic.state_unwritten"):
        assert event not in deployed.said()


def test_without_a_permission_the_authorizer_of_these_tests_says_no(deploy):
    deployed = deploy("overlays/kind", "nft")
    deployed.authorizer.permissions.discard(rbac.Permission("create", "events.k8s.io", "events"))
    deployed.run()

    wait_until(lambda: "recorder.event_refused" in deployed.said(), what="the refusal")
    assert deployed.authorizer.refused == [
        "create /apis/events.k8s.io/v1/namespaces/default/events"
    ]


def test_without_net_admin_the_daemon_ends_with_a_reason(deploy):
    deployed = deploy("overlays/kind", "nft")
    context = manifests.container(deployed.objects, "kubeproxy-py")["securityContext"]
    context["capabilities"]["add"] = ["NET_RAW"]
    daemon = deployed.runner.start("kubeproxy-py", deployed.log)

    assert daemon.wait(60) == 1
    assert "NET_ADMIN" in deployed.said()
