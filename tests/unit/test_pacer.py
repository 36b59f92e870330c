"""When the next sync is due: arithmetic."""

import pytest

from kubeproxy_py.pacer import Pacer

NEVER = float("inf")


@pytest.fixture
def pacer():
    return Pacer(retry_s=30, audit_s=600)


def sync(pacer, at, *, took_s=0.0, outcome="ok"):
    pacer.started()
    pacer.finished(at, took_s=took_s, outcome=outcome)


def test_nothing_is_due_before_somebody_asks(pacer):
    assert pacer.due_at() == NEVER


def test_request_waits_a_moment_for_those_that_come_with_it(pacer):
    pacer.request(100)

    assert pacer.due_at() == 100.01


def test_asking_again_does_not_postpone(pacer):
    pacer.request(100)
    pacer.request(100.009)

    assert pacer.due_at() == 100.01


def test_change_during_a_sync_is_not_lost(pacer):
    pacer.request(100)
    pacer.started()
    pacer.request(101)
    pacer.finished(101.5, took_s=0.5, outcome="ok")

    assert pacer.due_at() == 102


def test_start_answers_the_request(pacer):
    pacer.request(100)
    sync(pacer, 101)

    # What is due is the look that nobody asks for.
    assert pacer.due_at() == 701


def test_pause_is_as_long_as_the_sync_took(pacer):
    sync(pacer, 100, took_s=0.4)
    pacer.request(100.1)

    assert pacer.due_at() == 100.4


def test_pause_is_never_longer_than_a_second(pacer):
    sync(pacer, 100, took_s=20)
    pacer.request(100.1)

    assert pacer.due_at() == 101


def test_fixed_interval_counts_from_the_end_of_the_last_sync():
    pacer = Pacer(retry_s=30, audit_s=600, min_interval_s=5)
    sync(pacer, 100, took_s=3)
    pacer.request(101)

    assert pacer.due_at() == 105


def test_fixed_interval_lets_the_first_request_through_at_once():
    pacer = Pacer(retry_s=30, audit_s=600, min_interval_s=5)
    pacer.request(100)

    assert pacer.due_at() == 100


def test_audit_is_due_though_nobody_asks(pacer):
    sync(pacer, 100)

    assert pacer.due_at() == 700


def test_failures_are_tried_again_less_and_less_often(pacer):
    waits = []
    now = 100
    for _ in range(7):
        sync(pacer, now, outcome="failed")
        waits.append(pacer.due_at() - now)
        now = pacer.due_at()

    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_failures_for_days_do_not_overflow(pacer):
    for _ in range(5000):
        sync(pacer, 100, outcome="failed")

    assert pacer.due_at() == 130


def test_change_after_a_failure_does_not_wait_for_the_retry(pacer):
    for _ in range(5):
        sync(pacer, 100, outcome="failed")
    pacer.request(100.1)

    assert pacer.due_at() == 101


def test_retry_is_never_later_than_asked_for():
    pacer = Pacer(retry_s=0.5, audit_s=600)
    sync(pacer, 100, outcome="failed")

    assert pacer.due_at() == 100.5


def test_success_forgets_the_failures(pacer):
    for _ in range(4):
        sync(pacer, 100, outcome="failed")
    sync(pacer, 100)
    sync(pacer, 100, outcome="failed")

    assert pacer.due_at() == 101


def test_held_lock_is_tried_again_soon(pacer):
    for now in (100, 101, 102):
        sync(pacer, now, outcome="locked")

        assert pacer.due_at() == now + 0.2


def test_a_look_is_due_though_something_is_asked_for_all_the_time():
    pacer = Pacer(retry_s=30, audit_s=100)
    pacer.finished(0, took_s=0, outcome="ok")
    for now in range(1, 100):
        assert not pacer.take_look(now)
        pacer.request(now)
        pacer.started()
        pacer.finished(now, took_s=0, outcome="ok")

    assert pacer.take_look(100)
    assert not pacer.take_look(100)
    pacer.finished(101, took_s=0, outcome="ok")
    assert pacer.due_at() == 201


def test_a_look_that_takes_long_is_seldom():
    pacer = Pacer(retry_s=30, audit_s=100)
    pacer.finished(0, took_s=0, outcome="ok")
    assert pacer.take_look(100)
    pacer.finished(110, took_s=10, outcome="ok")
    # What other syncs take says nothing about it.
    pacer.finished(120, took_s=1, outcome="ok")

    assert pacer.due_at() == 610


def test_a_retry_is_no_reason_to_look():
    pacer = Pacer(retry_s=30, audit_s=100)
    pacer.finished(0, took_s=0, outcome="locked")

    assert not pacer.take_look(pacer.due_at())
