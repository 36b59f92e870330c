"""Work on a thread for as long as a ``with`` block lasts, whose failure is the block's."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

#: Waits so many seconds; True: the work is to end.
Rest = Callable[[float], bool]

# A last step may wait for a connection or for a busy machine, and no longer.
_END_S: Final = 30.0


class Background:
    """Runs *work*, which rests between its steps and ends when it is told to."""

    def __init__(self, work: Callable[[Rest], None], *, name: str) -> None:
        """Prepare; the work begins when the block is entered."""
        self._work = work
        self._name = name
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._error: Exception | None = None

    def end(self) -> None:
        """Let the work end, and wait for it; it may have ended already.

        Raises what the work raised, unless that has been raised before; AssertionError if it hangs.
        """
        self._is_over.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            raise AssertionError(f"{self._name} has not ended within {_END_S:g} s")
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.end()
        except Exception as failure:
            if error is None:
                raise
            # The block has a failure of its own, of which this may be the cause.
            error.add_note(f"meanwhile, {self._name} failed: {failure!r}")

    def _run(self) -> None:
        try:
            self._work(self._is_over.wait)
        except Exception as error:  # noqa: BLE001 - raised by the thread that closes the block
            self._error = error
