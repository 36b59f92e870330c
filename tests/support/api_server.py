"""
A Kubernetes API server for tests, demos and benchmarks: Services, EndpointSlices, Nodes, Events.

It answers as kube-apiserver does (api_rest.py), and misbehaves on demand: every outage a client
must survive is a method here. Threads only, standard library only.

    with ApiServer() as server:
        server.apply(builders.make_service("web"))
        server.kubeconfig(tmp_path / "kubeconfig")

As a program: ``python -m tests.support.api_server --port 8001 --load cluster.json``.
"""

import argparse
import base64
import contextlib
import errno
import json
import signal
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import yaml

from tests.support import api_certs, api_faults, api_http, api_rest, api_store, builders
from tests.support.api_http import Request
from tests.support.api_store import Json

__all__ = ["ApiServer", "Json", "Request"]

# As many as kube-apiserver's watch cache keeps at most: a test that wants less says so.
_HISTORY: Final = 100_000
_BACKLOG: Final = 128
# A connection's thread ends as soon as its socket is shut down; this only bounds a bug.
_JOIN_S: Final = 10.0


class ApiServer:
    """The server. All methods may be called from any thread.

    It listens where the creating thread is: make it inside a network namespace to serve there.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tokens: Collection[str] | None = None,
        tls: bool = False,
        needs_client_certificate: bool = False,
        streaming_lists: bool = True,
        bookmark_interval_s: float = 60.0,
        has_progress: bool = True,
        service_fields: bool = True,
        history: int = _HISTORY,
        realistic: bool = False,
    ) -> None:
        """Reserve the port; ``start`` (or ``with``) begins to answer.

        Args:
            host: an IP address; IPv6 without brackets.
            port: 0 takes a free one, which is kept over stop and start.
            tokens: accepted bearer tokens; None lets everybody in.
            tls: serve https with a certificate of its own authority (needs ``openssl``).
            needs_client_certificate: let in who shows a certificate of that authority or a token.
            streaming_lists: False answers sendInitialEvents as old servers do, with 422.
            bookmark_interval_s: how often a watch that allows bookmarks gets one, if it is newer than
                where the watch began.
            has_progress: False leaves watches' versions alone where only other resources change.
            service_fields: False knows no field selector for Services' specs, as before 1.31.
            history: changes remembered per resource; reading from further back is 410.
            realistic: give objects managedFields and annotations of realistic size.
        """
        if needs_client_certificate and not tls:
            raise ValueError("cannot ask for client certificates without TLS")
        self.settings = api_rest.Settings(
            tokens=None if tokens is None else frozenset(tokens),
            needs_client_certificate=needs_client_certificate,
            streaming_lists=streaming_lists,
            bookmark_interval_s=bookmark_interval_s,
            has_progress=has_progress,
            service_fields=service_fields,
        )
        self._api = api_rest.Api(
            api_store.Store(history=history, is_realistic=realistic), self.settings
        )
        self._valve = api_http.Valve()
        self._certificates: api_certs.Certificates | None = None
        self._tls: ssl.SSLContext | None = None
        with contextlib.ExitStack() as undo:
            if tls:
                directory = undo.enter_context(
                    tempfile.TemporaryDirectory(prefix="api-server-", ignore_cleanup_errors=True)
                )
                self._certificates = api_certs.Certificates.make(Path(directory), host)
                self._tls = _tls_context(self._certificates)
            self._listener = undo.enter_context(contextlib.closing(_bound(host, port)))
            self._close = undo.pop_all()
        self._host = host
        self._port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._acceptor: threading.Thread | None = None
        self._connections: dict[api_http.Connection, threading.Thread] = {}

    # ---- where it is

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        """The address, e.g. ``http://127.0.0.1:41234``, without a slash at the end."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self._port}"

    @property
    def certificates(self) -> api_certs.Certificates:
        """The PEM files of a server with TLS."""
        if self._certificates is None:
            raise ValueError("cannot show certificates: the server has no TLS")
        return self._certificates

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig file that points here, with credentials that work; return *path*."""
        cluster: Json = {"server": self.url}
        user: Json = {}
        if self._certificates is not None:
            cluster["certificate-authority-data"] = _base64(self._certificates.authority)
            if self.settings.needs_client_certificate:
                user["client-certificate-data"] = _base64(self._certificates.client)
                user["client-key-data"] = _base64(self._certificates.client_key)
        if self.settings.tokens:
            user["token"] = min(self.settings.tokens)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config, indent=2) + "\n")
        path.chmod(0o600)
        return path

    # ---- starting and stopping

    def start(self) -> None:
        """Listen, on the same port every time; starting twice changes nothing."""
        with self._lock:
            if self._acceptor is not None:
                return
            self._listener.listen(_BACKLOG)
            self._acceptor = threading.Thread(
                target=self._accept, name=f"api-server-{self._port}", daemon=True
            )
            self._acceptor.start()

    def stop(self) -> None:
        """Refuse connections and cut those there are; objects and the port are kept."""
        with self._lock:
            acceptor, self._acceptor = self._acceptor, None
        if acceptor is None:
            return
        # Linux: a listener that is shut down stays bound, so nobody else gets the port meanwhile.
        self._listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(_JOIN_S)
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            connection.close()
        for thread in connections.values():
            thread.join(_JOIN_S)

    def close(self) -> None:
        """Stop for good and give the port back."""
        self.stop()
        self._close.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- objects

    @property
    def resource_version(self) -> str:
        """The resourceVersion of the newest write."""
        return str(self._api.store.version)

    def apply(self, obj: Json) -> Json:
        """Create or replace *obj* and return it as stored; unchanged objects are not written."""
        return self._api.store.apply(api_store.resource_of(obj), [obj])[0].decode()

    def apply_many(self, objs: Iterable[Json]) -> None:
        """Create or replace *objs* in order, waking watches once per run of one kind."""
        run: list[Json] = []
        for obj in objs:
            if run and api_store.resource_of(run[0]) != api_store.resource_of(obj):
                self._api.store.apply(api_store.resource_of(run[0]), run)
                run = []
            run.append(obj)
        if run:
            self._api.store.apply(api_store.resource_of(run[0]), run)

    def load(self, path: Path) -> int:
        """Apply the objects of a JSON or YAML file (also Lists, several documents); return how many."""
        text = path.read_text()
        documents = [json.loads(text)] if path.suffix == ".json" else yaml.safe_load_all(text)
        objects = [obj for document in documents if document for obj in _flat(document)]
        self.apply_many(objects)
        return len(objects)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Remove an object. Raises KeyError if there is none."""
        for resource in api_store.resources_named(kind):
            key = api_store.make_key(resource, namespace, name)
            if self._api.store.delete(resource, key) is not None:
                return
        raise KeyError(f"cannot delete {kind} {namespace}/{name}: not found")

    def objects(self, kind: str) -> list[Json]:
        """Return the objects of *kind*, by namespace and name; Events of both API groups."""
        return [
            stored.decode()
            for resource in api_store.resources_named(kind)
            for stored in self._api.store.snapshot(resource)[1]
        ]

    # ---- what clients did

    @property
    def requests(self) -> list[Request]:
        """All requests since the start (or forget_requests), oldest first."""
        return self._api.requests()

    def count(
        self, verb: str | None = None, resource: str | None = None, method: str | None = None
    ) -> int:
        """Count requests by verb (list, watch, get, create, …), plural resource name, HTTP method."""
        return sum(
            verb in (None, request.verb)
            and resource in (None, request.resource)
            and method in (None, request.method)
            for request in self.requests
        )

    def forget_requests(self) -> None:
        self._api.forget_requests()

    def open_watches(self, resource: str | None = None) -> int:
        """Count the watches of a resource (plural name; None: of all) that are open now."""
        return len(self._api.watches(resource))

    def open_connections(self) -> int:
        with self._lock:
            return len(self._connections)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until *condition* holds. Raises TimeoutError."""
        if not self._api.wait_for(condition, timeout_s):
            raise TimeoutError(f"cannot wait for {condition}: not true in {timeout_s} s")

    # ---- outages

    def freeze(self) -> None:
        """Become a black hole: accept connections and requests, answer nothing, until thaw."""
        self._valve.freeze()

    def thaw(self) -> None:
        self._valve.thaw()

    def trickle(self, bytes_per_second: float | None) -> None:
        """Send everything this slowly; None: at full speed again."""
        self._valve.trickle(bytes_per_second)

    def cut_watches(self, resource: str | None = None) -> int:
        """Cut the connections of open watches in the middle of the stream; return how many."""
        watches = self._api.watches(resource)
        for watch in watches:
            watch.cut()
        return len(watches)

    def end_watches(self, resource: str | None = None) -> int:
        """End open watches cleanly, as their timeout would; return how many."""
        watches = self._api.watches(resource)
        for watch in watches:
            watch.end()
        return len(watches)

    def send_raw(
        self, resource: str, data: bytes, *, framed: bool = True, close: bool = False
    ) -> int:
        """Send *data* on all open watches of *resource*, then go on or *close* the connections.

        Framed data is a chunk of the stream (an event line, half of one, garbage); unframed data
        breaks the chunked encoding itself. Returns how many watches there were.
        """
        watches = self._api.watches(resource)
        for watch in watches:
            watch.send_raw(data, is_framed=framed, closes=close)
        return len(watches)

    def compact(self) -> None:
        """Forget the history: watches from, and continues of, older versions now get 410.

        Open watches go on: they have read it already.
        """
        self._api.store.compact()

    def roll_back(self, resource_version: str) -> None:
        """Restore etcd from a backup of that moment: objects and versions go back, watches are cut."""
        self._api.store.roll_back(int(resource_version))
        self.cut_watches()

    def expire_next_continue(self) -> None:
        """Answer the next list that has a continue token with 410."""
        self._api.expire_next_continue()

    def fail(
        self,
        status: int,
        *,
        verb: str | None = None,
        resource: str | None = None,
        times: int | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Answer requests with this error Status (403, 429, 500, 503, …) until ``heal``.

        Args:
            status: the HTTP code; reason and message are the real server's.
            verb: only these requests (list, watch, get, create, update, patch, delete).
            resource: only this resource, by plural name.
            times: that many requests; None: all.
            retry_after_s: sent as a Retry-After header.
        """
        self._api.faults.add(
            api_faults.Fault(verb, resource, times, status=status, retry_after_s=retry_after_s)
        )

    def spoil(
        self,
        data: bytes,
        *,
        verb: str | None = None,
        resource: str | None = None,
        times: int | None = 1,
    ) -> None:
        """Answer requests with these bytes and nothing else, not even HTTP, then close."""
        self._api.faults.add(api_faults.Fault(verb, resource, times, raw=data))

    def halve(
        self, *, verb: str | None = None, resource: str | None = None, times: int | None = 1
    ) -> None:
        """Send only the first half of the right answers' bodies, then close. Not for watches."""
        self._api.faults.add(api_faults.Fault(verb, resource, times, is_half=True))

    def heal(self) -> None:
        """End what fail, spoil and halve began."""
        self._api.faults.clear()

    def accept_tokens(self, *tokens: str) -> None:
        """Accept these bearer tokens from now on and no others; open watches go on."""
        self.settings.tokens = frozenset(tokens)

    # ---- threads

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:  # shut down by stop()
                    return
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                raise
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                # The handshake is for the connection's own thread: one that never comes must not
                # keep the others waiting.
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            connection = api_http.Connection(sock, f"{peer[0]}:{peer[1]}", self._valve)
            thread = threading.Thread(
                target=self._converse, args=(connection,), name=f"api-{peer[1]}", daemon=True
            )
            with self._lock:
                self._connections[connection] = thread
            thread.start()

    def _converse(self, connection: api_http.Connection) -> None:
        try:
            self._valve.wait_thawed(lambda: connection.is_closed)
            connection.handshake()
            while (request := connection.read_request()) is not None:
                if not self._api.serve(request, connection):
                    break
        except api_http.BadRequest as error:
            with contextlib.suppress(OSError):
                connection.send_response(
                    api_http.Response(400, f"{error}\n".encode(), (("Connection", "close"),))
                )
        except (OSError, ValueError) as error:
            # The client or a fault cut the connection. ValueError is a read from a TLS socket
            # whose other thread was faster.
            if isinstance(error, ValueError) and not connection.is_closed:
                raise
        finally:
            connection.release()
            with self._lock:
                self._connections.pop(connection, None)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if port:
        return _bound_socket(family, host, port)
    # Only a port that was asked for by number stays bound while the listener is shut down, so a
    # free one is found first and then asked for, before it is given back.
    with _bound_socket(family, host, 0) as probe:
        return _bound_socket(family, host, probe.getsockname()[1])


