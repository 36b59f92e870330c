"""
The figures: each a function that measures one daemon on one stage and returns raw samples.

Samples are floats by series name, in the unit that ``series.SERIES`` gives. Nothing here judges.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import stage as stages
from benchmarks import tracking
from benchmarks.clients import Churn
from benchmarks.results import Layout
from benchmarks.stage import Stage
from kubeproxy_py import host
from kubeproxy_py.model import IPFamily
from tests.support import proxy as proxies
from tests.support.background import Background, Rest
from tests.support.netns import Backend, Namespace, iptables_programs
from tests.support.proxy import Proxy
from tests.support.traffic import wait_until

Samples = dict[str, list[float]]


class Effort(NamedTuple):
    """How much is measured, so that a whole run has an end."""

    changes: int  # samples of each kind of change
    creations: int
    budget_s: float  # fewer samples when this is over: with large tables, a restore takes a second
    churn_s: float


_SMALL: Final = Effort(changes=40, creations=15, budget_s=5.0, churn_s=4.0)
# A hundred changes make a 99th percentile more than the largest value of a handful.
_LARGE: Final = Effort(changes=100, creations=20, budget_s=20.0, churn_s=8.0)

_ENDURANCE_S: Final = 600.0
# With full looks of half a second in it, as many as there are in any other minute.
_IDLENESS_S: Final = 60.0
_MIN_SAMPLES: Final = 5  # even when the budget is spent
# Between changes, at least: a change should not meet what is left to do for the last.
_THINK_S: Final = 0.02
_CONNECTS: Final = 100  # of one target before the next has its turn
_ROUNDS: Final = 20  # spread over seconds, so that a disturbance does not hit one target only
_RATE_CONNECTS: Final = 10_000  # in a row; few enough for conntrack's table of 65,536
_BARES: Final = 10
_LOOKS: Final = 5
_START_LIMIT_S: Final = 300.0
_HEALTH_POLL_S: Final = 0.05  # the metrics page costs the daemon milliseconds each time
_IDLE_S: Final = 0.5  # without a tick (10 ms) of CPU time for so long, a daemon is idle
_SETTLED_S: Final = 1.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_MIB: Final = 1024.0  # kB, as /proc/PID/status counts
_PENDING: Final = "kubeproxy_sync_proxy_rules_endpoint_changes_pending"
_SYNCED: Final = "kubeproxy_sync_proxy_rules_last_timestamp_seconds"
_EMPTY: Final = (
    "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\nCOMMIT\n"
    "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One daemon on one stage: a cell of the table."""

    stage: Stage
    backend: Backend
    layout: Layout
    proxy: Proxy

    @property
    def effort(self) -> Effort:
        """Goals for changes are set for more than a thousand Services."""
        return _SMALL if self.stage.size <= 1_000 else _LARGE


@contextlib.contextmanager
def daemon(
    stage: Stage, backend: Backend, layout: Layout, *arguments: str
) -> Iterator[tuple[Run, float]]:
    """Start a daemon; give it, and when it was started (time.perf_counter())."""
    log = stage.lab.directory / "daemon.log"
    log.unlink(missing_ok=True)
    started = time.perf_counter()
    with proxies.running(
        stage.lab,
        backend,
        log,
        f"--kubeconfig={stage.kubeconfig}",
        f"--dispatch={layout}",
        "--v=0",
        *arguments,
    ) as proxy:
        yield Run(stage, backend, layout, proxy), started


# From nothing ------------------------------------------------------------------------------------


def initial_sync(run: Run, started: float) -> Samples:
    """Time from the start of the process until DNS, and until the last Service answers."""
    waiting = [
        (stages.DNS_IP, stages.DNS_PORT),
        *((ip, stages.SERVICE_PORT) for ip in run.stage.last),
    ]
    answered: list[float] = []

    def is_done() -> bool:
        if run.stage.client.ask(*waiting[0], patience_s=0.02):
            waiting.pop(0)
            answered.append(time.perf_counter())
        return not waiting

    # Not Client.wait: this notices a daemon that ends, and shows its log.
    run.proxy.wait(is_done, _START_LIMIT_S)
    run.proxy.wait_synced(_START_LIMIT_S)
    return {"sync_dns": [answered[0] - started], "sync": [answered[-1] - started]}


