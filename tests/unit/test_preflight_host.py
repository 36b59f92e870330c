"""What is found on a host: one fact that is wrong, one finding, and a sound host has none."""

import msgspec
import pytest

from kubeproxy_py import config, options
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.model import IPFamily
from kubeproxy_py.node_ports import Listener
from kubeproxy_py.preflight import host
from kubeproxy_py.preflight.facts import HostFacts, Leftover, Process, Program, StateFile

V4, V6 = IPFamily.V4, IPFamily.V6
IPS = options.node_ips("", ["192.168.0.2"])
MAX = "net/netfilter/nf_conntrack_max"
COUNT = "net/netfilter/nf_conntrack_count"
LOCALNET = "net/ipv4/conf/all/route_localnet"

STATE_FILE = StateFile(
    path="/var/lib/kubeproxy-py/state", directory="/var/lib/kubeproxy-py", filesystem="ext4"
)
SOUND = HostFacts(
    release="6.1.0",
    capabilities=frozenset({"NET_ADMIN", "NET_RAW"}),
    lock_path="/run/xtables.lock",
    programs=(Program("nft", V4, (1, 8, 9)), Program("nft", V6, (1, 8, 9))),
    backend="nft",
    backend_reason="kubelet's hint chains",
    sysctls={
        "net/ipv4/ip_forward": "1",
        "net/ipv6/conf/all/forwarding": "1",
        "net/bridge/bridge-nf-call-iptables": "1",
        "net/bridge/bridge-nf-call-ip6tables": "1",
        LOCALNET: "1",
        "net/ipv4/ip_local_port_range": "32768\t60999",
        "net/ipv4/ip_local_reserved_ports": "",
        MAX: "1000",
        COUNT: "10",
    },
    wanted_sysctls={MAX: 1000},
    conntrack_buckets=1000,
    conntrack_stats={"drop": 0, "early_drop": 0, "insert_failed": 0},
    rp_filter={"eth0": 0, "eth1": 0},
    uplinks=frozenset({"eth0"}),
    addresses=frozenset({"192.168.0.2", "fd00::2", "127.0.0.1"}),
)


def judged(facts=SOUND, *, sysctls=None, settings=None, **changes):
    """Return what is found of SOUND with *changes*, without what is well."""
    changed = msgspec.structs.replace(facts, **changes)
    changed = msgspec.structs.replace(changed, sysctls={**changed.sysctls, **(sysctls or {})})
    found = host.judge(changed, settings or KubeProxyConfiguration(), IPS)
    return [finding for finding in found if finding.severity != "ok"]


def brief(found):
    return [(finding.topic, finding.severity) for finding in found]


def configured(path, value):
    return config.replace(KubeProxyConfiguration(), path, value)


def listener(port, address="0.0.0.0", family=V4, **fields):
    return Listener("tcp", family, address, port, 7, **fields)


def test_a_sound_host_has_no_findings():
    assert judged() == []


def test_a_sound_host_tells_what_was_looked_at():
    topics = {found.topic for found in host.judge(SOUND, KubeProxyConfiguration(), IPS)}

    assert topics >= {"privileges", "iptables-backend", "ip-forward", "conntrack-table", "ports"}


