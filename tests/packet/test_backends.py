"""Two backends in one kernel: what is left in the one that is not used is found, told and removed."""

import sys
from pathlib import Path

import pytest

from kubeproxy_py import rules
from kubeproxy_py.iptables import backends
from kubeproxy_py.model import IPFamily
from tests.support.netns import iptables_programs
from tests.support.object_files import ObjectFiles
from tests.support.proxy import HEALTH_PORT, running

pytestmark = pytest.mark.packet

CHAINS = (
    "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n"
    "-A KUBE-SERVICES -d 172.30.0.1/32 -j KUBE-SVC-AAAAAAAAAAAAAAAA\nCOMMIT\n"
)
CHAINS_V6 = CHAINS.replace("172.30.0.1/32", "fd00:172::1/128")
JUMP = f"*nat\n-I PREROUTING {rules.JUMPS[10].rule}\nCOMMIT\n"
FOREIGN = "*nat\n:CNI-HOSTPORT-DNAT - [0:0]\n-A PREROUTING -j CNI-HOSTPORT-DNAT\nCOMMIT\n"


def restored(lab, backend, family, text):
    lab.node.run([iptables_programs(backend, family).restore, "--noflush"], input=text)


def surveyed(lab, own, families=tuple(IPFamily)):
    with lab.node.entered():
        return backends.survey(own, families)


def chains_of(family):
    return CHAINS if family is IPFamily.V4 else CHAINS_V6


@pytest.fixture
def left_in(backend):
    """Give the backend in which something is left: the one that is not used."""
    return backends.other(backend)


def test_nothing_there_is_nothing_found(clean_lab, backend, left_in):
    restored(clean_lab, left_in, IPFamily.V4, FOREIGN)
    restored(clean_lab, backend, IPFamily.V4, CHAINS)

    assert surveyed(clean_lab, backend) == backends.Survey()


def test_looking_creates_no_legacy_table(clean_lab):
    # A namespace that no other test has touched: legacy tables stay once they are there.
    node = clean_lab.node2
    with node.entered():
        assert backends.survey("nft", tuple(IPFamily)) == backends.Survey()
        assert Path("/proc/thread-self/net/ip_tables_names").read_text() == ""


def test_chains_that_nothing_leads_to_are_found_and_harmless(clean_lab, backend, left_in, family):
    restored(clean_lab, left_in, family, chains_of(family))
    [leftover] = surveyed(clean_lab, backend).leftovers

    assert leftover == backends.Leftover(
        left_in, family, 2, ("nat/KUBE-SERVICES", "nat/KUBE-SVC-AAAAAAAAAAAAAAAA"), ()
    )


def test_chains_that_packets_pass_are_told_with_the_way_there(clean_lab, backend, left_in, family):
    restored(clean_lab, left_in, family, chains_of(family))
    restored(clean_lab, left_in, family, JUMP)
    [leftover] = surveyed(clean_lab, backend).leftovers

    assert leftover.jumps == ("nat/PREROUTING",)
    assert str(leftover).endswith("which packets pass as well")


def test_cleanup_of_that_backend_removes_them_and_leaves_ours(clean_lab, backend, left_in):
    for where in (backend, left_in):
        restored(clean_lab, where, IPFamily.V4, CHAINS)
        restored(clean_lab, where, IPFamily.V4, JUMP)
    clean_lab.node.run([sys.executable, "-m", "kubeproxy_py", "cleanup", f"--backend={left_in}"])

    assert surveyed(clean_lab, backend) == backends.Survey()
    assert len(surveyed(clean_lab, left_in).leftovers) == 1


def test_a_kubelet_that_has_gone_to_the_other_backend_is_noticed(clean_lab, backend, left_in):
    hint = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"
    restored(clean_lab, left_in, IPFamily.V4, hint)

    assert surveyed(clean_lab, backend).moved == (IPFamily.V4,)
    # Where it has left one in both, it has not gone anywhere.
    restored(clean_lab, backend, IPFamily.V4, hint)
    assert surveyed(clean_lab, backend).moved == ()


def test_a_daemon_tells_what_packets_meet_in_the_other_backend_and_is_not_ready(
    clean_lab, backend, left_in, tmp_path
):
    for text in (CHAINS, JUMP):
        restored(clean_lab, left_in, IPFamily.V4, text)
    files = ObjectFiles(tmp_path)
    files.write([])
    with running(clean_lab, backend, tmp_path / "log", f"--manifests={files.directory}") as proxy:
        proxy.wait_synced()
        proxy.wait(lambda: bool(proxy.events("backend.mixed")))
        [mixed] = proxy.events("backend.mixed")
        status, body = proxy.get("/readyz", HEALTH_PORT)

        assert (mixed["backend"], mixed["jumps"]) == (left_in, ["nat/PREROUTING"])
        assert proxy.metric("kubeproxy_iptables_other_backend_jumps") == 1
        assert status == 503
        assert f"cleanup --backend={left_in}" in body
        # They are told, and left alone.
        assert len(surveyed(clean_lab, backend).leftovers) == 1