def bare_restores(run: Run) -> Samples:
    """Time what iptables' own programs take: all rules at once (legacy), then one chain of one rule.

    Legacy's are restored in another namespace, so that the daemon sees nothing of it. nft takes time
    in proportion to the square of one input: all rules at once would be minutes, so its small
    restore is done where the rules are.
    """
    lab, programs = run.stage.lab, iptables_programs(run.backend, IPFamily.V4)
    small = lab.directory / "small.rules"
    # With a jump, because that is what makes nft check all of the table again.
    small.write_text("*nat\n:KPP-BENCH - [0:0]\n-A KPP-BENCH -j RETURN\nCOMMIT\n")
    argv = [programs.restore, "-w", "5", "--noflush"]
    if run.backend == "nft":
        found = {"bare_small": [_restore_seconds(lab.node, argv, small) for _ in range(_BARES)]}
        lab.node.run(argv, input="*nat\n:KPP-BENCH - [0:0]\n-X KPP-BENCH\nCOMMIT\n")
        wait_idle(run.proxy)
        return found
    text = lab.directory / "all.rules"
    text.write_text(lab.node.run([programs.save]).stdout)
    # Some rules name counters, which a namespace has to have first.
    with lab.outside.entered():
        host.ensure_counters()
    try:
        return {
            "bare_all": [_restore_seconds(lab.outside, [programs.restore], text)],
            "bare_small": [_restore_seconds(lab.outside, argv, small) for _ in range(_BARES)],
        }
    finally:
        lab.outside.run([programs.restore], input=_EMPTY)


def _restore_seconds(ns: Namespace, argv: list[str], rules: Path) -> float:
    with rules.open() as stream:
        started = time.perf_counter()
        status = ns.popen(argv, stdin=stream, stdout=subprocess.DEVNULL).wait()
        spent = time.perf_counter() - started
    if status:
        raise RuntimeError(f"cannot restore {rules.name} in {ns.name}: status {status}")
    return spent


def memory(run: Run) -> Samples:
    """Resident memory when idle, and the most there ever was."""
    wait_idle(run.proxy)
    return {
        "memory": [_status_mib(run.proxy, "VmRSS")],
        "memory_peak": [_status_mib(run.proxy, "VmHWM")],
    }


# Connections -------------------------------------------------------------------------------------


def connect(run: Run) -> Samples:
    """Time connects to Services, past them, and over as many hops without a rule."""
    found: Samples = {}
    for _ in range(_ROUNDS):
        for name, (client, ip, port) in run.stage.connect_targets().items():
            spent = client.connect_seconds(ip, port, _CONNECTS)
            found.setdefault(f"connect_{name}", []).extend(spent)
    return found


def rate(run: Run) -> Samples:
    """Count the connections per second that one client opens and closes, one after the other."""
    found: Samples = {}
    for name in ("bare", "last"):
        client, ip, port = run.stage.connect_targets()[name]
        started = time.perf_counter()
        client.connect_seconds(ip, port, _RATE_CONNECTS)
        found[f"rate_{name}"] = [_RATE_CONNECTS / (time.perf_counter() - started)]
    return found


# Changes -----------------------------------------------------------------------------------------


def change(run: Run) -> Samples:
    """Time from one endpoint's change at the API server until connections go there.

    Also counts the daemon's own CPU time for each, without the programs it runs.
    """
    wait_idle(run.proxy)
    spent: list[float] = []
    used: list[float] = []
    for _ in _within_budget(run.effort, run.effort.changes, spent):
        before = _own_cpu_seconds(run.proxy)
        spent += _change_seconds(run, 1)
        used.append(_own_cpu_seconds(run.proxy) - before)
    return {"change": spent, "change_cpu": used}


def idle(run: Run) -> Samples:
    """Let nothing happen, and count the CPU time that goes by it: looks at the kernel, timers.

    The layout of rules has no part in it, so it is measured with one only.
    """
    if run.layout != "tree":
        return {}
    wait_idle(run.proxy)
    before, started = _own_cpu_seconds(run.proxy), time.perf_counter()
    # Not to wait for something, but to let time pass: that is what is measured.
    threading.Event().wait(_IDLENESS_S)
    used, lasted = _own_cpu_seconds(run.proxy) - before, time.perf_counter() - started
    return {"idle_cpu": [100 * used / lasted]}


def create(run: Run) -> Samples:
    """Time from the creation of a Service, and then its slice, until it can be connected to."""
    spent: list[float] = []
    with run.stage.api() as api:
        for _ in _within_budget(run.effort, run.effort.creations, spent):
            service, endpoint_slice = stages.new_service(len(spent) + 1)
            started = time.perf_counter()
            api.create(service)
            api.create(endpoint_slice)
            answered = run.stage.client.wait(service["spec"]["clusterIP"], bool)
            spent.append(answered - started)
            _think(spent[-1])
            api.delete(endpoint_slice)
            api.delete(service)
            _think(spent[-1])
    return {"create": spent}


def busy(run: Run) -> Samples:
    """Time single changes while 20 other endpoints change every second."""
    with _churn(run, 20):
        return {"busy": _change_seconds(run, run.effort.changes)}


