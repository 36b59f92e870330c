"""
The connection to the API server: addresses, credentials, requests, answers.

The only importer of ``kubernetes``, whose client finds and renews credentials (kubeconfig,
exec plugins, certificates, service-account tokens) and builds the connection pool. Bodies pass
through as bytes: what they mean is the business of callers. Nothing here tries again, except
once after a 401, because that is the one refusal that fresh credentials can cure.
"""

import functools
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlencode, urlsplit

import msgspec
import structlog
import urllib3
import yaml

from kubeproxy_py import errors
from kubeproxy_py.metrics import Metrics

log = structlog.get_logger()

# A control plane that is up accepts within milliseconds; this leaves room for several lost SYNs.
_CONNECT_TIMEOUT_S: Final = 10.0
# The API server itself gives up on anything that is not a watch after 60 s.
_READ_TIMEOUT_S: Final = 65.0
# Connections kept for reuse: three watches, their lists, and Events.
_POOL_SIZE: Final = 4
# What is read at once at most. Events are smaller; a page of a list takes a few reads.
_PIECE: Final = 1 << 18
# A peer that vanished without a word (node power loss, dropped NAT entry) is noticed after
# a minute, well before the watch's own silence limit. Only an unanswered kernel fails this
# test: a frozen API server still acknowledges, which is what the silence limit is for.
_SOCKET_OPTIONS: Final = [
    *urllib3.connection.HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
]

_SERVICE_ACCOUNT_DIR: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# Everything that reading from or writing to a socket may end in. ValueError is what the standard
# library raises when another thread has closed the file that is being read.
_TRANSPORT_ERRORS: Final = (urllib3.exceptions.HTTPError, OSError, ValueError)


