"""Who has the xtables lock, as /proc tells it, and how a wait for it is told and counted."""

import os
import threading

import pytest
from structlog.testing import capture_logs

from kubeproxy_py.iptables.lock import Holder, LockWait, LockWatch, find_holders, lock_path
from kubeproxy_py.model import IPFamily

OTHER = Holder(77, "iptables", "iptables -w -t nat -A X")
CHILD = Holder(99, "iptables-restor", "iptables-legacy-restore -w 5 --noflush")


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


class Host:
    """A lock file, and a /proc of our own."""

    def __init__(self, directory):
        self.file = directory / "xtables.lock"
        self.file.touch()
        self.proc = directory / "proc"
        self.proc.mkdir()
        self.process("self", "", "", "mnt:[1]")
        self._locks = []

    def process(self, pid, comm, cmdline, mount="mnt:[1]"):
        directory = self.proc / str(pid)
        (directory / "ns").mkdir(parents=True)
        (directory / "comm").write_text(f"{comm}\n")
        (directory / "cmdline").write_text("\0".join([*cmdline.split(" "), ""]))
        (directory / "ns/mnt").symlink_to(mount)

    def lock(self, pid, *, file=None, kind="FLOCK", waits=False):
        status = (file or self.file).stat()
        where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        arrow = "-> " if waits else ""
        self._locks.append(f"1: {arrow}{kind}  ADVISORY  WRITE {pid} {where} 0 EOF\n")

    def holders(self):
        (self.proc / "locks").write_text("".join(self._locks))
        return find_holders(self.file, self.proc / "locks", self.proc)


def test_a_holder_is_named_with_its_command_line(host):
    host.process(77, "iptables", "iptables -w -t nat")
    host.lock(77)

    assert host.holders() == (Holder(77, "iptables", "iptables -w -t nat"),)


def test_locks_of_other_files_and_kinds_and_who_waits_as_well_are_no_holders(host, tmp_path):
    (tmp_path / "other").touch()
    host.lock(1, file=tmp_path / "other")
    host.lock(2, kind="POSIX")
    host.lock(3, waits=True)
    host._locks.append("\n")

    assert host.holders() == ()


def test_a_holder_whose_files_are_others_is_said_to_be_elsewhere(host):
    host.process(77, "iptables", "iptables", mount="mnt:[2]")
    host.lock(77)
    [holder] = host.holders()

    assert holder.is_elsewhere
    assert "in another container or on the host" in str(holder)


def test_a_holder_that_may_not_be_looked_into_is_taken_for_one_from_here(host):
    host.process(77, "iptables", "iptables")
    (host.proc / "77/ns/mnt").unlink()
    host.lock(77)

    assert host.holders() == (Holder(77, "iptables", "iptables"),)


def test_a_holder_that_is_gone_is_told_by_its_number(host):
    host.lock(77)

    assert host.holders() == (Holder(77, ""),)
    assert str(host.holders()[0]).startswith("a process (pid 77)")


def test_without_a_lock_file_nobody_has_it(host):
    host.lock(77)
    host.file.unlink()

    assert host.holders() == ()


def test_the_lock_file_is_where_libxtables_looks(monkeypatch, tmp_path):
    monkeypatch.delenv("XTABLES_LOCKFILE", raising=False)
    assert str(lock_path()) == "/run/xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path))
    assert lock_path() == tmp_path


class World:
    """A LockWatch, a clock, and who has the lock."""

    def __init__(self, metrics):
        self.now = 100.0
        self.holders = ()
        self._registry = metrics.registry
        self.watch = LockWatch(
            IPFamily.V4, metrics, find=lambda: self.holders, clock=lambda: self.now
        )

    def look(self, *holders, at):
        self.now, self.holders = 100.0 + at, holders
        with capture_logs() as logs:
            self.watch.look(CHILD.pid)
        return [line["event"] for line in logs]

    def metric(self, name):
        labels = {"ip_family": "IPv4"}
        return self._registry.get_sample_value(f"kubeproxy_xtables_lock_{name}", labels)


