"""What runs beside a test fails that test."""

import threading

import pytest

from tests.support import background, storm


def fail(_rest):
    raise ValueError("boom")


def test_work_ends_with_its_block():
    steps = []

    def work(rest):
        while not rest(0.0):
            steps.append(threading.current_thread().name)

    with background.Background(work, name="stepper") as stepper:
        while not steps:
            pass

    assert set(steps) == {"stepper"}
    assert not stepper._thread.is_alive()


def test_what_work_raises_the_block_raises():
    with pytest.raises(ValueError, match="boom"), background.Background(fail, name="failing"):
        pass


def test_what_work_raises_is_raised_once():
    with background.Background(fail, name="failing") as failing:
        with pytest.raises(ValueError, match="boom"):
            failing.end()
        failing.end()


def test_a_failure_of_the_block_comes_first_and_names_that_of_the_work():
    with (
        pytest.raises(KeyError) as raised,
        background.Background(fail, name="failing"),
    ):
        raise KeyError("own")

    assert raised.value.__notes__ == ["meanwhile, failing failed: ValueError('boom')"]


def test_work_that_does_not_end_is_a_failure(monkeypatch):
    monkeypatch.setattr(background, "_END_S", 0.0)
    let_go = threading.Event()

    with (
        pytest.raises(AssertionError, match="hanging has not ended"),
        background.Background(lambda _rest: let_go.wait() and None, name="hanging"),
    ):
        pass
    let_go.set()


def test_a_storm_that_breaks_fails_its_test():
    with pytest.raises(AttributeError), storm.Storm(None, (), seed=1) as broken:
        broken._thread.join(10)
