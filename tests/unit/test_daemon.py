"""
What the daemon is put together of. What it does on a kernel is in tests/packet.

Built here, but never run: running touches the host.
"""

import pytest

from kubeproxy_py import config, daemon
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.flags import Settings
from kubeproxy_py.model import IPFamily, Node


@pytest.fixture
def settings(tmp_path):
    """Give settings with which a Daemon can be built without a cluster."""
    return Settings(config=KubeProxyConfiguration(), manifests=(str(tmp_path),))


@pytest.mark.parametrize(
    ("mode", "is_failure"), [("NodeCIDR", True), ("ClusterCIDR", False)], ids=["node", "cluster"]
)
def test_changed_pod_cidrs_end_it_in_node_cidr_mode_alone(settings, mode, is_failure):
    changed = config.replace(settings.config, "detect_local_mode", mode)
    built = daemon.Daemon(Settings(config=changed, manifests=settings.manifests))
    built._node.at_start = Node(name="node1", pod_cidrs=("10.0.0.0/24",))
    built._node_changed(Node(name="node1", pod_cidrs=("10.0.1.0/24",)))

    assert built._life.stop.is_set() is is_failure


class Listener:
    """Something that a change of the store is told to."""

    def __init__(self):
        self.told = []

    def note(self):
        self.told.append("note")

    def outdate(self):
        self.told.append("outdate")

    def nudge(self, family):
        self.told.append(family)


def test_a_change_is_told_to_all_that_are_started(settings):
    built = daemon.Daemon(settings)
    built._nudge(IPFamily.V6)
    built._keeper = built._counting = built._families = listener = Listener()
    built._nudge(IPFamily.V6)

    assert listener.told == ["note", "outdate", IPFamily.V6]


def test_a_node_that_changed_is_a_state_to_keep(settings):
    built = daemon.Daemon(settings)
    built._keeper = Listener()
    built._node_changed(Node(name="node1"))

    assert built._keeper.told == ["note"]


def test_an_interface_that_no_node_can_have_is_refused_before_anything_starts(settings):
    changed = config.replace(settings.config, "detect_local_mode", "BridgeInterface")
    changed = config.replace(changed, "detect_local.bridge_interface", "a b")

    with pytest.raises(ConfigError, match="bridgeInterface"):
        daemon.Daemon(Settings(config=changed, manifests=settings.manifests))


def test_a_configuration_file_that_is_gone_is_named(settings, tmp_path):
    path = str(tmp_path / "gone.yaml")
    built = daemon.Daemon(
        Settings(config=settings.config, manifests=settings.manifests, config_file=path)
    )

    with pytest.raises(ConfigError, match=f"^cannot watch configuration file {path}: "):
        built._open_config_file()
