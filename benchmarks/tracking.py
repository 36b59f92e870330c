"""
The figure of connection tracking: what cleaning a large table costs, and whether a sync feels it.

As many entries as the kernel takes, half of them TCP, which only the kernel should look at, and half
UDP to one Service, of which none is stale: the longest way, because nothing becomes less by it.
"""

import itertools
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks import stage as stages
from benchmarks.clients import Churn, Json
from kubeproxy_py.model import IPFamily
from tests.support import addresses, builders, tracked
from tests.support.netns import Namespace
from tests.support.proxy import Proxy
from tests.support.traffic import wait_until

_GOAL: Final = 1_000_000
# Of the kernel's limit, which cannot be raised in a namespace; the rest is for the connections that
# measure meanwhile, and what they leave behind.
_SHARE: Final = 0.8
# Longer than any run lasts.
_TIMEOUT_S: Final = 86_400
_IP: Final = "172.30.255.53"
_ENDPOINT: Final = "10.1.252.1"
_DURATION: Final = "kubeproxy_conntrack_reconciler_sync_duration_seconds"
_V4: Final = {"ip_family": "IPv4"}
_LIMIT_S: Final = 60.0


def fill(ns: Namespace) -> int:
    """Fill the table of *ns*; return how many entries were put there."""
    count = min(_GOAL, int(_SHARE * int(ns.read_sysctl("net/netfilter/nf_conntrack_max"))))
    vip, endpoint = tracked.packed(_IP, 53), tracked.packed(_ENDPOINT, 53)
    protocols = itertools.cycle((socket.IPPROTO_TCP, socket.IPPROTO_UDP))
    flows = (
        tracked.Flow(client, vip, endpoint, protocol)
        for client, protocol in zip(
            itertools.islice(tracked.clients(addresses.V4.outside), count), protocols, strict=False
        )
    )
    with ns.entered():
        tracked.insert(IPFamily.V4, flows, timeout_s=_TIMEOUT_S)
    return count


def empty(ns: Namespace) -> None:
    """Remove all entries."""
    ns.run(["conntrack", "-F"])


def service() -> tuple[Json, Json]:
    """Return the UDP Service that the entries lead to, and its slice."""
    ports = [builders.make_port(53, protocol="UDP")]
    return (
        builders.make_service("tracked", cluster_ip=_IP, ports=ports),
        builders.make_slice("tracked", ports=ports, endpoints=[_ENDPOINT]),
    )


def another_endpoint(endpoint_slice: Json, number: int) -> Json:
    """Return the slice with one endpoint more, which differs with *number*: none becomes stale."""
    more = builders.make_endpoint(f"10.1.252.{2 + number % 200}")
    return endpoint_slice | {"endpoints": [*endpoint_slice["endpoints"][:1], more]}


def cleanings(proxy: Proxy) -> tuple[float, float]:
    """Return how many times the daemon has looked at the IPv4 table, and how many seconds it took."""
    return proxy.metric(f"{_DURATION}_count", **_V4), proxy.metric(f"{_DURATION}_sum", **_V4)


def measure(
    stage: stages.Stage,
    proxy: Proxy,
    peak_mib: Callable[[], float],
    changes: Callable[[], list[float]],
) -> dict[str, list[float]]:
    """Time single cleanings of a full table, and *changes* while one follows the other."""
    node = stage.lab.node
    of_service, of_slice = service()
    numbers = itertools.count()
    with stage.api() as api:
        before, _ = cleanings(proxy)
        api.create(of_service)
        api.create(of_slice)
        wait_until(
            lambda: cleanings(proxy)[0] > before, timeout_s=_LIMIT_S, what="a look at the table"
        )
        try:
            count = fill(node)
            # From here on VmHWM counts anew (proc(5)): the first sync had its own peak.
            Path("/proc", str(proxy.process.pid), "clear_refs").write_text("5")
            memory = peak_mib()

            def ask_for_one() -> None:
                api.replace(another_endpoint(of_slice, next(numbers)))

            looks, seconds = cleanings(proxy)
            ask_for_one()
            wait_until(
                lambda: cleanings(proxy)[0] > looks, timeout_s=_LIMIT_S, what="a cleaning's end"
            )
            looks_after, seconds_after = cleanings(proxy)
            alone = (seconds_after - seconds) / (looks_after - looks)
            started = time.perf_counter()
            # As fast as they are carried out, so that there is always one under way.
            rate = 1 / max(alone, 0.02)
            with Churn(rate, ask_for_one):
                spent = changes()
            lasted = time.perf_counter() - started
            _, seconds_busy = cleanings(proxy)
            # The same with nothing to clean: what the changes that ask for it cost by themselves.
            empty(node)
            with Churn(rate, ask_for_one):
                spent_empty = changes()
            return {
                "conntrack_entries": [float(count)],
                "conntrack_clean": [alone],
                "conntrack_memory": [peak_mib() - memory],
                "conntrack_change": spent,
                "conntrack_change_empty": spent_empty,
                "conntrack_busy": [100 * (seconds_busy - seconds_after) / lasted],
            }
        finally:
            empty(node)
            api.delete(of_slice)
            api.delete(of_service)