def _bound_socket(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def _tls_context(certificates: api_certs.Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    context.load_verify_locations(certificates.authority)
    # Optional, because a token is as good: the API decides who gets in.
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _flat(document: Json) -> list[Json]:
    if "items" not in document:
        return [document]
    # Items of a ServiceList do not repeat kind and apiVersion; those of a v1 List do.
    kind = str(document.get("kind", "")).removesuffix("List")
    inherited = {"kind": kind, "apiVersion": document.get("apiVersion", "v1")} if kind else {}
    return [inherited | item for item in document["items"] or ()]


def main(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM; the first line on stdout is the URL."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.api_server", description="Kubernetes API server for tests."
    )
    parser.add_argument("--host", default="127.0.0.1", help="IP address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--load", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--services", type=int, default=0, help="make up this many Services")
    parser.add_argument("--endpoints", type=int, default=1, help="endpoints of each of them")
    parser.add_argument("--token", action="append", help="accept this bearer token; repeatable")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--realistic", action="store_true", help="objects of realistic size")
    parser.add_argument("--no-streaming-lists", action="store_true", help="as old servers")
    parser.add_argument("--bookmark-interval", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--kubeconfig", type=Path, help="write a kubeconfig file that points here")
    options = parser.parse_args(argv)
    # Blocked before any thread exists, so that all inherit it and sigwait gets the signal.
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    server = ApiServer(
        host=options.host,
        port=options.port,
        tokens=options.token,
        tls=options.tls,
        streaming_lists=not options.no_streaming_lists,
        bookmark_interval_s=options.bookmark_interval,
        realistic=options.realistic,
    )
    for path in options.load:
        server.load(path)
    if options.services:
        server.apply_many(builders.cluster(options.services, options.endpoints))
    if options.kubeconfig:
        server.kubeconfig(options.kubeconfig)
    with server:
        print(server.url, flush=True)
        signal.sigwait(stops)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
