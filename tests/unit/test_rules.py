"""The rules of one ServicePort, written out."""

import math
import re
from fractions import Fraction

import pytest

from kubeproxy_py import rules
from kubeproxy_py.model import Endpoint, IPFamily, ServicePort, ServicePortName
from kubeproxy_py.rules import FILTER, NAT, LocalDetector, Options

HASH = "XPGD46QRK7WJZT7O"
SVC, SVL, EXT, FW = (f"KUBE-{kind}-{HASH}" for kind in ("SVC", "SVL", "EXT", "FW"))
SEP1 = "KUBE-SEP-SXIVWICOYRO3J4NJ"
LOCAL = Endpoint("10.180.0.1", 80, is_local=True)
REMOTE = Endpoint("10.180.2.1", 80)
TO_CLUSTER_IP = (
    '-d 172.30.0.41/32 -p tcp -m comment --comment "ns1/svc1:p80 {}" -m tcp --dport 80 -j {}'
)
OPTIONS = Options(
    family=IPFamily.V4, node_name="node1", local_detector=LocalDetector("-s", "10.180.0.0/16")
)


def port(**fields):
    published = ("node_port", "external_ips", "lb_vips")
    defaults = {
        "name": ServicePortName("ns1", "svc1", "p80", "tcp"),
        "cluster_ip": "172.30.0.41",
        "port": 80,
        "is_externally_accessible": any(fields.get(name) for name in published),
    }
    return ServicePort(**defaults | fields)


def options(**changes):
    return rules.msgspec.structs.replace(OPTIONS, **changes)


def build(service_port, *endpoints, **changes):
    return rules.build(service_port, endpoints, options(**changes))


def entries(fragment, table, chain):
    return [entry.rule for entry in fragment.entries if entry[:2] == (table, chain)]


def said(fragment):
    """Return chain and end of each dispatch entry: what is done to whom, without the match."""
    return [
        (entry.table, entry.chain, entry.rule.rpartition(" -j ")[2].partition(" --")[0])
        for entry in fragment.entries
    ]


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (("ns1/svc1:p80", "tcp"), "XPGD46QRK7WJZT7O"),
        (("ns1/svc1:p80", "tcp", "10.180.0.1:80"), "SXIVWICOYRO3J4NJ"),
        (("ns3/svc3", "tcp"), "63AVES5QA6FLPQYD"),
        (("ns7/svc7:sctp", "sctp"), "FKW7EXB3Q7DMKSWZ"),
        (("ns7/svc7:sctp", "sctp", "[fd00:10::7]:80"), "YM56FI2RAYNEZQX4"),
        (("ns5/svc5:p80", "udp"), "ZCFRLRXJJ5IA6SS3"),
        (("ns5/svc5:p80", "udp", "10.180.0.5:80"), "MEEZI44XBCQHHOMQ"),
    ],
)
def test_hash_is_kube_proxys(parts, wanted):
    assert rules.hash16(*parts) == wanted


def test_ports_of_one_name_have_chains_of_their_own_by_protocol():
    tcp = build(port(), LOCAL)
    udp = build(port(name=ServicePortName("ns1", "svc1", "p80", "udp")), LOCAL)

    assert tcp.chains.keys().isdisjoint(udp.chains)


def test_every_chain_name_fits_into_28_characters():
    fragment = build(
        port(lb_vips=("1.2.3.4",), source_ranges=("10.0.0.0/8",), is_internal_local=True), LOCAL
    )

    assert max(map(len, fragment.chains)) <= 28
    assert all(name.startswith(rules.PORT_CHAIN_PREFIXES) for name in fragment.chains)


# Probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "wanted"),
    [
        (1, "1.00000000000"),
        (2, "0.50000000000"),
        (3, "0.33333333349"),
        (4, "0.25000000000"),
        (5, "0.20000000019"),
        (6, "0.16666666651"),
        (7, "0.14285714272"),
        (10, "0.10000000009"),
        (100, "0.00999999978"),
        (1000, "0.00100000016"),
    ],
)
def test_probability_is_spelled_as_iptables_save_does(n, wanted):
    assert rules.probability(n) == wanted


