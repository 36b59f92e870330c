"""Killed at any moment, again and again, while everything changes: nobody notices."""

import random
import threading
import time

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import storm
from tests.support.duos import service_ip, web
from tests.support.proxy import own_rules, running
from tests.support.traffic import Ticker

pytestmark = pytest.mark.packet

DEADLINE_S = 90


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_leaves_connections_alone_and_ends_up_right(
    clean_lab, servers, backend, api, tmp_path, kills
):
    client, far = clean_lab.local_pods[0], clean_lab.remote_pods[0]
    kubeconfig = f"--kubeconfig={api.kubeconfig(tmp_path / 'kubeconfig')}"
    flags = (kubeconfig, f"--state-file={tmp_path / 'state'}")
    api.apply_many(web(1, far))
    api.apply_many([item for number in storm.NUMBERS for item in web(number, *clean_lab.pods)])
    with running(clean_lab, backend, tmp_path / "first", *flags) as first:
        first.wait_synced(DEADLINE_S)
        moments = random.Random(kills)
        tickers = [Ticker(client, service_ip(family, 1), 80) for family in IPFamily]
        with storm.Storm(api, clean_lab.pods, seed=kills) as changes, tickers[0], tickers[1]:
            for kill in range(kills):
                with running(clean_lab, backend, tmp_path / f"log-{kill}", *flags) as proxy:
                    first.process.kill()
                    # From before it has read anything until it is in the middle of writing.
                    threading.Event().wait(moments.uniform(0.1, 1.6))
                    assert proxy.process.poll() is None, proxy.log.read_text()[-2000:]
                    # Killed by the end of the block.
            last = running(clean_lab, backend, tmp_path / "last", *flags)
            began = time.monotonic()
            with last as proxy:
                proxy.wait_synced(DEADLINE_S)
                print(f"{backend}: synced {time.monotonic() - began:.1f} s after the start")
                for ticker in tickers:
                    ticker.wait_for_ticks(20)
                changes.end()
                # What a fresh list says is what the kernel has: nothing would change.
                proxy.wait(lambda: proxy.plan(kubeconfig) == 0, DEADLINE_S)
                assert any("web1-ipv4" in str(rules) for rules in own_rules(proxy.live()).values())

    assert changes.changes > 10 * kills
    for ticker in tickers:
        assert len(ticker.ticks) > 10 * kills
        assert ticker.failures == []
