"""Others' changes of legacy tables, with a kernel that is a dict."""

import threading

import pytest

from kubeproxy_py.drift import Culprit, Suspicion
from kubeproxy_py.iptables.infos import LegacyWatcher
from kubeproxy_py.model import IPFamily

V4, V6 = IPFamily.V4, IPFamily.V6


class Told:
    """What was called back, to be waited for."""

    def __init__(self):
        self.changed = threading.Condition()
        self.suspicions = []

    def __call__(self, suspicion):
        with self.changed:
            self.suspicions.append(suspicion)
            self.changed.notify_all()

    def wait(self, count=1):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.suspicions) >= count, timeout=10)
        return self.suspicions


@pytest.fixture
def infos():
    return {V4: {"nat": b"1", "filter": b"1"}, V6: {"nat": b"1"}}


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def watcher(infos, told, tmp_path):
    watcher = LegacyWatcher(
        (V4, V6),
        told,
        read=lambda family: dict(infos[family]),
        lock_file=tmp_path / "xtables.lock",
        clock=lambda: 0.0,
    )
    watcher.start()
    yield watcher
    watcher.stop()


def test_a_table_of_another_size_is_told_with_its_family(watcher, infos, told):
    infos[V6]["nat"] = b"2"

    assert told.wait() == [Suspicion(V6, None, None)]


def test_a_table_that_appears_is_told(watcher, infos, told):
    infos[V4]["mangle"] = b"1"

    assert told.wait() == [Suspicion(V4, None, None)]


def test_what_we_write_is_not_told(watcher, infos, told):
    with watcher.own(V4, 17):
        infos[V4]["nat"] = b"2"
    infos[V6]["nat"] = b"2"

    assert told.wait() == [Suspicion(V6, None, None)]


def test_what_others_wrote_just_before_us_is_told(watcher, infos, told):
    infos[V4]["nat"] = b"2"
    with watcher.own(V4, 17):
        infos[V4]["nat"] = b"3"

    assert told.wait() == [Suspicion(V4, None, None)]


def test_stopping_what_never_started_does_nothing(told):
    LegacyWatcher((V4,), told).stop()


def test_a_restore_may_end_after_the_watcher(infos, told, tmp_path):
    watcher = LegacyWatcher(
        (V4,), told, read=lambda family: infos[family], lock_file=tmp_path / "lock"
    )
    watcher.start()
    with watcher.own(V4, 17):
        watcher.stop()

    assert told.suspicions == []


def test_a_kernel_that_cannot_be_asked_any_more_is_no_crash(watcher, infos, told):
    watcher._read = lambda family: (_ for _ in ()).throw(OSError("no raw sockets"))
    with watcher.own(V4, 17):
        pass

    assert told.suspicions == []


def test_who_used_the_lock_soon_after_a_look_is_looked_at_ten_seconds_after_it(told):
    """A renamed chain changes no size, and nobody may use the lock again for long."""
    now = 0.0
    users = Users()
    watcher = LegacyWatcher((V4,), told, read=lambda family: {}, clock=lambda: now)
    watcher._lock_users = users
    first, second = Culprit("first", 1), Culprit("second", 2)
    users.told = [(first, True)]
    assert watcher._look() == {V4: (first,)}
    now = 5.0
    users.told = [(second, True)]
    assert watcher._look() == {}
    now = 9.0
    assert watcher._look() == {}
    now = 10.0
    assert watcher._look() == {V4: (second,)}
    now = 30.0
    assert watcher._look() == {}


@pytest.fixture
def quiet(infos, told):
    """Give a watcher of two families without a thread, whose next close look may be at once."""
    watcher = LegacyWatcher(
        (V4, V6), told, read=lambda family: dict(infos[family]), clock=lambda: 0.0
    )
    watcher._lock_users = Users()
    watcher._look()
    return watcher


OTHER = Culprit("ip6tables", 7)


def test_who_used_the_lock_while_we_wrote_one_family_may_have_changed_the_other(quiet, told):
    with quiet.own(V4, 17):
        quiet._lock_users.told = [(OTHER, True)]

    assert told.suspicions == [Suspicion(V4, OTHER, None)]
    assert quiet._look() == {V6: (OTHER,)}
    assert quiet._look() == {}


def test_who_came_between_our_program_s_end_and_ours_is_told_though_another_thread_saw_it(
    quiet, infos, told
):
    quiet._looked_at = -5.0
    with quiet.own(V4, 17):
        infos[V4]["nat"] = b"2"  # ours, and theirs as well
        quiet._lock_users.told = [(OTHER, True)]
        assert quiet._look() == {}

    assert told.suspicions == [Suspicion(V4, OTHER, None)]


def test_who_changed_a_size_of_one_family_may_have_changed_the_other_s_rules(quiet, infos):
    quiet._looked_at = -5.0
    infos[V4]["nat"] = b"2"
    quiet._lock_users.told = [(OTHER, True)]
    assert quiet._look() == {V4: (OTHER,)}
    assert quiet._look() == {}
    quiet._looked_at = -10.0

    assert quiet._look() == {V6: (OTHER,)}


def test_who_writes_one_family_all_the_time_hides_nothing_in_the_other(quiet, infos):
    quiet._looked_at = -10.0
    infos[V4]["nat"] = b"2"
    quiet._lock_users.told = [(OTHER, True)]

    assert quiet._look() == {V4: (OTHER,), V6: (OTHER,)}


class Users:
    """Tells once who has used the lock."""

    def __init__(self):
        self.told = []

    def read(self):
        told, self.told = self.told, []
        return told

    def holders(self):
        return []
