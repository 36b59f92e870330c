"""The HTTP server, over real sockets on loopback."""

import errno
import os
import re
import resource
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import httpserver
from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.httpserver import HttpServer, Limits, Response
from kubeproxy_py.model import IPFamily

DEADLINE_S = 30
GET = b"GET / HTTP/1.1\r\nHost: node1\r\n\r\n"


def ok(_request):
    return Response(200, b"ok")


def echo(request):
    """Answer with what was understood of the request."""
    return Response(200, repr((request.method, request.path, request.query, request.body)).encode())


@pytest.fixture
def start():
    """Return a function that starts a server; it is stopped in the end."""
    with ExitStack() as stack:

        def start(limits=Limits()):  # noqa: B008 - immutable
            server = HttpServer(limits)
            server.start()
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def serve(start):
    """Return a function that serves an app on 127.0.0.1 and returns the port."""

    def serve(app=ok, limits=Limits()):  # noqa: B008 - immutable
        sock = httpserver.bind("127.0.0.1", 0)
        port = sock.getsockname()[1]
        start(limits).listen(sock, app)
        return port

    return serve


@contextmanager
def connected(port, host="127.0.0.1"):
    with socket.create_connection((host, port), timeout=DEADLINE_S) as client:
        yield client


def read_to_end(client):
    parts = []
    while data := client.recv(65536):
        parts.append(data)
    return b"".join(parts)


def read_until(client, text):
    """Read up to and including *text*."""
    seen = b""
    while not seen.endswith(text):
        data = client.recv(1)
        assert data, seen
        seen += data
    return seen


def ask(port, request=GET, host="127.0.0.1"):
    """Send a request as the last one of a connection; return everything that comes back."""
    with connected(port, host) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return read_to_end(client)


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def body_of(answer):
    return answer.partition(b"\r\n\r\n")[2]


def get(target):
    return f"GET {target} HTTP/1.1\r\nHost: node1\r\n\r\n".encode()


