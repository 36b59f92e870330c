"""
One test's place in the cluster: a namespace, servers, clients, Services, and what clients see.

Whatever a cluster does takes a moment, so every expectation is asked again until it holds or its time is
over; nothing waits for a fixed time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from e2e import agnhost, objects
from e2e.agnhost import Answer
from e2e.cluster import Cluster, ClusterError

Json = dict[str, Any]

# Kubernetes' own e2e limits, but for the start of Pods, which includes the pull of an image.
_POD_S: Final = 300.0
SERVICE_S: Final = 120.0
_POLL_S: Final = 0.3

# Enough that each of three endpoints is met: the chance to miss one is 3 * (2/3)**30 < 2e-5.
_TRIES: Final = 30
# Each is a process in the client for a second.
_UDP_TRIES: Final = 12


class Node(NamedTuple):
    name: str
    ip: str  # of the family that is tested


class Pod(NamedTuple):
    name: str
    ip: str
    node: Node


class Service(NamedTuple):
    """A Service as the cluster has completed it."""

    name: str
    ip: str  # "" if there is none
    node_ports: Mapping[str, int]  # by the port's name, or by protocol if it has none
    health_check_node_port: int
    spec: Json


class Bench:
    """Makes objects in one namespace and asks over the network."""

    def __init__(
        self, cluster: Cluster, namespace: str, *, family: str, nodes: Sequence[Node], image: str
    ) -> None:
        """Use a namespace that exists.

        Args:
            cluster: where
            namespace: its name
            family: IPv4 or IPv6: of Services, Pods' and nodes' addresses
            nodes: those that may run Pods
            image: agnhost's
        """
        self.cluster: Final = cluster
        self.namespace: Final = namespace
        self.family: Final = family
        self.nodes: Final = tuple(nodes)
        self._image = image

    # What there is ---------------------------------------------------------------------------------

    def server(
        self,
        name: str,
        *,
        node: Node | None = None,
        app: str = "server",
        http_port: int = 80,
        udp_port: int = -1,
        delay_s: int = 0,
        ports: Sequence[Json] = (),
        host_network: bool = False,
        is_ready: bool = True,
    ) -> Pod:
        """Start a server under the label app=*app*; without *is_ready*, ``set_ready`` has to follow."""
        arguments = agnhost.netexec(http_port=http_port, udp_port=udp_port, delay_s=delay_s)
        self.cluster.apply(
            objects.pod(
                name,
                namespace=self.namespace,
                arguments=arguments,
                node=node.name if node else "",
                labels={"app": app},
                ports=ports,
                host_network=host_network,
                ready_by_file=not is_ready,
                grace_s=delay_s + 5 if delay_s else 1,
                image=self._image,
            )
        )
        return self._started(name, is_ready=is_ready)

    def client(
        self, name: str = "client", *, node: Node | None = None, host_network: bool = False
    ) -> Pod:
        """Start a Pod that only asks."""
        self.cluster.apply(
            objects.pod(
                name,
                namespace=self.namespace,
                arguments=["pause"],
                node=node.name if node else "",
                host_network=host_network,
                image=self._image,
            )
        )
        return self._started(name, is_ready=True)

    def set_ready(self, pod: Pod, *, is_ready: bool) -> None:
        """Let the readiness probe of a server that was started without *is_ready* succeed or fail."""
        command = ["touch"] if is_ready else ["rm", "-f"]
        self.run(pod, [*command, agnhost.READY_FILE])

    def service(
        self,
        name: str,
        ports: Sequence[Json] = (),
        *,
        app: str | None = "server",
        labels: Mapping[str, str] | None = None,
        **spec: Any,
    ) -> Service:
        """Create a Service for app=*app*, or change it to what is said now."""
        is_external = spec.get("type") == "ExternalName"
        found = self.cluster.apply(
            objects.service(
                name,
                namespace=self.namespace,
                selector=None if app is None else {"app": app},
                ports=ports,
                labels=labels,
                family="" if is_external else self.family,
                **spec,
            )
        )["spec"]
        ip = found.get("clusterIP", "")
        return Service(
            name,
            "" if ip == "None" else ip,
            {p.get("name") or p["protocol"]: p.get("nodePort", 0) for p in found.get("ports", ())},
            found.get("healthCheckNodePort", 0),
            found,
        )

    def delete(self, kind: str, name: str) -> None:
        """Delete an object; its end is not waited for."""
        self.cluster.delete(kind, self.namespace, name)

    def delete_pod(self, pod: Pod) -> None:
        """Delete a Pod and wait until it is gone."""
        self.delete("Pod", pod.name)
        self.wait(
            lambda: self.cluster.find("Pod", self.namespace, pod.name) is None,
            f"the end of Pod {pod.name}",
            _POD_S,
        )

    # What clients see ------------------------------------------------------------------------------

    def run(self, pod: Pod, argv: Sequence[str]) -> str:
        done = self.cluster.execute(self.namespace, pod.name, argv)
        if done.status:
            raise ClusterError(f"cannot run {argv[0]} in {pod.name}: {done.stderr.strip()}")
        return done.stdout

    def ask(
        self, client: Pod, ip: str, port: int, path: str = "/hostname", **how: Any
    ) -> list[Answer]:
        """Ask over HTTP; *how* as for ``agnhost.http``."""
        return agnhost.parse(self.run(client, agnhost.http(ip, port, path, **how)))

    def ask_udp(self, client: Pod, ip: str, port: int, **how: Any) -> list[Answer]:
        """Ask with datagrams; *how* as for ``agnhost.udp``."""
        return agnhost.parse(self.run(client, agnhost.udp(ip, port, **how)))

    def expect(
        self, client: Pod, ip: str, port: int, *servers: Pod | str, limit_s: float = SERVICE_S
    ) -> None:
        """Wait until HTTP requests are answered by all of *servers* and by nobody else."""
        names = {server if isinstance(server, str) else server.name for server in servers}
        self._wait_for_answers(
            lambda: self.ask(client, ip, port, tries=_TRIES),
            lambda seen: {a.body for a in seen} == names and _are(seen, "answered"),
            f"answers of {sorted(names)} from {ip} port {port}",
            limit_s,
        )

    def expect_udp(self, client: Pod, ip: str, port: int, *servers: Pod | str, **how: Any) -> None:
        """Wait until datagrams are answered by all of *servers* and by nobody else."""
        names = {server if isinstance(server, str) else server.name for server in servers}
        tries = 1 if len(names) == 1 else _UDP_TRIES
        self._wait_for_answers(
            lambda: self.ask_udp(client, ip, port, tries=tries, **how),
            lambda seen: {a.body for a in seen} == names,
            f"answers of {sorted(names)} over UDP from {ip} port {port}",
            SERVICE_S,
        )

    def expect_refusal(self, client: Pod, ip: str, port: int) -> None:
        """Wait until connections are refused."""
        self._wait_for_answers(
            lambda: self.ask(client, ip, port),
            lambda seen: _are(seen, "refused"),
            f"a refusal by {ip} port {port}",
            SERVICE_S,
        )

    def expect_nothing(self, client: Pod, ip: str, port: int) -> None:
        """Wait until nobody answers any more: refused, unreachable or silent."""
        self._wait_for_answers(
            lambda: self.ask(client, ip, port),
            lambda seen: all(answer.status != "answered" for answer in seen),
            f"silence of {ip} port {port}",
            SERVICE_S,
        )

    def expect_silence(self, client: Pod, ip: str, port: int) -> None:
        """Wait until connections are dropped, not refused."""
        self._wait_for_answers(
            lambda: self.ask(client, ip, port),
            lambda seen: _are(seen, "timed out"),
            f"dropped packets to {ip} port {port}",
            SERVICE_S,
        )

    def expect_status(self, client: Pod, ip: str, port: int, *wanted: str, path: str = "/") -> None:
        """Wait until the page has one of these HTTP statuses."""
        self._wait_for_answers(
            lambda: agnhost.parse(self.run(client, agnhost.http_status(ip, port, path))),
            lambda seen: {answer.body for answer in seen} <= set(wanted),
            f"status {'/'.join(wanted)} of {ip} port {port}{path}",
            SERVICE_S,
        )

    def source_of(self, client: Pod, ip: str, port: int) -> str:
        """Return the address under which the server sees *client*."""
        (answer,) = self.ask(client, ip, port, "/clientip")
        assert answer.status == "answered", answer
        return agnhost.parse_client_ip(answer.body)

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float = SERVICE_S) -> None:
        """Ask *condition* until it holds. Raises AssertionError when the time is over."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {limit_s} s"
            time.sleep(_POLL_S)

    def _wait_for_answers(
        self,
        ask: Callable[[], list[Answer]],
        is_right: Callable[[list[Answer]], bool],
        what: str,
        limit_s: float,
    ) -> None:
        seen: list[Answer] = []

        def look() -> bool:
            seen[:] = ask()
            return is_right(seen)

        try:
            self.wait(look, what, limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {sorted(set(seen))}") from None

    def _started(self, name: str, *, is_ready: bool) -> Pod:
        found: Json = {}

        def is_up() -> bool:
            found.clear()
            found.update(self.cluster.find("Pod", self.namespace, name) or {})
            status = found.get("status", {})
            assert status.get("phase") not in {"Failed", "Succeeded"}, f"Pod {name} ended: {status}"
            return status.get("phase") == "Running" and (
                not is_ready
                or any(
                    (c["type"], c["status"]) == ("Ready", "True")
                    for c in status.get("conditions", ())
                )
            )

        self.wait(is_up, f"the start of Pod {name}", _POD_S)
        ips = [entry["ip"] for entry in found["status"]["podIPs"]]
        (node,) = (n for n in self.nodes if n.name == found["spec"]["nodeName"])
        return Pod(name, next(ip for ip in ips if (":" in ip) == (self.family == "IPv6")), node)


def _are(answers: list[Answer], status: str) -> bool:
    return bool(answers) and all(answer.status == status for answer in answers)
