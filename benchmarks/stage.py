"""
What is measured on: a laboratory, a cluster of one size in an API server, endpoints that answer.

Every endpoint of every Service is real: one pod owns the whole address range of the made-up pods,
and tells who connects which address was reached. The API server is a process of its own.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.clients import Api, Client, Json
from tests.support import addresses, builders
from tests.support.netns import Lab, Namespace

ENDPOINTS: Final = 5
SERVICE_PORT: Final = 80
TARGET_PORT: Final = 8080
NODE_PORT: Final = 30080
DNS_IP: Final = "172.30.255.10"
DNS_PORT: Final = 53
# The pods of the made-up nodes (builders.cluster): 10.1.0.0/16 to 10.3.0.0/16.
_POD_CIDRS: Final = ("10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16")
_FIRST_CLUSTER_IP: Final = (172 << 24) + (30 << 16) + 1
# Services that churn; more would only make the objects kept here more.
_CHURNING: Final = 200


def _fresh_addresses() -> Iterator[str]:
    """Yield pod addresses that no Service has: 50,000 pods a node end at 10.3.195."""
    return itertools.cycle(
        f"10.{high}.{middle}.{low}"
        for high in (3, 2)
        for middle in range(200, 256)
        for low in range(1, 251)
    )


@dataclasses.dataclass(slots=True)
class Stage:
    """One size of cluster, ready for daemons of any backend and layout."""

    lab: Lab
    size: int
    url: str
    kubeconfig: Path
    slices: dict[int, Json]  # by Service number: those that are changed
    client: Client  # a pod on the node under test
    bare_client: Client  # a pod on a node without any rule
    _fresh: Iterator[str] = dataclasses.field(default_factory=_fresh_addresses)

    @property
    def probe(self) -> int:
        """The number of the Service whose changes are timed."""
        return self.size // 2

    @property
    def last(self) -> tuple[str, ...]:
        """The cluster IPs of the last Service by number and of the last by name."""
        by_name = max(range(self.size), key=str)
        return tuple(cluster_ip(number) for number in {self.size - 1, by_name})

    def connect_targets(self) -> dict[str, tuple[Client, str, int]]:
        """Return who connects where, by name; ``bare`` passes as many hops without a rule."""
        return {
            "bare": (self.bare_client, addresses.V4.remote_pod(1), TARGET_PORT),
            "first": (self.client, cluster_ip(0), SERVICE_PORT),
            "middle": (self.client, cluster_ip(self.size // 2), SERVICE_PORT),
            "last": (self.client, cluster_ip(self.size - 1), SERVICE_PORT),
            "none": (self.client, "10.1.0.1", TARGET_PORT),
            "node_port": (self.client, addresses.V4.node, NODE_PORT),
        }

    def move(self, api: Api, number: int) -> str:
        """Give the first endpoint of Service *number* another address; return it."""
        address = next(self._fresh)
        self.slices[number]["endpoints"][0]["addresses"] = [address]
        api.replace(self.slices[number])
        return address

    @contextlib.contextmanager
    def api(self) -> Iterator[Api]:
        """Connect to the API server, for one thread."""
        with contextlib.closing(Api(self.lab.node, self.url)) as connection:
            yield connection

    def churning(self) -> Iterator[int]:
        """Yield Services to change, round and round, without the timed one."""
        return itertools.cycle(number for number in self.slices if number != self.probe)


@contextlib.contextmanager
def build(size: int) -> Iterator[Stage]:
    """Build the stage for *size* Services."""
    with contextlib.ExitStack() as undo:
        lab = undo.enter_context(Lab.build())
        _route_pods(lab)
        for pod in (lab.local_pods[0], lab.remote_pods[0]):
            _start(pod, "benchmarks.answer", str(TARGET_PORT))
        kubeconfig = lab.directory / "kubeconfig"
        url = _start(
            lab.node,
            "tests.support.api_server",
            f"--services={size}",
            f"--endpoints={ENDPOINTS}",
            "--realistic",
            f"--kubeconfig={kubeconfig}",
        )
        stage = Stage(
            lab,
            size,
            url,
            kubeconfig,
            _some_slices(size),
            undo.enter_context(contextlib.closing(Client(lab.local_pods[1]))),
            undo.enter_context(contextlib.closing(Client(lab.remote_pods[1]))),
        )
        with stage.api() as api:
            for obj in (*_node_port_service(), *_dns()):
                api.create(obj)
        yield stage


def cluster_ip(number: int) -> str:
    """Return the cluster IP of Service *number*, as builders.cluster counts."""
    value = _FIRST_CLUSTER_IP + number
    return ".".join(str(value >> shift & 255) for shift in (24, 16, 8, 0))


def new_service(number: int) -> tuple[Json, Json]:
    """Return a Service that is not in the cluster, and its slice."""
    name = f"new-{number}"
    return (
        builders.make_service(name, cluster_ip=f"172.30.254.{number}"),
        builders.make_slice(name, endpoints=[f"10.1.250.{n + 1}" for n in range(ENDPOINTS)]),
    )


def _node_port_service() -> tuple[Json, Json]:
    port = builders.make_port(SERVICE_PORT, nodePort=NODE_PORT, targetPort=TARGET_PORT)
    return (
        builders.make_service("outer", cluster_ip="172.30.255.1", type="NodePort", ports=[port]),
        builders.make_slice("outer", endpoints=[f"10.1.251.{n + 1}" for n in range(ENDPOINTS)]),
    )


def _dns() -> tuple[Json, Json]:
    port = builders.make_port(DNS_PORT, targetPort=TARGET_PORT)
    return (
        builders.make_service("kube-dns", namespace="kube-system", cluster_ip=DNS_IP, ports=[port]),
        builders.make_slice("kube-dns", namespace="kube-system", endpoints=["10.1.251.11"]),
    )


def _some_slices(size: int) -> dict[int, Json]:
    wanted = {size // 2, *range(0, size, max(1, size // _CHURNING))}
    slices = (obj for obj in builders.cluster(size, ENDPOINTS) if obj["kind"] == "EndpointSlice")
    return {number: obj for number, obj in enumerate(slices) if number in wanted}


def _route_pods(lab: Lab) -> None:
    """Let the first pod of the node own the addresses of all made-up pods."""
    owner = lab.local_pods[0]
    for cidr in _POD_CIDRS:
        owner.run(["ip", "route", "add", "local", cidr, "dev", "lo"])
        lab.node.run(["ip", "route", "add", cidr, "via", addresses.V4.local_pod(1)])
    # The gateway sends Service addresses to the node: without rules, a packet would go in circles.
    lab.node.run(["ip", "route", "add", "blackhole", addresses.V4.service_cidr])


def _start(ns: Namespace, module: str, *arguments: str) -> str:
    """Run a module of ours in *ns* until the lab is closed; return the first line it prints."""
    process = ns.popen([sys.executable, "-m", module, *arguments], stdout=-1)
    assert process.stdout is not None
    line: str = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"cannot start {module}: it ended with {process.wait()}")
    return line