def test_probability_falls_with_every_endpoint():
    texts = [rules.probability(n) for n in range(1, 5001)]

    assert texts == sorted(set(texts), reverse=True)


def test_probability_is_one_over_n_as_near_as_31_bits_allow():
    assert max(abs(float(rules.probability(n)) * n - 1) for n in range(1, 1001)) < 1e-6


def test_endpoints_share_the_traffic_equally():
    endpoints = [Endpoint(f"10.180.0.{n}", 80) for n in range(1, 8)]
    left, shares = 1.0, []
    for text in build(port(), *endpoints, local_detector=None).chains[SVC]:
        found = re.search(r"--probability (\S+)", text)
        shares.append(left * (float(found.group(1)) if found else 1.0))
        left -= shares[-1]

    assert shares == pytest.approx([1 / 7] * 7)


# Cluster IP --------------------------------------------------------------------------------------


def test_cluster_ip_service_written_out():
    fragment = build(port(), LOCAL, REMOTE)

    assert fragment.entries == (
        rules.Entry(
            NAT, "KUBE-SERVICES", "172.30.0.41", "tcp", 80, TO_CLUSTER_IP.format("cluster IP", SVC)
        ),
    )
    remote = f"KUBE-SEP-{rules.hash16('ns1/svc1:p80', 'tcp', '10.180.2.1:80')}"
    assert fragment.chains == {
        SVC: (
            f"! -s 10.180.0.0/16 {TO_CLUSTER_IP.format('cluster IP', 'KUBE-MARK-MASQ')}",
            '-m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" '
            f"-m statistic --mode random --probability 0.50000000000 -j {SEP1}",
            f'-m comment --comment "ns1/svc1:p80 -> 10.180.2.1:80" -j {remote}',
        ),
        SEP1: (
            '-s 10.180.0.1/32 -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ',
            '-p tcp -m comment --comment "ns1/svc1:p80" -m tcp '
            "-j DNAT --to-destination 10.180.0.1:80",
        ),
        remote: (
            '-s 10.180.2.1/32 -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ',
            '-p tcp -m comment --comment "ns1/svc1:p80" -m tcp '
            "-j DNAT --to-destination 10.180.2.1:80",
        ),
    }
    assert fragment.rule_count == 7


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        pytest.param(
            {}, f"! -s 10.180.0.0/16 {TO_CLUSTER_IP.format('cluster IP', 'KUBE-MARK-MASQ')}",
            id="ClusterCIDR and NodeCIDR",
        ),
        pytest.param(
            {"local_detector": LocalDetector("-i", "cni0")},
            "-d 172.30.0.41/32 ! -i cni0 -p tcp -m comment "
            '--comment "ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ',
            id="BridgeInterface",
        ),
        pytest.param(
            {"local_detector": LocalDetector("-i", "cali+")},
            "-d 172.30.0.41/32 ! -i cali+ -p tcp -m comment "
            '--comment "ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ',
            id="InterfaceNamePrefix",
        ),
        pytest.param(
            {"masquerade_all": True}, TO_CLUSTER_IP.format("cluster IP", "KUBE-MARK-MASQ"),
            id="masquerade all",
        ),
        pytest.param(
            {"masquerade_all": True, "local_detector": None},
            TO_CLUSTER_IP.format("cluster IP", "KUBE-MARK-MASQ"),
            id="masquerade all without a detector",
        ),
    ],
)  # fmt: skip
def test_cluster_ip_masquerade(changes, rule):
    assert build(port(), LOCAL, **changes).chains[SVC][0] == rule


def test_no_detector_masquerades_nothing_to_the_cluster_ip():
    assert build(port(), LOCAL, local_detector=None).chains[SVC] == (
        f'-m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" -j {SEP1}',
    )


def test_internal_local_policy_balances_in_svl():
    fragment = build(port(is_internal_local=True), LOCAL, REMOTE)

    assert said(fragment) == [(NAT, "KUBE-SERVICES", SVL)]
    assert fragment.chains.keys() == {SVL, SEP1}
    assert fragment.chains[SVL][0].endswith("-j KUBE-MARK-MASQ")


