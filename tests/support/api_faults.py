"""
Answers that the tests' API server gives instead of the right ones, until told otherwise.

A fault concerns the requests with its verb and resource; what it does is one of three things: an
error Status, raw bytes, or the right answer cut in half.
"""

import dataclasses
import threading

from tests.support import api_http


@dataclasses.dataclass(slots=True)
class Fault:
    """What to do to matching requests, *times* times (None: for ever)."""

    verb: str | None = None  # None: every one
    resource: str | None = None
    times: int | None = None
    status: int = 0  # 0: not an error Status
    retry_after_s: int | None = None
    raw: bytes | None = None
    is_half: bool = False

    def concerns(self, request: api_http.Request) -> bool:
        return self.verb in (None, request.verb) and self.resource in (None, request.resource)


class Faults:
    """The faults in force, oldest first. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, request: api_http.Request) -> Fault | None:
        """Return the fault for *request*, if any, and count it as used."""
        with self._lock:
            for fault in self._faults:
                if not fault.concerns(request):
                    continue
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                return fault
        return None
