"""
Shows kubeproxy-py at work, with real connections, on one machine and in half a minute.

Builds a small cluster of network namespaces, runs the real daemon in the one that plays the node,
and checks what it shows: the exit status is 0 only if everything was as it says. Changes nothing
outside its own namespaces and leaves nothing behind. Run it as root: ``make demo``.
"""

import argparse
import collections
import contextlib
import dataclasses
import http.client
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

_HERE: Final = Path(__file__).resolve().parent
# So that it runs as a script, too: the laboratory is in tests/, which is not installed.
sys.path.insert(0, str(_HERE.parents[1]))

from kubeproxy_py.model import IPFamily  # noqa: E402 - needs the path above
from tests.support import addresses, netns, traffic  # noqa: E402
from tests.support.addresses import AddressPlan  # noqa: E402
from tests.support.netns import Backend, Lab, Namespace  # noqa: E402
from tests.support.servers import Servers  # noqa: E402
from tests.support.traffic import Outcome, Tick  # noqa: E402

# Where the endpoints of manifests/ live in the laboratory.
ENDPOINTS: Final = {"web-1": "pod1", "web-2": "pod2", "web-3": "remote1", "web-4": "remote2"}
CLIENT: Final = "pod3"  # a pod that is no endpoint
MOVING: Final = "web-4"  # the endpoint that goes and comes back
SERVICE_PORT: Final = 80
NODE_PORT: Final = 30080
TARGET_PORT: Final = 8080
HEALTH_PORT: Final = 10256

_CONNECTIONS: Final = 100
# A fair quarter of 100 is below this once in ten million times.
_FEWEST: Final = 5
# As long as an endpoint still has a quarter, so many connections in a row miss it about once in
# thirty million times.
_QUIET_TICKS: Final = 60
_START_LIMIT_S: Final = 20.0
_CHANGE_LIMIT_S: Final = 10.0


class Failed(Exception):
    """The demonstration cannot go on."""