def test_internal_local_policy_without_local_endpoints_drops():
    fragment = build(port(is_internal_local=True), REMOTE)

    assert fragment.entries == (
        rules.Entry(
            FILTER, "KUBE-SERVICES", "172.30.0.41", "tcp", 80,
            TO_CLUSTER_IP.format("has no local endpoints", "DROP"),
        ),
    )  # fmt: skip
    assert fragment.chains == {}
    assert (fragment.lacks_internal, fragment.lacks_external) == (True, False)


# No endpoints ------------------------------------------------------------------------------------

EVERYTHING = {
    "node_port": 30080,
    "external_ips": ("192.168.99.22",),
    "lb_vips": ("1.2.3.4",),
    "source_ranges": ("203.0.113.0/25",),
}


@pytest.mark.parametrize(
    "endpoints",
    [
        pytest.param((), id="none"),
        pytest.param((Endpoint("10.0.0.1", 80, ready=False),), id="unready"),
        pytest.param(
            (Endpoint("10.0.0.1", 80, ready=False, serving=False, terminating=True),),
            id="terminating and no longer serving",
        ),
    ],
)
@pytest.mark.parametrize("is_local", [False, True])
def test_no_usable_endpoint_rejects_everywhere(endpoints, is_local):
    fragment = build(
        port(**EVERYTHING, is_external_local=is_local, is_internal_local=is_local), *endpoints
    )

    assert said(fragment) == [
        (FILTER, "KUBE-SERVICES", "REJECT"),
        (FILTER, "KUBE-EXTERNAL-SERVICES", "REJECT"),
        (FILTER, "KUBE-EXTERNAL-SERVICES", "REJECT"),
        (FILTER, "KUBE-EXTERNAL-SERVICES", "REJECT"),
    ]
    assert fragment.chains == {}
    assert (fragment.lacks_internal, fragment.lacks_external) == (False, False)


def test_reject_rules_written_out():
    fragment = build(port(node_port=30080))

    assert [entry.rule for entry in fragment.entries] == [
        TO_CLUSTER_IP.format("has no endpoints", "REJECT --reject-with icmp-port-unreachable"),
        '-p tcp -m comment --comment "ns1/svc1:p80 has no endpoints" -m addrtype --dst-type LOCAL '
        "-m tcp --dport 30080 -j REJECT --reject-with icmp-port-unreachable",
    ]


def test_ipv6_rejects_with_icmp6():
    fragment = rules.build(
        port(cluster_ip="fd00::41"), (), Options(family=IPFamily.V6, node_name="node1")
    )

    assert fragment.entries[0].rule == (
        '-d fd00::41/128 -p tcp -m comment --comment "ns1/svc1:p80 has no endpoints" '
        "-m tcp --dport 80 -j REJECT --reject-with icmp6-port-unreachable"
    )


def test_remote_terminating_endpoint_is_dropped_not_rejected_by_local_policy():
    terminating = Endpoint("10.180.2.1", 80, ready=False, terminating=True)
    fragment = build(port(node_port=30080, is_external_local=True), terminating)

    assert (FILTER, "KUBE-EXTERNAL-SERVICES", "DROP") in said(fragment)
    assert fragment.lacks_external


# External traffic --------------------------------------------------------------------------------


def test_load_balancer_written_out():
    fragment = build(port(**EVERYTHING), LOCAL)

    assert said(fragment) == [
        (NAT, "KUBE-SERVICES", SVC),
        (NAT, "KUBE-SERVICES", EXT),
        (FILTER, "KUBE-PROXY-FIREWALL", "DROP"),
        (NAT, "KUBE-SERVICES", FW),
        (NAT, "KUBE-NODEPORTS", EXT),
    ]
    assert fragment.chains[EXT] == (
        '-m comment --comment "masquerade traffic for ns1/svc1:p80 external destinations" '
        "-j KUBE-MARK-MASQ",
        f"-j {SVC}",
    )
    assert fragment.chains[FW] == (
        f'-s 203.0.113.0/25 -m comment --comment "ns1/svc1:p80 loadbalancer IP" -j {EXT}',
        '-m comment --comment "other traffic to ns1/svc1:p80 will be dropped by '
        'KUBE-PROXY-FIREWALL"',
    )


