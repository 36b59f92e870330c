"""
What the tests of e2e/ use of Kubernetes' test image agnhost: ``netexec`` and ``pause``.

    HOSTNAME=web-1 python -m tests.support.agnhost netexec --http-port=80 --udp-port=80
"""

import argparse
import contextlib
import http.server
import os
import signal
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

#: There once it serves, and knows what to do at its end.
STARTED_FILE: Final = Path("/dev/shm/started")

_NAME: Final = os.environ.get("HOSTNAME", "")


class _Http(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128


class _Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        match url.path:
            case "/hostname":
                body = _NAME
            case "/clientip":
                body = _text(self.client_address)
            case "/echo":
                body = query.get("msg", [""])[0]
            case "/" | "/healthz":
                body = "ok"
            case _:
                self.send_error(404)
                return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - its base's name
        """Keep quiet: the client says what it got."""


class _Udp(socketserver.UDPServer):
    address_family = socket.AF_INET6


class _Datagrams(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        match self.rfile.read().decode().strip().split(" ", 1):
            case ["hostname"]:
                self.wfile.write(_NAME.encode())
            case ["clientip"]:
                self.wfile.write(_text(self.client_address).encode())
            case ["echo", message]:
                self.wfile.write(message.encode())


def _text(address: tuple[str, int]) -> str:
    ip = address[0].removeprefix("::ffff:")
    return f"[{ip}]:{address[1]}" if ":" in ip else f"{ip}:{address[1]}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="agnhost")
    parser.add_argument("command", choices=["netexec", "pause"])
    parser.add_argument("--http-port", type=int, default=8080)
    parser.add_argument("--udp-port", type=int, default=8081)
    parser.add_argument("--delay-shutdown", type=int, default=0)
    options = parser.parse_args(argv)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with contextlib.ExitStack() as servers:
        if options.command == "netexec":
            kinds: list[tuple[int, type[socketserver.BaseServer], type]] = [
                (options.http_port, _Http, _Pages),
                (options.udp_port, _Udp, _Datagrams),
            ]
            for port, kind, handler in kinds:
                if port >= 0:
                    server = servers.enter_context(kind(("::", port), handler))
                    threading.Thread(target=server.serve_forever, daemon=True).start()
        STARTED_FILE.touch()
        ended.wait()
        time.sleep(options.delay_shutdown)
        os._exit(0)  # as a container that is stopped: whatever is in flight ends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
