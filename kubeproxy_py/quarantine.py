"""
Which Services' rules the kernel refused, and when to try them again.

Arithmetic on names and times that are passed in. One refused rule must not keep all other Services from
being programmed: its Service is set aside, with the rules it had before, until it changes or its time
has come.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from kubeproxy_py.model import ServiceName, ServiceState

# A module may be loaded, or a package installed, while we wait; it is not worth a look every second.
_FIRST_RETRY_S: Final = 30.0
_LONGEST_RETRY_S: Final = 900.0


class Case(msgspec.Struct, frozen=True):
    """One Service that was set aside."""

    state: ServiceState  # what could not be programmed
    reason: str
    retry_at: float
    attempts: int
    since: float  # when it was first refused


class Quarantine:
    """The Services of one family that are set aside."""

    def __init__(self) -> None:
        self.cases: dict[ServiceName, Case] = {}
        self._attempts: dict[ServiceName, int] = {}
        self._since: dict[ServiceName, float] = {}

    def admit(self, name: ServiceName, state: ServiceState, reason: str, now: float) -> None:
        """Set *name* aside because *state* was refused."""
        attempts = self._attempts.get(name, 0) + 1
        self._attempts[name] = attempts
        wait_s = min(_FIRST_RETRY_S * 2 ** min(attempts - 1, 10), _LONGEST_RETRY_S)
        since = self._since.setdefault(name, now)
        self.cases[name] = Case(state, reason, now + wait_s, attempts, since)

    def release_changed(self, names: Iterable[ServiceName]) -> None:
        """Forget Services that have changed: what was refused is not what they are now."""
        for name in names:
            self.cases.pop(name, None)
            self._attempts.pop(name, None)
            self._since.pop(name, None)

    def release_due(self, now: float) -> dict[ServiceName, ServiceState]:
        """Return, and no longer set aside, what should be tried again."""
        due = {name: case.state for name, case in self.cases.items() if case.retry_at <= now}
        for name in due:
            del self.cases[name]
        return due

    def settle(self) -> None:
        """Take note that everything that is not set aside now has been programmed."""
        self._since = {name: case.since for name, case in self.cases.items()}

    def next_retry_at(self) -> float:
        """Return when something should be tried again; infinity: never."""
        return min((case.retry_at for case in self.cases.values()), default=float("inf"))
