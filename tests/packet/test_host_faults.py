"""A host that fails: programs gone or hanging, no descriptors, a black hole on the way."""

import functools
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kubeproxy_py import api as api_connection
from kubeproxy_py import watch
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily
from tests.support.builders import make_service
from tests.support.duos import addresses, answers, web
from tests.support.netns import iptables_programs
from tests.support.proxy import HEALTH_PORT, running
from tests.support.traffic import wait_until

pytestmark = pytest.mark.packet

DEADLINE_S = 60


@pytest.fixture
def programs(tmp_path, backend):
    """Give a directory with this backend's programs, which the daemon finds first."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for family in IPFamily:
        for name in iptables_programs(backend, family):
            found = shutil.which(name)
            assert found
            (directory / name).symlink_to(Path(found).resolve())
    return directory


@pytest.fixture
def start(start):
    """Let the daemon have short periods."""
    return functools.partial(start, "--iptables-sync-period=1s")


def told_s(what, condition):
    """Wait for *condition*, and print how long that took, for docs/operations.md."""
    began = time.monotonic()
    condition()
    print(f"{what}: {time.monotonic() - began:.1f} s")


def livez(proxy):
    return proxy.get("/livez?verbose", HEALTH_PORT)


def children(proxy):
    """Return the pids of the daemon's children."""
    tasks = Path(f"/proc/{proxy.process.pid}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def test_programs_that_vanish_or_hang_show_cost_nothing_and_are_used_again(
    start, api, clean_lab, servers, programs
):
    client, near, far = clean_lab.local_pods[0], clean_lab.local_pods[1], clean_lab.remote_pods[0]
    api.apply_many(web(1, near))
    proxy = start(PATH=f"{programs}:{os.environ['PATH']}")
    proxy.wait_synced()
    aside = programs.with_name("aside")
    programs.rename(aside)
    api.apply_many(web(1, far))
    proxy.wait(lambda: bool(proxy.events("sync.failed")))
    # A change that waits for two periods is late.
    proxy.wait(lambda: livez(proxy)[0] == 503)

    # All threads turn; it is the change that waits.
    for thread in ("sync-IPv4", "sync-IPv6", "watch-Node", "watch-Service", "watch-EndpointSlice"):
        assert f"[+]{thread} ok" in livez(proxy)[1]
    assert "No such file" in proxy.events("sync.failed")[0]["error"]
    assert "[-]prompt-IPv4 failed" in livez(proxy)[1]
    assert answers(client, 1) == addresses(near)
    aside.rename(programs)
    told_s(
        "programs are back",
        lambda: proxy.wait(lambda: answers(client, 1) == addresses(far), DEADLINE_S),
    )
    proxy.wait(lambda: livez(proxy)[0] == 200)

    # Replaced by one that never ends.
    restores = [path for path in programs.iterdir() if path.name.endswith("restore")]
    targets = {path: path.readlink() for path in restores}
    for path in restores:
        path.unlink()
        path.write_text("#!/bin/sh\nexec sleep 1000\n")
        path.chmod(0o755)
    api.apply_many(web(1, near))
    proxy.wait(lambda: livez(proxy)[0] == 503)
    assert answers(client, 1) == addresses(far)
    for path, target in targets.items():
        path.unlink()
        path.symlink_to(target)
    for pid in children(proxy):
        if "sleep" in Path(f"/proc/{pid}/comm").read_text():
            os.kill(pid, signal.SIGKILL)
    told_s(
        "the program that hung is gone",
        lambda: proxy.wait(lambda: answers(client, 1) == addresses(near), DEADLINE_S),
    )
    proxy.wait(lambda: livez(proxy)[0] == 200)


