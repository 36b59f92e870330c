"""
Who was last heard of when, and who has been silent for too long: threads that turn, watches that tell.

It knows no threads and no sockets; those who live say so. By a clock that no NTP step moves.
"""

import threading
import time
from collections.abc import Callable


class Pulses:
    """Signs of life by name. All methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._last: dict[str, float] = {}
        self._limit_s: dict[str, float] = {}

    def expect(self, name: str, limit_s: float) -> Callable[[], None]:
        """Expect a sign of life of *name* at least every *limit_s*, from now on; return how to give it."""

        def beat() -> None:
            with self._lock:
                self._last[name] = self._clock()

        with self._lock:
            self._limit_s[name] = limit_s
        beat()
        return beat

    def age_s(self, name: str) -> float:
        """Return how long ago *name*, which is expected, was heard of."""
        with self._lock:
            return self._clock() - self._last[name]

    def silence(self, name: str) -> str | None:
        """Say so if *name* has been silent for longer than it may; None: it is well."""
        age_s = self.age_s(name)
        with self._lock:
            limit_s = self._limit_s[name]
        return None if age_s <= limit_s else f"no sign of life for {age_s:.0f} s"

    def has_silent(self) -> bool:
        """Tell whether anybody has been silent for longer than allowed."""
        with self._lock:
            names = tuple(self._last)
        return any(self.silence(name) for name in names)
