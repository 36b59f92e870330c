"""Logging: one line per event on stderr, as JSON or for people. Configured once, by the shell."""

import contextlib
import io
import sys
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# klog's verbosity: operators run kube-proxy with -v=2 and expect calm, and -v=4 to see objects.
_DEBUG_FROM_VERBOSITY = 4


_verbosity = 0


class _Unfailing(io.TextIOBase):
    """Writes to *stream* what it takes. What it does not, as with a reader that is gone, is lost.

    The rules are right without a log; an exception would end the thread that only wanted to say so.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure(*, fmt: Literal["text", "json"] = "text", verbosity: int = 0) -> None:
    """Send all events to stderr; *verbosity* is klog's ``-v`` (4 and more: debug)."""
    set_verbosity(verbosity)
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if fmt == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
    )
    structlog.configure(
        processors=[
            _drop_details,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(file=cast("TextIO", _Unfailing(sys.stderr))),
        cache_logger_on_first_use=False,
    )


def set_verbosity(verbosity: int) -> None:
    """Change what is logged from now on; below 0: errors alone."""
    global _verbosity  # noqa: PLW0603 - one process, one log
    _verbosity = verbosity


def _drop_details(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    if method == "debug" and _verbosity < _DEBUG_FROM_VERBOSITY:
        raise structlog.DropEvent
    if method in {"info", "warning"} and _verbosity < 0:
        raise structlog.DropEvent
    return event
