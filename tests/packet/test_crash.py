"""Killed at any moment, again and again, while everything changes: nobody notices."""

import contextlib
import random
import sys
import threading

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.api_server import ApiServer
from tests.support.builders import make_node
from tests.support.proxy import own_rules, running
from tests.support.traffic import Ticker, wait_until
from tests.support.webs import node_ips, service_ip, web

pytestmark = pytest.mark.packet

DEADLINE_S = 90
# Services that come, change and go; number 1 is never touched.
STORMY = range(2, 42)


@pytest.fixture
def api(clean_lab):
    with clean_lab.node.entered():
        server = ApiServer()
    with server:
        server.apply(make_node("node1", ips=node_ips()))
        yield server


class Storm:
    """Changes Services without a pause, in a thread, for as long as the ``with`` block lasts."""

    def __init__(self, api, pods, seed):
        self._api = api
        self._pods = pods
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="storm", daemon=True)
        self.changes = 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self):
        while not self._stop.wait(0.005):
            number = self._random.choice(STORMY)
            items = web(number, *self._random.sample(self._pods, self._random.randint(0, 3)))
            if self._random.random() < 0.3:
                for item in items:
                    with contextlib.suppress(KeyError):
                        self._api.delete(
                            item["kind"], item["metadata"]["namespace"], item["metadata"]["name"]
                        )
            else:
                self._api.apply_many(items)
            self.changes += 1


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_leaves_connections_alone_and_ends_up_right(
    clean_lab, servers, backend, api, tmp_path, kills
):
    node, client, far = clean_lab.node, clean_lab.local_pods[0], clean_lab.remote_pods[0]
    kubeconfig = f"--kubeconfig={api.kubeconfig(tmp_path / 'kubeconfig')}"
    flags = (kubeconfig, f"--state-file={tmp_path / 'state'}")
    api.apply_many(web(1, far))
    api.apply_many([item for number in STORMY for item in web(number, *clean_lab.pods)])
    with running(clean_lab, backend, tmp_path / "first", *flags) as first:
        first.wait_synced(DEADLINE_S)
        moments = random.Random(kills)
        tickers = [Ticker(client, service_ip(family, 1), 80) for family in IPFamily]
        with Storm(api, clean_lab.pods, seed=kills) as storm, tickers[0], tickers[1]:
            for kill in range(kills):
                with running(clean_lab, backend, tmp_path / f"log-{kill}", *flags) as proxy:
                    first.process.kill()
                    # From before it has read anything until it is in the middle of writing.
                    threading.Event().wait(moments.uniform(0.2, 2.0))
                    assert proxy.process.poll() is None, proxy.log.read_text()[-2000:]
                    # Killed by the end of the block.
            last = running(clean_lab, backend, tmp_path / "last", *flags)
            with last as proxy:
                proxy.wait_synced(DEADLINE_S)
                for ticker in tickers:
                    ticker.wait_for_ticks(20)
                storm.__exit__()
                argv = [
                    *(sys.executable, "-m", "kubeproxy_py", "plan", kubeconfig),
                    *("--hostname-override=node1", f"--iptables-backend={backend}"),
                    next(arg for arg in proxy.process.args if arg.startswith("--cluster-cidr")),
                ]
                # What a fresh list says is what the kernel has: nothing would change.
                wait_until(
                    lambda: node.run(argv, check=False).returncode == 0, timeout_s=DEADLINE_S
                )
                assert any("web1-ipv4" in str(rules) for rules in own_rules(proxy.live()).values())

    assert storm.changes > 10 * kills
    for ticker in tickers:
        assert len(ticker.ticks) > 10 * kills
        assert ticker.failures == []
