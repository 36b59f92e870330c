"""Another program has the xtables lock: nothing is lost, and who it was is known."""

import contextlib
import json
import sys
import time

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.builders import cluster
from tests.support.object_files import ObjectFiles
from tests.support.proxy import HEALTH_PORT, own_rules, running
from tests.support.traffic import wait_until

pytestmark = pytest.mark.packet

#: From the release of the lock to the rules: what the restore itself takes is milliseconds here.
AFTER_RELEASE_S = 1.0


@pytest.fixture
def files(tmp_path):
    files = ObjectFiles(tmp_path)
    files.write(cluster(5, 2))
    return files


@pytest.fixture
def proxy(clean_lab, backend, files, tmp_path):
    log = tmp_path / "log"
    with running(clean_lab, backend, log, f"--manifests={files.directory}") as proxy:
        proxy.wait_synced()
        yield proxy


@contextlib.contextmanager
def lock_held(lab, *before):
    """Let another process hold the lock while the block lasts; yields it."""
    held = lab.directory / "held"
    held.unlink(missing_ok=True)
    holder = lab.node.popen(
        [
            *before,
            *("flock", "--no-fork", lab.env["XTABLES_LOCKFILE"]),
            *("sh", "-c", f"touch {held}; exec sleep 60"),
        ]
    )
    wait_until(held.exists)
    try:
        yield holder
    finally:
        holder.kill()
        holder.wait(10)


def services(proxy):
    return sum(name.startswith("KUBE-SVC-") for name in proxy.live()["nat"])


def has_waited(proxy, seconds):
    return proxy.metric("kubeproxy_xtables_lock_wait_seconds_total") >= seconds


def change_while_held(proxy, files, seconds):
    """Hold the lock for about *seconds* while Services come; return how late they were programmed."""
    with lock_held(proxy.lab) as holder:
        files.write(cluster(8, 2))
        proxy.wait(lambda: has_waited(proxy, seconds / 2), 30 + seconds)
        files.write(cluster(12, 2))
        proxy.wait(lambda: has_waited(proxy, seconds), 30 + seconds)
        assert services(proxy) == 5
        assert proxy.metric("kubeproxy_xtables_lock_waiting", ip_family="IPv4") == 1
    released = time.monotonic()
    proxy.wait(lambda: services(proxy) == 12, 30)
    return holder, time.monotonic() - released


def test_what_waits_for_the_lock_is_written_when_it_is_free_and_the_holder_named(
    proxy, backend, files
):
    if backend == "nft":
        with lock_held(proxy.lab):
            files.write(cluster(12, 2))
            proxy.wait(lambda: services(proxy) == 12)

        assert not proxy.events("lock.waiting")
        return
    holder, late_s = change_while_held(proxy, files, 2)
    [waiting] = [line for line in proxy.events("lock.waiting") if line["ip_family"] == "IPv4"]
    proxy.wait(lambda: bool(proxy.events("lock.acquired")))

    assert late_s < AFTER_RELEASE_S
    assert holder.pid in waiting["pid"]
    assert f"sleep (pid {holder.pid}): sleep 60" in waiting["holder"]
    proxy.wait(lambda: proxy.metric("kubeproxy_xtables_lock_waiting") == 0)


@pytest.mark.parametrize("backend", ["legacy"], indirect=True)
def test_a_daemon_that_starts_while_the_lock_is_held_waits_and_says_for_whom(
    clean_lab, backend, files, tmp_path
):
    log = tmp_path / "log"
    with (
        lock_held(clean_lab) as holder,
        running(clean_lab, backend, log, f"--manifests={files.directory}") as proxy,
    ):
        proxy.wait(lambda: len(proxy.events("lock.waiting")) == len(IPFamily))
        assert proxy.get("/readyz", HEALTH_PORT)[0] == 503
        assert all(line["pid"] == [holder.pid] for line in proxy.events("lock.waiting"))
        assert own_rules(proxy.live()) == {}
        holder.kill()
        proxy.wait_synced()
        proxy.wait(lambda: proxy.get("/readyz", HEALTH_PORT)[0] == 200)
        assert services(proxy) == 5


@pytest.mark.parametrize("backend", ["legacy"], indirect=True)
@pytest.mark.soak
def test_nothing_is_lost_when_the_lock_is_held_for_half_a_minute(proxy, files):
    before = own_rules(proxy.live())
    _, late_s = change_while_held(proxy, files, 30)

    assert late_s < AFTER_RELEASE_S
    assert proxy.events("sync.delayed")
    # And back: what was written is right, not only there.
    files.write(cluster(5, 2))
    proxy.wait(lambda: own_rules(proxy.live()) == before)


SHOW = (
    "import sys, json; from pathlib import Path; from kubeproxy_py.iptables import lock; "
    "print(json.dumps([[str(found), found.is_elsewhere] "
    "for found in lock.find_holders(Path(sys.argv[1]))]))"
)


def seen_by(lab, *before):
    shown = lab.node.run([*before, sys.executable, "-c", SHOW, lab.env["XTABLES_LOCKFILE"]])
    return json.loads(shown.stdout)


def test_a_holder_in_another_container_is_told_to_be_there(clean_lab):
    with lock_held(clean_lab, "unshare", "--mount", "--pid", "--fork", "--kill-child"):
        [[text, is_elsewhere], *_] = seen_by(clean_lab)

    assert is_elsewhere
    assert "sleep 60" in text


def test_a_holder_that_this_process_namespace_does_not_have_is_not_seen(clean_lab):
    with lock_held(clean_lab):
        assert seen_by(clean_lab, "unshare", "--pid", "--fork", "--mount-proc") == []
