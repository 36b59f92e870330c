"""Reads of legacy tables through python-iptables, each in a process of its own: libiptc keeps state."""

import json
import sys

import pytest

from kubeproxy_py.iptables import libiptc
from kubeproxy_py.model import IPFamily
from tests.support.netns import iptables_programs

pytestmark = pytest.mark.packet

ASK = """
import json, sys
from kubeproxy_py.iptables import libiptc
from kubeproxy_py.model import IPFamily
family, table, *names = json.loads(sys.argv[1])
print(libiptc.has_any_chain(IPFamily(family), table, set(names)))
"""


@pytest.fixture
def ask(clean_lab):
    def ask(family, table, *names):
        question = json.dumps([family.value, table, *names])
        done = clean_lab.node.run([sys.executable, "-c", ASK, question])
        return {"True": True, "False": False}[done.stdout.split()[-1]]

    return ask


def test_a_chain_that_is_there_is_found_among_others(clean_lab, ask, family):
    restore = iptables_programs("legacy", family).restore
    clean_lab.node.run([restore], input="*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n")

    assert ask(family, "mangle", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT") is True
    assert ask(family, "mangle", "KUBE-KUBELET-CANARY") is False


def test_a_table_that_does_not_exist_has_no_chain(ask, family):
    assert ask(family, "nonsense", "KUBE-IPTABLES-HINT") is False


def test_nft_rules_are_not_seen(clean_lab, ask):
    restore = iptables_programs("nft", IPFamily.V4).restore
    clean_lab.node.run([restore], input="*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n")

    assert ask(IPFamily.V4, "mangle", "KUBE-IPTABLES-HINT") is False


def test_without_python_iptables_nothing_is_found_and_nothing_breaks(monkeypatch):
    monkeypatch.setitem(sys.modules, "iptc", None)

    assert libiptc.has_any_chain(IPFamily.V4, "mangle", {"KUBE-IPTABLES-HINT"}) is False