CASES = {
    "no rights": ({"capabilities": frozenset({"NET_RAW"})}, [("privileges", "warning")]),
    "rights unknown": ({"capabilities": None}, []),
    "lock": ({"lock_failure": "is read-only"}, [("xtables-lock", "warning")]),
    "no lock file": ({"lock_path": ""}, []),
    "state file": ({"state_file": STATE_FILE}, []),
    "state file that cannot be kept": (
        {"state_file": msgspec.structs.replace(STATE_FILE, failure="no", is_open=True)},
        [("state-file", "warning")],
    ),
    "state file that cannot be kept by this user": (
        {
            "state_file": msgspec.structs.replace(STATE_FILE, failure="no"),
            "capabilities": frozenset({"NET_RAW"}),
        },
        [("privileges", "warning"), ("state-file", "info")],
    ),
    "state file of another user": (
        {"state_file": msgspec.structs.replace(STATE_FILE, is_foreign=True)},
        [("state-file", "warning")],
    ),
    "state file that others may replace": (
        {"state_file": msgspec.structs.replace(STATE_FILE, is_open=True)},
        [("state-file", "warning")],
    ),
    "state file in memory": (
        {"state_file": msgspec.structs.replace(STATE_FILE, filesystem="tmpfs")},
        [("state-file", "warning")],
    ),
    "state file in memory that others may replace": (
        {"state_file": msgspec.structs.replace(STATE_FILE, filesystem="ramfs", is_open=True)},
        [("state-file", "warning"), ("state-file", "warning")],
    ),
    "state file of a container": (
        {"state_file": msgspec.structs.replace(STATE_FILE, filesystem="overlay")},
        [("state-file", "info")],
    ),
    "no backend": (
        {"backend": "", "backend_failure": "nothing works", "programs": ()},
        [("iptables-backend", "error")],
    ),
    "old nft": (
        {"programs": (Program("nft", V4, (1, 8, 2)), Program("nft", V6, (1, 8, 9)))},
        [("iptables-version", "warning")],
    ),
    "old legacy": (
        {
            "backend": "legacy",
            "programs": (Program("legacy", V4, (1, 6, 1)), Program("legacy", V6, (1, 8, 9))),
        },
        [("iptables-version", "info")],
    ),
    "no IPv6": ({"has_ipv6": False, "programs": SOUND.programs[:1]}, [("ip-families", "info")]),
    "no ip6tables": ({"programs": SOUND.programs[:1]}, [("ip-families", "info")]),
    "no program of the backend is known": (
        {"programs": (), "has_ipv6": False}, [("ip-families", "info")],
    ),
    "mixed backends": (
        {"leftovers": (Leftover("legacy", V4, 12),)}, [("other-backend", "warning")],
    ),
    "unreached rules in the other backend": (
        {"leftovers": (Leftover("legacy", V4, 12, is_reached=False),)}, [("other-backend", "info")],
    ),
    "rules in the other backend that may be reached": (
        {"leftovers": (Leftover("legacy", V4, 12, is_reached=None),)},
        [("other-backend", "warning")],
    ),
    "kubelet elsewhere": ({"kubelet_elsewhere": (V4,)}, [("kubelet-backend", "warning")]),
    "nftables mode": (
        {"nft_tables": frozenset({"ip kube-proxy", "ip6 kube-proxy"})},
        [("nft-mode-tables", "warning")],
    ),
    "rules that only nft can show": (
        {"unreadable": ("IPv4 filter/INPUT",)}, [("nft-rules", "info")],
    ),
    "no events": ({"rule_events_failure": "not permitted"}, [("rule-events", "info")]),
    "fanotify does not matter on nft": ({"lock_events_failure": "not permitted"}, []),
    "no nfacct": ({"has_nfacct": False}, [("nfacct", "info")]),
    "kube-proxy": ({"processes": (Process("kube-proxy", 7),)}, [("other-proxy", "warning")]),
    "two proxies": (
        {"processes": (Process("kube-proxy", 7), Process("kubeproxy-py", 8))},
        [("other-proxy", "error")],
    ),
    "ours": ({"processes": (Process("kubeproxy-py", 8),)}, []),
    "ours twice": (
        {"processes": (Process("kubeproxy-py", 8), Process("kubeproxy-py", 9))},
        [("other-proxy", "error")],
    ),
    "firewalld": ({"processes": (Process("firewalld", 7),)}, [("firewalld", "warning")]),
    "firewalld's table": ({"nft_tables": frozenset({"inet firewalld"})}, [("firewalld", "warning")]),
    "strict rp_filter on one of two uplinks": (
        {"rp_filter": {"eth0": 1, "eth1": 2}, "uplinks": frozenset({"eth0", "eth1"})},
        [("rp-filter", "warning")],
    ),
    "strict rp_filter on the only uplink": ({"rp_filter": {"eth0": 1}}, []),
    "strict rp_filter on another interface": ({"rp_filter": {"eth1": 1}}, []),
    "many to a bucket": ({"conntrack_buckets": 100}, [("conntrack-buckets", "warning")]),
    "buckets unknown": ({"conntrack_buckets": 0}, []),
    "drops": ({"conntrack_stats": {"drop": 1}}, [("conntrack-drops", "warning")]),
    "early drops": ({"conntrack_stats": {"early_drop": 1}}, [("conntrack-drops", "warning")]),
    "races": ({"conntrack_stats": {"insert_failed": 1}}, [("conntrack-drops", "info")]),
    "no counters": ({"conntrack_stats": {}}, []),
    "unseen": ({"unseen": ("nft tables: not permitted",)}, [("unchecked", "info")]),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "wanted"), CASES.values(), ids=CASES)