def test_traffic_not_accepted_by_the_firewall_is_dropped_for_every_vip():
    fragment = build(port(lb_vips=("1.2.3.4", "5.6.7.8"), source_ranges=("203.0.113.0/25",)), LOCAL)

    assert entries(fragment, FILTER, "KUBE-PROXY-FIREWALL") == [
        f'-d {vip}/32 -p tcp -m comment --comment "ns1/svc1:p80 traffic not accepted by {FW}" '
        "-m tcp --dport 80 -j DROP"
        for vip in ("1.2.3.4", "5.6.7.8")
    ]


@pytest.mark.parametrize(
    ("node_ip", "sources"),
    [
        pytest.param("203.0.113.9", ["203.0.113.0/25", "1.2.3.4/32"], id="inside the ranges"),
        pytest.param("192.168.0.2", ["203.0.113.0/25"], id="outside"),
        pytest.param(None, ["203.0.113.0/25"], id="unknown"),
    ],
)
def test_node_inside_the_ranges_may_use_the_vip_as_source(node_ip, sources):
    chain = build(port(**EVERYTHING), LOCAL, node_ip=node_ip).chains[FW]

    assert [rule.split()[1] for rule in chain if rule.startswith("-s ")] == sources


def test_no_source_ranges_is_no_firewall():
    fragment = build(port(lb_vips=("1.2.3.4",)), LOCAL)

    assert said(fragment) == [(NAT, "KUBE-SERVICES", SVC), (NAT, "KUBE-SERVICES", EXT)]
    assert FW not in fragment.chains


@pytest.mark.parametrize(
    ("detector", "first"),
    [
        (LocalDetector("-s", "10.180.0.0/16"), ["-s 10.180.0.0/16"]),
        (LocalDetector("-i", "cali+"), ["-i cali+"]),
        (None, []),
    ],
)
def test_local_policy_short_circuits_pods_and_the_node_itself(detector, first):
    fragment = build(
        port(node_port=30080, is_external_local=True), LOCAL, REMOTE, local_detector=detector
    )
    about = "for ns1/svc1:p80 external destinations"

    assert fragment.chains[EXT] == (
        *(f'{match} -m comment --comment "pod traffic {about}" -j {SVC}' for match in first),
        f'-m comment --comment "masquerade LOCAL traffic {about}" '
        "-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ",
        f'-m comment --comment "route LOCAL traffic {about}" -m addrtype --src-type LOCAL -j {SVC}',
        f"-j {SVL}",
    )
    assert len(fragment.chains[SVL]) == 1


def test_local_policy_without_local_endpoints_keeps_the_short_circuit_and_drops_the_rest():
    fragment = build(port(**EVERYTHING, is_external_local=True), REMOTE)

    assert said(fragment) == [
        (NAT, "KUBE-SERVICES", SVC),
        (NAT, "KUBE-SERVICES", EXT),
        (FILTER, "KUBE-EXTERNAL-SERVICES", "DROP"),
        (FILTER, "KUBE-PROXY-FIREWALL", "DROP"),
        (NAT, "KUBE-SERVICES", FW),
        (FILTER, "KUBE-EXTERNAL-SERVICES", "DROP"),
        (NAT, "KUBE-NODEPORTS", EXT),
        (FILTER, "KUBE-EXTERNAL-SERVICES", "DROP"),
    ]
    assert fragment.chains[EXT][-1].endswith(f"--src-type LOCAL -j {SVC}")
    assert (fragment.lacks_internal, fragment.lacks_external) == (False, True)


def test_internal_local_service_with_external_traffic_has_both_kinds_of_endpoints():
    fragment = build(port(node_port=30080, is_internal_local=True), REMOTE)

    assert said(fragment) == [
        (FILTER, "KUBE-SERVICES", "DROP"), (NAT, "KUBE-NODEPORTS", EXT),
    ]  # fmt: skip
    # No masquerade rule for the cluster IP: that address leads nowhere here.
    assert fragment.chains[SVC] == (
        '-m comment --comment "ns1/svc1:p80 -> 10.180.2.1:80" '
        f"-j KUBE-SEP-{rules.hash16('ns1/svc1:p80', 'tcp', '10.180.2.1:80')}",
    )


