"""
What the tests' API server answers: list options, watches, writing, permissions.

Behaviour and wording follow kube-apiserver and the Kubernetes API conventions; where a client has
to know of an oddity of the real server, it is reproduced and explained here. Requests are read in
api_requests.py, open watches are in api_watch.py, sockets in api_server.py.
"""

import dataclasses
import email.utils
import gzip
import json
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from tests.support import (
    api_faults,
    api_http,
    api_requests,
    api_selectors,
    api_status,
    api_store,
    api_watch,
)
from tests.support.api_status import Refusal

_GZIP_ABOVE: Final = 128 << 10  # kube-apiserver's threshold
# kube-apiserver ends a watch that names no timeout after its --min-request-timeout at the earliest.
_WATCH_TIMEOUT_S: Final = 1800.0
# What kube-apiserver tells without a token too (the role system:public-info-viewer).
_OPEN_PATHS: Final = frozenset(["/healthz", "/livez", "/readyz", "/version"])
_REVIEWS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_CONTINUE_EXPIRED: Final = (
    "The provided continue parameter is too old to display a consistent list result. You can start "
    "a new list without the continue parameter, or use the continue token in this response to "
    "retrieve the remainder of the results. Continuing with the provided token results in an "
    "inconsistent list - objects that were created, modified, or deleted between the time the first "
    "chunk was returned and now may show up in the list."
)


@dataclasses.dataclass(slots=True)
class Settings:
    """What may be changed while the server runs."""

    tokens: frozenset[str] | None = None  # None: nobody has to authenticate
    needs_client_certificate: bool = False  # one, or a token
    streaming_lists: bool = True  # False: as without the feature gate WatchList
    bookmark_interval_s: float = 60.0  # kube-apiserver's: about a minute
    # Whether a watch learns of writes to other resources: etcd's progress reports, every five seconds
    # in a cluster made by kubeadm, else every ten minutes.
    has_progress: bool = True
    service_fields: bool = True  # False: no field selectors for Services' specs, as before 1.31
    # Tells whether a request may be answered; None: everything is allowed.
    authorize: Callable[[api_http.Request, api_requests.Route], bool] | None = None
    version: str = "v1.36.2"  # what /version says
    clock_ahead_s: float = 0.0  # of this server's clock, in its Date headers


