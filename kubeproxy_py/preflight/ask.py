"""
Ask the API server who we are to it: is it there, which version, what may we do, what time is it.

Each question is one request. Nothing is changed: a SelfSubjectAccessReview is a question, though it is
posted.
"""

import email.utils
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec
from prometheus_client import CollectorRegistry

import kubeproxy_py
from kubeproxy_py import addresses, api
from kubeproxy_py.errors import ApiError, ConfigError
from kubeproxy_py.external import ApiAddress, api_address
from kubeproxy_py.flags import Settings
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.preflight.facts import ApiFacts

_REVIEWS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
# What `run` does: verb, API group, resource.
_NEEDS: Final = (
    ("list", "", "services"),
    ("watch", "", "services"),
    ("list", "discovery.k8s.io", "endpointslices"),
    ("watch", "discovery.k8s.io", "endpointslices"),
    ("list", "", "nodes"),
    ("watch", "", "nodes"),
    ("create", "events.k8s.io", "events"),
)
# A person waits for it; an API server that needs longer is no use to a proxy either.
_ANSWER_S: Final = 10.0


class _Version(msgspec.Struct, frozen=True):
    gitVersion: str = ""  # noqa: N815 - the API's name


class _Status(msgspec.Struct, frozen=True):
    allowed: bool = False


class _Review(msgspec.Struct, frozen=True):
    status: _Status = _Status()


_VERSION_DECODER: Final = msgspec.json.Decoder(_Version)
_REVIEW_DECODER: Final = msgspec.json.Decoder(_Review)


def has_source(settings: Settings, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether anything says where an API server would be."""
    return bool(
        settings.config.client_connection.kubeconfig
        or settings.master
        or environ.get("KUBERNETES_SERVICE_HOST")
    )


def ask(settings: Settings, clock: Callable[[], float] = time.time) -> ApiFacts:
    """Return what the API server says. Never raises."""
    kubeconfig = settings.config.client_connection.kubeconfig
    try:
        connection = api.connect(
            kubeconfig=kubeconfig,
            master=settings.master,
            user_agent=f"kubeproxy-py/{kubeproxy_py.__version__}",
            metrics=Metrics(CollectorRegistry()),
        )
    except ConfigError as error:
        return ApiFacts(config_failure=str(error))
    facts = ApiFacts(
        server=connection.server,
        addresses=_addresses(connection.server),
        is_in_cluster=not (kubeconfig or settings.master),
    )
    try:
        return _answers(connection, facts, clock)
    finally:
        connection.close()


def _answers(connection: api.Connection, facts: ApiFacts, clock: Callable[[], float]) -> ApiFacts:
    replace = msgspec.structs.replace
    try:
        with connection.get("/version", read_timeout_s=_ANSWER_S) as response:
            ahead_s = _ahead_s(response.headers.get("Date"), clock())
            body = response.read()
    except ApiError as error:
        return replace(facts, failure=str(error))
    try:
        version = _VERSION_DECODER.decode(body).gitVersion
    except msgspec.MsgspecError:
        return replace(facts, failure=f"{facts.server} answers, but not as an API server")
    facts = replace(facts, version=version, clock_ahead_s=ahead_s)
    permissions: dict[str, bool] = {}
    try:
        for verb, group, resource in _NEEDS:
            permissions[f"{verb} {resource}"] = _may(connection, verb, group, resource)
    except (ApiError, msgspec.MsgspecError) as error:
        return replace(facts, permissions=permissions, permissions_failure=str(error))
    return replace(facts, permissions=permissions)


def _may(connection: api.Connection, verb: str, group: str, resource: str) -> bool:
    asked = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {"verb": verb, "group": group, "resource": resource}},
    }
    answer = connection.post(_REVIEWS, asked)
    return _REVIEW_DECODER.decode(answer).status.allowed


def _ahead_s(date: str | None, now: float) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date or "").timestamp() - now
    except ValueError:
        return None


def _addresses(server: str) -> tuple[ApiAddress, ...]:
    """Return where the server listens; a name is resolved as the connection would."""
    stated = api_address(server)
    if stated is not None:
        return (stated,)
    parts = urlsplit(server)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return ()  # the request that follows says so
    ips = (addresses.parse_ip(str(entry[4][0])) for entry in found)
    return tuple(dict.fromkeys(ApiAddress(ip, port) for ip in ips if ip is not None))