def has_ended(client):
    """Wait until the server has closed the connection without another byte."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        tick.wait(0.01)


def free_port():
    with httpserver.bind("127.0.0.1", 0) as sock:
        return sock.getsockname()[1]


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# Answers -----------------------------------------------------------------------------------------


def test_answer_has_the_headers_and_their_order_of_gos_server(serve):
    headers = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))
    port = serve(lambda _: Response(503, b"{}", headers))

    answer = ask(port)

    assert re.fullmatch(
        rb"HTTP/1\.1 503 Service Unavailable\r\n"
        rb"Content-Type: application/json\r\n"
        rb"X-Content-Type-Options: nosniff\r\n"
        rb"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n"
        rb"Content-Length: 2\r\n"
        rb"\r\n"
        rb"\{\}",
        answer,
    )


def test_answer_without_a_type_is_plain_text_named_last(serve):
    answer = ask(serve())

    assert answer.endswith(
        b"GMT\r\nContent-Length: 2\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nok"
    )


def test_head_gets_the_length_but_no_body(serve):
    answer = ask(serve(), b"HEAD / HTTP/1.1\r\nHost: node1\r\n\r\n")

    assert b"Content-Length: 2\r\n" in answer
    assert body_of(answer) == b""


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "BREW"])
def test_every_method_is_left_to_the_app(serve, method):
    answer = ask(serve(echo), f"{method} / HTTP/1.1\r\nHost: node1\r\n\r\n".encode())

    assert body_of(answer) == repr((method, "/", {}, b"")).encode()


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        pytest.param("/a%20b", "/a b", {}, id="escaped"),
        pytest.param("//a", "//a", {}, id="two slashes are no host"),
        pytest.param("/a?verbose&x=1&x=2", "/a", {"verbose": "", "x": "2"}, id="query"),
        pytest.param("http://node1/a?x=%2F", "/a", {"x": "/"}, id="as proxies ask"),
        pytest.param("*", "*", {}, id="asterisk"),
    ],
)
def test_target_is_taken_apart(serve, target, path, query):
    answer = ask(serve(echo), get(target))

    assert body_of(answer) == repr(("GET", path, query, b"")).encode()


def test_header_names_are_lower_case_and_repeated_ones_joined(serve):
    port = serve(lambda request: Response(200, request.headers["accept"].encode()))

    answer = ask(port, b"GET / HTTP/1.1\r\nHost: x\r\nAccept: a\r\nACCEPT: b\r\n\r\n")

    assert body_of(answer) == b"a, b"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"Content-Length: 3\r\n\r\nabc", id="with a length"),
        pytest.param(
            b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", id="in chunks"
        ),
    ],
)
def test_body_is_given_to_the_app(serve, body):
    answer = ask(serve(echo), b"PUT / HTTP/1.1\r\nHost: node1\r\n" + body)

    assert body_of(answer) == repr(("PUT", "/", {}, b"abc")).encode()


def test_client_that_waits_for_permission_to_send_its_body_gets_it(serve):
    with connected(serve(echo)) as client:
        client.sendall(
            b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
        )
        permission = read_until(client, b"\r\n\r\n")
        client.sendall(b"z")
        answer = read_until(client, b")")

    assert permission == b"HTTP/1.1 100 \r\n\r\n"
    assert body_of(answer) == repr(("PUT", "/", {}, b"z")).encode()


def test_offer_to_speak_another_protocol_is_declined(serve):
    answer = ask(
        serve(), b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    )

    assert status_of(answer) == 200


def test_app_that_fails_is_logged_and_answered_with_500(serve):
    def app(request):
        raise ValueError(request.path)

    with capture_logs() as logs:
        answer = ask(serve(app), get("/x"))

    assert status_of(answer) == 500
    assert [(entry["event"], entry["path"]) for entry in logs] == [("http.app_failed", "/x")]


# Connections -------------------------------------------------------------------------------------


def test_connection_is_kept_for_the_next_request(serve):
    with connected(serve()) as client:
        for _ in range(3):
            client.sendall(GET)

            assert status_of(read_until(client, b"\r\n\r\nok")) == 200


def test_pipelined_requests_are_answered_in_order(serve):
    answer = ask(serve(echo), get("/1") + get("/2") + get("/3"))

    assert re.findall(rb"'(/\d)'", answer) == [b"/1", b"/2", b"/3"]


def test_request_may_arrive_byte_by_byte(serve):
    with connected(serve()) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in GET:
            client.sendall(bytes([byte]))

        assert status_of(read_until(client, b"\r\n\r\nok")) == 200


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", id="asked to"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", id="HTTP 1.0"),
    ],
)
def test_connection_is_closed_after_the_answer(serve, request_):
    with connected(serve()) as client:
        client.sendall(request_)
        answer = read_to_end(client)

    assert b"Connection: close\r\n" in answer
    assert body_of(answer) == b"ok"


def test_slow_app_does_not_keep_others_waiting(serve):
    called, go_on = threading.Event(), threading.Event()

    def app(request):
        if request.path == "/slow":
            called.set()
            go_on.wait(DEADLINE_S)
        return Response(200, b"ok")

    port = serve(app)
    with connected(port) as slow:
        slow.sendall(get("/slow"))
        assert called.wait(DEADLINE_S)
        others = [status_of(ask(port)) for _ in range(3)]
        go_on.set()
        last = read_until(slow, b"\r\n\r\nok")

    assert others == [200, 200, 200]
    assert status_of(last) == 200


def test_slow_clients_do_not_keep_others_waiting(serve):
    port = serve()
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connected(port)).sendall(GET[:-1])

        assert status_of(ask(port)) == 200


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"nonsense\r\n\r\n", id="no HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no Host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", id="bad header"),
        pytest.param(
            b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", id="negative length"
        ),
        pytest.param(b"GET http://[/ HTTP/1.1\r\nHost: x\r\n\r\n", id="bad target"),
    ],
)
def test_malformed_request_is_refused_as_by_gos_server(serve, request_):
    answer = ask(serve(), request_)

    assert answer == (
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Connection: close\r\n\r\n400 Bad Request"
    )


def test_huge_header_is_refused_and_the_client_can_read_why(serve):
    padding = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(200))

    answer = ask(serve(), b"GET / HTTP/1.1\r\nHost: x\r\n" + padding)

    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")


def test_huge_body_is_refused(serve):
    head = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n"

    answer = ask(serve(), head + b"x" * 200_000)

    assert status_of(answer) == 413


def test_tunnel_is_refused(serve):
    answer = ask(serve(), b"CONNECT node2:80 HTTP/1.1\r\nHost: node2:80\r\n\r\n")

    assert status_of(answer) == 501


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(GET[:-1], id="nearly a request"),
        pytest.param(
            b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nx", id="half of a body"
        ),
    ],
)
def test_client_that_never_completes_its_request_is_dropped(serve, sent):
    with connected(serve(limits=Limits(request_s=0.05))) as client:
        client.sendall(sent)

        assert has_ended(client)


def test_idle_connection_is_closed(serve):
    with connected(serve(limits=Limits(idle_s=0.05))) as client:
        client.sendall(GET)
        read_until(client, b"\r\n\r\nok")

        assert has_ended(client)


def test_second_request_has_as_much_time_as_the_first(serve):
    with connected(serve(limits=Limits(request_s=0.05, idle_s=DEADLINE_S))) as client:
        client.sendall(GET)
        read_until(client, b"\r\n\r\nok")
        client.sendall(GET[:-1])

        assert has_ended(client)


def test_client_that_does_not_read_is_dropped(serve):
    port = serve(lambda _: Response(200, bytes(50_000_000)), Limits(write_s=0.05))
    with connected(port) as client:
        client.sendall(GET)
        wait_for(lambda: not is_established(port))

        with pytest.raises(ConnectionResetError):
            read_to_end(client)


def is_established(port):
    """Tell whether the kernel still has the server's end of a connection."""
    suffix = f":{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(row[1].endswith(suffix) and row[3] in {"01", "04"} for row in rows)