#: As much of a server's own words goes into an error.
MAX_TOLD: Final = 1000
#: What decoding of anything that a server sent may end in: besides what is no JSON, or another shape
#: of it, text that is not UTF-8, and lists in lists in lists.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Refused(errors.ApiUnavailable):
    """The server answered, with an error. ``status`` is the HTTP code."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


class Silence(errors.ApiUnavailable):
    """The server sent nothing for longer than the read timeout."""


_CONTENT_TYPES: Final = {
    "POST": "application/json",
    "PATCH": "application/strategic-merge-patch+json",
}


class _Request(NamedTuple):
    method: str
    url: str
    body: bytes | None
    read_timeout_s: float

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def __str__(self) -> str:
        # Without the query: its random timeout would make every error message a new one.
        return f"{self.method} {self.host}{urlsplit(self.url).path}"


class Response:
    """An answer. Close it, or use it as a context manager, in the thread that reads it."""

    def __init__(
        self, raw: urllib3.BaseHTTPResponse, request: str, done: Callable[[], None]
    ) -> None:
        """*request* names the request in errors; *done* is called on close."""
        self.status: Final = raw.status
        self.headers: Final[Mapping[str, str]] = raw.headers
        self._raw = raw
        self._request = request
        self._done = done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def read(self) -> bytes:
        """Return the rest of the body. Raises ApiUnavailable."""
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """Yield what arrives, as it arrives, until the server ends the body properly.

        Raises Silence if nothing comes for the read timeout, ApiUnavailable if the body is cut short.
        """
        while True:
            try:
                piece = self._raw.read1(_PIECE)
            except urllib3.exceptions.ReadTimeoutError:
                raise Silence(f"cannot read {self._request}: the server is silent") from None
            except _TRANSPORT_ERRORS as error:
                raise errors.ApiUnavailable(
                    f"cannot read {self._request}: {_detail(error)}"
                ) from error
            if not piece:
                return
            yield piece

    def close(self) -> None:
        """Give the connection back, or close it if the body was not read to its end."""
        self._done()
        self._raw.close()


class Connection:
    """Requests to one API server. All methods may be called from any thread."""

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        user_agent: str,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take addresses and credentials from *load*, which returns a kubernetes Configuration.

        It is called once here, and again whenever credentials have to be renewed.
        """
        self._load = load
        self._user_agent = user_agent
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        # Under the lock:
        self._is_closed = False
        self._in_flight: dict[object, Callable[[], None]] = {}
        # A second lock, because an exec plugin may take long and ``close`` must not wait for it.
        self._credentials_lock = threading.Lock()
        # Under the second lock:
        self._generation = 0
        self._configuration = load()
        self.server: Final[str] = _with_scheme(self._configuration).rstrip("/")
        self._pool = self._new_pool()

    def get(
        self,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        read_timeout_s: float = _READ_TIMEOUT_S,
    ) -> Response:
        """Ask for *path* and return the answer, its body unread.

        Args:
            path: begins with a slash
            query: parameters, not yet escaped
            read_timeout_s: how long the server may be silent, before the head and within the body

        Raises:
            WatchExpired: the server answered 410
            Refused: it answered with another error
            ApiUnavailable: it did not answer
        """
        return self._request("GET", path, query or {}, None, read_timeout_s)

    def post(self, path: str, body: object) -> bytes:
        """Send *body* as JSON and return the answer's body. Raises like ``get``."""
        payload = msgspec.json.encode(body)
        with self._request("POST", path, {}, payload, _READ_TIMEOUT_S) as response:
            return response.read()

    def patch(self, path: str, body: object) -> bytes:
        """Send *body* as a strategic merge patch, like ``post``."""
        payload = msgspec.json.encode(body)
        with self._request("PATCH", path, {}, payload, _READ_TIMEOUT_S) as response:
            return response.read()

    def close(self) -> None:
        """Refuse all further requests and end those in flight, also reads that block in other threads.

        The blocked calls raise ApiUnavailable at once. Only a TCP connect in progress, to an
        address where nobody answers, holds its thread longer: up to the connect timeout.
        """
        with self._lock:
            self._is_closed = True
            in_flight = tuple(self._in_flight.values())
        for interrupt in in_flight:
            try:
                interrupt()
            except OSError as error:
                # It ended by itself in this moment.
                log.debug("api.interrupt_failed", error=str(error))
        self._pool.clear()

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes | None,
        read_timeout_s: float,
    ) -> Response:
        url = self.server + path + (f"?{urlencode(query)}" if query else "")
        request = _Request(method, url, body, read_timeout_s)
        response, generation = self._send(request)
        if response.status == 401:
            response.close()
            self._renew(generation)
            response, _ = self._send(request)
        if not 200 <= response.status < 300:
            raise _refusal(response, request)
        return response

    def _prepare(self) -> tuple[urllib3.PoolManager, dict[str, str], int]:
        headers = {"Accept": "application/json", "User-Agent": self._user_agent}
        with self._credentials_lock:
            try:
                # Runs the hooks that read a token file again or call an exec plugin. The lock
                # keeps several watches from calling the plugin at once.
                token = self._configuration.auth_settings().get("BearerToken", {}).get("value")
            except Exception as error:  # the client documents none, plugins may raise any
                raise errors.ApiUnavailable(f"cannot renew credentials: {error}") from error
            if token:
                # Token files end in a newline, which no header may contain.
                headers["Authorization"] = token.strip()
            return self._pool, headers, self._generation

    def _renew(self, generation: int) -> None:
        """Load configuration and credentials again, unless somebody did since *generation*."""
        with self._credentials_lock:
            if self._generation != generation:
                return
            try:
                self._configuration = self._load()
            except errors.ConfigError as error:
                raise errors.ApiUnavailable(f"cannot renew credentials: {error}") from error
            self._generation += 1
            # Client certificates may be new too, so connections made with the old ones must go.
            old, self._pool = self._pool, self._new_pool()
        old.clear()
        log.info("api.credentials_renewed", server=self.server)

    def _send(self, request: _Request) -> tuple[Response, int]:
        """Return the answer, whatever its status, and the generation of the credentials sent."""
        pool, headers, generation = self._prepare()
        if request.body is not None:
            headers["Content-Type"] = _CONTENT_TYPES[request.method]
        started = self._clock()
        code = "<error>"  # client-go's word for a request without an answer
        try:
            raw = pool.request(
                request.method,
                request.url,
                body=request.body,
                headers=headers,
                timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=request.read_timeout_s),
                preload_content=False,
                redirect=False,  # the API never redirects; a login page would be no help
            )
            code = str(raw.status)
        except urllib3.exceptions.ReadTimeoutError:
            raise Silence(f"cannot {request}: the server does not answer") from None
        except _TRANSPORT_ERRORS as error:
            raise errors.ApiUnavailable(f"cannot {request}: {_detail(error)}") from error
        finally:
            seconds = self._clock() - started
            self._metrics.rest_requests.labels(code, request.host, request.method).inc()
            self._metrics.rest_request_duration.labels(request.host, request.method).observe(
                seconds
            )
        return Response(raw, str(request), functools.partial(self._end, raw.connection)), generation

    def _begin(self, connection: object, interrupt: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                raise errors.ApiUnavailable("cannot use the API connection: it is closed")
            self._in_flight[connection] = interrupt

    def _end(self, connection: object) -> None:
        with self._lock:
            self._in_flight.pop(connection, None)

    def _new_pool(self) -> urllib3.PoolManager:
        # No other module of the client is needed, so that its hundreds of models stay unloaded.
        from kubernetes.client import rest  # noqa: PLC0415 - see connect()

        self._configuration.host = self.server
        self._configuration.socket_options = _SOCKET_OPTIONS
        self._configuration.connection_pool_maxsize = _POOL_SIZE
        self._configuration.retries = False  # the watches have their own back-off
        if not self._configuration.verify_ssl:
            # kubeconfig said insecure-skip-tls-verify; a warning at each request helps nobody.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        pool: urllib3.PoolManager = rest.RESTClientObject(self._configuration).pool_manager
        pool.connection_pool_kw["ssl_context"] = _tls_context(self._configuration)
        pool.pool_classes_by_scheme = {
            scheme: _interruptible(pool_class, self._begin, self._end)
            for scheme, pool_class in pool.pool_classes_by_scheme.items()
        }
        return pool


def connect(
    *,
    kubeconfig: str = "",
    master: str = "",
    user_agent: str,
    metrics: Metrics,
    environ: Mapping[str, str] = os.environ,
    service_account_dir: Path = _SERVICE_ACCOUNT_DIR,
) -> Connection:
    """Find the API server as kube-proxy does; no request is made yet.

    *kubeconfig* if given, else *master* without credentials, else the Pod's service account.
    *master* overrides the server's address in any case. Raises ConfigError.
    """

    def load() -> Any:
        # Imported late: 15 MB and 0.1 s that a proxy fed from files does not need.
        from kubernetes import config  # noqa: PLC0415
        from kubernetes.client import configuration as client_configuration  # noqa: PLC0415

        configuration = client_configuration.Configuration()
        try:
            if kubeconfig:
                _load_kubeconfig(kubeconfig, configuration)
            elif not master:
                _load_in_cluster(environ, service_account_dir, configuration)
        except (
            config.ConfigException,
            OSError,
            ValueError,
            yaml.YAMLError,
            RecursionError,
        ) as error:
            source = f"kubeconfig {kubeconfig!r}" if kubeconfig else "in-cluster configuration"
            raise errors.ConfigError(f"cannot load {source}: {error}") from error
        if master:
            configuration.host = master
        _check_url(_with_scheme(configuration))
        return configuration

    if master:
        _check_url(master if "://" in master else f"http://{master}")
    return Connection(load, user_agent=user_agent, metrics=metrics)


def _load_kubeconfig(path: str, configuration: Any) -> None:
    from kubernetes import config  # noqa: PLC0415

    if not Path(path).is_file():
        raise FileNotFoundError("no such file")
    try:
        config.load_kube_config(  # type: ignore[no-untyped-call]
            path, client_configuration=configuration, persist_config=False
        )
    except (TypeError, AttributeError, KeyError) as error:
        # The loader trusts the file's shape.
        raise ValueError(f"it is not a kubeconfig ({error})") from error


def _load_in_cluster(environ: Mapping[str, str], directory: Path, configuration: Any) -> None:
    from kubernetes.config import incluster_config  # noqa: PLC0415

    if not (environ.get("KUBERNETES_SERVICE_HOST") and environ.get("KUBERNETES_SERVICE_PORT")):
        raise errors.ConfigError(
            "unable to load in-cluster configuration, "
            "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT must be defined"
        )
    loader = incluster_config.InClusterConfigLoader(  # type: ignore[no-untyped-call]
        token_filename=str(directory / "token"),
        cert_filename=str(directory / "ca.crt"),
        environ=environ,
    )
    loader.load_and_set(configuration)  # type: ignore[no-untyped-call]


def _tls_context(configuration: Any) -> ssl.SSLContext:
    """Return what urllib3 makes by itself, but for what Python asks of authorities since 3.13.

    Those of many clusters, EKS for one, lack the key identifiers that RFC 5280 wants and Go does not
    (kubernetes-client/python#2394).
    """
    needed = ssl.CERT_REQUIRED if configuration.verify_ssl else ssl.CERT_NONE
    context = urllib3.util.ssl_.create_urllib3_context(cert_reqs=needed)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if needed and not configuration.ssl_ca_cert:
        # urllib3 does so for a context of its own only.
        context.load_default_certs()
    return context


def _check_url(text: str) -> None:
    try:
        url = urllib3.util.parse_url(text)
    except urllib3.exceptions.LocationParseError:
        url = urllib3.util.Url()
    if url.scheme not in {"http", "https"} or not url.host:
        raise errors.ConfigError(f"cannot use {text!r} as the API server's URL")


def _with_scheme(configuration: Any) -> str:
    """Return the server's URL; ``--master`` may be given without a scheme, as to client-go."""
    host: str = configuration.host
    if "://" in host:
        return host
    uses_tls = configuration.ssl_ca_cert or configuration.cert_file or not configuration.verify_ssl
    return f"{'https' if uses_tls else 'http'}://{host}"


def _detail(error: Exception) -> object:
    # The second argument of a ProtocolError is its cause, which the first has already told.
    return error.args[0] if isinstance(error, urllib3.exceptions.ProtocolError) else error


def _refusal(response: Response, request: _Request) -> errors.ApiError:
    """Turn an error answer into an exception with the server's own words, and close it."""
    with response:
        try:
            body = next(response.pieces(), b"")
        except errors.ApiUnavailable:
            body = b""
    try:
        message = _STATUS_DECODER.decode(body).message
    except UNREADABLE:
        message = ""
    message = message[:MAX_TOLD] or body[:200].decode(errors="replace").strip()
    text = f"cannot {request}: {response.status}: {message}"
    if response.status == 410:
        return errors.WatchExpired(text)
    return Refused(text, response.status)


class _Status(msgspec.Struct):
    """The part of a meta/v1 Status that says what is wrong."""

    message: str = ""


# Before there are threads, see watch.py.
_STATUS_DECODER: Final = msgspec.json.Decoder(_Status)


def _interruptible(
    pool_class: type[urllib3.HTTPConnectionPool],
    begin: Callable[[object, Callable[[], None]], None],
    end: Callable[[object], None],
) -> type[urllib3.HTTPConnectionPool]:
    """Return *pool_class* with connections that tell how to end their waiting.

    *begin* is called with the connection and a function that ends the wait, before the TLS
    handshake and before the wait for an answer; *end* after the handshake, and if no answer came.
    Once one came, the connection is the answer's.
    """
    base: Any = pool_class.ConnectionCls

    def new_conn(self: Any) -> socket.socket:
        sock: socket.socket = base._new_conn(self)  # noqa: SLF001 - what urllib3's own SOCKS overrides
        # The handshake moves the descriptor to another object, so a second one is held till then.
        self.twin = sock.dup()
        try:
            begin(self, functools.partial(self.twin.shutdown, socket.SHUT_RDWR))
        except BaseException:
            self.twin.close()
            sock.close()
            raise
        return sock

    def connect(self: Any) -> None:
        self.twin = None
        try:
            base.connect(self)
        finally:
            end(self)
            if self.twin is not None:
                self.twin.close()

    def getresponse(self: Any) -> Any:
        # Not SSLSocket.shutdown: it takes the TLS state away under the thread that reads.
        begin(self, functools.partial(socket.socket.shutdown, self.sock, socket.SHUT_RDWR))
        try:
            return base.getresponse(self)
        except BaseException:
            end(self)
            raise

    methods = {"_new_conn": new_conn, "connect": connect, "getresponse": getresponse}
    # Under their own names, because urllib3 writes them into error messages.
    connection_class = type(base.__name__, (base,), methods)
    return type(pool_class.__name__, (pool_class,), {"ConnectionCls": connection_class})