def test_without_descriptors_it_waits_and_goes_on(start, api, clean_lab, servers):
    client, near, far = clean_lab.local_pods[0], clean_lab.local_pods[1], clean_lab.remote_pods[0]
    api.apply_many(web(1, near))
    proxy = start()
    proxy.wait_synced()
    pid = proxy.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # What is open stays open; nothing more can be.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, before[1]))
    api.apply_many(web(1, far))
    proxy.wait(lambda: bool(proxy.events("sync.failed")))
    assert "Too many open files" in proxy.events("sync.failed")[0]["error"]
    assert answers(client, 1) == addresses(near)
    api.cut_watches()
    proxy.wait(lambda: bool(proxy.events("watch.failed")))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    told_s(
        "descriptors are back",
        lambda: proxy.wait(lambda: answers(client, 1) == addresses(far), DEADLINE_S),
    )
    api.apply_many(web(2, near))
    proxy.wait(lambda: answers(client, 2) == addresses(near), DEADLINE_S)


class Shelf:
    """A sink that remembers names."""

    def __init__(self):
        self.names = set()

    def upsert(self, _kind, obj):
        self.names.add(obj.metadata.name)

    def delete(self, _kind, _namespace, name):
        self.names.discard(name)

    def listed(self, _kind):
        pass


def test_a_black_hole_on_the_way_to_the_api_server_is_noticed_and_left(clean_lab, api):
    """Connections stay open, and nothing comes: no FIN, no reset, no ICMP."""
    node, shelf, stop = clean_lab.node, Shelf(), threading.Event()
    metrics = Metrics(CollectorRegistry())
    connection = api_connection.connect(master=api.url, user_agent="test", metrics=metrics)
    heard = []
    watcher = watch.Watcher(
        "Service",
        connection,
        shelf,
        lambda problem: None,
        metrics,
        stop=stop,
        silence_s=1.0,
        pause_s=0.1,
        heard=lambda: heard.append(time.monotonic()),
    )

    def run():
        with node.entered():
            watcher.run()

    api.apply(make_service("stays", cluster_ip="172.30.0.1"))
    api.apply(make_service("goes", cluster_ip="172.30.0.2"))
    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: shelf.names == {"stays", "goes"}, timeout_s=DEADLINE_S)
        hole = f"""
            table inet black_hole {{
                chain input {{
                    type filter hook input priority -300; policy accept;
                    tcp dport {api.port} drop
                    tcp sport {api.port} drop
                }}
            }}
        """
        node.run(["nft", "-f", "-"], input=hole)
        last = len(heard)
        api.delete("Service", "default", "goes")
        api.apply(make_service("comes", cluster_ip="172.30.0.3"))
        wait_until(
            lambda: metrics.watch_reconnects.labels("Service", "silent")._value.get() > 0,
            timeout_s=DEADLINE_S,
        )
        assert len(heard) == last
        assert shelf.names == {"stays", "goes"}
        node.run(["nft", "delete", "table", "inet", "black_hole"])
        told_s(
            "the way is free",
            lambda: wait_until(lambda: shelf.names == {"stays", "comes"}, timeout_s=DEADLINE_S),
        )
    finally:
        stop.set()
        connection.close()
        thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_a_log_that_nobody_reads_any_more_costs_nothing_but_the_log(
    clean_lab, backend, api, tmp_path, servers
):
    client, near, far = clean_lab.local_pods[0], clean_lab.local_pods[1], clean_lab.remote_pods[0]
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
    api.apply_many(web(1, near))
    with running(clean_lab, backend, fifo, f"--kubeconfig={kubeconfig}", "--v=0") as proxy:
        wait_until(lambda: answers(client, 1) == addresses(near), timeout_s=DEADLINE_S)
        # As when journald is killed: whoever writes is told EPIPE.
        os.close(reader)
        for pod in (far, near, far):
            api.apply_many(web(1, pod))
            wait_until(lambda pod=pod: answers(client, 1) == addresses(pod), timeout_s=DEADLINE_S)

        assert proxy.get("/readyz", HEALTH_PORT)[0] == 200
        assert proxy.end(signal.SIGTERM) == 0
