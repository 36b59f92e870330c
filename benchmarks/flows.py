"""
The figures of bytes counted: CPU for each living connection at a look, and for each that ends.

In this process, because the daemon's own time cannot be told from that of its other work. Entries are
made up; the rules have no part in it, so it is measured once.
"""

import itertools
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from benchmarks.figures import Run, Samples
from kubeproxy_py import sysctls
from kubeproxy_py.flow_meter import FlowMeter
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServicePort, ServicePortName
from tests.support import addresses, tracked
from tests.support.netns import Namespace

_COUNT: Final = 50_000
# As many ends as find room in the socket however busy the machine is.
_ENDING: Final = 2_000
_LOOKS: Final = 5
# Longer than any run lasts.
_TIMEOUT_S: Final = 86_400
_IP: Final = "172.30.255.54"
_ENDPOINT: Final = "10.1.252.1"


def flows(run: Run) -> Samples:
    """Count made-up connections; series ``flows_*``, in seconds of CPU and MiB."""
    if (run.layout, run.backend) != ("tree", "nft"):
        return {}
    node = run.stage.lab.node
    name = ServicePortName("default", "flows", "", "udp")
    port = ServicePort(name=name, cluster_ip=_IP, port=53)
    metrics = Metrics(CollectorRegistry())
    meter = FlowMeter(
        lambda family: [port] if family is IPFamily.V4 else [],
        lambda _family: [],
        families=[IPFamily.V4],
        metrics=metrics,
    )
    with node.entered():
        if not sysctls.ensure_conntrack_accounting():
            raise RuntimeError("cannot switch nf_conntrack_acct on")
        meter.start()
    try:
        _empty(node)
        nothing = min(_cpu_seconds(meter.look) for _ in range(_LOOKS))
        _insert(node, _COUNT, is_rewritten=False)
        others = [(_cpu_seconds(meter.look) - nothing) / _COUNT for _ in range(_LOOKS)]
        _empty(node)
        before = _resident_mib()
        _insert(node, _COUNT, is_rewritten=True)
        living = [(_cpu_seconds(meter.look) - nothing) / _COUNT for _ in range(_LOOKS)]
        memory = _resident_mib() - before
        _empty(node)

        def end_all() -> None:
            _empty(node)
            # Takes in all that has ended before it looks.
            meter.look()

        end_all()
        nothing = min(_cpu_seconds(end_all) for _ in range(_LOOKS))
        ended = []
        for _ in range(_LOOKS):
            _insert(node, _ENDING, is_rewritten=True)
            ended.append((_cpu_seconds(end_all) - nothing) / _ENDING)
    finally:
        meter.stop()
        _empty(node)
        node.write_sysctls({"net/netfilter/nf_conntrack_acct": "0"})
    return {
        "flows_living": living,
        "flows_others": others,
        "flows_ended": ended,
        "flows_memory": [memory],
    }


def _insert(node: Namespace, count: int, *, is_rewritten: bool) -> None:
    vip, endpoint = tracked.packed(_IP, 53), tracked.packed(_ENDPOINT, 53)
    clients = itertools.islice(tracked.clients(addresses.V4.outside), count)
    flows = (tracked.Flow(client, vip, endpoint, is_rewritten=is_rewritten) for client in clients)
    with node.entered():
        tracked.insert(IPFamily.V4, flows, timeout_s=_TIMEOUT_S)


def _empty(node: Namespace) -> None:
    node.run(["conntrack", "-F"])


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
