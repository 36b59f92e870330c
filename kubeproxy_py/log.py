"""Logging: one line per event on stderr, as JSON or for people. Configured once, by the shell."""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor

# klog's verbosity: operators run kube-proxy with -v=2 and expect calm, and -v=4 to see objects.
_DEBUG_FROM_VERBOSITY = 4


def configure(*, fmt: Literal["text", "json"] = "text", verbosity: int = 0) -> None:
    """Send all events to stderr; *verbosity* is klog's ``-v`` (4 and more: debug)."""
    level = logging.DEBUG if verbosity >= _DEBUG_FROM_VERBOSITY else logging.INFO
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if fmt == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