def test_both_policies_local_balance_internal_and_external_traffic_in_svl():
    fragment = build(
        port(node_port=30080, is_internal_local=True, is_external_local=True), LOCAL, REMOTE
    )

    assert said(fragment)[0] == (NAT, "KUBE-SERVICES", SVL)
    assert fragment.chains[EXT][-1] == f"-j {SVL}"
    assert fragment.chains[SVL][0].endswith("-j KUBE-MARK-MASQ")
    assert not any(rule.endswith("-j KUBE-MARK-MASQ") for rule in fragment.chains[SVC])


def test_external_ips_that_are_not_allowed_leave_an_unused_chain():
    fragment = build(port(is_externally_accessible=True), LOCAL)

    assert EXT in fragment.chains
    assert said(fragment) == [(NAT, "KUBE-SERVICES", SVC)]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"localhost_node_ports": True, "has_nfacct": True}, True),
        ({"localhost_node_ports": True, "has_nfacct": False}, False),
        ({"localhost_node_ports": False, "has_nfacct": True}, False),
    ],
)
def test_node_ports_on_loopback_are_counted_where_that_works(changes, wanted):
    named = '-p tcp -m comment --comment "ns1/svc1:p80" -m tcp --dport 30080'
    counted = f"-d 127.0.0.0/8 {named} -m nfacct --nfacct-name localhost_nps_accepted_pkts -j {EXT}"

    assert entries(build(port(node_port=30080), LOCAL, **changes), NAT, "KUBE-NODEPORTS") == [
        *([counted] if wanted else []), f"{named} -j {EXT}",
    ]  # fmt: skip


@pytest.mark.parametrize("endpoints", [(), (LOCAL,)])
def test_health_check_port_is_open_whether_or_not_there_are_endpoints(endpoints):
    fragment = build(port(node_port=30080, health_check_node_port=30000), *endpoints)

    assert entries(fragment, FILTER, "KUBE-NODEPORTS") == [
        '-p tcp -m comment --comment "ns1/svc1:p80 health check node port" '
        "-m tcp --dport 30000 -j ACCEPT"
    ]


# Affinity ----------------------------------------------------------------------------------------


def test_affinity_looks_for_old_clients_before_it_throws_dice():
    other = Endpoint("10.180.0.2", 80)
    chain = build(port(affinity_timeout_s=60), LOCAL, other, local_detector=None).chains
    sep2 = f"KUBE-SEP-{rules.hash16('ns1/svc1:p80', 'tcp', '10.180.0.2:80')}"

    assert chain[SVC][:2] == tuple(
        f'-m comment --comment "ns1/svc1:p80 -> {address}" -m recent --rcheck --seconds 60 --reap '
        f"--name {sep} --mask 255.255.255.255 --rsource -j {sep}"
        for address, sep in (("10.180.0.1:80", SEP1), ("10.180.0.2:80", sep2))
    )
    assert "statistic" in chain[SVC][2]
    assert chain[SEP1][1] == (
        f'-p tcp -m comment --comment "ns1/svc1:p80" -m recent --set --name {SEP1} '
        "--mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.180.0.1:80"
    )


def test_affinity_in_ipv6_compares_whole_addresses():
    fragment = rules.build(
        port(cluster_ip="fd00::41", affinity_timeout_s=60),
        (Endpoint("fd00:10::7", 80),),
        Options(family=IPFamily.V6, node_name="node1"),
    )

    assert all(
        "--mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff " in rule
        for chain in fragment.chains.values()
        for rule in chain
        if "recent" in rule
    )


# Large clusters ----------------------------------------------------------------------------------


