"""
The lab as a cluster of two nodes, for the tests of e2e/: Pods are namespaces, nodes run the daemon.

Stands in for API server, scheduler, kubelet and controllers as far as those tests see them; Services,
EndpointSlices (which the daemon makes of Pods, see kubeproxy_py/endpoint_controller.py) and all packets
are real. Every object is held to the API's schemas.

    python -m pytest e2e -p tests.support.lab_cluster --disruptive
"""

import contextlib
import copy
import datetime as dt
import ipaddress
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from e2e import agnhost
from e2e.cluster import Cluster, ClusterError, Execution
from kubeproxy_py.model import IPFamily
from tests.support import addresses, schemas
from tests.support.agnhost import STARTED_FILE
from tests.support.background import Background, Rest
from tests.support.builders import make_node
from tests.support.netns import Backend, Lab, Namespace

Json = dict[str, Any]
Key = tuple[str, str, str]  # kind, namespace, name

_REPOSITORY: Final = Path(__file__).parents[2]
# As often as the kubelet of these tests looks at its Pods: they wait for what it finds.
_TICK_S: Final = 0.1
_FIRST_NODE_PORT: Final = 30000
# The first addresses of the range are taken in a real cluster, too.
_FIRST_SERVICE: Final = 256
_PODS: Final = 8
_KINDS: Final = {
    "nodes": "Node",
    "pods": "Pod",
    "services": "Service",
    "endpointslices": "EndpointSlice",
}


