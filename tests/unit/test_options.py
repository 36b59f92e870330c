"""Configuration and facts of the node → what rules depend on."""

import pytest

from kubeproxy_py import config, external, options
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.model import IPFamily
from kubeproxy_py.options import NodeIPs
from kubeproxy_py.rules import LocalDetector

V4, V6 = IPFamily.V4, IPFamily.V6
BOTH = (V4, V6)
UNKNOWN = NodeIPs(V4, {V4: "127.0.0.1", V6: "::1"})
KNOWN = NodeIPs(V4, {V4: "192.168.0.2", V6: "fd00::2"})


def configured(**fields):
    """Return a configuration with *fields* set, by path with __ for the dot."""
    result = KubeProxyConfiguration()
    for path, value in fields.items():
        result = config.replace(result, path.replace("__", "."), value)
    return result


# This node's addresses --------------------------------------------------------------------------

# The cases of kube-proxy's Test_detectNodeIPs.
NODE_IPS = {
    "a Node IP and a specific bind address": (["192.168.1.1"], "10.0.0.1", V4, "10.0.0.1", "::1"),
    "a bind address of IPv4 alone": ([], "10.0.0.1", V4, "10.0.0.1", "::1"),
    "a bind address of IPv6 alone": ([], "fd00:4321::2", V6, "127.0.0.1", "fd00:4321::2"),
    "nothing at all": ([], "0.0.0.0", V4, "127.0.0.1", "::1"),
    "nothing, and the bind address is ::": ([], "::", V4, "127.0.0.1", "::1"),
    "an IPv4 node": (["192.168.1.1"], "0.0.0.0", V4, "192.168.1.1", "::1"),
    "an IPv4 node bound to ::": (["192.168.1.1"], "::", V4, "192.168.1.1", "::1"),
    "an IPv6 node": (["fd00:1234::1"], "0.0.0.0", V6, "127.0.0.1", "fd00:1234::1"),
    "an IPv6 node bound to ::": (["fd00:1234::1"], "::", V6, "127.0.0.1", "fd00:1234::1"),
    "dual stack, IPv4 first": (
        ["90.90.90.90", "2001:db8::2"], "::", V4, "90.90.90.90", "2001:db8::2",
    ),
    "dual stack, IPv6 first": (
        ["2001:db8::2", "90.90.90.90"], "0.0.0.0", V6, "90.90.90.90", "2001:db8::2",
    ),
    "dual stack, IPv4 overridden": (
        ["2001:db8::2", "90.90.90.90"], "80.80.80.80", V4, "80.80.80.80", "2001:db8::2",
    ),
    "dual stack, IPv6 overridden": (
        ["90.90.90.90", "2001:db8::2"], "2001:db8::555", V6, "90.90.90.90", "2001:db8::555",
    ),
    "dual stack, overridden with IPv4 loopback": (
        ["2001:db8::2", "90.90.90.90"], "127.0.0.1", V4, "127.0.0.1", "2001:db8::2",
    ),
    "dual stack, overridden with IPv6 loopback": (
        ["90.90.90.90", "2001:db8::2"], "::1", V6, "90.90.90.90", "::1",
    ),
    # Ours: Nodes have InternalIPs before ExternalIPs, and any number of them.
    "several addresses of one family": (
        ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"], "0.0.0.0", V4, "10.0.0.1", "fd00::1",
    ),
    "a bind address that is none": (["10.0.0.1"], "", V4, "10.0.0.1", "::1"),
    "a bind address with leading zeros": ([], "010.0.0.1", V4, "10.0.0.1", "::1"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("ips", "bind_address", "primary", "v4", "v6"), NODE_IPS.values(), ids=NODE_IPS
)
def test_node_ips_are_chosen_as_kube_proxy_chooses_them(ips, bind_address, primary, v4, v6):
    found = options.node_ips(bind_address, ips)

    assert (found.primary, found.by_family) == (primary, {V4: v4, V6: v6})


@pytest.mark.parametrize(
    ("ips", "is_known"),
    [
        ([], False),
        (["10.0.0.1"], True),
        (["fd00::1"], True),
        (["127.0.0.1"], False),
    ],
)
def test_a_loopback_address_is_no_knowledge_of_the_node(ips, is_known):
    assert options.node_ips("0.0.0.0", ips).is_known is is_known


# Where node ports are served ---------------------------------------------------------------------

NODE_PORTS = {
    "nothing": ([], KNOWN, None, None),
    "IPv4 leaves IPv6 open": (["192.168.0.0/24"], KNOWN, ("192.168.0.0/24",), None),
    "IPv6 leaves IPv4 open": (["fd00::/64"], KNOWN, None, ("fd00::/64",)),
    "both": (["10.0.0.0/8", "fd00::/64"], KNOWN, ("10.0.0.0/8",), ("fd00::/64",)),
    "several of one family": (["10.0.0.0/8", "11.0.0.0/8"], KNOWN, ("10.0.0.0/8", "11.0.0.0/8"), None),
    "host bits are cleared": (["10.1.2.3/8"], KNOWN, ("10.0.0.0/8",), None),
    "/0 opens its family": (["10.0.0.0/8", "0.0.0.0/0", "fd00::/64"], KNOWN, None, ("fd00::/64",)),
    "::/0 opens its family": (["10.0.0.0/8", "::/0"], KNOWN, ("10.0.0.0/8",), None),
    "primary": (["primary"], KNOWN, ("192.168.0.2/32",), ("fd00::2/128",)),
    "primary of a node with one family": (
        ["primary"], NodeIPs(V4, {V4: "10.0.0.1", V6: "::1"}), ("10.0.0.1/32",), None,
    ),
    "primary of an unknown node": (["primary"], UNKNOWN, None, None),
    "what is no CIDR does not count": (["nonsense"], KNOWN, None, None),
}  # fmt: skip


@pytest.mark.parametrize(("listed", "ips", "v4", "v6"), NODE_PORTS.values(), ids=NODE_PORTS)
def test_node_ports_are_limited_by_family(listed, ips, v4, v6):
    found = options.node_port_cidrs(configured(node_port_addresses=tuple(listed)), ips)

    assert found == {V4: v4, V6: v6}


def test_only_local_addresses_within_the_cidrs_have_node_ports():
    local = ("192.168.1.1", "10.0.0.9", "10.0.0.1", "10.0.0.1", "127.0.0.1")

    assert options.served_addresses(("10.0.0.0/8",), local, allows_loopback=True) == (
        "10.0.0.1",
        "10.0.0.9",
    )


@pytest.mark.parametrize(("allows_loopback", "served"), [(True, ("127.0.0.1",)), (False, ())])
def test_loopback_has_node_ports_only_where_it_may(allows_loopback, served):
    found = options.served_addresses(
        ("127.0.0.0/8",), ("127.0.0.1", "10.0.0.1"), allows_loopback=allows_loopback
    )

    assert found == served


def test_without_cidrs_the_kernel_judges_which_addresses_are_local():
    assert options.served_addresses(None, ("10.0.0.1",), allows_loopback=True) is None


@pytest.mark.parametrize(
    ("is_on", "listed", "expected"),
    [
        (True, [], True),
        (False, [], False),
        (True, ["192.168.0.0/24"], False),
        (True, ["192.168.0.0/24", "127.0.0.0/8"], True),
        (True, ["127.0.0.1/32"], True),
        (True, ["127.1.2.3/32"], True),
        (True, ["96.0.0.0/3"], True),
        (True, ["0.0.0.0/0", "192.168.0.0/24"], True),
        (True, ["fd00::/64"], True),
        (True, ["primary"], False),
        (False, ["127.0.0.0/8"], False),
    ],
)
def test_localhost_node_ports_need_loopback_among_the_addresses(is_on, listed, expected):
    settings = configured(iptables__localhost_node_ports=is_on, node_port_addresses=tuple(listed))
    cidrs = options.node_port_cidrs(settings, KNOWN)

    assert options.has_localhost_node_ports(settings, cidrs) is expected


# Which traffic is local --------------------------------------------------------------------------

V4_CIDR, V6_CIDR = LocalDetector("-s", "10.0.0.0/14"), LocalDetector("-s", "2002:0:0:1234::/64")
# As in kube-proxy's Test_getLocalDetectors: configured CIDRs, and the detectors they come to.
CIDRS = {
    "IPv4": (["10.0.0.0/14"], V4_CIDR, None),
    "IPv6": (["2002:0:0:1234::/64"], None, V6_CIDR),
    "IPv4 and IPv6": (["10.0.0.0/14", "2002:0:0:1234::/64"], V4_CIDR, V6_CIDR),
    "IPv6 and IPv4": (["2002:0:0:1234::/64", "10.0.0.0/14"], V4_CIDR, V6_CIDR),
    "none": ([], None, None),
    "blanks around them": ([" 10.0.0.0/14", "2002:0:0:1234::/64 "], V4_CIDR, V6_CIDR),
    "host bits": (["10.1.2.3/14"], V4_CIDR, None),
    "two of a family": (["10.0.0.0/14", "11.0.0.0/14"], V4_CIDR, None),
    "an unreadable one": (["nonsense", "10.0.0.0/14"], V4_CIDR, None),
}


@pytest.mark.parametrize("mode", ["ClusterCIDR", "NodeCIDR"])
@pytest.mark.parametrize(("cidrs", "v4", "v6"), CIDRS.values(), ids=CIDRS)
def test_local_traffic_is_told_by_the_first_cidr_of_the_family(mode, cidrs, v4, v6):
    is_cluster = mode == "ClusterCIDR"
    settings = configured(
        detect_local_mode=mode, cluster_cidr=",".join(cidrs if is_cluster else [])
    )
    pod_cidrs = () if is_cluster else cidrs

    assert [options.local_detector(settings, family, pod_cidrs) for family in BOTH] == [v4, v6]


def test_the_other_mode_s_cidrs_do_not_count():
    by_cluster = configured(detect_local_mode="ClusterCIDR")
    by_node = configured(detect_local_mode="NodeCIDR", cluster_cidr="10.0.0.0/14")

    assert options.local_detector(by_cluster, V4, ["10.0.0.0/14"]) is None
    assert options.local_detector(by_node, V4, []) is None


@pytest.mark.parametrize(
    ("mode", "field", "value", "argument"),
    [
        ("BridgeInterface", "detect_local__bridge_interface", "cbr0", "cbr0"),
        ("BridgeInterface", "detect_local__bridge_interface", "br-0123456789ab", "br-0123456789ab"),
        ("InterfaceNamePrefix", "detect_local__interface_name_prefix", "veth", "veth+"),
        ("InterfaceNamePrefix", "detect_local__interface_name_prefix", "a" * 14, "a" * 14 + "+"),
    ],
)
def test_interface_modes_are_the_same_in_both_families(mode, field, value, argument):
    settings = configured(detect_local_mode=mode, **{field: value})

    for family in BOTH:
        assert options.local_detector(settings, family, ()) == LocalDetector("-i", argument)


@pytest.mark.parametrize(
    ("mode", "field", "value"),
    [
        ("BridgeInterface", "bridge_interface", ""),
        ("BridgeInterface", "bridge_interface", "a" * 16),
        ("BridgeInterface", "bridge_interface", "eth0 -j ACCEPT"),
        ("BridgeInterface", "bridge_interface", "eth0\n-j ACCEPT"),
        ("BridgeInterface", "bridge_interface", '"eth0'),
        ("BridgeInterface", "bridge_interface", "eth+"),
        ("BridgeInterface", "bridge_interface", "!eth0"),
        ("InterfaceNamePrefix", "interface_name_prefix", "veth+"),
        # iptables counts the plus sign, and would refuse every restore.
        ("InterfaceNamePrefix", "interface_name_prefix", "a" * 15),
    ],
)
def test_an_interface_that_cannot_be_in_a_rule_is_refused_by_its_field(mode, field, value):
    settings = configured(detect_local_mode=mode, **{f"detect_local__{field}": value})
    words = {"bridge_interface": "bridgeInterface", "interface_name_prefix": "interfaceNamePrefix"}

    with pytest.raises(ConfigError, match=f"^cannot use detectLocal.{words[field]} "):
        options.local_detector(settings, V4, ())


# All together ------------------------------------------------------------------------------------


def test_rules_get_all_facts_and_the_options_of_their_family():
    settings = configured(
        cluster_cidr="10.0.0.0/14", iptables__masquerade_all=True, iptables__masquerade_bit=7
    )
    facts = options.Facts(
        node_name="node1",
        node_ips=KNOWN,
        zone="zone-a",
        has_nfacct=True,
        has_random_fully=False,
        lacks=frozenset({"recent"}),
        conntrack_is_liberal=True,
    )

    v4 = options.rules_options(settings, V4, facts, node_port_addresses=("10.0.0.1",))
    v6 = options.rules_options(settings, V6, facts, node_port_addresses=None)

    assert (v4.node_ip, v6.node_ip) == ("192.168.0.2", "fd00::2")
    assert (v4.local_detector, v6.local_detector) == (V4_CIDR, None)
    assert (v4.node_port_addresses, v6.node_port_addresses) == (("10.0.0.1",), None)
    # IPv6 has no route_localnet.
    assert (v4.localhost_node_ports, v6.localhost_node_ports) == (True, False)
    for built in (v4, v6):
        assert built.node_name == "node1"
        assert built.zone == "zone-a"
        assert built.masquerade_all
        assert built.masquerade_bit == 7
        assert built.has_nfacct
        assert not built.has_random_fully
        assert built.lacks == {"recent"}
        assert not built.drops_invalid
        assert not built.is_large


# Doubts ------------------------------------------------------------------------------------------

UNSET = (
    "nodePortAddresses is unset; NodePort connections will be accepted on all local IPs. "
    "Consider using `--nodeport-addresses primary`"
)
V6_PRIMARY = NodeIPs(V6, {V4: "127.0.0.1", V6: "fd00::2"})
V4_ONLY = NodeIPs(V4, {V4: "192.168.0.2", V6: "::1"})

# The cases of kube-proxy's Test_checkBadConfig, and what it resolves "primary" to before.
NODE_PORT_DOUBTS = {
    "single-stack addresses, single-stack cluster": ("10.0.0.0/8", ["192.168.0.0/24"], KNOWN, None),
    "dual-stack addresses, dual-stack cluster": (
        "10.0.0.0/8,fd09::/64", ["192.168.0.0/24", "fd03::/64"], KNOWN, None,
    ),
    "no addresses": ("", [], KNOWN, UNSET),
    "single-stack addresses, dual-stack cluster": (
        "10.0.0.0/8,fd09::/64", ["192.168.0.0/24"], KNOWN,
        "cluster appears to be dual-stack but nodePortAddresses contains only IPv4 addresses; "
        "NodePort connections will be accepted on all local IPv6 IPs",
    ),
    "addresses of the wrong family": (
        "fd09::/64", ["192.168.0.0/24"], V6_PRIMARY,
        "cluster appears to be IPv6-primary but nodePortAddresses contains only IPv4 addresses; "
        "NodePort connections will be accepted on all local IPv6 IPs",
    ),
    "primary of a node of both families": ("10.0.0.0/8,fd09::/64", ["primary"], KNOWN, None),
    "primary of a node of one family, dual-stack cluster": (
        "10.0.0.0/8,fd09::/64", ["primary"], V4_ONLY,
        "cluster appears to be dual-stack but nodePortAddresses contains only IPv4 addresses; "
        "NodePort connections will be accepted on all local IPv6 IPs",
    ),
    # It stays match-all for good: somebody must hear of it.
    "primary of an unknown node": ("10.0.0.0/8", ["primary"], UNKNOWN, UNSET),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cluster_cidr", "listed", "ips", "doubt"), NODE_PORT_DOUBTS.values(), ids=NODE_PORT_DOUBTS
)
def test_node_port_addresses_are_doubted_as_kube_proxy_does(cluster_cidr, listed, ips, doubt):
    settings = configured(cluster_cidr=cluster_cidr, node_port_addresses=tuple(listed))

    said = options.doubts(settings, ips, (), BOTH)

    assert said == ([] if doubt is None else [doubt])


def test_dual_stack_pod_cidrs_make_a_dual_stack_cluster_too():
    settings = configured(node_port_addresses=("192.168.0.0/24",))

    (said,) = options.doubts(settings, KNOWN, ("10.0.0.0/8", "fd09::/64"), BOTH)

    assert said.startswith("cluster appears to be dual-stack")


# The cases of kube-proxy's Test_checkBadIPConfig: mode, CIDRs, and with one family and with both:
# None, a doubt or an end.
FINE, DOUBT, END = None, "doubt", "end"
CIDR_DOUBTS = {
    "nothing": ("ClusterCIDR", "", [], FINE, FINE),
    "IPv4 cluster CIDR": ("ClusterCIDR", "10.0.0.0/8", [], FINE, FINE),
    "dual-stack cluster CIDRs": ("ClusterCIDR", "10.0.0.0/8,fd01::/64", [], FINE, FINE),
    "reversed cluster CIDRs": ("ClusterCIDR", "fd01::/64,10.0.0.0/8", [], FINE, FINE),
    "IPv6 cluster CIDR": ("NodeCIDR", "fd01::/64", [], DOUBT, DOUBT),
    "IPv6 cluster CIDR that matters": ("ClusterCIDR", "fd01::/64", [], END, DOUBT),
    "IPv4 pod CIDR": ("NodeCIDR", "", ["10.0.0.0/8"], FINE, FINE),
    "dual-stack pod CIDRs": ("NodeCIDR", "", ["10.0.0.0/8", "fd01::/64"], FINE, FINE),
    "reversed pod CIDRs": ("NodeCIDR", "", ["fd01::/64", "10.0.0.0/8"], FINE, FINE),
    "IPv6 pod CIDR that matters": ("NodeCIDR", "", ["fd01::/64"], END, END),
    "IPv6 pod CIDR": ("ClusterCIDR", "", ["fd01::/64"], DOUBT, DOUBT),
}


@pytest.mark.parametrize("is_dual", [False, True], ids=["one family", "both families"])
@pytest.mark.parametrize(
    ("mode", "cluster_cidr", "pod_cidrs", "single", "dual"), CIDR_DOUBTS.values(), ids=CIDR_DOUBTS
)
def test_cidrs_of_the_wrong_family_are_doubted_or_the_end(
    mode, cluster_cidr, pod_cidrs, single, dual, is_dual
):
    settings = configured(
        detect_local_mode=mode, cluster_cidr=cluster_cidr, node_port_addresses=("192.168.0.0/24",)
    )
    verdict, families = (dual, BOTH) if is_dual else (single, (V4,))
    field = "clusterCIDRs" if cluster_cidr else "node.spec.podCIDRs"
    text = f"cluster is IPv4-{'primary' if is_dual else 'only'} but {field} contains only IPv6 addresses"

    if verdict is END:
        with pytest.raises(ConfigError, match=f"^kube-proxy configuration is incorrect: {text}$"):
            options.doubts(settings, KNOWN, pod_cidrs, families)
        return
    said = [
        doubt
        for doubt in options.doubts(settings, KNOWN, pod_cidrs, families)
        if "dual" not in doubt
    ]

    assert said == ([text] if verdict is DOUBT else [])


@pytest.mark.parametrize("field", ["healthz_bind_address", "metrics_bind_address"])
@pytest.mark.parametrize(
    ("address", "ips", "is_doubted"),
    [
        ("10.0.0.1:9999", KNOWN, False),
        ("[fd01:2345::1]:9999", V6_PRIMARY, False),
        ("0.0.0.0:9999", V6_PRIMARY, False),
        ("[::]:9999", KNOWN, False),
        ("10.0.0.1:9999", V6_PRIMARY, True),
        ("[fd01:2345::1]:9999", KNOWN, True),
    ],
)
def test_a_server_address_of_a_family_that_is_not_there_is_doubted(field, address, ips, is_doubted):
    other = V6 if ips.primary is V4 else V4
    settings = configured(
        healthz_bind_address="",
        metrics_bind_address="",
        node_port_addresses=("10.0.0.0/8", "fd00::/64"),
    )
    settings = config.replace(settings, field, address)
    name = {"healthz_bind_address": "healthzBindAddress"}.get(field, "metricsBindAddress")

    assert options.doubts(settings, ips, (), (ips.primary,)) == (
        [f"cluster is {ips.primary.value}-only but {name} is {other.value}"] if is_doubted else []
    )
    assert options.doubts(settings, ips, (), BOTH) == []


@pytest.mark.parametrize("is_allowed", [True, False])
def test_the_policy_for_external_addresses_is_of_gate_and_flag(is_allowed):
    settings = configured(feature_gates={"AllowServiceExternalIPs": is_allowed})

    assert options.external_policy(settings, ("192.0.2.0/24",)) == external.Policy(
        allows_external_ips=is_allowed, allowed=("192.0.2.0/24",)
    )
