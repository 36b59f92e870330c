"""Lengths of time as Go writes and reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import durations


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (1, "1s"),
        (60, "1m0s"),
        (90, "1m30s"),
        (900, "15m0s"),
        (86400, "24h0m0s"),
        (0.5, "500ms"),
        (1.5, "1.5s"),
        (0.0000015, "1.5\u00b5s"),
        (0.000000007, "7ns"),
        (3600.25, "1h0m0.25s"),
        (-1, "-1s"),
    ],
)
def test_a_duration_is_written_as_go_writes_it(seconds, text):
    assert durations.render(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("5.s", 5),
        ("+2m", 120),
        ("-1s", -1),
        ("3us", 0.000003),
        ("3\u03bcs", 0.000003),
        ("1s1s", 2),
    ],
)
def test_a_duration_is_read_as_go_reads_it(text, seconds):
    assert durations.parse(text) == seconds


@pytest.mark.parametrize("text", ["5", "-5", "1.5"])
def test_a_bare_number_lacks_its_unit(text):
    with pytest.raises(ValueError, match=f'time: missing unit in duration "{text}"'):
        durations.parse(text)


@pytest.mark.parametrize("text", ["", "s", "1d", "1 s", "1s ", "--1s", ".s", "\u0661s", "1h 30m"])
def test_other_text_is_no_duration(text):
    with pytest.raises(ValueError, match="time: invalid duration"):
        durations.parse(text)


def test_a_duration_that_go_could_not_hold_is_refused():
    with pytest.raises(ValueError, match="time: invalid duration"):
        durations.parse("2562048h")


@given(st.integers(min_value=-(2**52), max_value=2**52))
def test_what_is_written_reads_back_to_the_nanosecond(nanoseconds):
    seconds = nanoseconds / 10**9

    assert durations.parse(durations.render(seconds)) == seconds
