"""
The daemon's threads and its end: all of them run, or the process is on its way out.

The invariant it guards: the process is either whole or gone. A thread that ends unasked ends the
process, with a reason and a status that make the supervisor start it again; the rules stay in the
kernel in any case.
"""

import queue
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import structlog

from kubeproxy_py.health import ProxyHealth
from kubeproxy_py.notify import Notifier
from kubeproxy_py.pulses import Pulses

log = structlog.get_logger()

# How long SIGTERM waits for threads. What is undone before them may wait as well, for what it has begun:
# conntrack 2 s, Events, traffic and connections 1 s each. An end takes a moment where nothing hangs, and
# these six seconds where everything does; supervisors give it ten.
_STOP_S: Final = 1.0
# A thread that has not turned for so long hangs. One iptables program may take 300 s before it is
# given up, and nothing else takes that long.
_LONGEST_TURN_S: Final = 330.0


class Lifecycle:
    """Starts threads, learns that it is time to stop, and undoes what was begun in reverse."""

    def __init__(self, notifier: Notifier, health: ProxyHealth) -> None:
        """Tell *notifier* (systemd) and *health* (/livez) as long as no thread hangs."""
        self._notifier = notifier
        self._health = health
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._undo: list[Callable[[], None]] = []
        self._alive = Pulses()
        #: Set when it is time to stop, for whatever reason.
        self.stop = threading.Event()
        #: Why it is; None: it was asked for, or it is not.
        self.failure: str | None = None

    def follow_signals(self) -> None:
        """Stop at SIGTERM, SIGINT, and when a thread crashes. From the main thread."""
        threading.Thread(target=self._stop_by_signal, name="signals", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        threading.excepthook = self._note_crash

    def spawn(self, name: str, target: Callable[[], None]) -> None:
        """Run *target* in a thread of its own, which is to run until it is time to stop."""

        def guarded() -> None:
            target()
            if not self.stop.is_set():
                self.fail(f"thread {name} ended")

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def expect_thread(self, name: str) -> Callable[[], None]:
        """Let /livez miss the thread *name* when it hangs; return what it shows that it turns by."""
        beat = self._alive.expect(name, _LONGEST_TURN_S)
        self._health.add_liveness(name, lambda: self._alive.silence(name))
        return beat

    def at_end(self, undo: Callable[[], None]) -> None:
        """Call *undo* when it is time to stop, before what was given earlier. From any thread."""
        self._undo.append(undo)

    def fail(self, reason: str) -> None:
        """Stop, because nothing but another process helps. The first reason is the one that counts."""
        if self.failure is None:
            self.failure = reason
        self.stop.set()

    def rest(self, seconds: float) -> bool:
        """Wait at most *seconds*, and tell systemd that we are alive; True: it is time to stop."""
        # All of us: a thread that hangs is healed by a restart, and by nothing else.
        if not self._alive.has_silent():
            self._notifier.alive()
        return self.stop.wait(min(seconds, self._notifier.watchdog_s or seconds))

    def shut_down(self) -> None:
        """Undo everything, and wait for the threads for a moment."""
        self.stop.set()
        for undo in reversed(self._undo):
            undo()
        deadline = time.monotonic() + _STOP_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _note_crash(self, args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        if args.exc_value is not None:
            log.error("thread.crashed", thread=name, exc_info=args.exc_value)
        self.fail(f"thread {name} crashed: {args.exc_type.__name__}: {args.exc_value}")

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        # Runs in the main thread between any two of its steps, so it may take no lock: that of the
        # event or of the log may be the main thread's own at that moment.
        self._signals.put(number)

    def _stop_by_signal(self) -> None:
        log.info("daemon.stopping", signal=signal.Signals(self._signals.get()).name)
        self.stop.set()