def test_large_cluster_leaves_out_the_comments_of_endpoints_only():
    fragment = build(port(affinity_timeout_s=60), LOCAL, REMOTE, is_large=True)
    commented = [
        rule for chain in fragment.chains.values() for rule in chain if "--comment" in rule
    ]

    assert commented == [
        f"! -s 10.180.0.0/16 {TO_CLUSTER_IP.format('cluster IP', 'KUBE-MARK-MASQ')}"
    ]
    assert fragment.chains[SEP1] == (
        "-s 10.180.0.1/32 -j KUBE-MARK-MASQ",
        f"-p tcp -m recent --set --name {SEP1} --mask 255.255.255.255 --rsource -m tcp "
        "-j DNAT --to-destination 10.180.0.1:80",
    )


def test_large_cluster_means_the_same_packets():
    small = build(port(**EVERYTHING, is_external_local=True), LOCAL, REMOTE)
    large = build(port(**EVERYTHING, is_external_local=True), LOCAL, REMOTE, is_large=True)

    def bare(fragment):
        return {
            name: [re.sub(r'-m comment --comment "[^"]*" ?', "", rule) for rule in chain]
            for name, chain in fragment.chains.items()
        }

    assert bare(small) == bare(large)


# What every node has -----------------------------------------------------------------------------


def test_fixed_chains_written_out():
    assert rules.fixed_chains(options(localhost_node_ports=True, has_nfacct=True)) == {
        FILTER: {
            "KUBE-FORWARD": (
                "-m conntrack --ctstate INVALID -m nfacct "
                "--nfacct-name ct_state_invalid_dropped_pkts -j DROP",
                '-m comment --comment "kubernetes forwarding rules" '
                "-m mark --mark 0x4000/0x4000 -j ACCEPT",
                '-m comment --comment "kubernetes forwarding conntrack rule" '
                "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ),
            "KUBE-PROXY-CANARY": (),
            "KUBE-FIREWALL": (
                "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment "
                '--comment "block incoming localnet connections" '
                "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
            ),
        },
        NAT: {
            "KUBE-MARK-MASQ": ("-j MARK --set-xmark 0x4000/0x4000",),
            "KUBE-POSTROUTING": (
                "-m mark ! --mark 0x4000/0x4000 -j RETURN",
                "-j MARK --set-xmark 0x4000/0x0",
                '-m comment --comment "kubernetes service traffic requiring SNAT" '
                "-j MASQUERADE --random-fully",
            ),
            "KUBE-PROXY-CANARY": (),
        },
        "mangle": {"KUBE-PROXY-CANARY": ()},
    }


def test_kubelets_firewall_chain_is_left_alone_without_localhost_node_ports():
    assert "KUBE-FIREWALL" not in rules.fixed_chains(OPTIONS)[FILTER]


def test_invalid_packets_are_dropped_without_a_counter_where_there_is_none():
    assert rules.fixed_chains(OPTIONS)[FILTER]["KUBE-FORWARD"][0] == (
        "-m conntrack --ctstate INVALID -j DROP"
    )


def test_liberal_conntrack_drops_nothing():
    chain = rules.fixed_chains(options(drops_invalid=False))[FILTER]["KUBE-FORWARD"]

    assert not any("INVALID" in rule for rule in chain)


def test_old_iptables_masquerades_without_random_fully():
    chain = rules.fixed_chains(options(has_random_fully=False))[NAT]["KUBE-POSTROUTING"]

    assert chain[-1].endswith("-j MASQUERADE")


@pytest.mark.parametrize(("bit", "mark"), [(0, "0x1"), (14, "0x4000"), (31, "0x80000000")])
def test_mark_is_the_masquerade_bit(bit, mark):
    chain = rules.fixed_chains(options(masquerade_bit=bit))[NAT]["KUBE-MARK-MASQ"]

    assert chain == (f"-j MARK --set-xmark {mark}/{mark}",)


LAST = (
    '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this '
    'chain"'
)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param(
            {"localhost_node_ports": True},
            [f"{LAST} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"], id="all addresses",
        ),
        pytest.param(
            {}, [f"! -d 127.0.0.0/8 {LAST} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"],
            id="all addresses but loopback",
        ),
        pytest.param(
            {"family": IPFamily.V6},
            [f"! -d ::1/128 {LAST} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"],
            id="IPv6 never has loopback",
        ),
        pytest.param(
            {"node_port_addresses": ("192.168.0.2", "192.168.0.3")},
            [f"-d 192.168.0.{n}/32 {LAST} -j KUBE-NODEPORTS" for n in (2, 3)], id="listed addresses",
        ),
        pytest.param({"node_port_addresses": ()}, [], id="none of the listed is local"),
    ],
)  # fmt: skip
def test_node_port_jumps(changes, wanted):
    assert list(rules.node_port_jumps(options(**changes))) == wanted