def test_one_fact_is_one_finding(changes, wanted):
    assert brief(judged(**changes)) == wanted


SYSCTLS = {
    "forwarding": ({"net/ipv4/ip_forward": "0"}, [("ip-forward", "error")]),
    "forwarding of IPv6": ({"net/ipv6/conf/all/forwarding": "0"}, [("ip-forward", "error")]),
    "bridges": ({"net/bridge/bridge-nf-call-iptables": "0"}, [("bridge-nf", "warning")]),
    "bridges of IPv6": ({"net/bridge/bridge-nf-call-ip6tables": "0"}, [("bridge-nf", "warning")]),
    "route_localnet to be set": ({LOCALNET: "0"}, [("route-localnet", "info")]),
    "filling": ({COUNT: "800"}, [("conntrack-table", "warning")]),
    "full": ({COUNT: "990"}, [("conntrack-table", "error")]),
    "no limit": ({MAX: "0", COUNT: "990"}, []),
    "no conntrack": ({MAX: ""}, [("conntrack", "error")]),
}


@pytest.mark.parametrize(("changes", "wanted"), SYSCTLS.values(), ids=SYSCTLS)
def test_one_sysctl_is_one_finding(changes, wanted):
    assert brief(judged(sysctls=changes)) == wanted


def test_ipv6_that_is_not_used_need_not_be_forwarded():
    changes = {"net/ipv6/conf/all/forwarding": "0", "net/bridge/bridge-nf-call-ip6tables": "0"}
    linklocal = frozenset({"192.168.0.2", "fe80::1", "::1"})

    assert judged(sysctls=changes, addresses=linklocal) == []


def test_what_is_absent_is_not_judged():
    present = {MAX: "1000", COUNT: "10"}

    assert judged(msgspec.structs.replace(SOUND, sysctls=present)) == []


def test_route_localnet_is_too_much_where_localhost_node_ports_are_off():
    settings = configured("iptables.localhost_node_ports", False)

    assert brief(judged(settings=settings)) == [("route-localnet", "warning")]
    assert judged(settings=settings, sysctls={LOCALNET: "0"}) == []


def test_route_localnet_that_cannot_be_set_keeps_run_from_starting():
    stuck = {"sysctls": {LOCALNET: "0"}, "read_only_sysctls": frozenset({LOCALNET})}

    assert brief(judged(**stuck)) == [("route-localnet", "error")]
    assert brief(judged(capabilities=None, **stuck)) == [("route-localnet", "warning")]


@pytest.mark.parametrize(
    ("capabilities", "severity"),
    [(frozenset({"NET_ADMIN", "NET_RAW"}), "error"), (frozenset({"NET_RAW"}), "warning"), (None, "warning")],
)  # fmt: skip
def test_a_sysctl_that_cannot_be_set_is_worse_for_one_with_rights(capabilities, severity):
    found = judged(
        wanted_sysctls={MAX: 131072, COUNT: 10},
        read_only_sysctls=frozenset({MAX, COUNT}),
        capabilities=capabilities,
    )

    (stuck,) = [finding for finding in found if finding.topic == "conntrack-settings"]
    assert (stuck.severity, stuck.found) == (
        severity, "read-only here: net.netfilter.nf_conntrack_max is 1000, not 131072",
    )  # fmt: skip