def churn(run: Run) -> Samples:
    """Let 100 endpoints change every second: what that costs, and what single changes feel of it."""
    wait_idle(run.proxy)
    before, restores = _cpu_seconds(run.proxy), _restores(run.proxy)
    started = time.perf_counter()
    spent: list[float] = []
    with _churn(run, 100) as churning:
        while time.perf_counter() - started < run.effort.churn_s or len(spent) < _MIN_SAMPLES:
            spent += _change_seconds(run, 1)
    lasted = time.perf_counter() - started
    after = _cpu_seconds(run.proxy)
    found = {
        "churn": spent,
        "churn_rate": [churning.steps / lasted],
        "churn_cpu": [100 * (after.own - before.own) / lasted],
        "churn_cpu_programs": [100 * (after.programs - before.programs) / lasted],
        "churn_restores": [(_restores(run.proxy) - restores) / lasted],
    }
    wait_idle(run.proxy)
    return found | {"memory_churned": [_status_mib(run.proxy, "VmRSS")]}


def endurance(run: Run) -> Samples:
    """Let 100 endpoints change every second for ten minutes: what is in memory then."""
    wait_idle(run.proxy)
    with _churn(run, 100):
        # Not to wait for something, but to let time pass: that is what is measured.
        threading.Event().wait(_ENDURANCE_S)
    wait_idle(run.proxy)
    return {"memory_endured": [_status_mib(run.proxy, "VmRSS")]}


