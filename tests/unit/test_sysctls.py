"""Kernel parameters, in a directory that stands for the host."""

import os
import re

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import errors, sysctls

NETFILTER = "proc/sys/net/netfilter"
MAX = f"{NETFILTER}/nf_conntrack_max"
ESTABLISHED = f"{NETFILTER}/nf_conntrack_tcp_timeout_established"
CLOSE_WAIT = f"{NETFILTER}/nf_conntrack_tcp_timeout_close_wait"
LIBERAL = f"{NETFILTER}/nf_conntrack_tcp_be_liberal"
UDP = f"{NETFILTER}/nf_conntrack_udp_timeout"
UDP_STREAM = f"{NETFILTER}/nf_conntrack_udp_timeout_stream"
HASHSIZE = "sys/module/nf_conntrack/parameters/hashsize"
ROUTE_LOCALNET = "proc/sys/net/ipv4/conf/all/route_localnet"
CPUS = "sys/devices/system/cpu/online"
OOM = "proc/self/oom_score_adj"

FRESH = {
    MAX: "1000",
    ESTABLISHED: "432000",
    CLOSE_WAIT: "60",
    LIBERAL: "0",
    UDP: "30",
    UDP_STREAM: "120",
    HASHSIZE: "65536",
    CPUS: "0-3",
}

NOTHING = {
    "max_per_core": 0,
    "min": 0,
    "tcp_established_timeout_s": 0,
    "tcp_close_wait_timeout_s": 0,
    "tcp_be_liberal": False,
    "udp_timeout_s": 0,
    "udp_stream_timeout_s": 0,
}


class Host:
    """Files under a directory, by their path."""

    def __init__(self, root, files):
        self.root = root
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")

    def __getitem__(self, name):
        return (self.root / name).read_text().strip()

    def apply(self, **settings):
        sysctls.apply_conntrack(**(NOTHING | settings), root=self.root)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path, FRESH)


def test_nothing_configured_changes_nothing(host):
    host.apply()

    assert {name: host[name] for name in FRESH} == FRESH


@pytest.mark.parametrize(
    ("max_per_core", "floor", "wanted"),
    [
        pytest.param(32768, 131072, "131072", id="product equals the floor"),
        pytest.param(50000, 131072, "200000", id="product above the floor"),
        pytest.param(10, 131072, "131072", id="product below the floor"),
        pytest.param(1048576, 131072, "1048576", id="product above the limit"),
        pytest.param(1048576, 2000000, "1048576", id="product above the limit and floor too"),
        pytest.param(10, 2000000, "2000000", id="floor above the limit"),
    ],
)
def test_the_size_of_the_table_is_chosen_as_by_kube_proxy(host, max_per_core, floor, wanted):
    host.apply(max_per_core=max_per_core, min=floor)

    assert host[MAX] == wanted


def test_a_floor_alone_changes_nothing(host):
    host.apply(min=131072)

    assert host[MAX] == "1000"


def test_the_hash_table_grows_with_the_entries(host):
    host.apply(max_per_core=100000, min=0)

    assert host[HASHSIZE] == "100000"


def test_the_hash_table_never_shrinks(host):
    host.apply(max_per_core=1000, min=0)

    assert host[HASHSIZE] == "65536"


def test_time_outs_are_written_in_whole_seconds(host):
    host.apply(
        tcp_established_timeout_s=86400.0,
        tcp_close_wait_timeout_s=3600.9,
        udp_timeout_s=31.5,
        udp_stream_timeout_s=180,
    )

    assert [host[name] for name in (ESTABLISHED, CLOSE_WAIT, UDP, UDP_STREAM)] == [
        "86400", "3600", "31", "180",
    ]  # fmt: skip


def test_less_than_a_second_is_no_time_out(host):
    host.apply(udp_timeout_s=0.9)

    assert host[UDP] == "30"


def test_liberal_tracking_is_switched_on(host):
    host.apply(tcp_be_liberal=True)

    assert host[LIBERAL] == "1"


def test_liberal_tracking_is_never_switched_off(tmp_path):
    host = Host(tmp_path, FRESH | {LIBERAL: "1"})

    host.apply(tcp_be_liberal=False)

    assert host[LIBERAL] == "1"


def test_values_that_are_right_already_are_not_written(host):
    for name in (MAX, ESTABLISHED, LIBERAL):
        (host.root / name).chmod(0o444)
    before = (host.root / ESTABLISHED).stat().st_mtime_ns

    host.apply(max_per_core=250, min=1000, tcp_established_timeout_s=432000)

    assert (host.root / ESTABLISHED).stat().st_mtime_ns == before


def test_each_write_is_logged_with_the_old_and_the_new_value(host):
    with capture_logs() as logs:
        host.apply(udp_timeout_s=45)

    assert logs == [
        {"event": "sysctl.set", "log_level": "info", "name": f"/{UDP}", "old": 30, "new": 45}
    ]


def test_values_are_written_in_kube_proxys_order(host):
    with capture_logs() as logs:
        host.apply(
            max_per_core=100000,
            tcp_established_timeout_s=1,
            tcp_close_wait_timeout_s=1,
            tcp_be_liberal=True,
            udp_timeout_s=1,
            udp_stream_timeout_s=1,
        )

    assert [entry["name"].lstrip("/") for entry in logs] == [
        MAX, HASHSIZE, ESTABLISHED, CLOSE_WAIT, LIBERAL, UDP, UDP_STREAM,
    ]  # fmt: skip


