"""
Lengths of time as Go writes them: ``24h0m0s``, ``1m30s``, ``500ms``, ``0s``. Pure.

In the program they are seconds; only files, flags and debug pages see the text. ``render`` and
``parse`` are inverses up to 2**52 nanoseconds (52 days); beyond that the last digits are lost.
"""

import re
from fractions import Fraction
from typing import Final

# Go accepts both spellings of the micro sign, U+00B5 and the Greek letter.
_NANOSECONDS: Final = {
    "ns": 1,
    "us": 10**3,
    "\u00b5s": 10**3,
    "\u03bcs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_PART: Final = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|\u00b5s|\u03bcs|ms|s|m|h)"
_DURATION: Final = re.compile(rf"([+-]?)((?:{_PART})+)")
_PARTS: Final = re.compile(r"([0-9.]+)([^0-9.]+)")

# Go counts nanoseconds in an int64; a longer duration is refused rather than wrapped.
_MAX_NANOSECONDS: Final = 2**63 - 1


class Duration(float):
    """A length of time in seconds. A type of its own so that files spell it as Go does."""

    __slots__ = ()


def parse(text: str) -> Duration:
    """Read Go's text form. Raises ValueError with Go's message."""
    if text in {"0", "+0", "-0"}:
        return Duration(0)
    match = _DURATION.fullmatch(text)
    if match is None:
        # Go tells a bare number apart: it is the mistake people make.
        reason = "missing unit in" if re.fullmatch(r"[+-]?[0-9]+\.?[0-9]*", text) else "invalid"
        raise ValueError(f'time: {reason} duration "{text}"')
    sign, parts = match.groups()
    # Each part is cut to whole nanoseconds, as Go does.
    nanoseconds = sum(
        int(Fraction(number.removesuffix(".")) * _NANOSECONDS[unit])
        for number, unit in _PARTS.findall(parts)
    )
    if nanoseconds > _MAX_NANOSECONDS:
        raise ValueError(f'time: invalid duration "{text}"')
    return Duration((-nanoseconds if sign == "-" else nanoseconds) / 10**9)


def render(seconds: float) -> str:
    """Write *seconds* in Go's text form, rounded to nanoseconds."""
    nanoseconds = round(Fraction(seconds) * 10**9)
    sign = "-" if nanoseconds < 0 else ""
    nanoseconds = abs(nanoseconds)
    if nanoseconds == 0:
        return "0s"
    if nanoseconds < 10**9:
        # Below a second Go changes the unit instead of writing 0.5s.
        unit = "ns" if nanoseconds < 10**3 else "\u00b5s" if nanoseconds < 10**6 else "ms"
        return f"{sign}{_decimal(nanoseconds, _NANOSECONDS[unit])}{unit}"
    minutes, rest = divmod(nanoseconds, 60 * 10**9)
    text = f"{_decimal(rest, 10**9)}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
    return sign + text


def _decimal(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    if not rest:
        return str(whole)
    digits = len(str(unit)) - 1
    return f"{whole}.{rest:0{digits}d}".rstrip("0")
