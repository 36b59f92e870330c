"""Tells systemd how this process is doing (sd_notify(3)); does nothing where systemd does not ask."""

import os
import socket
from collections.abc import Mapping


class Notifier:
    """The socket that systemd gave a Type=notify service, if it did."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the abstract namespace.
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        self._interval_s = _interval_s(environ)

    @property
    def watchdog_s(self) -> float | None:
        """How often ``alive`` is expected at least, already with a margin; None: never."""
        return self._interval_s

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        if self._interval_s is not None:
            self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(text.encode(), self._address)
        except OSError:
            # systemd itself will notice that it hears nothing; there is nobody else to tell.
            return


def _interval_s(environ: Mapping[str, str]) -> float | None:
    # Addressed to another process: systemd sets the pid, and children inherit the variables.
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = environ.get("WATCHDOG_USEC", "")
    # Half of the limit, as sd_watchdog_enabled(3) advises.
    return int(text) / 2e6 if text.isdigit() and int(text) else None