# Many endpoints ----------------------------------------------------------------------------------


def many(count, **fields):
    return [Endpoint(f"10.180.{n // 250}.{n % 250 + 1}", 80, **fields) for n in range(count)]


def build_tree(service_port, endpoints, **changes):
    return build(service_port, *endpoints, **{"local_detector": None, "layout": "tree"} | changes)


def shares(chains, chain, share=Fraction(1)):
    """Return the share of the connections to *chain* that each endpoint's chain gets."""
    found = {}
    for text in chains[chain]:
        if " --rcheck " in text:
            continue
        chance = re.search(r"--probability (\S+)", text)
        taken = share * (Fraction(round(float(chance[1]) * 2**31), 2**31) if chance else 1)
        to = text.rpartition(" -j ")[2]
        found |= {to: taken} if to.startswith("KUBE-SEP-") else shares(chains, to, taken)
        share -= taken
    return found


def groups(chains):
    return {name for name in chains if re.fullmatch(r"KUBE-SV[CL]-[A-Z2-7]{16}-[0-9a-f]{2}", name)}


@pytest.mark.parametrize("layout", ["auto", "tree"])
def test_up_to_32_endpoints_stand_in_one_chain(layout):
    fragment = build_tree(port(), many(32), layout=layout)

    assert groups(fragment.chains) == set()
    assert fragment == build_tree(port(), many(32), layout="flat")
    assert groups(build_tree(port(), many(33), layout=layout).chains) != set()


def test_flat_has_no_groups_whatever_the_number_of_endpoints():
    fragment = build_tree(port(), many(300), layout="flat")

    assert groups(fragment.chains) == set()
    assert len(fragment.chains[SVC]) == 300


# Some of all sizes, among them those at which the number of groups changes.
@pytest.mark.parametrize(
    "count", [33, 48, 49, 50, 63, 64, 65, 100, 255, 256, 257, 777, 1000, 1023, 1024, 1025, 2000]
)
def test_every_endpoint_of_many_gets_its_share_as_near_as_31_bits_allow(count):
    fragment = build_tree(port(), many(count))
    found = shares(fragment.chains, SVC)

    assert len(found) == count
    assert sum(found.values()) == 1
    assert max(abs(share - Fraction(1, count)) for share in found.values()) < Fraction(1, 2**30)


@pytest.mark.parametrize("count", [33, 100, 257, 1000, 2000])
def test_a_connection_passes_about_twice_the_square_root_of_the_endpoints(count):
    fragment = build_tree(port(), many(count))
    longest = max(len(fragment.chains[name]) for name in groups(fragment.chains))

    assert len(fragment.chains[SVC]) <= 2 * math.sqrt(count) + 1
    assert longest <= 2 * math.sqrt(count) + 5
    # All at once, because probability is for the mean and this is the worst.
    assert len(fragment.chains[SVC]) + longest < 4 * math.sqrt(count)


def test_names_of_groups_fit_and_are_a_services_own():
    fragment = build_tree(port(is_internal_local=True, node_port=30080), many(5000, is_local=True))

    assert len(groups(fragment.chains)) == 256
    assert max(map(len, fragment.chains)) == 28
    assert all(name.startswith(rules.PORT_CHAIN_PREFIXES) for name in fragment.chains)


def test_every_group_is_jumped_to_once_and_no_group_is_empty():
    chains = build_tree(port(), many(500)).chains
    targets = [text.rpartition(" -j ")[2] for text in chains[SVC]]

    assert sorted(targets) == sorted(groups(chains))
    assert all(chains[name] for name in groups(chains))


