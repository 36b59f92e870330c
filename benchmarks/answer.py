"""
Accepts TCP connections on every address of its namespace and tells each the address it came to.

A program of its own, so that answering costs the measuring process nothing:
``python -m benchmarks.answer PORT`` prints one line as soon as it listens.
"""

import contextlib
import socket
import sys

# The kernel caps it at somaxconn (4,096 by default), which is more than one client can fill.
_BACKLOG = 4096


def main(port: int) -> None:
    """Serve until killed."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", port))
        listener.listen(_BACKLOG)
        print("listening", flush=True)
        while True:
            accepted, _peer = listener.accept()
            # Clients that measure only the connect are gone already.
            with accepted, contextlib.suppress(OSError):
                accepted.sendall(accepted.getsockname()[0].encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
