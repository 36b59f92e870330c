"""
How soon what others do to our rules is put right: one fault after the other, on a running daemon.

From the end of the program that did it until the daemon says that all is as it should be, by the time
in its log: asking its pages would cost it time.
"""

import datetime as dt
import time
from collections.abc import Callable, Iterator
from typing import Final

from benchmarks import stage
from benchmarks.figures import Run, Samples, wait_idle
from kubeproxy_py import rules
from kubeproxy_py.model import IPFamily
from tests.support.netns import iptables_programs

_REPEATS: Final = {"nft": 20, "legacy": 10}
# On legacy it is always "something has changed": one fault after the other is a fight, which is left
# alone for longer and longer, unless there is peace for so long between them (kubeproxy_py.drift).
_PEACE_S: Final = 6.0
# With large tables, one takes seconds, and so does reading the chains to choose from.
_FLUSHES: Final = 3
_LIMIT_S: Final = 60.0

Fault = Callable[[str], list[str]]


def drift(run: Run) -> Samples:
    """Time the repair of every kind of fault; series ``drift_KIND``."""
    programs = iptables_programs(run.backend, IPFamily.V4)
    nat = [programs.command, "-w", "-t", "nat"]
    # Each to a chain of its own: who does the same again and again is left waiting.
    faults: dict[str, Fault] = {
        "rule": lambda chain: [*nat, "-D", chain, "1"],
        "foreign": lambda chain: [*nat, "-I", chain, "-j", "RETURN"],
        "chain": lambda chain: [*nat, "-F", chain],
        "rename": lambda chain: [*nat, "-E", chain, f"STRAY-{chain[-16:]}"],
        "jump": lambda _chain: [*nat, "-D", "OUTPUT", "1"],
        "flush": lambda _chain: [*nat, "-F"],
    }
    wait_idle(run.proxy)
    chains = _service_chains(run)
    found: Samples = {}
    for kind, fault in faults.items():
        times = _FLUSHES if kind in {"jump", "flush"} else _REPEATS[run.backend]
        found[f"drift_{kind}"] = [_repair_seconds(run, fault(next(chains))) for _ in range(times)]
    found["drift_flush_dns"] = [
        _seconds_without_dns(run, faults["flush"]("")) for _ in range(_FLUSHES)
    ]
    return found


def _service_chains(run: Run) -> Iterator[str]:
    """Yield chains of Services, each once."""
    save = iptables_programs(run.backend, IPFamily.V4).save
    lines = run.stage.lab.node.run([save, "-t", rules.NAT]).stdout.splitlines()
    names = (line[1:].partition(" ")[0] for line in lines if line.startswith(":KUBE-SVC-"))
    return iter([name for name in names if len(name) == len("KUBE-SVC-") + 16])


def _seconds_without_dns(run: Run, fault: list[str]) -> float:
    time.sleep(_PEACE_S)
    run.stage.lab.node.run(fault)
    done = time.perf_counter()
    answered = run.stage.client.wait(stage.DNS_IP, bool, port=stage.DNS_PORT)
    wait_idle(run.proxy)
    return answered - done


def _repair_seconds(run: Run, fault: list[str]) -> float:
    before = len(run.proxy.events("drift.repaired"))
    if run.backend == "legacy":
        time.sleep(_PEACE_S)
    run.stage.lab.node.run(fault)
    done = time.time()
    run.proxy.wait(lambda: len(run.proxy.events("drift.repaired")) > before, _LIMIT_S)
    wait_idle(run.proxy)
    told = run.proxy.events("drift.repaired")[-1]["timestamp"]
    # It may have been quicker than the program that did it took to end.
    return max(0.0, dt.datetime.fromisoformat(told).timestamp() - done)