class Screen:
    """Prints steps, facts and charts; plain text if nobody sits in front of it."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        self._block = "█" if is_unicode else "#"
        self._step = 0
        self.problems: list[str] = []

    def step(self, text: str) -> None:
        self._step += 1
        self._print("")
        self._print(self._painted(f"{self._step}. {text}", "1"))

    def fact(self, text: str) -> None:
        self._print(f"   {text}")

    def expect(self, text: str, *, holds: bool) -> None:
        """Print *text* as true, or as what should have been true and was not."""
        if holds:
            self._print(f"   {self._painted('ok', '32')}  {text}")
        else:
            self._print(f"   {self._painted('NOT SO', '31')}  {text}")
            self.problems.append(text)

    def chart(self, counts: collections.Counter[str], names: Sequence[str]) -> None:
        others = sorted(counts.keys() - set(names))
        for name in [*names, *others]:
            count = counts[name]
            self._print(f"     {name:<10} {count:>4}  {self._block * count}".rstrip())

    def _painted(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._is_terminal else text

    def _print(self, text: str) -> None:
        print(text, flush=True)  # noqa: T201 - this program's purpose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What all steps use."""

    screen: Screen
    lab: Lab
    plan: AddressPlan
    backend: Backend
    manifests: Path
    daemon: subprocess.Popen[str]
    log: Path

    @property
    def client(self) -> Namespace:
        return self.lab.namespace(CLIENT)

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> float:
        """Wait for *condition*; return the seconds. Raises Failed if it or the daemon fails."""

        def is_over() -> bool:
            if self.daemon.poll() is not None:
                raise Failed(
                    f"kubeproxy-py ended with status {self.daemon.returncode} while waiting for:"
                    f" {what}"
                )
            return condition()

        try:
            return traffic.wait_until(is_over, timeout_s=limit_s, what=what)
        except AssertionError as error:
            raise Failed(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration: 0 all was as expected, 1 something was not, 2 it cannot run here."""
    parser = argparse.ArgumentParser(description="Show kubeproxy-py at work in a small laboratory.")
    parser.add_argument("--backend", choices=["nft", "legacy"], default="nft")
    parser.add_argument(
        "--family", choices=[family.value for family in IPFamily], default=IPFamily.V4.value
    )
    arguments = parser.parse_args(argv)
    obstacle = _find_obstacle(arguments.backend)
    if obstacle:
        print(f"cannot run the demo: {obstacle}", file=sys.stderr)  # noqa: T201 - the terminal
        return 2
    # Ended politely, it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    screen = Screen()
    try:
        with _set_up(screen, arguments.backend, IPFamily(arguments.family)) as stage:
            try:
                _show(stage)
            except (Failed, AssertionError) as error:
                screen.problems.append(str(error))
                _print_log(stage)
    except KeyboardInterrupt:
        print("interrupted; everything is removed", file=sys.stderr)  # noqa: T201 - the terminal
        return 130
    if screen.problems:
        print("\nNot as expected:", file=sys.stderr)  # noqa: T201 - the terminal
        for problem in screen.problems:
            print(f"  - {problem}", file=sys.stderr)  # noqa: T201 - the terminal
        return 1
    screen.step("Everything was as it should be. The namespaces are gone; this host is unchanged.")
    return 0


def _find_obstacle(backend: Backend) -> str:
    if os.geteuid():
        return "it makes network namespaces, which needs root (try: sudo make demo)"
    programs = netns.iptables_programs(backend, IPFamily.V4)
    for program in ("ip", "nft", "conntrack", programs.command):
        if not shutil.which(program):
            return f"program {program!r} is not installed"
    if not _program().exists():
        return f"{_program()} is not there (try: make install)"
    return ""


def _program() -> Path:
    return Path(sysconfig.get_path("scripts"), "kubeproxy-py")


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _set_up(screen: Screen, backend: Backend, family: IPFamily) -> Iterator[Stage]:
    """Build the cluster, start servers and the daemon; remove all of it afterwards."""
    plan = addresses.PLANS[family]
    screen.step("Build a small cluster out of network namespaces, one for each machine and pod.")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab.build(local_pods=3))
        servers = stack.enter_context(Servers())
        for name, pod in ENDPOINTS.items():
            servers.serve(lab.namespace(pod), name=name, tcp=[TARGET_PORT])
        screen.fact(f"built in {time.monotonic() - started:.2f} s:")
        screen.fact(f"  node1    {plan.node:<22} runs kubeproxy-py")
        for name, pod in ENDPOINTS.items():
            where = "node1" if pod.startswith("pod") else "node2"
            screen.fact(f"  {name}    {lab.namespace(pod).address(family):<22} a pod on {where}")
        screen.fact(f"  client   {lab.namespace(CLIENT).address(family):<22} a pod on node1")
        screen.fact(f"  outside  {plan.outside:<22} not in the cluster")

        manifests = lab.directory / "manifests"
        shutil.copytree(_HERE / "manifests", manifests)
        _leave_hint(lab, backend)
        argv = [
            str(_program()),
            "run",
            f"--manifests={manifests}",
            "--hostname-override=node1",
            f"--cluster-cidr={addresses.V4.cluster_cidr},{addresses.V6.cluster_cidr}",
            f"--healthz-bind-address=127.0.0.1:{HEALTH_PORT}",
            # Namespaces of networks do not part /run, where a daemon of the host's may listen.
            "--status-socket=",
            # The connection table's size belongs to the host; a namespace cannot change it.
            "--conntrack-max-per-core=0",
        ]
        screen.step("Start kubeproxy-py on node1. It reads files here; in a cluster, the API.")
        screen.fact(f"$ {shlex.join(['kubeproxy-py', *argv[1:]])}")
        log = lab.directory / "kubeproxy-py.log"
        with log.open("w") as sink:
            # In a session of its own, so that Ctrl-C reaches it only through us, in order.
            daemon = lab.node.popen(
                argv, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        yield Stage(
            screen=screen,
            lab=lab,
            plan=plan,
            backend=backend,
            manifests=manifests,
            daemon=daemon,
            log=log,
        )


def _leave_hint(lab: Lab, backend: Backend) -> None:
    """Tell which backend the node uses, as the kubelet does on a real one."""
    for family in IPFamily:
        restore = netns.iptables_programs(backend, family).restore
        lab.node.run([restore, "--noflush"], input="*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n")


def _show(stage: Stage) -> None:
    _wait_for_rules(stage)
    everybody = list(ENDPOINTS)
    stage.screen.step("Connect 100 times to the Service, from a pod and from outside.")
    _show_shares(stage, stage.client, stage.plan.cluster_ip, SERVICE_PORT, everybody)
    _show_shares(stage, stage.lab.outside, stage.plan.node, NODE_PORT, everybody)
    stage.screen.step("Look at the chain that does it, as the kernel has it.")
    _show_chain(stage, everybody)

    rest = [name for name in everybody if name != MOVING]
    stage.screen.step(f"Make {MOVING} not ready (its file changes) while connections go on.")
    _change(stage, is_ready=False)
    _show_shares(stage, stage.client, stage.plan.cluster_ip, SERVICE_PORT, rest)
    stage.screen.step(f"Make {MOVING} ready again.")
    _change(stage, is_ready=True)
    _show_shares(stage, stage.client, stage.plan.cluster_ip, SERVICE_PORT, everybody)

    stage.screen.step("Stop kubeproxy-py. The rules stay, and so does the Service.")
    _stop(stage)
    _show_shares(stage, stage.lab.outside, stage.plan.node, NODE_PORT, everybody)


def _wait_for_rules(stage: Stage) -> None:
    seconds = stage.wait(
        lambda: (
            traffic.connect(
                stage.client, stage.plan.cluster_ip, SERVICE_PORT, timeout_s=0.2
            ).is_answered
        ),
        "the first connection to the Service's cluster IP",
        _START_LIMIT_S,
    )
    stage.screen.fact(f"first connection answered {seconds:.2f} s after the start")
    stage.wait(lambda: _health(stage) == http.HTTPStatus.OK, "/healthz to say 200", _START_LIMIT_S)
    stage.screen.fact("/healthz says 200")


def _health(stage: Stage) -> int:
    """Return the status of /healthz, 0 if nobody answers."""
    with stage.lab.node.entered():
        connection = http.client.HTTPConnection("127.0.0.1", HEALTH_PORT, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/healthz")
            return connection.getresponse().status
    return 0


def _show_shares(
    stage: Stage, client: Namespace, address: str, port: int, wanted: Sequence[str]
) -> None:
    """Connect again and again; show who answered, and check that it is those *wanted*."""
    outcomes = [traffic.connect(client, address, port) for _ in range(_CONNECTIONS)]
    counts = collections.Counter(_label(outcome) for outcome in outcomes)
    text = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    kind = "node port" if port == NODE_PORT else "cluster IP"
    who = "from outside" if client is stage.lab.outside else "from the client pod"
    stage.screen.fact(f"{who} to {kind} {text}")
    stage.screen.chart(counts, list(ENDPOINTS))
    stage.screen.expect(
        f"all {_CONNECTIONS} answered by {', '.join(wanted)}, and each of them had a share",
        holds=counts.keys() == set(wanted) and min(counts.values()) >= _FEWEST,
    )
    seen = sorted({outcome.client_ip for outcome in outcomes if outcome.is_answered})
    stage.screen.fact(f"the endpoints saw the client as {', '.join(seen)}")


def _label(outcome: Outcome) -> str:
    return outcome.server if outcome.is_answered else f"({outcome.kind})"


def _show_chain(stage: Stage, endpoints: Sequence[str]) -> None:
    save = netns.iptables_programs(stage.backend, stage.plan.family).save
    lines = stage.lab.node.run([save, "-t", "nat"]).stdout.splitlines()
    found = next(
        (
            match[1]
            for line in lines
            if (match := re.search(r'"demo/web:http cluster IP".* -j (KUBE-SVC-\w+)', line))
        ),
        None,
    )
    if found is None:
        raise Failed("nat has no rule for the cluster IP of demo/web:http")
    stage.screen.fact(f"$ {save} -t nat | grep -e '-A {found}'")
    rules = [line for line in lines if line.startswith(f"-A {found} ")]
    for line in rules:
        stage.screen.fact(f"  {line}")
    stage.screen.expect(
        f"it has one rule for each of the {len(endpoints)} endpoints",
        holds=sum("-j KUBE-SEP-" in line for line in rules) == len(endpoints),
    )


def _change(stage: Stage, *, is_ready: bool) -> None:
    """Rewrite the manifest of MOVING under load; show how long its traffic takes to follow."""
    with traffic.Ticker(
        stage.client, stage.plan.cluster_ip, SERVICE_PORT, interval_s=0.001
    ) as ticker:
        ticker.wait_for_ticks(20)
        changed_at = time.monotonic()
        _rewrite(stage, is_ready=is_ready)

        def has_followed(ticks: list[Tick]) -> bool:
            after = [tick for tick in ticks if tick.started_at >= changed_at]
            if is_ready:
                return any(tick.outcome.server == MOVING for tick in after)
            return len(after) >= _QUIET_TICKS and all(
                tick.outcome.server != MOVING for tick in after[-_QUIET_TICKS:]
            )

        try:
            ticker.wait_for(has_followed, timeout_s=_CHANGE_LIMIT_S)
        except AssertionError as error:
            raise Failed(f"traffic to {MOVING} did not follow its manifest: {error}") from error
    moments = [
        (tick.started_at - changed_at) * 1000
        for tick in ticker.since(changed_at)
        if tick.outcome.server == MOVING
    ]
    if is_ready:
        stage.screen.fact(f"first connection to {MOVING} again: {moments[0]:.0f} ms after it")
    elif moments:
        stage.screen.fact(f"last connection to {MOVING}: {moments[-1]:.0f} ms after the change")
    else:
        stage.screen.fact(f"no connection went to {MOVING} after the change")
    stage.screen.expect(
        f"none of the {len(ticker.ticks)} connections made meanwhile failed",
        holds=not ticker.failures,
    )


def _rewrite(stage: Stage, *, is_ready: bool) -> None:
    path = stage.manifests / f"{MOVING}.yaml"
    text = re.sub(
        r'(type: Ready, status: )"\w+"', rf'\1"{is_ready}"', path.read_text(encoding="utf-8")
    )
    # Replaced in one step, so that nobody reads half a file.
    new = stage.lab.directory / path.name
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _stop(stage: Stage) -> None:
    stage.daemon.terminate()
    try:
        status = stage.daemon.wait(timeout=10)
    except subprocess.TimeoutExpired as error:
        raise Failed("kubeproxy-py does not stop within 10 s of SIGTERM") from error
    stage.screen.expect(f"kubeproxy-py stopped with status {status}", holds=status == 0)


def _print_log(stage: Stage) -> None:
    lines = stage.log.read_text(encoding="utf-8", errors="replace").splitlines()
    stage.screen.fact("the last lines of kubeproxy-py's log:")
    for line in lines[-20:]:
        stage.screen.fact(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