def test_three_hundred_connections_are_bounded_and_do_not_keep_others_out(serve):
    limit = 256
    port = serve(limits=Limits(connections=limit))
    before = descriptors()
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(port)) for _ in range(300)]

        assert status_of(ask(port)) == 200
        assert descriptors() - before - len(clients) <= limit
        # Those that have held a connection longest had to go.
        assert all(has_ended(client) for client in clients[: 300 - limit])
        clients[-1].sendall(GET)
        assert status_of(read_until(clients[-1], b"\r\n\r\nok")) == 200
    wait_for(lambda: descriptors() == before)


def test_connection_is_refused_when_all_others_are_being_answered(serve):
    busy, go_on = threading.Semaphore(0), threading.Event()

    def app(_request):
        busy.release()
        go_on.wait(DEADLINE_S)
        return Response(200, b"ok")

    port = serve(app, Limits(connections=2))
    with connected(port) as one, connected(port) as two:
        for client in (one, two):
            client.sendall(GET)
            assert busy.acquire(timeout=DEADLINE_S)
        with connected(port) as third:
            assert has_ended(third)
        go_on.set()

        assert status_of(read_until(one, b"\r\n\r\nok")) == 200
        assert status_of(read_until(two, b"\r\n\r\nok")) == 200


def test_lack_of_descriptors_is_waited_out(serve):
    port = serve()
    ask(port)  # whatever is opened once is open now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client, capture_logs() as logs:
        client.settimeout(DEADLINE_S)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            client.connect(("127.0.0.1", port))
            client.sendall(GET)
            wait_for(lambda: logs)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        assert status_of(read_until(client, b"\r\n\r\nok")) == 200
    assert [(entry["event"], entry["error"]) for entry in logs] == [
        ("http.accept_failed", os.strerror(errno.EMFILE))
    ]


# Addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_unspecified_address_of_either_family_means_both(start, host):
    sock = httpserver.bind(host, 0)
    port = sock.getsockname()[1]
    start().listen(sock, ok)

    assert status_of(ask(port, host="127.0.0.1")) == 200
    assert status_of(ask(port, host="::1")) == 200


def test_specific_address_is_only_that(start):
    sock = httpserver.bind("127.0.0.2", 0)
    port = sock.getsockname()[1]
    start().listen(sock, ok)

    assert status_of(ask(port, host="127.0.0.2")) == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, host="127.0.0.1")


def test_wildcards_of_both_families_share_a_port(start):
    server = start()
    sock4 = httpserver.bind_family("0.0.0.0", 0, IPFamily.V4)
    port = sock4.getsockname()[1]
    server.listen(sock4, lambda _: Response(200, b"four"))
    sock6 = httpserver.bind_family("::", port, IPFamily.V6)
    server.listen(sock6, lambda _: Response(200, b"six"))

    assert body_of(ask(port, host="127.0.0.1")) == b"four"
    assert body_of(ask(port, host="::1")) == b"six"


