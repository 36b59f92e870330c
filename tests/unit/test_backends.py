"""What stands in the backend that is not used: what counts, and what is said of it, once."""

import msgspec
import pytest
from structlog.testing import capture_logs

from kubeproxy_py.backend_watch import BackendWatch
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.iptables import backends
from kubeproxy_py.model import IPFamily

V4, V6 = IPFamily.V4, IPFamily.V6
HINT = ChainId("mangle", "KUBE-IPTABLES-HINT")
CANARY = ChainId("mangle", "KUBE-KUBELET-CANARY")
LEFT = backends.Leftover("legacy", V4, 2, ("nat/KUBE-SERVICES", "nat/KUBE-SVC-A"), ())
MET = backends.Leftover("legacy", V4, 2, ("nat/KUBE-SERVICES",), ("nat/PREROUTING",))


def survey(chains, own="nft"):
    return backends.survey(
        own, [V4, V6], lambda family, backend: chains.get((family, backend), set())
    )


@pytest.mark.parametrize("own", ["nft", "legacy"])
@pytest.mark.parametrize("hint", [HINT, CANARY])
def test_a_kubelet_with_its_hint_only_in_the_other_backend_has_moved(own, hint):
    other = backends.other(own)

    assert survey({(V6, other): {hint}}, own).moved == (V6,)
    assert survey({(V6, other): {hint}, (V6, own): {hint}}, own).moved == ()
    assert survey({(V6, own): {hint}}, own).moved == ()


def test_chains_of_others_are_nothing():
    foreign = {
        ChainId("nat", "CNI-X"),
        ChainId("filter", "KUBE-FIREWALL"),
        ChainId("nat", "OUTPUT"),
    }

    assert survey({(V4, "legacy"): foreign, (V4, "nft"): {ChainId("nat", "KUBE-SERVICES")}}) == (
        backends.Survey()
    )


def test_a_backend_that_cannot_be_looked_at_is_told_and_the_other_family_is_looked_at():
    def listed(family, _backend):
        if family is V4:
            raise IptablesError("no")
        return {HINT} if _backend == "legacy" else set()

    found = backends.survey("nft", [V4, V6], listed)

    assert found.failures == ("IPv4, legacy: no",)
    assert found.unknown == (V4,)
    assert found.moved == (V6,)


def test_leftovers_that_no_program_can_read_are_told_all_the_same():
    def unreadable(family, backend, tables):
        assert tables == {"nat"}
        raise IptablesError("no programs")

    chains = {(V4, "nft"): {ChainId("nat", "KUBE-SERVICES")}}
    found = backends.survey(
        "legacy", [V4], lambda family, backend: chains.get((family, backend), set()), unreadable
    )

    assert found == backends.Survey(
        leftovers=(backends.Leftover("nft", V4, 1, ("nat/KUBE-SERVICES",), None),),
        failures=("IPv4, nft: no programs",),
    )
    assert "cannot be seen whether packets pass them" in str(found.leftovers[0])


class World:
    """A BackendWatch, and what it finds."""

    def __init__(self, metrics):
        self.found = backends.Survey()
        self.waits = 0
        self._registry = metrics.registry
        self.watch = BackendWatch(
            "nft", [V4, V6], metrics, wait=self._wait, survey=lambda own, families: self.found
        )

    def _wait(self, seconds):
        assert seconds == 60
        self.waits += 1
        return self.waits == 3

    def look(self, **found):
        self.found = backends.Survey(**found)
        with capture_logs() as logs:
            self.watch.look()
        return [line["event"] for line in logs]

    def metric(self, name):
        return self._registry.get_sample_value(
            f"kubeproxy_iptables_other_backend_{name}", {"ip_family": "IPv4"}
        )


@pytest.fixture
def world(metrics):
    return World(metrics)


def test_leftovers_are_told_once_counted_and_told_when_they_are_gone(world):
    assert world.look() == []
    assert world.look(leftovers=(LEFT,)) == ["backend.mixed"]
    assert world.look(leftovers=(LEFT,)) == []
    assert (world.metric("chains"), world.metric("jumps")) == (2, 0)
    assert world.look() == ["backend.unmixed"]
    assert (world.metric("chains"), world.metric("jumps")) == (0, 0)


def test_only_rules_that_packets_meet_make_a_node_not_ready(world):
    world.look(leftovers=(LEFT,))
    assert world.watch.reason() is None

    assert world.look(leftovers=(MET,)) == ["backend.mixed"]
    assert world.metric("jumps") == 1
    assert (
        "which packets pass as well: kubeproxy-py cleanup --backend=legacy" in world.watch.reason()
    )


def test_what_was_found_stays_while_it_cannot_be_looked_at(world):
    world.look(leftovers=(MET,), moved=(V4,))
    assert world.look(unknown=(V4,), failures=("no",)) == ["backend.unknown"]
    assert (world.metric("chains"), world.metric("jumps")) == (2, 1)
    assert "which packets pass as well" in world.watch.reason()
    assert world.look(leftovers=(MET,), moved=(V4,)) == []

    assert world.look() == ["backend.unmixed"]
    assert world.watch.reason() is None


def test_jumps_that_cannot_be_seen_are_those_of_before(world):
    unseen = msgspec.structs.replace(MET, jumps=None)
    assert world.look(leftovers=(unseen,)) == ["backend.mixed"]
    assert (world.metric("chains"), world.metric("jumps")) == (2, 0)
    assert world.watch.reason() is None
    assert world.look(leftovers=(MET,)) == ["backend.mixed"]

    assert world.look(leftovers=(unseen,)) == []
    assert "which packets pass as well" in world.watch.reason()


def test_a_kubelet_that_moved_and_a_look_that_failed_are_told_once(world):
    found = {"moved": (V4,), "failures": ("no",)}

    assert world.look(**found) == ["backend.moved", "backend.unknown"]
    assert world.look(**found) == []
    assert world.watch.reason() is None


def test_it_looks_at_the_start_and_every_minute_until_stopped(world):
    looks = []
    world.watch._survey = lambda own, families: looks.append(own) or backends.Survey()
    world.watch.run()

    assert looks == ["nft"] * 3
