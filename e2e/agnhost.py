"""
Kubernetes' test image agnhost: what its servers are told, and what clients in it say of answers.

Pure: command lines are built and outputs read here, and run elsewhere.
"""

import ipaddress
import re
import shlex
from typing import Final, Literal, NamedTuple

#: The image of Kubernetes' own e2e tests, for all its architectures.
IMAGE: Final = "registry.k8s.io/e2e-test-images/agnhost:2.53"

#: Where a server's readiness is a file that tests create and remove; in memory, in every container.
READY_FILE: Final = "/dev/shm/ready"

_ERRORS: Final = "/dev/shm/curl"

# Between nodes of one cluster; a lost packet is sent again after 1 s and 3 s.
_CONNECT_S: Final = 2
_ANSWER_S: Final = 5

_CURL_REFUSED: Final = 7  # "failed to connect": refused, or no route
_CURL_TIMED_OUT: Final = 28
_LINE: Final = re.compile(r"(\d+) ?(.*)")

Status = Literal["answered", "refused", "unreachable", "timed out", "failed"]


class Answer(NamedTuple):
    """What one request came to."""

    status: Status
    body: str = ""


def netexec(*, http_port: int = 80, udp_port: int = -1, delay_s: int = 0) -> list[str]:
    """Return the arguments of a server that tells its host name, over HTTP and UDP.

    Args:
        http_port: where it serves HTTP
        udp_port: where it serves UDP; -1: nowhere
        delay_s: how long it goes on serving after SIGTERM
    """
    return [
        "netexec",
        f"--http-port={http_port}",
        f"--udp-port={udp_port}",
        f"--delay-shutdown={delay_s}",
    ]


def http(
    ip: str, port: int, path: str = "/hostname", *, tries: int = 1, source_port: int = 0
) -> list[str]:
    """Return a command that asks *tries* times, but stops when nobody answers, for ``parse``."""
    host = f"[{ip}]" if ":" in ip else ip
    local = f" --local-port {source_port}" if source_port else ""
    url = shlex.quote(f"http://{host}:{port}{path}")
    limits = f"--connect-timeout {_CONNECT_S} --max-time {_ANSWER_S}"
    # Only what -v prints tells a refusal from a missing route, in all versions of curl.
    ask = f"curl -gqsv{local} {limits} {url} 2>{_ERRORS}"
    why = f"{{ c=$?; grep -o refused {_ERRORS} | head -n 1; exit $c; }}"
    # Thirty tries that all wait for nobody would take minutes, and say no more than one.
    return _repeated(f"{ask} || {why}", tries, stops=True)


def http_status(ip: str, port: int, path: str = "/") -> list[str]:
    """Return a command whose answer, for ``parse``, is the HTTP status."""
    host = f"[{ip}]" if ":" in ip else ip
    url = shlex.quote(f"http://{host}:{port}{path}")
    limits = f"--connect-timeout {_CONNECT_S} --max-time {_ANSWER_S}"
    return _repeated(f"curl -gqsS -o /dev/null -w '%{{http_code}}' {limits} {url}", 1)


def udp(
    ip: str, port: int, message: str = "hostname", *, tries: int = 1, source_port: int = 0
) -> list[str]:
    """Return a command that sends a datagram *tries* times and prints a line for each answer."""
    local = f" -p {source_port}" if source_port else ""
    ask = f"echo {shlex.quote(message)} | nc -u -w 1{local} {ip} {port}"
    # nc waits a second after the answer, and ends with 0 whether or not anything came.
    return _repeated(
        f'o=$({ask} 2>&1); [ -n "$o" ] && echo "$o" || (exit {_CURL_TIMED_OUT})',
        tries,
        is_parallel=not source_port,
    )


def parse(stdout: str) -> list[Answer]:
    """Read what one of the commands printed. Raises ValueError for anything else."""
    answers = []
    for line in stdout.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"cannot read {line!r}: it is not STATUS BODY")
        status, body = int(match[1]), match[2].strip()
        if status == 0:
            answers.append(Answer("answered", body))
        elif status == _CURL_TIMED_OUT:
            answers.append(Answer("timed out"))
        elif status == _CURL_REFUSED:
            answers.append(Answer("refused" if "refused" in body else "unreachable", body))
        else:
            answers.append(Answer("failed", body))
    return answers


def parse_client_ip(body: str) -> str:
    """Return the address of /clientip, which answers ADDRESS:PORT. Raises ValueError."""
    host, _, port = body.rpartition(":")
    if not port.isdigit():
        raise ValueError(f"cannot read {body!r}: it is not ADDRESS:PORT")
    found = ipaddress.ip_address(host.strip("[]"))
    # A server on a dual-stack socket sees IPv4 clients under their IPv6 spelling.
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def _repeated(ask: str, tries: int, *, is_parallel: bool = False, stops: bool = False) -> list[str]:
    """Return a script that prints a line for each try; *stops*: until one fails."""
    once = f'out=$({ask} 2>&1); c=$?; echo "$c $out"'
    if stops:
        once += "; [ $c -eq 0 ] || break"
    each = f"({once}) &" if is_parallel else f"{once};"
    return ["sh", "-c", f"i=0; while [ $i -lt {tries} ]; do i=$((i+1)); {each} done; wait"]