def conntrack(run: Run) -> Samples:
    """Time the cleaning of a large connection table, and changes meanwhile.

    The layout of rules has no part in it, so it is measured with one only.
    """
    if run.layout != "tree":
        return {}
    wait_idle(run.proxy)
    found = tracking.measure(
        run.stage,
        run.proxy,
        lambda: _status_mib(run.proxy, "VmHWM"),
        lambda: _change_seconds(run, run.effort.changes // 2),
    )
    wait_idle(run.proxy)
    return found


def traffic(run: Run) -> Samples:
    """Let traffic be counted: what a scrape costs, and what a change feels of it."""
    run.proxy.end(signal.SIGTERM)
    state = run.stage.lab.directory / "traffic.json"
    with daemon(
        run.stage,
        run.backend,
        run.layout,
        "--traffic-metrics=service",
        f"--traffic-metrics-state={state}",
    ) as (again, started):
        _wait_healthy(again.proxy, started)
        # The first look learns names from all rules.
        again.proxy.get("/metrics")
        wait_idle(again.proxy)
        found = {"look_first": [_looks(again.proxy).seconds], "look": [], "look_cpu": []}
        for _ in range(_LOOKS):
            before, cpu = _looks(again.proxy), _cpu_seconds(again.proxy)
            # Looks take at most a tenth of the time.
            time.sleep(max(1.0, 10 * (before.seconds / before.number)))
            again.proxy.get("/metrics")
            wait_idle(again.proxy)
            used = _cpu_seconds(again.proxy).own - cpu.own
            after = _looks(again.proxy)
            number = max(1.0, after.number - before.number)
            found["look"].append((after.seconds - before.seconds) / number)
            found["look_cpu"].append(used / number)
        with _scrapes(again.proxy):
            found["look_change"] = _change_seconds(again, again.effort.changes)
        wait_idle(again.proxy)
        return found | {"look_memory": [_status_mib(again.proxy, "VmRSS")]}


class _Looks(NamedTuple):
    number: float
    seconds: float


def _looks(proxy: Proxy) -> _Looks:
    name = "kubeproxy_traffic_look_duration_seconds"
    family = IPFamily.V4.value
    return _Looks(
        proxy.metric(f"{name}_count", ip_family=family),
        proxy.metric(f"{name}_sum", ip_family=family),
    )


def _scrapes(proxy: Proxy) -> Background:
    """Scrape every second, so that as many looks are made as the daemon allows."""

    def scrape(rest: Rest) -> None:
        while not rest(1.0):
            proxy.get("/metrics")

    return Background(scrape, name="scrapes")


def restart(run: Run) -> Samples:
    """Stop the daemon, start another on the same rules: time until healthy, and what it writes."""
    _wait_settled(run.proxy)
    run.proxy.end(signal.SIGTERM)
    with daemon(run.stage, run.backend, run.layout) as (again, started):
        _wait_healthy(again.proxy, started)
        seconds = time.perf_counter() - started
        return {"restart": [seconds], "restart_restores": [_restores(again.proxy)]}


def _wait_healthy(proxy: Proxy, started: float) -> None:
    while not _is_healthy(proxy):
        if time.perf_counter() - started > _START_LIMIT_S or proxy.process.poll():
            raise RuntimeError(f"cannot see a healthy daemon within {_START_LIMIT_S} s")
        time.sleep(_HEALTH_POLL_S)


def _change_seconds(run: Run, n: int) -> list[float]:
    spent: list[float] = []
    ip = stages.cluster_ip(run.stage.probe)
    with run.stage.api() as api:
        for _ in _within_budget(run.effort, n, spent):
            started = time.perf_counter()
            address = run.stage.move(api, run.stage.probe)
            # The other four endpoints answer four in five attempts, hence the attempts follow
            # each other without a pause worth mentioning: it takes five of them on average.
            seen = run.stage.client.wait(ip, address.__eq__)
            spent.append(seen - started)
            _think(spent[-1])
    return spent


def _think(last_s: float) -> None:
    """Let the daemon's own pause pass, which is as long as its last sync."""
    time.sleep(max(_THINK_S, last_s))


def _within_budget(effort: Effort, n: int, spent: list[float]) -> Iterator[int]:
    deadline = time.monotonic() + effort.budget_s
    for number in range(n):
        if len(spent) >= _MIN_SAMPLES and time.monotonic() > deadline:
            return
        yield number


@contextlib.contextmanager
def _churn(run: Run, rate: float) -> Iterator[Churn]:
    numbers = run.stage.churning()
    with (
        run.stage.api() as api,
        Churn(rate, lambda: _ignore(run.stage.move(api, next(numbers)))) as churning,
    ):
        yield churning


def _ignore(_address: str) -> None:
    """Drop an answer that nobody needs."""


# The process -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Cpu:
    own: float  # seconds, user and system, of the daemon's threads
    programs: float  # of the programs it has run and waited for


def wait_idle(proxy: Proxy) -> None:
    """Wait until the daemon has used no CPU time for half a second."""
    seen, since = _cpu_seconds(proxy), time.monotonic()

    def is_idle() -> bool:
        nonlocal seen, since
        now = _cpu_seconds(proxy)
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > _IDLE_S

    wait_until(is_idle, timeout_s=_START_LIMIT_S, what="an idle daemon")


def _cpu_seconds(proxy: Proxy) -> _Cpu:
    stat = Path("/proc", str(proxy.process.pid), "stat").read_text()
    # Behind the name, which may contain anything: utime, stime, cutime, cstime are fields 14 to 17.
    fields = [int(field) for field in stat.rpartition(")")[2].split()[11:15]]
    return _Cpu((fields[0] + fields[1]) / _TICKS_PER_S, (fields[2] + fields[3]) / _TICKS_PER_S)


def _wait_settled(proxy: Proxy) -> None:
    """Wait until the daemon has had nothing to write, and has run no program, for a second.

    One that waits for a program is idle, too: with legacy's large tables, for as long.
    """
    tasks, since = Path("/proc", str(proxy.process.pid), "task"), time.monotonic()

    def is_settled() -> bool:
        nonlocal since
        if proxy.metric(_PENDING) or any(each.read_text() for each in tasks.glob("*/children")):
            since = time.monotonic()
        return time.monotonic() - since > _SETTLED_S

    wait_until(is_settled, timeout_s=_START_LIMIT_S, what="a daemon that has written all")


def _own_cpu_seconds(proxy: Proxy) -> float:
    """Return what /proc/PID/stat counts in ticks of 10 ms, to the nanosecond (clock_gettime(2))."""
    # Linux makes the number of another process's CPU clock so (include/linux/posix-timers.h,
    # MAKE_PROCESS_CPUCLOCK and CPUCLOCK_SCHED); glibc's clock_getcpuclockid(3) is not in Python.
    return time.clock_gettime(~proxy.process.pid << 3 | 2)


def _status_mib(proxy: Proxy, field: str) -> float:
    status = Path("/proc", str(proxy.process.pid), "status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / _MIB


def _restores(proxy: Proxy) -> float:
    return proxy.metric("kubeproxy_iptables_restores_total")


def _is_healthy(proxy: Proxy) -> bool:
    """Tell whether /healthz says so and every family has been synced."""
    try:
        status, _body = proxy.get("/healthz", proxies.HEALTH_PORT)
        return status == 200 and all(
            proxy.metric(_SYNCED, ip_family=family.value) > 0 for family in IPFamily
        )
    except OSError:  # it does not listen yet
        return False


#: Measured on a running daemon, in this order; "sync" comes before them. The last two start their own.
FIGURES: Final[dict[str, Callable[[Run], Samples]]] = {
    "bare": bare_restores,
    "memory": memory,
    "connect": connect,
    "rate": rate,
    "idle": idle,
    "change": change,
    "create": create,
    "busy": busy,
    "churn": churn,
    "endurance": endurance,
    "conntrack": conntrack,
    "traffic": traffic,
    "restart": restart,
}
