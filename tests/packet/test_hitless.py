"""
Nobody notices who programs the node: start, stop, upgrade, take-over from kube-proxy and back.

Clients connect every few milliseconds for the whole time, to several Services of both families, and
other connections stay open. From a pod: the random source port of a masqueraded client may be one at
which the server still waits for stray segments of a connection that conntrack was made to forget.
"""

import contextlib
import itertools
import signal
import sys

import msgspec
import pytest

from kubeproxy_py.dispatch import tree_depth
from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily
from kubeproxy_py.ruleset import Ruleset
from tests.packet.test_foreign_rules import FOREIGN
from tests.support import kube_proxy, states
from tests.support.netns import iptables_programs
from tests.support.object_files import ObjectFiles
from tests.support.proxy import own_rules, running
from tests.support.traffic import Ticker, conversation
from tests.support.webs import cluster_ip, web

pytestmark = pytest.mark.packet

#: Services whose clients never rest; all others only have to be written.
WATCHED = (0, 1)
SILENT = 3


class Stage:
    """A node with Services, programmed in turns by kube-proxy and by us."""

    def __init__(self, lab, backend, scratch, services):
        self.lab = lab
        self.backend = backend
        self.files = ObjectFiles(scratch)
        self.services = services
        self._scratch = scratch
        self._logs = itertools.count()

    def objects(self, services=None):
        """Return the Services: one endpoint of the watched ones is here, one on another node."""
        pods = {0: self.lab.local_pods[0], 1: self.lab.remote_pods[0]}
        return [
            item
            for family in IPFamily
            for number in range(services or self.services)
            for item in web(
                family, number, pods[number % 2], silent=0 if number in WATCHED else SILENT
            )
        ]

    def live(self, family):
        return chains.parse_save(self.saved(family).splitlines())

    def saved(self, family):
        return self.lab.node.run([iptables_programs(self.backend, family).save]).stdout

    def restored(self, family, text):
        restore = iptables_programs(self.backend, family).restore
        self.lab.node.run([restore, "--noflush"], input=text)

    # Who programs it -------------------------------------------------------------------------------

    def wanted(self, family, services=None):
        options = msgspec.structs.replace(states.golden_options(family), has_nfacct=False)
        ruleset = Ruleset(options)
        ruleset.apply(states.service_states(self.objects(services), family))
        return ruleset.tables

    def kube_proxy_starts(self):
        for family in IPFamily:
            self.restored(family, kube_proxy.prepare(self.live(family)))
            self.restored(family, kube_proxy.first_sync(self.wanted(family), self.live(family)))

    def kube_proxy_goes_on(self):
        """Let a Service come and go, in its incremental syncs."""
        for services in (self.services + 1, self.services):
            for family in IPFamily:
                wanted, live = self.wanted(family, services), self.live(family)
                changed = wanted["nat"].keys() - live["nat"].keys()
                self.restored(family, kube_proxy.partial_sync(wanted, live, changed))

    def we_run(self, layout, ending=signal.SIGTERM):
        """Run the daemon until it has programmed everything."""
        self.files.write(self.objects())
        log = self._scratch / f"log-{next(self._logs)}"
        arguments = (f"--manifests={self.files.directory}", f"--dispatch={layout}")
        with running(self.lab, self.backend, log, *arguments) as proxy:
            proxy.wait(lambda: self.is_programmed(layout), 60)
            proxy.wait_synced(60)
            proxy.end(ending)

    def is_programmed(self, layout):
        for family in IPFamily:
            nat = self.live(family)["nat"]
            is_tree = any(tree_depth(name) is not None for name in nat)
            services = [name for name in nat if name.startswith("KUBE-SVC-")]
            if is_tree != (layout == "tree") or len(services) < self.services:
                return False
        return True


@pytest.fixture
def stage(clean_lab, servers, backend, tmp_path):
    return Stage(clean_lab, backend, tmp_path, services=40)


class Clients:
    """Those who must not notice."""

    def __init__(self, stack, lab):
        client = lab.local_pods[1]
        addresses = [cluster_ip(family, number) for family in IPFamily for number in WATCHED]
        self._talks = [
            stack.enter_context(conversation(client, address, 80)) for address in addresses
        ]
        self._tickers = [
            stack.enter_context(Ticker(client, address, 80, interval_s=0.002, max_ticks=10**7))
            for address in addresses
        ]

    def go_on(self, ticks=20):
        """Wait until all have connected *ticks* times more; nothing has failed so far."""
        for ticker in self._tickers:
            ticker.wait_for_ticks(ticks, timeout_s=60)
        self.notice_nothing()

    def notice_nothing(self):
        assert [ticker.failures for ticker in self._tickers] == [[]] * len(self._tickers)
        for talk in self._talks:
            assert talk.ask().is_answered

    @property
    def count(self):
        return sum(len(ticker.ticks) for ticker in self._tickers)


def play(stage, rounds):
    """Change hands again and again, and back; return how often somebody connected."""
    with contextlib.ExitStack() as stack:
        stage.kube_proxy_starts()
        clients = Clients(stack, stage.lab)
        clients.go_on()
        for _ in range(rounds):
            stage.we_run("flat")  # take-over
            clients.go_on()
            stage.we_run("tree")  # upgrade to another layout
            clients.go_on()
            stage.we_run("tree", ending=signal.SIGKILL)  # restart with nothing changed, and a crash
            clients.go_on()
            stage.kube_proxy_starts()  # hand-back
            clients.go_on()
            stage.kube_proxy_goes_on()
            clients.go_on()
        return clients.count


def test_nobody_notices_who_programs_the_node_and_cleanup_leaves_the_rules_of_others(stage):
    for family in IPFamily:
        stage.restored(family, FOREIGN)
    before = {family: foreign_lines(stage.saved(family)) for family in IPFamily}
    assert play(stage, rounds=1) > 1000
    stage.we_run("tree")
    stage.lab.node.run([sys.executable, "-m", "kubeproxy_py", "cleanup"])

    for family in IPFamily:
        assert own_rules(stage.live(family)) == {}
        assert foreign_lines(stage.saved(family)) == before[family]


@pytest.mark.soak
def test_nobody_notices_for_many_rounds_with_many_services(clean_lab, servers, backend, tmp_path):
    stage = Stage(clean_lab, backend, tmp_path, services=300)

    assert play(stage, rounds=5) > 20_000


def foreign_lines(saved):
    """Return the lines of iptables-save that are about rules, without times and counters.

    Empty tables, and KUBE-FIREWALL, which is the kubelet's as well, may have come.
    """
    return [
        line.partition(" [")[0]
        for line in saved.splitlines()
        if line.startswith((":", "-A"))
        and "KUBE-FIREWALL" not in line
        and line[1:].partition(" ")[0] not in chains.BUILTIN
    ]