@pytest.fixture
def world(metrics):
    world = World(metrics)
    world.watch.start()
    return world


def test_who_has_the_lock_need_not_be_watched_closely(world):
    world.holders = (OTHER,)
    assert not world.watch.look(CHILD.pid)
    world.holders = ()
    assert not world.watch.look(CHILD.pid)
    world.holders = (CHILD,)
    assert world.watch.look(CHILD.pid)


def test_a_wait_is_counted_while_it_lasts_and_told_once_after_a_second(world):
    said = [world.look(OTHER, at=seconds) for seconds in (0.05, 0.9, 1.0, 2.0)]

    assert said == [[], [], ["lock.waiting"], []]
    assert world.metric("wait_seconds_total") == pytest.approx(2.0)
    assert world.watch.waited_s == pytest.approx(2.0)
    assert world.metric("waiting") == 1
    assert world.watch.wait == LockWait(2.0, (OTHER,))


def test_it_is_over_when_our_restore_has_the_lock(world):
    world.look(OTHER, at=1.5)

    assert world.look(CHILD, at=1.6) == ["lock.acquired"]
    assert world.metric("waiting") == 0
    assert world.watch.wait is None
    # Writing takes as long as it takes; that is no wait.
    world.look(CHILD, at=9.0)
    assert world.metric("wait_seconds_total") == pytest.approx(1.5)


def test_it_is_over_when_the_restore_has_ended_well(world):
    world.look(OTHER, at=0.5)
    world.watch.finish(has_lock=True)

    assert (world.watch.wait, world.metric("waiting")) == (None, 0)


def test_who_waits_again_after_giving_up_waits_on(world):
    world.look(OTHER, at=4.9)
    world.now = 105.0
    world.watch.finish(has_lock=False)
    world.now = 105.2
    world.watch.start()

    assert world.look(OTHER, at=6.0) == []
    assert world.watch.wait == LockWait(6.0, (OTHER,))
    assert world.metric("wait_seconds_total") == pytest.approx(6.0)


def test_a_wait_that_gave_up_is_over_when_there_is_nothing_to_write_any_more(world):
    world.look(OTHER, at=4.9)
    world.now = 105.0
    world.watch.finish(has_lock=False)
    with capture_logs() as logs:
        world.watch.abandon()
        world.watch.abandon()
    assert (world.watch.wait, world.metric("waiting")) == (None, 0)
    assert [(line["event"], line["waited_s"]) for line in logs] == [("lock.abandoned", 5.0)]
    world.now = 3700.0
    world.watch.start()

    assert world.look(OTHER, at=3600.1) == []
    assert world.metric("wait_seconds_total") == pytest.approx(5.1)


def test_where_nobody_is_seen_to_have_it_only_a_long_wait_is_one(world):
    world.look(at=0.5)
    assert (world.watch.wait, world.metric("wait_seconds_total")) == (None, 0)

    assert world.look(at=1.2) == ["lock.waiting"]
    assert world.metric("wait_seconds_total") == pytest.approx(1.2)
    assert "outside of this container" in str(world.watch.wait)


def test_a_restore_that_never_waited_is_not_told(world):
    with capture_logs() as logs:
        world.watch.finish(has_lock=True)

    assert logs == []
    assert world.metric("wait_seconds_total") == 0


def test_one_that_gave_up_before_anybody_looked_has_waited(world):
    world.now, world.holders = 105.0, (OTHER,)
    world.watch.finish(has_lock=False)

    assert world.watch.wait == LockWait(5.0, (OTHER,))


def test_a_restore_that_runs_is_looked_at_until_it_is_over(metrics):
    has_looked = threading.Event()

    def find():
        has_looked.set()
        return (CHILD,)

    watch = LockWatch(IPFamily.V4, metrics, find=find)
    with watch.following(CHILD.pid):
        assert has_looked.wait(10)
    has_looked.clear()

    assert not [thread for thread in threading.enumerate() if thread.name == "lock-watch"]
