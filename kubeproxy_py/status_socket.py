"""
The unix socket on which the running daemon tells root what it knows, as JSON over HTTP: both ends of it.

The daemon serves pages; ``status`` and its like ask for them. To add a page, give ``Pages.add`` a path
and a function, and let the command call ``ask``:

    pages.add("/top", lambda query: traffic.totals(limit=int(query.get("limit", "10"))))
    answer = status_socket.ask(path, "/top?limit=20", wanted=list[traffic.Total])

The function is called for each request, on a thread of the HTTP server's, with the query's parameters.
It returns anything that msgspec encodes as JSON, and must not wait for a sync or for anybody else: what
it reads should be immutable values that their owners replace. A ValueError or KubeProxyError of its is
answered with status 400 and its text, which ``ask`` raises again.

The invariant: whatever is wrong with the socket, the daemon runs on without it.
"""

import contextlib
import http.client
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog

from kubeproxy_py import httpserver
from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.httpserver import NOSNIFF, NOT_FOUND, HttpServer, Request, Response

log = structlog.get_logger()

_T = TypeVar("_T")

#: Where the daemon listens unless told otherwise.
DEFAULT_PATH: Final = "/run/kubeproxy-py/status.sock"

_JSON: Final = ("Content-Type", "application/json")
_BACKLOG: Final = 16  # people and their scripts, one after the other
# A page takes milliseconds; a daemon that needs longer hangs, or the node is badly short of CPU.
_TIMEOUT_S: Final = 10.0
_PEER: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid (unix(7))

#: Query parameters → anything that msgspec encodes.
Page = Callable[[Mapping[str, str]], Any]


class NotRunning(KubeProxyError):
    """Nobody listens on the socket."""


# The daemon's end ------------------------------------------------------------------------------------


class Pages:
    """What can be asked, by path."""

    def __init__(self) -> None:
        # Replaced as a whole: requests come on other threads.
        self._pages: Mapping[str, Page] = {}

    def add(self, path: str, page: Page) -> None:
        """Answer requests for *path* with what *page* returns."""
        self._pages = {**self._pages, path: page}

    def app(self, request: Request) -> Response:
        page = self._pages.get(request.path)
        if page is None:
            return NOT_FOUND
        if request.method not in {"GET", "HEAD"}:
            return Response(405, b"405 method not allowed\n", (("Allow", "GET, HEAD"),))
        try:
            body = msgspec.json.encode(page(request.query))
        except (ValueError, KubeProxyError) as error:
            return Response(400, str(error).encode())
        return Response(200, body, (_JSON, NOSNIFF))


def serve(path: str, server: HttpServer, pages: Pages) -> Callable[[], None]:
    """
    Serve *pages* to root and to this process's own user; return what ends it.

    A socket that nobody listens on any more is replaced. If that cannot be, or somebody does listen,
    there is a warning, and no socket.
    """
    try:
        sock = bind(path)
    except OSError as error:
        log.warning("status.listen_failed", path=path, error=httpserver.reason(error))
        return _nothing
    made = _identity(path)
    listener = server.listen(sock, pages.app, admits=is_trusted)
    log.info("status.listening", path=path)

    def close() -> None:
        listener.close()
        # Unless another daemon has its socket there by now.
        with contextlib.suppress(OSError):
            if _identity(path) == made:
                Path(path).unlink()

    return close


def bind(path: str) -> socket.socket:
    """Return a listening socket at *path*, for root alone. Raises OSError."""
    place = Path(path)
    place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _remove_stale(place)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sock.bind(path)
        # Before it listens: until then nobody can connect, whatever the umask left.
        place.chmod(0o600)
        sock.listen(_BACKLOG)
        stack.pop_all()
    return sock


def _remove_stale(place: Path) -> None:
    """Remove a socket that a process left behind. Raises OSError if *place* is anything else."""
    try:
        if not stat.S_ISSOCK(place.lstat().st_mode):
            raise FileExistsError(None, "it exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_S)
        try:
            probe.connect(str(place))
        except ConnectionRefusedError:
            place.unlink(missing_ok=True)
            return
    raise FileExistsError(None, "another process listens there")


def is_trusted(client: socket.socket) -> bool:
    """Tell whether root or this process's own user is at the other end."""
    raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, _ = _PEER.unpack(raw)
    return uid in {0, os.geteuid()}


def _identity(path: str) -> tuple[int, int]:
    found = Path(path).lstat()
    return found.st_dev, found.st_ino


def _nothing() -> None:
    pass


# The commands' end -----------------------------------------------------------------------------------


class _Connection(http.client.HTTPConnection):
    """HTTP to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(path: str, target: str, *, wanted: type[_T]) -> _T:
    """
    Ask the daemon that listens at *path* for a page; return it as a value of type *wanted*.

    Raises:
        NotRunning: nobody listens there.
        KubeProxyError: it is not for us, or the answer says why not or is not what was wanted.
    """
    connection = _Connection(path)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        status, body = answer.status, answer.read()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotRunning(f"cannot ask the daemon at {path}: nobody listens there") from error
    except PermissionError as error:
        raise KubeProxyError(f"cannot ask the daemon at {path}: only root may open it") from error
    except (ConnectionError, http.client.RemoteDisconnected) as error:
        raise KubeProxyError(
            f"cannot ask the daemon at {path}: it hung up; only root may ask"
        ) from error
    except TimeoutError as error:
        raise KubeProxyError(
            f"cannot ask the daemon at {path}: no answer within {_TIMEOUT_S:g} s"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise KubeProxyError(f"cannot ask the daemon at {path}: {error}") from error
    finally:
        connection.close()
    if status != 200:
        said = body.decode(errors="replace").strip()
        raise KubeProxyError(f"cannot ask the daemon at {path} for {target}: {said}")
    try:
        return msgspec.json.decode(body, type=wanted)
    except msgspec.MsgspecError as error:
        raise KubeProxyError(
            f"cannot read the answer of the daemon at {path}, which may be of another version: {error}"
        ) from error
