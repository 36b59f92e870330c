"""Signs of life, by a clock that only moves when told."""

from kubeproxy_py.pulses import Pulses


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_silence_is_told_once_it_is_longer_than_allowed():
    clock = Clock()
    pulses = Pulses(clock)
    beat = pulses.expect("sync", 10.0)
    clock.now += 10.0
    assert pulses.silence("sync") is None
    clock.now += 1.0

    assert pulses.silence("sync") == "no sign of life for 11 s"
    assert pulses.has_silent()
    beat()
    assert pulses.silence("sync") is None
    assert not pulses.has_silent()


def test_expecting_somebody_counts_as_having_heard_of_them():
    clock = Clock()
    pulses = Pulses(clock)
    pulses.expect("sync", 10.0)

    assert pulses.age_s("sync") == 0.0
    assert pulses.silence("sync") is None


def test_each_has_its_own_age_and_limit():
    clock = Clock()
    pulses = Pulses(clock)
    pulses.expect("slow", 100.0)
    quick = pulses.expect("quick", 5.0)
    clock.now += 6.0

    assert pulses.silence("slow") is None
    assert pulses.silence("quick")
    quick()
    assert (pulses.age_s("slow"), pulses.age_s("quick")) == (6.0, 0.0)


def test_nobody_is_silent_where_nobody_is_expected():
    assert not Pulses().has_silent()