def changed_chains(before, after):
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@pytest.mark.parametrize("count", [40, 100, 500, 1500])
def test_one_endpoint_more_changes_one_group_and_the_chain_above(count):
    before = build_tree(port(), many(count)).chains
    after = build_tree(port(), many(count + 1)).chains
    changed = changed_chains(before, after)

    assert len([name for name in changed if name.startswith("KUBE-SEP-")]) == 1
    assert SVC in changed
    assert len(changed & groups(after)) == 1
    assert len(changed) == 3


def test_one_endpoint_instead_of_another_changes_two_groups_at_most():
    before = build_tree(port(), many(100)).chains
    after = build_tree(port(), [*many(99), Endpoint("10.180.9.9", 80)]).chains

    assert len(changed_chains(before, after) & (groups(before) | groups(after))) <= 2


def test_affinity_of_many_endpoints_comes_first_and_is_rule_for_rule_that_of_few():
    flat = build_tree(port(affinity_timeout_s=60), many(100), layout="flat").chains
    tree = build_tree(port(affinity_timeout_s=60), many(100)).chains
    remembered = flat[SVC][:100]

    assert all(" --rcheck " in text for text in remembered)
    assert tree[SVC][:100] == remembered
    assert not any(" --rcheck " in text for text in tree[SVC][100:])
    assert not any(" recent " in text for name in groups(tree) for text in tree[name])
    assert {name: flat[name] for name in flat if name != SVC} == {
        name: tree[name] for name in tree if name != SVC and name not in groups(tree)
    }


def test_local_policy_chain_has_groups_of_its_own():
    endpoints = [*many(100)[:60], *(Endpoint(ep.ip, 80, is_local=True) for ep in many(100)[60:])]
    chains = build_tree(port(is_external_local=True, node_port=30080), endpoints).chains

    assert {name[:8] for name in groups(chains)} == {"KUBE-SVC", "KUBE-SVL"}
    assert len(shares(chains, SVC)) == 100
    assert shares(chains, SVL).keys() == {
        text.rpartition(" -j ")[2]
        for name in groups(chains) if name.startswith(SVL) for text in chains[name]
    }  # fmt: skip
    assert len(shares(chains, SVL)) == 40


def test_masquerading_stands_before_the_choice_of_a_group():
    chain = build_tree(
        port(), many(100), local_detector=LocalDetector("-s", "10.180.0.0/16")
    ).chains[SVC]

    assert chain[0].endswith("-j KUBE-MARK-MASQ")
    assert all(SVC in text for text in chain[1:])


def test_a_large_cluster_leaves_comments_out_of_groups_as_well():
    chains = build_tree(port(), many(100), is_large=True).chains

    assert not any("comment" in text for name in groups(chains) for text in chains[name])
    assert not any("comment" in text for text in chains[SVC])


# On a kernel that lacks something ----------------------------------------------------------------


def test_without_recent_clients_do_not_stay_but_are_served():
    lacking = build(port(affinity_timeout_s=60), LOCAL, REMOTE, lacks=frozenset({"recent"}))

    assert lacking == build(port(), LOCAL, REMOTE)


def test_without_statistic_all_go_to_one_endpoint():
    lacking = build(port(), LOCAL, REMOTE, local_detector=None, lacks=frozenset({"statistic"}))

    assert lacking.chains[SVC] == (
        f'-m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" -j {SEP1}',
    )


def test_without_reject_who_has_no_endpoints_is_silent():
    [rejected] = entries(build(port()), FILTER, "KUBE-SERVICES")
    [dropped] = entries(build(port(), lacks=frozenset({"REJECT"})), FILTER, "KUBE-SERVICES")

    assert rejected.endswith("-j REJECT --reject-with icmp-port-unreachable")
    assert dropped == rejected.replace("REJECT --reject-with icmp-port-unreachable", "DROP")


@pytest.mark.parametrize(("protocol", "is_there"), [("sctp", False), ("tcp", True)])
def test_without_sctp_only_its_ports_are_left_out(protocol, is_there):
    name = ServicePortName("ns1", "svc1", "p80", protocol)
    fragment = build(port(name=name), LOCAL, lacks=frozenset({"sctp"}))

    assert bool(fragment.chains and fragment.entries) is is_there
