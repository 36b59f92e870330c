"""The daemon under test: a real process in a namespace, its log, its pages, its end."""

import compileall
import functools
import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import kubeproxy_py
from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.netns import Backend, Lab, iptables_programs
from tests.support.traffic import wait_until

METRICS_PORT: Final = 10249
HEALTH_PORT: Final = 10256
_CLUSTER_CIDRS: Final = ",".join(PLANS[family].cluster_cidr for family in IPFamily)


def own_rules(tables: chains.Tables) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the rules of our chains, by table and chain; without those of a probe, there for 30 ms."""
    return {
        (table, name): texts
        for table, found in tables.items()
        for name, texts in found.items()
        if chains.is_ours(table, name) and name != chains.PROBE
    }


@functools.cache
def compile_program() -> None:
    """Compile the daemon's modules, as they are where it is installed, once for all its starts."""
    compileall.compile_dir(str(Path(kubeproxy_py.__file__).parent), quiet=1)


class Proxy:
    """One run of ``kubeproxy-py run`` in the lab's node namespace."""

    def __init__(
        self,
        lab: Lab,
        backend: Backend,
        log: Path,
        arguments: Sequence[str],
        environ: Mapping[str, str],
    ) -> None:
        self.lab = lab
        self.backend: Final = backend
        self.log: Final = log
        # Namespaces of networks do not part /run, so each has its own.
        self.status_socket: Final = log.with_suffix(".sock")
        with log.open("ab") as stream:
            self.process = lab.node.popen(
                [
                    *(sys.executable, "-m", "kubeproxy_py", "run"),
                    "--logging-format=json",
                    "--v=4",
                    "--hostname-override=node1",
                    f"--cluster-cidr={_CLUSTER_CIDRS}",
                    f"--iptables-backend={backend}",
                    f"--status-socket={self.status_socket}",
                    # nf_conntrack_max cannot be written outside of the first namespace.
                    "--conntrack-max-per-core=0",
                    "--conntrack-tcp-timeout-established=0",
                    "--conntrack-tcp-timeout-close-wait=0",
                    # A test must not find what another one left on the host's disk.
                    "--state-file=",
                    *arguments,
                ],
                stdout=subprocess.DEVNULL,
                stderr=stream,
                env={**lab.node.environment, **environ},
            )

    # What it says ----------------------------------------------------------------------------------

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log's events, or those called *name*."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "unreadable", "line": line}
            if name in {None, event.get("event")}:
                found.append(event)
        return found

    def get(self, path: str, port: int = METRICS_PORT, host: str = "127.0.0.1") -> tuple[int, str]:
        """Return status and body of a page."""
        with self.lab.node.entered():
            connection = http.client.HTTPConnection(host, port, timeout=5)
            connection.connect()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample's value, the sum over all that have these labels; 0 if there is none."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            head, _, value = line.rpartition(" ")
            sample, _, rest = head.partition("{")
            if sample == name and all(f'{key}="{text}"' in rest for key, text in labels.items()):
                total += float(value)
        return total

    def ask(self, *arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run ``kubeproxy-py status``, by another program if *prefix* names one."""
        program = (sys.executable, "-m", "kubeproxy_py", "status")
        socket = f"--status-socket={self.status_socket}"
        return self.lab.node.run([*prefix, *program, socket, *arguments], check=False)

    # What it does ----------------------------------------------------------------------------------

    def live(self, family: IPFamily = IPFamily.V4) -> chains.Tables:
        """Return the kernel's tables."""
        programs = iptables_programs(self.backend, family)
        saved = self.lab.node.run([programs.save])
        return chains.parse_save(saved.stdout.splitlines())

    def plan(self, *arguments: str) -> int:
        """Return the exit status of ``kubeproxy-py plan``: 0 if the kernel is as it should be."""
        argv = [
            *(sys.executable, "-m", "kubeproxy_py", "plan", "--hostname-override=node1"),
            f"--cluster-cidr={_CLUSTER_CIDRS}",
            f"--iptables-backend={self.backend}",
            *arguments,
        ]
        return self.lab.node.run(argv, check=False).returncode

    def is_synced(self) -> bool:
        """Tell whether every family has been programmed at least once."""
        families = {event.get("ip_family") for event in self.events("sync.completed")}
        return len(families) == len(IPFamily)

    def wait_synced(self, timeout_s: float = 30.0) -> None:
        self.wait(self.is_synced, timeout_s)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        """Wait until *condition*; fails at once if the process ends, and shows its log."""

        def is_over() -> bool:
            return self.process.poll() is not None or condition()

        try:
            wait_until(is_over, timeout_s=timeout_s)
            assert self.process.poll() is None, f"the daemon ended: {self.process.returncode}"
        except AssertionError as error:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            raise AssertionError(f"{error}\nend of its log:\n{tail}") from None

    def end(self, number: int, timeout_s: float = 10.0) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def running(
    lab: Lab,
    backend: Backend,
    log: Path,
    *arguments: str,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Proxy]:
    """Run the daemon, with *environ* besides the tests' own, and kill it if it runs at the end."""
    compile_program()
    proxy = Proxy(lab, backend, log, arguments, environ)
    try:
        yield proxy
    finally:
        proxy.process.kill()
        proxy.process.wait(10)
