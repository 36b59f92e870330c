"""Reading this host's files; the whole look is in tests/packet/test_check.py."""

import os
from pathlib import Path

import pytest

from kubeproxy_py.preflight import collect
from kubeproxy_py.preflight.collect import Files

STATS = """\
entries  clashres found new drop early_drop insert_failed
00000010  00000000 00000000 00000000 0000000a 00000001 00000002
00000010  00000000 00000000 00000000 00000001 00000000
"""
ROUTES = """\
Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0
eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""


def write(root, **files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Files([root])


def process(root, pid, comm, *words, namespace="net:[1]"):
    directory = root / "proc" / str(pid)
    (directory / "ns").mkdir(parents=True)
    (directory / "comm").write_text(f"{comm}\n")
    (directory / "cmdline").write_text("\0".join([*words, ""]))
    (directory / "ns/net").symlink_to(namespace)


def test_the_first_root_that_has_a_file_counts(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write(first, x="1\n")
    write(second, x="2", y="3")
    files = Files([first, second])

    assert [files.read(name) for name in ("x", "y", "z")] == ["1", "3", None]
    assert files.path("z") == second / "z"


def test_counters_are_summed_over_all_cpus():
    assert collect._conntrack_stats(STATS) == {
        "entries": 32, "clashres": 0, "found": 0, "new": 0,
        "drop": 11, "early_drop": 1, "insert_failed": 2,
    }  # fmt: skip
    assert collect._conntrack_stats("") == {}


def test_uplinks_are_those_with_a_default_route():
    # tun0 has half of the world (0.0.0.0/1).
    assert collect._uplinks(ROUTES) == {"eth0"}
    assert collect._uplinks("") == frozenset()


def test_the_greater_rp_filter_holds(tmp_path):
    base = "proc/sys/net/ipv4/conf"
    files = write(
        tmp_path,
        **{
            f"{base}/all/rp_filter": "1",
            f"{base}/eth0/rp_filter": "0",
            f"{base}/eth1/rp_filter": "2",
        },
    )

    assert collect._rp_filter(files, ["eth0", "eth1", "gone"]) == {"eth0": 1, "eth1": 2, "gone": 1}


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        ("CapEff:\t000001ffffffffff\n", {"NET_ADMIN", "NET_RAW", "SYS_ADMIN"}),
        ("Name:\tx\nCapEff:\t0000000000001000\n", {"NET_ADMIN"}),
        ("CapEff:\t0000000000000000\n", set()),
        ("Name:\tx\n", None),
    ],
)
def test_capabilities_are_read_from_the_process_s_status(tmp_path, status, wanted):
    assert collect._capabilities(write(tmp_path, **{"proc/self/status": status})) == wanted


@pytest.mark.parametrize(
    ("comm", "words", "role"),
    [
        ("kube-proxy", ["/usr/local/bin/kube-proxy", "--config=x"], "kube-proxy"),
        ("firewalld", ["/usr/bin/python3", "-s", "/usr/sbin/firewalld"], "firewalld"),
        ("kubeproxy-py", ["/usr/bin/python3", "/usr/bin/kubeproxy-py", "run"], "kubeproxy-py"),
        ("python3", ["python3", "-m", "kubeproxy_py", "run", "--x"], "kubeproxy-py"),
        ("python3", ["python3", "-m", "kubeproxy_py", "check"], None),
        ("kubeproxy-py", ["kubeproxy-py"], None),
        ("vi", ["vi", "kube-proxy"], None),
    ],
)
def test_a_process_is_told_by_name_or_command_line(tmp_path, comm, words, role):
    process(tmp_path, 7, comm, *words)

    assert collect._role(tmp_path / "proc/7") == role


def test_a_process_that_ended_is_none(tmp_path):
    assert collect._role(tmp_path / "proc/7") is None


def test_processes_of_other_network_namespaces_are_none_of_ours(tmp_path):
    own = Path("/proc/self/ns/net").readlink()
    process(tmp_path, 7, "kube-proxy", namespace=own)
    process(tmp_path, 8, "kube-proxy", namespace="net:[1]")
    process(tmp_path, 9, "firewalld", namespace=own)
    process(tmp_path, 10, "kube-proxy", namespace=own)
    (tmp_path / "proc/10/ns/net").unlink()  # may not be seen

    assert [(found.role, found.pid) for found in collect._processes(Files([tmp_path]))] == [
        ("kube-proxy", 7), ("firewalld", 9),
    ]  # fmt: skip


def test_a_lock_file_must_be_there_or_possible(tmp_path):
    assert collect._lock_failure(tmp_path / "xtables.lock") == ""
    assert "is not there" in collect._lock_failure(tmp_path / "none" / "xtables.lock")
    (tmp_path / "lock").touch()
    assert collect._lock_failure(tmp_path / "lock") == ""


def test_what_cannot_be_looked_at_is_remembered():
    unseen = collect._Unseen()

    def refuse():
        raise OSError(1, "not permitted")

    assert unseen.attempt("sockets", refuse, 3) == 3
    assert unseen.attempt("sockets", lambda: 4, 3) == 4
    assert unseen.said == ["sockets: [Errno 1] not permitted"]


# The state file ----------------------------------------------------------------------------------

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /run rw,nosuid master:3 - tmpfs tmpfs rw
24 22 0:22 / /a\\040b rw - xfs /dev/sdb1 rw
25 22 0:23 / /twice rw - ext4 /dev/sdc1 rw
26 25 0:24 / /twice rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("directory", "wanted"),
    [
        ("/var/lib", "ext4"), ("/run/kubeproxy-py", "tmpfs"), ("/runs", "ext4"), ("/a b", "xfs"),
        ("/twice/x", "tmpfs"),
    ],
)  # fmt: skip
def test_the_deepest_mount_above_a_directory_has_it(directory, wanted):
    assert collect._filesystem(MOUNTS, Path(directory)) == wanted


def test_without_mounts_the_file_system_is_unknown():
    assert collect._filesystem("", Path("/var")) == ""


def state_file(tmp_path, path):
    files = write(tmp_path / "root", **{"proc/self/mountinfo": MOUNTS})
    return collect._state_file(files, path)


def test_a_state_file_whose_directories_are_not_there_yet_can_be_kept(tmp_path):
    tmp_path.chmod(0o700)
    found = state_file(tmp_path, tmp_path / "deep" / "down" / "state")

    assert (found.directory, found.failure, found.filesystem) == (str(tmp_path), "", "ext4")
    assert (found.is_foreign, found.is_open) == (False, False)


def test_a_directory_that_others_may_write_into_is_open(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)

    assert state_file(tmp_path, tmp_path / "open" / "state").is_open


def test_a_directory_of_another_user_is_foreign(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 65534, 65534)

    assert state_file(tmp_path, tmp_path / "theirs" / "state").is_foreign


def test_what_stands_in_the_way_of_a_state_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "directory").mkdir()

    assert "file is not a directory" in state_file(tmp_path, tmp_path / "file" / "state").failure
    assert "No such file" in state_file(tmp_path, tmp_path / "link" / "state").failure
    assert state_file(tmp_path, tmp_path / "directory").failure == "it is a directory"
