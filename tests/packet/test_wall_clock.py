"""The wall clock of the daemon's process jumps while it runs: what it shows jumps, what it does goes on."""

import json
import os
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from kubeproxy_py.model import IPFamily, Kind
from tests.support.api_server import ApiServer
from tests.support.builders import make_node
from tests.support.duos import addresses, answers, node_ips, service_ip, web
from tests.support.proxy import HEALTH_PORT, running
from tests.support.traffic import Ticker
from tests.support.wall_clock import WallClock

pytestmark = pytest.mark.packet

HOUR_S = 3600
# Certificates are made when the test runs: half a day later, an hour more or less is within their time.
START_S = 12 * HOUR_S
DEADLINE_S = 60
# Gives the token that is in a file, and says by its own clock, which jumps as well, that it is good for
# half an hour.
PLUGIN = """\
#!{python}
import datetime as dt, json, pathlib
with open({runs!r}, "a") as file:
    file.write("x")
until = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=30)
print(json.dumps({{
    "apiVersion": "client.authentication.k8s.io/v1",
    "kind": "ExecCredential",
    "status": {{
        "token": pathlib.Path({token!r}).read_text(),
        "expirationTimestamp": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }},
}}))
"""


@pytest.fixture
def api(clean_lab):
    with clean_lab.node.entered():
        # Bookmarks, because a quiet watch would tell nothing of the clock.
        server = ApiServer(tls=True, tokens=["first"], bookmark_interval_s=1.0)
    with server:
        server.apply(make_node("node1", ips=node_ips()))
        yield server


@pytest.fixture
def clock(tmp_path):
    with WallClock(tmp_path) as clock:
        yield clock


class Credentials:
    """A token from a plugin, which a kubeconfig names."""

    def __init__(self, api, directory):
        self._api = api
        self._token, self._runs = directory / "token", directory / "runs"
        self._token.write_text("first")
        plugin = directory / "plugin"
        plugin.write_text(
            PLUGIN.format(python=sys.executable, runs=str(self._runs), token=str(self._token))
        )
        plugin.chmod(0o755)
        self.kubeconfig = api.kubeconfig(directory / "kubeconfig")
        document = json.loads(self.kubeconfig.read_text())
        document["users"][0]["user"] = {
            "exec": {"command": str(plugin), "apiVersion": "client.authentication.k8s.io/v1"}
        }
        self.kubeconfig.write_text(json.dumps(document))

    def count(self):
        """Return how often the plugin was asked."""
        return len(self._runs.read_text())

    def rotate(self, token):
        """Let no other token than this one be good."""
        self._token.write_text(token)
        self._api.accept_tokens(token)


@pytest.fixture
def credentials(api, tmp_path):
    return Credentials(api, tmp_path)


@pytest.fixture
def proxy(clean_lab, servers, api, clock, credentials, tmp_path):
    """Start the daemon, with *clock* half a day ahead and one Service."""
    api.apply_many(web(1, clean_lab.local_pods[1]))
    clock.shift_s = START_S
    flags = (f"--kubeconfig={credentials.kubeconfig}", f"--state-file={tmp_path / 'state'}")
    with running(clean_lab, "nft", tmp_path / "log", *flags, environ=clock.environ) as proxy:
        # Before any connection: what was tracked without rules would be remembered by its port.
        proxy.wait_synced(DEADLINE_S)
        yield proxy


def cpu_s(proxy):
    """Return how long the daemon and the programs it ran have kept a CPU busy."""
    fields = Path(f"/proc/{proxy.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def shows_time(proxy, shift_s):
    """Tell whether what came last on each watch came by a clock that is *shift_s* ahead."""
    name = "kubeproxy_watch_last_event_timestamp_seconds"
    now = time.time() + shift_s
    return all(abs(proxy.metric(name, kind=kind) - now) < HOUR_S / 2 for kind in get_args(Kind))


def done(api, proxy):
    """Return what grows with every restore, list and watch."""
    restores = proxy.metric("kubeproxy_iptables_restores_total")
    return restores, api.count("list"), api.count("watch")


def document(proxy):
    return json.loads(proxy.ask("--output=json").stdout)


def statuses(proxy):
    return {path: proxy.get(path, HEALTH_PORT)[0] for path in ("/livez", "/healthz", "/readyz")}


WELL = {"/livez": 200, "/healthz": 200, "/readyz": 200}


def test_an_hour_ahead_and_two_hours_back_change_nothing_but_the_times_shown(
    clean_lab, api, clock, credentials, proxy
):
    client, one, other = (*clean_lab.local_pods[:2], clean_lab.remote_pods[0])
    state_file = Path(credentials.kubeconfig).with_name("state")
    proxy.wait(state_file.exists)
    for shift_s, endpoint in ((START_S + HOUR_S, other), (START_S - HOUR_S, one)):
        before = done(api, proxy)
        clock.shift_s = shift_s
        told = document(proxy)

        assert (told["state"], told["warnings"]) == ("ready", [])
        assert statuses(proxy) == WELL

        # Nothing spins, and nothing is done that nobody asked for.
        began, used_s = time.monotonic(), cpu_s(proxy)
        with Ticker(client, service_ip(IPFamily.V4, 1), 80) as ticker:
            ticker.wait_for_ticks(100, timeout_s=DEADLINE_S)
        assert cpu_s(proxy) - used_s < 0.2 * (time.monotonic() - began)
        assert not ticker.failures
        # Watches are told of the progress that another Node's coming is, by bookmarks.
        api.apply(make_node(f"other-{shift_s}"))
        proxy.wait(lambda shift_s=shift_s: shows_time(proxy, shift_s))
        assert done(api, proxy) == before

        # Credentials have expired too soon by the daemon's clock, and then are good for too long.
        asked_for = credentials.count()
        credentials.rotate(f"token-{shift_s}")
        assert api.cut_watches() == 3
        api.apply_many(web(1, endpoint))
        proxy.wait(lambda endpoint=endpoint: answers(client, 1) == addresses(endpoint), DEADLINE_S)

        assert credentials.count() > asked_for
        proxy.wait(lambda: api.open_watches() == 3, DEADLINE_S)
        assert statuses(proxy) == WELL
        for kind in get_args(Kind):
            assert 0 <= proxy.metric("kubeproxy_watch_staleness_seconds", kind=kind) < HOUR_S / 2
        # An age of before the jump is an hour wrong, and never negative.
        text = proxy.ask().stdout
        assert " -" not in text, text


def test_a_clock_behind_the_api_server_s_certificate_is_told_and_costs_no_rule(
    clean_lab, api, clock, proxy
):
    client, one, other = (*clean_lab.local_pods[:2], clean_lab.remote_pods[0])
    clock.shift_s = -HOUR_S
    assert api.cut_watches() == 3
    proxy.wait(
        lambda: all("not yet valid" in watch["error"] for watch in document(proxy)["watches"]),
        DEADLINE_S,
    )
    proxy.wait(lambda: answers(client, 1) == addresses(one))
    assert proxy.get("/livez", HEALTH_PORT)[0] == 200
    api.apply_many(web(1, other))
    clock.shift_s = 0
    proxy.wait(lambda: answers(client, 1) == addresses(other), DEADLINE_S)

    proxy.wait(lambda: api.open_watches() == 3, DEADLINE_S)
