"""What is read of legacy tables again and again leaves nothing behind in this process."""

import gc

import pytest

from kubeproxy_py.iptables import counters, infos
from tests.support.netns import iptables_programs

pytestmark = pytest.mark.packet

TABLE = "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j RETURN\nCOMMIT\n"


@pytest.fixture
def in_node(clean_lab, family):
    """Enter a namespace whose legacy nat table has one chain."""
    clean_lab.node.run([iptables_programs("legacy", family).restore], input=TABLE)
    with clean_lab.node.entered():
        yield


@pytest.mark.usefixtures("in_node")
def test_sizes_and_counters_are_read_without_leaving_work_for_a_look_for_cycles(family, tmp_path):
    reader = counters.LegacyCounters(family, lock_file=tmp_path / "lock")

    def read():
        return "nat" in infos.read_infos(family), reader.read("nat", ["KUBE-SERVICES"])

    read()
    gc.collect()
    for _ in range(3):
        assert read() == (True, {"KUBE-SERVICES": (0,)})

    assert gc.collect() == 0