def test_port_in_use_leaves_no_socket_behind():
    with httpserver.bind("127.0.0.1", 0) as taken:
        before = descriptors()
        with pytest.raises(OSError) as caught:
            httpserver.bind("127.0.0.1", taken.getsockname()[1])

        assert caught.value.errno == errno.EADDRINUSE
        assert descriptors() == before


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.0.0.0:10256", ("0.0.0.0", 10256)),
        ("[::1]:80", ("::1", 80)),
        (":80", ("", 80)),
    ],
)
def test_address_is_split_into_host_and_port(text, wanted):
    assert httpserver.split_address(text) == wanted


@pytest.mark.parametrize("text", ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "[::1]:65536"])
def test_address_without_a_port_is_refused(start, text):
    with pytest.raises(KubeProxyError, match="cannot listen on"):
        start().serve_address(text, ok, name="healthz")


def test_port_in_use_is_tried_again_until_it_is_free(start):
    server = start()
    with httpserver.bind("127.0.0.1", 0) as taken, capture_logs() as logs:
        port = taken.getsockname()[1]
        server.serve_address(f"127.0.0.1:{port}", ok, name="healthz", retry_s=0.01)
        wait_for(lambda: len(logs) >= 3)

    wait_for(lambda: can_connect(port))
    assert status_of(ask(port)) == 200
    assert logs[0] == {
        "event": "http.listen_failed",
        "log_level": "error",
        "server": "healthz",
        "address": f"127.0.0.1:{port}",
        "error": "Address already in use",
    }


def can_connect(port):
    try:
        with connected(port):
            return True
    except ConnectionRefusedError:
        return False


def test_port_in_use_is_an_error_if_failing_hard_is_wanted(start):
    server = start()
    with httpserver.bind("127.0.0.1", 0) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(KubeProxyError, match=f"cannot listen on {address} for healthz: Addr"):
            server.serve_address(address, ok, name="healthz", hard_fail=True)


# Closing -----------------------------------------------------------------------------------------


def test_closed_listener_has_freed_its_port_and_its_connections(start):
    server = start()
    sock = httpserver.bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    listener = server.listen(sock, ok)
    with connected(port) as client:
        client.sendall(GET)
        read_until(client, b"\r\n\r\nok")
        listener.close()

        with httpserver.bind("127.0.0.1", port):
            assert has_ended(client)


def test_closed_listener_no_longer_tries_to_get_its_port(start):
    server = start()
    port = free_port()
    with httpserver.bind("127.0.0.1", port), capture_logs() as logs:
        address = f"127.0.0.1:{port}"
        closed = server.serve_address(address, ok, name="closed", retry_s=0.01)
        wait_for(lambda: len(logs) >= 2)
        closed.close()
        attempts = len(logs)
        # Another one shows that there was time enough to try again.
        server.serve_address(address, ok, name="other", retry_s=0.01)
        wait_for(lambda: len(logs) >= attempts + 4)

    assert {entry["server"] for entry in logs[attempts:]} == {"other"}


def test_listener_may_be_closed_twice_and_after_the_server(start):
    server = start()
    listener = server.listen(httpserver.bind("127.0.0.1", 0), ok)
    listener.close()
    listener.close()
    server.stop()
    listener.close()


@pytest.mark.parametrize("was_started", [False, True], ids=["never started", "stopped"])
def test_server_that_does_not_run_takes_no_socket(was_started):
    server = HttpServer()
    if was_started:
        server.start()
        server.stop()
    sock = httpserver.bind("127.0.0.1", 0)

    with pytest.raises(KubeProxyError, match="the HTTP server does not run"):
        server.listen(sock, ok)
    assert sock.fileno() == -1


def test_stopped_server_leaves_no_thread_and_no_descriptor():
    before = descriptors(), threading.active_count()
    called, go_on = threading.Event(), threading.Event()

    def app(_request):
        called.set()
        go_on.wait(DEADLINE_S)
        return Response(200, b"ok")

    server = HttpServer()
    server.start()
    sock = httpserver.bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    server.listen(sock, app)
    server.serve_address(f"127.0.0.1:{port}", ok, name="never", retry_s=0.01)
    with connected(port) as idle, connected(port) as half, connected(port) as asking:
        half.sendall(GET[:-1])
        asking.sendall(GET)
        assert called.wait(DEADLINE_S)
        go_on.set()
        server.stop()

        assert has_ended(idle)
        assert has_ended(half)

    assert (descriptors(), threading.active_count()) == before
    server.stop()  # again: nothing happens
