"""Objects and stated facts → rules, without a daemon; what ``render`` prints is in test_cli.py."""

import json

import pytest

from kubeproxy_py import config, desired, rules
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.flags import HostFacts, Settings
from kubeproxy_py.model import IPFamily
from tests.support import states
from tests.support.builders import make_service, make_slice

V4, V6 = IPFamily.V4, IPFamily.V6
CIDR = "10.180.0.0/16"
STATES = sorted(path.stem for path in states.GOLDEN.glob("*.json"))


@pytest.fixture
def write(tmp_path):
    def write(*items):
        path = tmp_path / "objects.json"
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)}))
        return str(path)

    return write


def settings(path, **fields):
    changed = KubeProxyConfiguration()
    for name, value in fields.items():
        changed = config.replace(changed, name, value)
    return Settings(config=changed, manifests=(path,))


@pytest.mark.parametrize("family", IPFamily, ids=lambda family: family.value)
@pytest.mark.parametrize("state", STATES)
def test_the_parts_put_together_make_the_rules_that_the_parts_make(write, state, family):
    items = states.golden_items(state)
    facts = HostFacts(
        node_ips=("192.168.0.2",), topology_labels={"topology.kubernetes.io/zone": "zone-a"}
    )
    problems = []
    chosen = settings(write(*items), cluster_cidr=CIDR)
    store = desired.load(chosen, "node1", problems.append)
    built = desired.build(chosen, store, facts, "node1", family)

    names = {str(name) for name in states.service_states(items, family)}
    assert built.service_count == len(names)
    assert built.options.zone == "zone-a"
    assert built.options.local_detector == (
        rules.LocalDetector("-s", CIDR) if family is V4 else None
    )
    assert problems == []


def test_facts_of_another_node_are_not_this_node_s(write):
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node2", "labels": {"topology.kubernetes.io/zone": "zone-b"}},
        "spec": {"podCIDRs": ["10.0.0.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.4"}]},
    }
    facts = HostFacts()
    chosen = settings(write(node), detect_local_mode="NodeCIDR")
    built = desired.build(chosen, desired.load(chosen, "node1", print), facts, "node1", V4)

    assert built.options.zone == ""
    assert built.options.node_ip == "127.0.0.1"
    assert built.options.local_detector is None


def test_a_path_that_is_not_there_is_named(tmp_path):
    path = str(tmp_path / "none")

    with pytest.raises(ConfigError, match=path):
        desired.load(settings(path), "node1", print)


@pytest.mark.parametrize("is_allowed", [True, False])
def test_external_ips_can_be_switched_off(write, is_allowed):
    path = write(make_service(externalIPs=["192.168.99.22"]), make_slice())
    gates = {"AllowServiceExternalIPs": is_allowed}
    chosen = settings(path, feature_gates=gates)
    store = desired.load(chosen, "node1", print)
    built = desired.build(chosen, store, HostFacts(), "node1", V4)
    services = built.tables["nat"]["KUBE-SERVICES"]

    assert any("192.168.99.22" in rule for rule in services) is is_allowed
    assert [refusal.reason for refusal in store.refusals()] == ([] if is_allowed else ["disabled"])
