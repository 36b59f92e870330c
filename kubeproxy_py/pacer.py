"""
When to sync. Arithmetic on times that are passed in: no clock, no thread.

A change is written after a short wait for those that come with it, and then no more often than what
a sync costs allows. A sync that failed is tried again, without anybody having to ask.
"""

from typing import Final, Literal

Outcome = Literal["ok", "failed", "locked", "disturbed"]

# A Service and its first slice, or the slices of a rolling update, arrive within milliseconds of
# each other. Longer would be felt, shorter would write them one by one.
_COALESCE_S: Final = 0.01
# After a sync that took t, the next starts no sooner than t later: at most half of the time, of one
# core and of the xtables lock, goes into writing rules. kube-proxy waits a fixed second.
_MAX_PAUSE_S: Final = 1.0
# The restore itself has waited seconds for the lock; whoever holds it may let go at any moment.
_LOCKED_RETRY_S: Final = 0.2
# Somebody changed our rules while we wrote them, which explains the failure; what we know of them by
# then, or read again, is right.
_DISTURBED_RETRY_S: Final = 0.05
_FIRST_RETRY_S: Final = 1.0
# A look that took t is followed by the next no sooner than this many t later: reading a big node's rules
# takes a second of a core, for what is hardly ever there.
_LOOK_EVERY: Final = 50


class Pacer:
    """Decides when the next sync is due."""

    def __init__(
        self, *, retry_s: float, audit_s: float, min_interval_s: float | None = None
    ) -> None:
        """
        Set the pace.

        Args:
            retry_s: the longest wait before a failed sync is tried again.
            audit_s: how long after a sync a look at the whole kernel is due though nobody asked; longer
                where that takes long.
            min_interval_s: a fixed pause after each sync; None adapts it to what syncs cost.
        """
        self._retry_s = retry_s
        self._audit_s = audit_s
        self._min_interval_s = min_interval_s
        self._requested_at: float | None = None
        self._not_before = float("-inf")
        self._retry_at = float("inf")
        self._look_at = float("inf")
        self._is_look = False
        self._look_took_s = 0.0
        self._failures = 0

    def request(self, now: float) -> None:
        """Ask for a sync. Asking again before it has started changes nothing."""
        if self._requested_at is None:
            self._requested_at = now

    def started(self) -> None:
        """Say that a sync begins: what is asked from now on is not in it."""
        # Cleared on start, not on finish: a change that arrives while we are writing rules is not
        # in them, so it needs a sync of its own.
        self._requested_at = None

    def take_look(self, now: float) -> bool:
        """Tell whether the sync that begins should look at the whole kernel; it is due no more then.

        Asked for or not: in a cluster where something changes all the time, nobody would ever look.
        """
        if self._look_at > now:
            return False
        self._look_at = float("inf")
        self._is_look = True
        return True

    def finished(self, now: float, *, took_s: float, outcome: Outcome) -> None:
        """Say how the sync that ended *now* went."""
        pause = min(took_s, _MAX_PAUSE_S) if self._min_interval_s is None else self._min_interval_s
        if outcome == "ok":
            self._failures = 0
            self._retry_at = float("inf")
            if self._is_look:
                self._look_took_s = took_s
            look_in_s = max(self._audit_s, _LOOK_EVERY * self._look_took_s)
            self._look_at = min(self._look_at, now + look_in_s)
        elif outcome == "locked":
            self._retry_at = now + _LOCKED_RETRY_S
        elif outcome == "disturbed":
            self._retry_at = now + _DISTURBED_RETRY_S
        else:
            # A change may be what mends it, so it need not wait as long as a mere retry.
            pause = max(pause, min(_FIRST_RETRY_S, self._retry_s))
            self._retry_at = now + min(_FIRST_RETRY_S * 2**self._failures, self._retry_s)
            # Bounded, so that a fault that lasts for days does not overflow the power.
            self._failures = min(self._failures + 1, 30)
        self._is_look = False
        self._not_before = now + pause

    def remind(self, at: float) -> None:
        """Let a look at the whole kernel be due *at* that time at the latest, though nobody asks."""
        self._look_at = min(self._look_at, at)

    def due_at(self) -> float:
        """Return when the next sync should start; infinity: when somebody asks."""
        asked_at = float("inf")
        if self._requested_at is not None:
            wait = _COALESCE_S if self._min_interval_s is None else 0.0
            asked_at = self._requested_at + wait
        return max(min(asked_at, self._retry_at, self._look_at), self._not_before)