class Api:
    """Answers requests, and remembers them. ``serve`` is called by many threads at once."""

    def __init__(self, store: api_store.Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.faults = api_faults.Faults()
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._requests: list[api_http.Request] = []
        self._watches: set[api_watch.Watch] = set()
        self._next_continue_expires = False

    def requests(self) -> list[api_http.Request]:
        with self._changed:
            return list(self._requests)

    def forget_requests(self) -> None:
        with self._changed:
            self._requests.clear()

    def watches(self, resource: str | None = None) -> list[api_watch.Watch]:
        with self._changed:
            return [watch for watch in self._watches if resource in (None, watch.resource.plural)]

    def expire_next_continue(self) -> None:
        with self._changed:
            self._next_continue_expires = True

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until *condition* holds, and return whether it does."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() >= deadline:
                return False
            # Most conditions are about requests and watches, which notify; what else there is to
            # wait for is asked 50 times a second.
            with self._changed:
                self._changed.wait(0.02)
        return True

    def serve(self, request: api_http.Request, connection: api_http.Connection) -> bool:
        """Answer *request*; False when the connection has to end. Raises OSError when it is gone."""
        route = api_requests.parse_path(request.path)
        if route is not None:
            request.verb = api_requests.verb_of(request, route)
            request.resource = route.resource.plural
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()
        fault = self.faults.take(request)
        if fault is not None and fault.raw is not None:
            connection.send(fault.raw)
            return False
        try:
            if fault is not None and fault.status:
                raise (
                    api_requests.forbidden(request, route)
                    if fault.status == 403
                    else Refusal(fault.status, retry_after_s=fault.retry_after_s)
                )
            self._authenticate(request, connection)
            authorize = self.settings.authorize
            if route is not None and authorize is not None and not authorize(request, route):
                raise api_requests.forbidden(request, route)
            if route is not None and request.verb == "watch":
                self._watch(request, connection, route)
                return request.is_keepalive and not connection.is_closed
            response = self._respond(request, route)
        except Refusal as refusal:
            response = refusal.response
        connection.send_response(
            _compressed(request, response), is_half=bool(fault and fault.is_half)
        )
        return request.is_keepalive and not (fault and fault.is_half)

    def _authenticate(self, request: api_http.Request, connection: api_http.Connection) -> None:
        tokens = self.settings.tokens
        if _open_path(request):
            return
        if tokens is None and not self.settings.needs_client_certificate:
            return
        if self.settings.needs_client_certificate and connection.has_client_certificate:
            return
        scheme, _, token = (request.headers.get("Authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or token not in (tokens or ()):
            raise Refusal(401)

    def _respond(
        self, request: api_http.Request, route: api_requests.Route | None
    ) -> api_http.Response:
        if _open_path(request) and request.method == "GET":
            return _fixed(_open_path(request), self.settings)
        if (request.method, request.path) == ("POST", _REVIEWS):
            return self._review(request)
        if route is None:
            raise Refusal(404)
        if not api_requests.accepts_json(request):
            raise Refusal(406)
        match request.verb:
            case "list":
                return api_http.Response(200, self._list(request, route))
            case "get":
                return api_http.Response(200, self._found(route).alone)
            case "create":
                return api_http.Response(201, self._create(request, route).alone)
            case "update":
                return api_http.Response(200, self._update(request, route).alone)
            case "patch":
                return api_http.Response(200, self._patch(request, route).alone)
            case "delete":
                return api_http.Response(200, self._delete(route))
        raise Refusal(405)

    def _review(self, request: api_http.Request) -> api_http.Response:
        """Answer a SelfSubjectAccessReview."""
        review = api_requests.parse_json(request, frozenset(["application/json"]))
        asked = review["spec"]["resourceAttributes"]
        group = asked.get("group")
        path = f"/{f'apis/{group}' if group else 'api'}/v1/{asked['resource']}"
        route = api_requests.parse_path(path)
        if route is None:
            raise Refusal(400, f"{path} is not served here")
        meant = dataclasses.replace(request, path=path, verb=asked["verb"])
        authorize = self.settings.authorize
        review["status"] = {"allowed": authorize is None or authorize(meant, route)}
        return api_http.Response(201, json.dumps(review).encode())

    # ---- reading

    def _list(self, request: api_http.Request, route: api_requests.Route) -> bytes:
        query = request.query
        selector = self._selector(query, route)
        limit = api_requests.number(query, "limit")
        asked = query.get("resourceVersion", "")
        match_rule = query.get("resourceVersionMatch", "")
        if "sendInitialEvents" in query:
            raise api_status.invalid_list_options(
                "sendInitialEvents", "sendInitialEvents is forbidden for list"
            )
        if match_rule and not asked:
            raise api_status.invalid_list_options(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            )
        start = ""
        if token := query.get("continue", ""):
            version, start, objects = self._continued(token, asked, route)
        else:
            version, objects = self._listed(
                route, api_requests.number(query, "resourceVersion"), match_rule
            )
            if asked == "0":
                # Answered from the watch cache, which has no pages: clients must cope with more
                # objects than they asked for.
                limit = 0
        matching = [stored for stored in objects if stored.key > start and stored.matches(selector)]
        page = matching[:limit] if limit else matching
        metadata: api_store.Json = {"resourceVersion": str(version)}
        if len(page) < len(matching):
            metadata["continue"] = api_requests.make_token(version, page[-1].key)
            if not selector:
                # With a selector the real server does not know how many are left.
                metadata["remainingItemCount"] = len(matching) - len(page)
        head = {
            "kind": route.resource.kind + "List",
            "apiVersion": route.resource.group_version,
            "metadata": metadata,
        }
        opening = json.dumps(head, separators=(",", ":")).encode()[:-1]
        return b'%b,"items":[%b]}\n' % (opening, b",".join(stored.body for stored in page))

    def _listed(
        self, route: api_requests.Route, version: int, match_rule: str
    ) -> tuple[int, list[api_store.Stored]]:
        current = self.store.version
        if version > current:
            # The real server waits three seconds for the version to come before it says this.
            raise Refusal(
                504,
                f"Too large resource version: {version}, current: {current}",
                details={
                    "causes": [
                        {
                            "reason": "ResourceVersionTooLarge",
                            "message": "Too large resource version",
                        }
                    ]
                },
                retry_after_s=1,
            )
        if match_rule == "Exact":
            try:
                return self.store.snapshot(route.resource, version)
            except api_store.HistoryExpired as error:
                raise Refusal(410) from error
        return self.store.snapshot(route.resource)

    def _continued(
        self, token: str, asked: str, route: api_requests.Route
    ) -> tuple[int, str, list[api_store.Stored]]:
        if asked not in ("", "0"):
            raise Refusal(400, "specifying resource version is not allowed when using continue")
        version, start = api_requests.parse_token(token)
        with self._changed:
            expires, self._next_continue_expires = self._next_continue_expires, False
        too_old = Refusal(
            410,
            _CONTINUE_EXPIRED,
            continue_token=api_requests.make_token(api_requests.INCONSISTENT, start),
        )
        if expires:
            raise too_old
        try:
            at, objects = self.store.snapshot(
                route.resource, None if version == api_requests.INCONSISTENT else version
            )
        except api_store.HistoryExpired as error:
            raise too_old from error
        return at, start, objects

    def _watch(
        self, request: api_http.Request, connection: api_http.Connection, route: api_requests.Route
    ) -> None:
        query = request.query
        if not api_requests.accepts_json(request):
            raise Refusal(406)
        is_streaming_list = self._is_streaming_list(query)
        asked = query.get("resourceVersion", "")
        version = api_requests.number(query, "resourceVersion")
        watch = api_watch.Watch(
            connection,
            self.store,
            route.resource,
            self._selector(query, route),
            has_bookmarks=api_requests.flag(query, "allowWatchBookmarks"),
            bookmark_interval_s=self.settings.bookmark_interval_s,
            has_progress=self.settings.has_progress,
            timeout_s=float(api_requests.number(query, "timeoutSeconds")) or _WATCH_TIMEOUT_S,
        )
        with self._changed:
            self._watches.add(watch)
            self._changed.notify_all()
        try:
            if is_streaming_list:
                watch.run_from_state(is_marked=True)
            elif "sendInitialEvents" in query and asked in ("", "0"):
                watch.run_from_version(None)
            elif asked in ("", "0"):
                # Without a version to begin at, a watch tells the present state first, but nothing
                # marks where that ends.
                watch.run_from_state(is_marked=False)
            else:
                watch.run_from_version(version)
        finally:
            with self._changed:
                self._watches.remove(watch)
                self._changed.notify_all()
            watch.close()

    def _selector(self, query: dict[str, str], route: api_requests.Route) -> api_selectors.Selector:
        return api_requests.parse_selector(
            query, route, knows_service_fields=self.settings.service_fields
        )

    def _is_streaming_list(self, query: dict[str, str]) -> bool:
        """Return whether this watch begins with a streaming list (KEP-3157). Raises Refusal."""
        match_rule = query.get("resourceVersionMatch", "")
        if "sendInitialEvents" not in query:
            if match_rule:
                raise api_status.invalid_list_options(
                    "resourceVersionMatch",
                    "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
                )
            return False
        if not self.settings.streaming_lists:
            raise api_status.invalid_list_options(
                "sendInitialEvents",
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is "
                "enabled",
            )
        if match_rule != "NotOlderThan":
            raise api_status.invalid_list_options(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            )
        return api_requests.flag(query, "sendInitialEvents")

    # ---- writing

    def _found(self, route: api_requests.Route) -> api_store.Stored:
        stored = self.store.find(route.resource, _key(route))
        if stored is None:
            raise api_requests.not_found(route)
        return stored

    def _create(self, request: api_http.Request, route: api_requests.Route) -> api_store.Stored:
        obj = api_requests.parse_object(request, route)
        metadata = obj["metadata"]
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + secrets.token_hex(3)
        key = api_requests.checked_key(route, obj)

        def create(present: api_store.Stored | None) -> api_store.Json:
            if present is not None:
                raise Refusal(
                    409,
                    f'{api_requests.qualified(route.resource)} "{metadata["name"]}" already exists',
                    reason="AlreadyExists",
                    details=api_requests.details(route.resource, metadata["name"]),
                )
            return obj

        return self.store.update(route.resource, key, create)

    def _update(self, request: api_http.Request, route: api_requests.Route) -> api_store.Stored:
        obj = api_requests.parse_object(request, route)
        if api_requests.checked_key(route, obj) != _key(route):
            raise Refusal(400, "the name of the object does not match the name on the URL")

        def replace(present: api_store.Stored | None) -> api_store.Json:
            if present is None:
                raise api_requests.not_found(route)
            _check_version(route, obj, present)
            return obj

        return self.store.update(route.resource, _key(route), replace)

    def _patch(self, request: api_http.Request, route: api_requests.Route) -> api_store.Stored:
        patch = api_requests.parse_json(request, api_requests.PATCH_TYPES)

        def merge(present: api_store.Stored | None) -> api_store.Json:
            if present is None:
                raise api_requests.not_found(route)
            merged: api_store.Json = _merged(present.decode(), patch)
            if _names(merged) != _names(present.decode()):
                raise Refusal(422, "metadata: Invalid value: name and namespace cannot be changed")
            _check_version(route, merged, present)
            return merged

        return self.store.update(route.resource, _key(route), merge)

    def _delete(self, route: api_requests.Route) -> bytes:
        deleted = self.store.delete(route.resource, _key(route))
        if deleted is None:
            raise api_requests.not_found(route)
        if route.resource.returns_deleted:
            return deleted.alone
        return json.dumps(
            {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Success",
                "details": api_requests.details(route.resource, route.name) | {"uid": deleted.uid},
            }
        ).encode()


def _compressed(request: api_http.Request, response: api_http.Response) -> api_http.Response:
    encodings = request.headers.get("Accept-Encoding") or ""
    if request.method != "GET" or "gzip" not in encodings or len(response.body) <= _GZIP_ABOVE:
        return response
    return dataclasses.replace(
        response,
        # Level 1 is what kube-apiserver uses.
        body=gzip.compress(response.body, compresslevel=1),
        headers=(*response.headers, ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")),
    )


def _open_path(request: api_http.Request) -> str:
    """Return which path this is of those that need no token, or ""."""
    path = request.path.rstrip("/")  # generated clients ask for "/version/"
    return path if path in _OPEN_PATHS else ""


def _fixed(path: str, settings: Settings) -> api_http.Response:
    if path != "/version":
        return api_http.Response(200, b"ok", content_type="text/plain; charset=utf-8")
    version = {
        "major": "1",
        "minor": "36",
        "gitVersion": settings.version,
        "gitCommit": "0" * 40,
        "gitTreeState": "clean",
        "buildDate": "2026-01-01T00:00:00Z",
        "goVersion": "go1.25",
        "compiler": "gc",
        "platform": "linux/amd64",
    }
    date = email.utils.formatdate(time.time() + settings.clock_ahead_s, usegmt=True)
    body = json.dumps(version, indent=2).encode()
    return api_http.Response(200, body, headers=(("Date", date),))


def _key(route: api_requests.Route) -> str:
    return api_store.make_key(route.resource, route.namespace, route.name)


def _check_version(
    route: api_requests.Route, obj: api_store.Json, present: api_store.Stored
) -> None:
    asked = obj["metadata"].get("resourceVersion")
    if asked and asked != str(present.version):
        raise Refusal(
            409,
            f'Operation cannot be fulfilled on {api_requests.qualified(route.resource)} "{route.name}": the '
            "object has been modified; please apply your changes to the latest version and try again",
            details=api_requests.details(route.resource, route.name),
        )


def _names(obj: api_store.Json) -> tuple[Any, Any] | None:
    metadata = obj.get("metadata")
    if not isinstance(metadata, dict):
        return None
    return metadata.get("namespace"), metadata.get("name")


def _merged(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value)
    return result