class LabCluster:
    """A cluster on a lab. Close it (``with``)."""

    def __init__(self, backend: Backend = "nft") -> None:
        """Build the lab and start the daemon on both nodes."""
        self._undo = contextlib.ExitStack()
        self._lab = self._undo.enter_context(Lab.build(local_pods=_PODS, remote_pods=_PODS))
        self._backend = backend
        self._nodes = {"node1": self._lab.node, "node2": self._lab.node2}
        self._directory = Path(
            self._undo.enter_context(tempfile.TemporaryDirectory(prefix="lab-cluster-"))
        )
        self._manifests = self._directory / "manifests"
        self._manifests.mkdir()
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        # Under the lock:
        self._free = {
            "node1": list(self._lab.local_pods),
            "node2": list(self._lab.remote_pods),
        }
        self._objects: dict[Key, Json] = {}
        self._places: dict[Key, Namespace] = {}
        self._processes: dict[Key, subprocess.Popen[str]] = {}
        for name, node_plans in (
            ("node1", [(p.node, p.pod_cidr) for p in addresses.PLANS.values()]),
            ("node2", [(p.node2, p.node2_pod_cidr) for p in addresses.PLANS.values()]),
        ):
            self._put(
                make_node(
                    name,
                    ips=[ip for ip, _ in node_plans],
                    pod_cidrs=[cidr for _, cidr in node_plans],
                )
            )
        for name in self._nodes:
            self._start_proxy(name)
        self._undo.enter_context(Background(self._look_after_pods, name="kubelet"))

    def close(self) -> None:
        self._undo.close()

    # What tests call -------------------------------------------------------------------------------

    def apply(self, obj: Json) -> Json:
        if found := schemas.problems(obj):
            raise ClusterError("; ".join(found))
        with self._lock:
            key = _key(obj)
            old = self._objects.get(key)
            match obj["kind"]:
                case "Pod" if old is None:
                    self._create_pod(copy.deepcopy(obj))
                case "Pod":
                    raise ClusterError(f"cannot change Pod {key[2]}")
                case "Service":
                    self._put(self._completed(copy.deepcopy(obj), old))
                case "Namespace":
                    self._objects[key] = obj  # nothing that the daemon reads
                case _:
                    self._put(obj)
            return copy.deepcopy(self._objects[key])

    def delete(self, kind: str, namespace: str, name: str, *, grace_s: int | None = None) -> None:
        with self._lock:
            key = (kind, namespace, name)
            if key not in self._objects:
                return
            if kind == "Namespace":
                for other in [k for k in self._objects if k[1] == name]:
                    if other[0] == "Pod":
                        self._processes[other].kill()
                        self._processes[other].wait()
                        self._bury(other)
                    else:
                        self._remove(other)
                del self._objects[key]
            elif kind == "Pod":
                pod = self._objects[key]
                moment = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                pod["metadata"].setdefault("deletionTimestamp", moment)
                self._put(pod)
                self._processes[key].send_signal(signal.SIGTERM)
            else:
                self._remove(key)

    def find(self, kind: str, namespace: str, name: str) -> Json | None:
        with self._lock:
            return copy.deepcopy(self._objects.get((kind, namespace, name)))

    def list(self, kind: str, namespace: str = "", selector: str = "") -> list[Json]:
        wanted = dict(part.split("=") for part in selector.split(",") if part)
        with self._lock:
            return [
                copy.deepcopy(obj)
                for key, obj in sorted(self._objects.items())
                if key[0] == _KINDS[kind]
                and namespace in {"", key[1]}
                and wanted.items() <= obj["metadata"].get("labels", {}).items()
            ]

    def execute(
        self, namespace: str, pod: str, argv: Sequence[str], *, timeout_s: float = 60.0
    ) -> Execution:
        with self._lock:
            process = self._processes.get(("Pod", namespace, pod))
        if process is None or process.poll() is not None:
            raise ClusterError(f"cannot run {argv[0]} in {namespace}/{pod}: it does not run")
        done = subprocess.run(
            ["nsenter", f"--target={process.pid}", "--net", "--mount", "--", *argv],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self._lab.env,
        )
        return Execution(done.returncode, done.stdout, done.stderr)

    # What stands in for the control plane -----------------------------------------------------------

    def _put(self, obj: Json) -> None:
        key = _key(obj)
        self._objects[key] = obj
        temporary = self._directory / "new"
        temporary.write_text(json.dumps(obj))
        temporary.rename(self._file(key))

    def _remove(self, key: Key) -> None:
        self._objects.pop(key, None)
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: Key) -> Path:
        return self._manifests / f"{'.'.join(key)}.json"

    def _completed(self, service: Json, old: Json | None) -> Json:
        """Return a Service with what the API server allocates and defaults."""
        spec = service["spec"]
        before = old["spec"] if old else {}
        kind = spec.setdefault("type", "ClusterIP")
        if kind == "ExternalName":
            return service
        families = spec.setdefault("ipFamilies", ["IPv4"])
        family = IPFamily.V6 if families == ["IPv6"] else IPFamily.V4
        plan = addresses.PLANS[family]
        network = ipaddress.ip_network(plan.service_cidr)
        given = spec.get("clusterIP") or before.get("clusterIP")
        spec["clusterIP"] = given or str(network[_FIRST_SERVICE + next(self._numbers)])
        spec["clusterIPs"] = [spec["clusterIP"]]
        spec.setdefault("internalTrafficPolicy", "Cluster")
        spec.setdefault("sessionAffinity", "None")
        if spec["sessionAffinity"] == "ClientIP":
            spec.setdefault("sessionAffinityConfig", {"clientIP": {"timeoutSeconds": 10800}})
        kept = {(p["port"], p["protocol"]): p.get("nodePort") for p in before.get("ports", ())}
        for port in spec.get("ports", ()):
            port.setdefault("targetPort", port["port"])
            if kind in {"NodePort", "LoadBalancer"}:
                number = kept.get((port["port"], port["protocol"]))
                port.setdefault("nodePort", number or self._next_node_port())
        if kind == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            spec.setdefault(
                "healthCheckNodePort",
                before.get("healthCheckNodePort") or self._next_node_port(),
            )
        return service

    def _next_node_port(self) -> int:
        return _FIRST_NODE_PORT + next(self._numbers)

    # What stands in for scheduler and kubelet ---------------------------------------------------------

    def _create_pod(self, pod: Json) -> None:
        spec = pod["spec"]
        node = spec.setdefault("nodeName", max(self._free, key=lambda name: len(self._free[name])))
        key = _key(pod)
        if spec.get("hostNetwork"):
            place = self._nodes[node]
            name = node
        else:
            place = self._free[node].pop(0)
            name = key[2]
        self._places[key] = place
        (container,) = spec["containers"]
        self._processes[key] = self._start(
            place, name, [sys.executable, "-m", "tests.support.agnhost", *container["args"]]
        )
        ips = [{"ip": place.address(family)} for family in IPFamily]
        pod["status"] = {
            "phase": "Pending",
            "podIP": ips[0]["ip"],
            "podIPs": ips,
            "conditions": [{"type": "Ready", "status": "False"}],
        }
        self._put(pod)

    def _start(self, place: Namespace, name: str, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a program with a /dev/shm of its own, in which readiness is told."""
        script = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        with (self._directory / "log").open("ab") as log:
            return place.popen(
                ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", *argv],
                env=self._lab.env | {"HOSTNAME": name},
                cwd=_REPOSITORY,
                stdout=log,
                stderr=log,
            )

    def _look_after_pods(self, rest: Rest) -> None:
        while not rest(_TICK_S):
            with self._lock:
                for key, obj in list(self._objects.items()):
                    if key[0] == "Pod":
                        self._look_after(key, obj)

    def _look_after(self, key: Key, pod: Json) -> None:
        process = self._processes[key]
        if process.poll() is not None:
            if "deletionTimestamp" in pod["metadata"]:
                self._bury(key)
            elif pod["status"]["phase"] != "Failed":
                pod["status"]["phase"] = "Failed"
                self._put(pod)
            return
        if key[1] == "kube-system":
            return
        own = Path(f"/proc/{process.pid}/root")
        is_running = (own / _inside(STARTED_FILE)).exists()
        has_probe = "readinessProbe" in pod["spec"]["containers"][0]
        is_ready = is_running and (not has_probe or (own / _inside(agnhost.READY_FILE)).exists())
        status = {
            "phase": "Running" if is_running else "Pending",
            "conditions": [{"type": "Ready", "status": str(is_ready)}],
        }
        if not status.items() <= pod["status"].items():
            pod["status"] |= status
            self._put(pod)

    def _bury(self, key: Key) -> None:
        pod = self._objects[key]
        self._remove(key)
        del self._processes[key]
        place = self._places.pop(key, None)
        if key[1] == "kube-system":
            self._start_proxy(pod["spec"]["nodeName"])
        elif place is not None and not pod["spec"].get("hostNetwork"):
            # At the end: an address is used again as late as possible.
            self._free[pod["spec"]["nodeName"]].append(place)

    # The proxy ------------------------------------------------------------------------------------------

    def _start_proxy(self, node: str) -> None:
        cidrs = ",".join(plan.cluster_cidr for plan in addresses.PLANS.values())
        name = f"kubeproxy-py-{next(self._numbers)}"
        process = self._start(
            self._nodes[node],
            node,
            [
                *(sys.executable, "-m", "kubeproxy_py", "run"),
                f"--manifests={self._manifests}",
                f"--hostname-override={node}",
                f"--cluster-cidr={cidrs}",
                f"--iptables-backend={self._backend}",
                # nf_conntrack_max cannot be written outside of the first namespace.
                "--conntrack-max-per-core=0",
                "--conntrack-tcp-timeout-established=0",
                "--conntrack-tcp-timeout-close-wait=0",
            ],
        )
        key = ("Pod", "kube-system", name)
        self._processes[key] = process
        # Not a file: the daemon need not know of itself.
        self._objects[key] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": "kube-system",
                "labels": {"k8s-app": "kube-proxy"},
            },
            "spec": {"nodeName": node, "hostNetwork": True, "containers": [{"name": "proxy"}]},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        }


def _inside(path: Path | str) -> str:
    return str(path).lstrip("/")


def _key(obj: Json) -> Key:
    metadata = obj["metadata"]
    return obj["kind"], metadata.get("namespace", ""), metadata["name"]


# pytest's plugin ----------------------------------------------------------------------------------------

_CLUSTER: Final = pytest.StashKey[LabCluster]()


@pytest.hookimpl(optionalhook=True)
def pytest_e2e_cluster(config: pytest.Config) -> Cluster:
    """Give the tests of e2e/ this cluster."""
    cluster = config.stash[_CLUSTER] = LabCluster(
        "legacy" if os.environ.get("LAB_BACKEND") == "legacy" else "nft"
    )
    return cluster


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CLUSTER in config.stash:
        config.stash[_CLUSTER].close()