def test_the_limit_that_run_sets_is_told():
    found = host.judge(
        msgspec.structs.replace(SOUND, wanted_sysctls={MAX: 131072}), KubeProxyConfiguration(), IPS
    )

    assert "10 of 1,000 connections; `run` sets the limit to 131,072" in {f.found for f in found}


def test_fanotify_matters_on_legacy():
    legacy = tuple(Program("legacy", family, (1, 8, 9)) for family in IPFamily)
    changes = {"backend": "legacy", "programs": legacy, "lock_events_failure": "not permitted"}

    assert brief(judged(**changes)) == [("lock-events", "info")]


# The servers' ports ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "wanted"),
    [
        (listener(10249), ["127.0.0.1:10249"]),
        (listener(10249, "127.0.0.1"), ["127.0.0.1:10249"]),
        (listener(10249, "192.168.0.2"), []),
        (listener(10249, "::", V6, is_dual=True), ["127.0.0.1:10249"]),
        (listener(10249, "::", V6), []),
        (listener(10256, "192.168.0.2"), ["0.0.0.0:10256"]),
        (listener(10256, "::1", V6), []),
        (listener(80), []),
        (listener(10249)._replace(protocol="udp"), []),
    ],
)
def test_a_port_is_taken_where_a_server_could_not_listen(taken, wanted):
    found = judged(listeners=(taken,), owners={7: (9, "nginx")})

    assert [f.found for f in found] == [
        f"{address} ({name}) is taken by nginx (pid 9)"
        for address, name in (("127.0.0.1:10249", "metrics"), ("0.0.0.0:10256", "health"))
        if address in wanted
    ]


def test_a_port_that_is_ours_is_well():
    ours = {"processes": (Process("kubeproxy-py", 9),), "owners": {7: (9, "python3")}}

    assert judged(listeners=(listener(10249), listener(10256)), **ours) == []


def test_who_has_a_port_may_be_hidden():
    (found,) = judged(listeners=(listener(10249),))

    assert found.found == "127.0.0.1:10249 (metrics) is taken by a process that cannot be seen"


def test_with_hard_fail_a_taken_port_is_an_error():
    settings = configured("bind_address_hard_fail", True)

    assert brief(judged(listeners=(listener(10249),), settings=settings)) == [("ports", "error")]


def test_a_server_that_is_switched_off_needs_no_port():
    settings = configured("healthz_bind_address", "")

    assert judged(listeners=(listener(10256),), settings=settings) == []


# Node ports and local ports ----------------------------------------------------------------------


def port_range(local, reserved="", node_ports=()):
    sysctls = {
        "net/ipv4/ip_local_port_range": local, "net/ipv4/ip_local_reserved_ports": reserved,
    }  # fmt: skip
    return host.judge_port_range(HostFacts(sysctls=sysctls), node_ports)


@pytest.mark.parametrize(
    ("local", "reserved", "node_ports", "severity"),
    [
        ("32768\t60999", "", (), "ok"),
        ("32768\t60999", "", (30080,), "ok"),
        ("1024\t65535", "", (), "info"),
        ("1024\t65535", "", (30080,), "warning"),
        ("1024\t65535", "30000-32767", (30080,), "ok"),
        ("1024\t65535", "8472,30080", (30080,), "ok"),
        ("1024\t65535", "8472,30080", (30080, 30081), "warning"),
    ],
)
def test_node_ports_must_not_be_given_to_outgoing_connections(
    local, reserved, node_ports, severity
):
    assert port_range(local, reserved, node_ports).severity == severity


def test_what_was_reserved_stays_so():
    found = port_range("1024\t65535", "8472", (29999, *range(30000, 30010)))

    assert found.command == "sysctl -w net.ipv4.ip_local_reserved_ports=8472,29999-32767"
    assert "node ports 29999, 30000, 30001, 30002, 30003 and 6 more, not reserved" in found.found


def test_without_a_range_nothing_can_be_told():
    assert port_range("") is None