def test_a_value_that_cannot_be_read_is_written(tmp_path):
    host = Host(tmp_path, FRESH | {UDP: "?"})

    host.apply(udp_timeout_s=45)

    assert host[UDP] == "45"


@pytest.mark.parametrize(
    ("missing", "settings"),
    [
        pytest.param(MAX, {"max_per_core": 1000}, id="the size of the table"),
        pytest.param(HASHSIZE, {"max_per_core": 1000}, id="the size of the hash table"),
        pytest.param(UDP, {"udp_timeout_s": 30}, id="a time-out"),
    ],
)
def test_a_parameter_that_cannot_be_opened_is_fatal_in_kube_proxys_words(host, missing, settings):
    (host.root / missing).unlink()

    wanted = (
        "could not set conntrack parameters from kube-proxy configuration: "
        f"open {host.root}/{missing}: no such file or directory (--init-only sets them"
    )
    with pytest.raises(errors.KubeProxyError, match=re.escape(wanted)):
        host.apply(**settings)


def test_a_missing_parameter_is_not_created_as_a_file(host):
    (host.root / UDP).unlink()

    with pytest.raises(errors.KubeProxyError):
        host.apply(udp_timeout_s=30)

    assert not (host.root / UDP).exists()


def test_a_value_that_the_kernel_refuses_is_fatal_and_named(host):
    (host.root / UDP).unlink()
    # A file of this process that takes no more than 1000, so nothing is changed.
    (host.root / UDP).symlink_to("/proc/self/oom_score_adj")

    wanted = f"write {host.root}/{UDP}: invalid argument"
    with pytest.raises(errors.KubeProxyError, match=re.escape(wanted)):
        host.apply(udp_timeout_s=1001)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        pytest.param("0", False, id="strict"),
        pytest.param("1", True, id="liberal"),
        pytest.param("junk", False, id="unreadable"),
    ],
)
def test_liberal_tracking_is_read(tmp_path, content, wanted):
    host = Host(tmp_path, {LIBERAL: content})

    assert sysctls.conntrack_is_liberal(host.root) is wanted


def test_without_conntrack_nothing_is_liberal(tmp_path):
    assert not sysctls.conntrack_is_liberal(tmp_path)


def test_localhost_is_made_routable(tmp_path):
    host = Host(tmp_path, {ROUTE_LOCALNET: "0"})

    sysctls.ensure_route_localnet(host.root)

    assert host[ROUTE_LOCALNET] == "1"


def test_localhost_that_cannot_be_made_routable_is_fatal_in_kube_proxys_words(tmp_path):
    wanted = (
        "unable to create proxier: unable to create ipv4 proxier: "
        "can't set sysctl net/ipv4/conf/all/route_localnet to 1: open "
    )
    with pytest.raises(errors.KubeProxyError, match=re.escape(wanted)):
        sysctls.ensure_route_localnet(tmp_path)


ACCOUNTING = f"{NETFILTER}/nf_conntrack_acct"
EVENTS = f"{NETFILTER}/nf_conntrack_events"


@pytest.mark.parametrize(
    ("events", "wanted"),
    [("0", "1"), ("1", "1"), ("2", "2")],
    ids=["off", "on", "if somebody listens"],
)
def test_accounting_is_switched_on_and_ends_are_told(tmp_path, events, wanted):
    host = Host(tmp_path, {ACCOUNTING: "0", EVENTS: events})

    assert sysctls.ensure_conntrack_accounting(host.root)
    assert (host[ACCOUNTING], host[EVENTS]) == ("1", wanted)


def test_accounting_that_is_on_already_needs_no_permission(tmp_path):
    host = Host(tmp_path, {ACCOUNTING: "1", EVENTS: "2"})
    for name in (ACCOUNTING, EVENTS):
        (host.root / name).chmod(0o444)
    before = (host.root / ACCOUNTING).stat().st_mtime_ns

    assert sysctls.ensure_conntrack_accounting(host.root)
    assert (host.root / ACCOUNTING).stat().st_mtime_ns == before


@pytest.mark.parametrize("files", [{}, {ACCOUNTING: "0"}, {ACCOUNTING: "1", EVENTS: "yes"}])
def test_accounting_that_cannot_be_switched_on_is_a_warning(tmp_path, files):
    host = Host(tmp_path, files)
    with capture_logs() as logs:
        assert not sysctls.ensure_conntrack_accounting(host.root)

    assert logs[-1]["event"] == "conntrack.accounting_refused"
    assert "packets and bytes" in logs[-1]["consequence"]


def test_the_oom_score_is_written(tmp_path):
    host = Host(tmp_path, {OOM: "0"})

    assert sysctls.set_oom_score_adj(-999, host.root)
    assert host[OOM] == "-999"


def test_a_refused_oom_score_is_tried_twice_and_then_left(tmp_path):
    pauses = []

    with capture_logs() as logs:
        is_set = sysctls.set_oom_score_adj(-999, tmp_path, sleep=pauses.append)

    assert (is_set, pauses) == (False, [0.1])
    assert {entry["event"] for entry in logs} == {"oom_score_adj.set_failed"}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        pytest.param("0", 1, id="one"),
        pytest.param("0-7", 8, id="a range"),
        pytest.param("0-3,8,10-11", 7, id="ranges with holes"),
    ],
)
def test_cpus_are_counted_from_the_list_of_online_ones(tmp_path, content, wanted):
    host = Host(tmp_path, {CPUS: content})

    assert sysctls.cpu_count(host.root) == wanted


def test_without_that_list_the_runtime_is_asked(tmp_path):
    assert sysctls.cpu_count(tmp_path) == (os.cpu_count() or 1)
