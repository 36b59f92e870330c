"""
Keep a sink equal to what the API server has of one kind, for ever.

A Watcher lists once, then follows changes and resumes where it was after every interruption. It
distrusts silence, never reports an object gone because it could not read it, and never raises
for anything the server or the network does: the last state it delivered stays in force.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from random import random as _random
from typing import Final

import msgspec
import structlog
import tenacity

from kubeproxy_py import api, errors, objects
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import Kind, Problem

log = structlog.get_logger()

_PATHS: Final[dict[Kind, str]] = {
    "Service": "/api/v1/services",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices",
    "Node": "/api/v1/nodes",
}

# kube-proxy's selectors. EndpointSlices of Services with a foreign proxy name are not excluded:
# nothing refers to them once the Service is not there.
_SELECTORS: Final[dict[Kind, dict[str, str]]] = {
    "Service": {
        "labelSelector": "!service.kubernetes.io/service-proxy-name",
        "fieldSelector": "spec.clusterIP!=None",
    },
    "EndpointSlice": {"labelSelector": "!service.kubernetes.io/headless"},
    "Node": {},
}

# Refusals of a watch that no waiting cures: asked wrongly, forbidden, not there, not offered.
_NO_WATCH: Final = frozenset({400, 403, 404, 405, 406, 422})
_INITIAL_EVENTS_END: Final = "k8s.io/initial-events-end"
# The message of client-go's IsTooLargeResourceVersion; the Status has no reason of its own for it.
_TOO_NEW: Final = "Too large resource version"
_SERVICE_NAME: Final = "kubernetes.io/service-name"
# As long as all the rest of a Service together, and nobody here reads it.
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"

# client-go's page: bounds the server's work, a few round trips for most clusters.
_PAGE: Final = "500"
# etcd refuses objects above 1.5 MiB and the API server requests above 3 MiB.
_MAX_LINE: Final = 8 << 20
# A cluster's 100,000 slices in one piece, as a server without streaming lists sends them from its
# cache: ten times that does not fit into a node, and is no list.
_MAX_PAGE: Final = 1 << 30
# A server that is well answers a list of one object at once; this is for one that is busy.
_ANSWER_S: Final = 15.0
# In silences. What takes longer is older than what it tells when it arrives.
_LONGEST_PAGE: Final = 3
# An outage is one line a minute for each kind, not one for each attempt.
_WARN_EVERY_S: Final = 60.0
# client-go's measure of a watch that never really began; a loop of those would be a busy one.
_BRIEF_S: Final = 1.0

# msgspec ends its messages with the place: "... - at `$.spec.ports[0].port`".
_PLACE: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<field>.*)`)?$", re.DOTALL)

Key = tuple[str, str]  # namespace ("" for Nodes), name
_NOBODY: Final[Key] = ("", "")


class WatchState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a watch stands."""

    kind: Kind
    objects: int
    resource_version: str  # "": nothing has been listed completely
    last_event_at: float | None  # Unix time when the server last sent anything; None: never
    silent_for_s: float | None  # how long ago that was, whatever became of the wall clock since
    failing_for_s: float | None  # None: it does not fail
    error: str  # why it failed last, while it fails


def _nothing() -> None:
    pass


class Watcher:
    """Lists and watches one kind. ``run`` belongs in a thread of its own."""

    def __init__(
        self,
        kind: Kind,
        connection: api.Connection,
        sink: objects.Sink,
        report: Callable[[Problem], None],
        metrics: Metrics,
        *,
        stop: threading.Event,
        node_name: str = "",
        beat: Callable[[], None] = _nothing,
        heard: Callable[[], None] = _nothing,
        silence_s: float = 120.0,
        pause_s: float = 0.8,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        random: Callable[[], float] = _random,
    ) -> None:
        """Prepare; nothing is asked of the server yet.

        Args:
            kind: what to watch
            connection: closing it after *stop* is set ends a read that blocks
            sink: receives the objects
            report: receives objects, or parts of the stream, that cannot be read
            metrics: reconnects and the time of the last line
            stop: ends ``run``
            node_name: the only Node to watch; needed for that kind
            beat: called whenever the thread turns, so that one which hangs is missed
            heard: called whenever the server has sent a whole line or page
            silence_s: reconnect after this long without a complete line, and ask the server whether
                it is there. Most send bookmarks once a minute; where nothing changes, and etcd has
                not been told to say so more often, none comes for ten. A dead one is quiet for ever.
            pause_s: the shortest wait after a failure; client-go's, as is the longest, 30 s
            clock: monotonic seconds
            now: seconds since the epoch
            random: a number from 0 to 1, for the spread of time limits and back-off
        """
        self._kind: Final = kind
        self._connection = connection
        self._sink = sink
        self._report = report
        self._reconnects = metrics.watch_reconnects
        self._last_line = metrics.watch_last_event_timestamp.labels(kind)
        self._stop = stop
        self._beat = beat
        self._heard = heard
        self._silence_s = silence_s
        self._clock = clock
        self._now = now
        self._random = random
        self._selectors = dict(_SELECTORS[kind])
        if kind == "Node":
            self._selectors["fieldSelector"] = f"metadata.name={node_name}"
        self._decoder = _DECODERS[kind]
        # Stretched by up to two in _pause.
        self._exponential = tenacity.wait_exponential(multiplier=pause_s, max=15)

        # What is known of the cluster. Keys only: the objects themselves are the sink's.
        self._known: set[Key] = set()
        self._resource_version = ""  # "": list again
        self._is_history_lost = False
        # What is known of the server.
        self._can_stream_lists = True
        self._is_stream_doubtful = False
        self._is_silent = False
        # The connection in progress.
        self._is_connected = False
        self._has_progressed = False
        self._damaged_at: str | None = None
        # The outage in progress.
        self._failing_since: float | None = None
        self._warned_at: float | None = None
        # For those who ask how it goes.
        self._last_event_at: float | None = None
        self._heard_at: float | None = None
        self._error_text = ""

    def run(self) -> None:
        """Watch until stopped. Exceptions of the sink, and only those, come out."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(errors.ApiError),
            wait=self._pause,
            sleep=tenacity.sleep_using_event(self._stop),
            stop=tenacity.stop_when_event_set(self._stop),
            before_sleep=self._warn,
            retry_error_callback=lambda _: None,
        )
        retrying(self._watch)

    def state(self) -> WatchState:
        """Return where it stands. From any thread; waits for nobody."""
        failing_since, heard_at, now = self._failing_since, self._heard_at, self._clock()
        return WatchState(
            kind=self._kind,
            objects=len(self._known),
            resource_version=self._resource_version,
            last_event_at=self._last_event_at,
            silent_for_s=None if heard_at is None else max(0.0, now - heard_at),
            failing_for_s=None if failing_since is None else now - failing_since,
            error="" if failing_since is None else self._error_text,
        )

    # -- when -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._beat()
            self._is_connected = self._has_progressed = False
            try:
                self._converse()
            except errors.ApiError as error:
                if not self._stop.is_set():
                    self._learn_from(error)
                raise

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Return how long to wait: 0.8 to 1.6 s at first, 15 to 30 s in the end.

        The spread keeps the nodes of a cluster from coming back all at the same moment.
        """
        if self._has_progressed:
            # A list alone is no reason to be quick again: a server that fails right after it
            # would be asked for everything once a second.
            state.attempt_number = 1
        return self._exponential(state) * (1 + self._random())

    def _note_life(self) -> None:
        self._last_event_at, self._heard_at = self._now(), self._clock()
        self._last_line.set(self._last_event_at)
        self._heard()

    def _learn_from(self, error: errors.ApiError) -> None:
        reason = self._reason(error)
        self._reconnects.labels(self._kind, reason).inc()
        if reason == "expired":
            self._resource_version = ""
            self._is_history_lost = True
            log.info("watch.expired", kind=self._kind, error=str(error))
        elif isinstance(error, api.Refused) and error.status in _NO_WATCH:
            # What it says to a watch it need not say to a list, as when only that is allowed. A list
            # with each attempt is what client-go makes of it; not from a cache older than what we have.
            self._resource_version = ""
            self._is_history_lost = True

    def _reason(self, error: errors.ApiError) -> str:
        match error:
            case errors.WatchExpired():
                return "expired"
            case api.Refused(status=504) if _TOO_NEW in str(error):
                # What we have seen is ahead of the server: etcd was restored from a backup.
                return "expired"
            case api.Silence():
                return "silent"
            case api.Refused():
                return "refused"
            case _Damaged():
                return "damaged"
        return "cut" if self._is_connected else "unreachable"

    def _warn(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        self._error_text = str(error)
        if isinstance(error, errors.WatchExpired):
            return
        if self._warned_at is None or now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            log.warning(
                "watch.failed",
                kind=self._kind,
                error=str(error),
                failing_s=round(now - self._failing_since, 1),
                retry_in_s=round(state.next_action.sleep if state.next_action else 0.0, 1),
            )

    def _recovered(self) -> None:
        if self._failing_since is None:
            return
        log.info(
            "watch.reconnected",
            kind=self._kind,
            failing_s=round(self._clock() - self._failing_since, 1),
            resource_version=self._resource_version,
        )
        self._failing_since = self._warned_at = None

    # -- the conversation -------------------------------------------------------------------------

    def _converse(self) -> None:
        """Make one step: list, or follow one watch until the server's time limit ends it."""
        if self._resource_version:
            if self._is_silent:
                self._ask()
            self._follow(None)
        elif self._can_stream_lists and not self._is_stream_doubtful:
            try:
                self._follow(_Listing())
            except api.Refused as error:
                # 422 from servers before 1.27 or without the WatchList gate; 400 from others.
                if error.status not in {400, 422}:
                    # Any other reason to refuse a stream may not hold for a list; but no haste.
                    self._is_stream_doubtful = error.status != 429
                    raise
                self._cannot_stream(str(error))
        else:
            self._list_pages()

    def _ask(self) -> None:
        """Ask a server that sent nothing for long whether it is there, and where it stands.

        A kube-apiserver sends a watch only what is newer than where that began, bookmarks included
        (its cacher's cacheWatcher). So a watch from before etcd was restored from a backup stays silent
        for as long as it takes to catch up, days perhaps (kubernetes/kubernetes#107457), and one of
        objects that do not change until etcd reports progress: every ten minutes, if not told otherwise.
        """
        limit_s = min(_ANSWER_S, self._silence_s)
        # Without a resourceVersion: what etcd has, not what a cache does.
        page = self._page({**self._selectors, "limit": "1"}, read_timeout_s=limit_s)
        self._is_silent = False
        self._expire_if_older(page.metadata.resourceVersion)

    def _expire_if_older(self, resource_version: str) -> None:
        if _is_older(resource_version, self._resource_version):
            raise errors.WatchExpired(
                f"cannot watch {self._kind}: the server went back from resourceVersion "
                f"{self._resource_version} to {resource_version}"
            )

    def _follow(self, listing: "_Listing | None") -> None:
        """Read one watch to its end; with a *listing*, the initial state comes first in the stream."""
        query = {
            **self._selectors,
            "watch": "true",
            "allowWatchBookmarks": "true",
            # client-go's spread, so that the watches of a cluster do not all end together.
            "timeoutSeconds": str(300 + int(self._random() * 300)),
        }
        if listing is None:
            query["resourceVersion"] = self._resource_version
        else:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        started = self._clock()
        with self._connection.get(
            _PATHS[self._kind], query, read_timeout_s=self._silence_s
        ) as response:
            self._is_connected = True
            if listing is None:
                self._recovered()
            try:
                for line in self._lines(response.pieces()):
                    if self._stop.is_set():
                        return
                    listing = self._receive(line, listing)
                    if listing is not None and not self._can_stream_lists:
                        return
            except api.Silence:
                if listing is None:
                    # Perhaps nothing has happened. Whether it is an outage, asking will tell.
                    self._is_silent = True
                    self._reconnects.labels(self._kind, "silent").inc()
                    return
                # Perhaps a stalled server, perhaps one that ignores what it does not know and
                # has nothing more to say: a list by pages works with both.
                self._is_stream_doubtful = True
                raise
        if listing is not None:
            self._is_stream_doubtful = True
            raise errors.ApiUnavailable(
                f"cannot list {self._kind}: the stream ended within the initial state"
            )
        if self._clock() - started < _BRIEF_S:
            raise errors.ApiUnavailable(f"cannot watch {self._kind}: the server ended it at once")
        self._reconnects.labels(self._kind, "ended").inc()

    def _cannot_stream(self, why: str) -> None:
        self._can_stream_lists = False
        log.info("watch.streaming_list_refused", kind=self._kind, reason=why)

    def _list_pages(self) -> None:
        first = dict(self._selectors)
        if not self._is_history_lost:
            # From the server's cache. Not after a 410: the cache may be as old as what we have.
            first["resourceVersion"] = "0"
        listing = _Listing()
        query = {**first, "limit": _PAGE}
        while not self._stop.is_set():
            try:
                page = self._page(query, read_timeout_s=self._silence_s)
            except api.Refused as error:
                if error.status != 400 or not self._widen(str(error)):
                    raise
                return
            except errors.WatchExpired:
                if "continue" not in query:
                    raise
                # etcd forgot the state between two pages: all in one piece then.
                listing, query = _Listing(), first
                continue
            self._is_connected = True
            for raw in page.items or ():
                self._collect(raw, listing)
            if not page.metadata.continue_:
                self._deliver(listing, page.metadata.resourceVersion, mode="pages")
                self._is_stream_doubtful = False
                return
            query = {**self._selectors, "limit": _PAGE, "continue": page.metadata.continue_}

    def _widen(self, why: str) -> bool:
        """Give up the field selector of Services; return False if there is none to give up.

        API servers before 1.31 know none for spec.clusterIP, which only spares us headless Services.
        """
        if self._kind != "Service" or not self._selectors.pop("fieldSelector", ""):
            return False
        log.info("watch.field_selector_refused", kind=self._kind, reason=why)
        return True

    def _page(self, query: dict[str, str], *, read_timeout_s: float) -> "_Page":
        path = _PATHS[self._kind]
        with self._connection.get(path, query, read_timeout_s=read_timeout_s) as response:
            body = self._body(response.pieces())
        try:
            page = _PAGE_DECODER.decode(body)
        except api.UNREADABLE as error:
            raise _Damaged(f"cannot decode the list of {self._kind}: {error}") from error
        self._note_life()
        return page

    def _body(self, pieces: Iterable[bytes]) -> bytes:
        """Put a page together. Raises ApiUnavailable for an endless or endlessly slow one."""
        parts: list[bytes] = []
        size = 0
        began = self._clock()
        for piece in pieces:
            self._beat()
            parts.append(piece)
            size += len(piece)
            if size > _MAX_PAGE:
                raise _Damaged(f"cannot list {self._kind}: a page exceeds {_MAX_PAGE} bytes")
            if self._clock() - began > _LONGEST_PAGE * self._silence_s:
                raise api.Silence(f"cannot list {self._kind}: a page takes too long")
        return b"".join(parts)

    def _lines(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield complete lines. Raises ApiUnavailable for an endless, endlessly slow or half one."""
        parts: list[bytes] = []
        size = 0
        last = self._clock()
        for piece in pieces:
            self._beat()
            head, *others = piece.split(b"\n")
            parts.append(head)
            size += len(head)
            if size > _MAX_LINE:
                raise _Damaged(f"cannot watch {self._kind}: a line exceeds {_MAX_LINE} bytes")
            if others:
                yield b"".join(parts)
                yield from others[:-1]
                parts, size = [others[-1]], len(others[-1])
                last = self._clock()
            elif self._clock() - last > self._silence_s:
                # The socket's own limit starts anew with every byte.
                raise api.Silence(f"cannot watch {self._kind}: no complete line for too long")
        if size:
            raise errors.ApiUnavailable(f"cannot watch {self._kind}: it ended within a line")

    # -- events -----------------------------------------------------------------------------------

    def _receive(self, line: bytes, listing: "_Listing | None") -> "_Listing | None":
        """Take one event. Return the *listing* while the initial state is incomplete, then None."""
        if not line.strip():
            return listing
        self._note_life()
        try:
            event = _EVENT_DECODER.decode(line)
        except api.UNREADABLE as error:
            self._damaged(error)
            if listing is not None:
                listing.unreadable.add(_NOBODY)
            return listing
        match event.type:
            case "ADDED" | "MODIFIED" if listing is not None:
                self._collect(event.object, listing)
            case "DELETED" if listing is not None:
                key = self._identify(event.object).key
                listing.drop(key)
                self._sink.delete(self._kind, *key)
            case "ADDED" | "MODIFIED":
                self._upsert(event.object)
            case "DELETED":
                self._delete(event.object)
            case "BOOKMARK":
                return self._bookmark(event.object, listing)
            case "ERROR":
                raise self._error(event.object)
            case unknown:
                log.warning("watch.unknown_event_ignored", kind=self._kind, type=unknown[:80])
        return listing

    def _upsert(self, raw: msgspec.Raw) -> None:
        decoded = self._decode(raw)
        if isinstance(decoded, _Unreadable):
            # Whatever good version the sink has stays.
            self._advance(decoded.resource_version)
            return
        self._known.add(_key(decoded))
        self._sink.upsert(self._kind, decoded)
        self._advance(decoded.metadata.resourceVersion)

    def _delete(self, raw: msgspec.Raw) -> None:
        # Its metadata will do: the rest may be as unreadable as it was when it came.
        gone = self._identify(raw)
        self._known.discard(gone.key)
        self._sink.delete(self._kind, *gone.key)
        self._advance(gone.resource_version)

    def _bookmark(self, raw: msgspec.Raw, listing: "_Listing | None") -> "_Listing | None":
        mark = self._identify(raw)
        if listing is None:
            self._expire_if_older(mark.resource_version)
            self._advance(mark.resource_version)
            return None
        if not mark.ends_initial_state:
            # A server that streams lists sends no other bookmark before that one.
            self._cannot_stream("a bookmark came before the end of the initial state")
            return listing
        self._deliver(listing, mark.resource_version, mode="stream")
        return None

    def _error(self, raw: msgspec.Raw) -> errors.ApiError:
        try:
            status = _STATUS_DECODER.decode(raw)
        except api.UNREADABLE:
            status = _Status(message="an error event without a readable Status")
        text = f"cannot watch {self._kind}: {status.code}: {status.message[: api.MAX_TOLD]}"
        if status.code == 410 or status.reason in {"Expired", "Gone"}:
            return errors.WatchExpired(text)
        return api.Refused(text, status.code)

    def _damaged(self, error: Exception) -> None:
        """Deal with a line that is no event: ask again once, then leave it out.

        Transport damage is gone the second time. What the server really sends would come for ever,
        and one object must not keep all the others from being followed.
        """
        place = self._resource_version
        if self._damaged_at != place:
            self._damaged_at = place
            raise _Damaged(f"cannot decode an event of {self._kind}: {error}") from error
        self._report(Problem(kind=self._kind, message=f"cannot decode an event: {error}"))

    def _advance(self, resource_version: str) -> None:
        self._has_progressed = True
        if resource_version:
            self._resource_version = resource_version

    # -- objects ----------------------------------------------------------------------------------

    def _collect(self, raw: msgspec.Raw, listing: "_Listing") -> None:
        """Take one object of a list. It goes on at once: a big list is never held in memory."""
        decoded = self._decode(raw)
        if isinstance(decoded, _Unreadable):
            listing.unreadable.add(decoded.key)
            return
        key = _key(decoded)
        listing.keys.add(key)
        listing.unreadable.discard(key)
        # Known from now on, for the case that this list is never completed and the next lacks it.
        self._known.add(key)
        self._sink.upsert(self._kind, decoded)

    def _deliver(self, listing: "_Listing", resource_version: str, *, mode: str) -> None:
        """Remove what a complete list lacks, and say that it is complete."""
        # Listed but unreadable is not gone: the last good version stays. When it cannot even be
        # said which object was unreadable, it may be any of those missed.
        missed = self._known - listing.keys
        kept = missed if _NOBODY in listing.unreadable else missed & listing.unreadable
        vanished = missed - kept
        for namespace, name in vanished:
            self._sink.delete(self._kind, namespace, name)
        self._sink.listed(self._kind)
        self._known = listing.keys | kept
        self._resource_version = resource_version
        self._is_history_lost = False
        self._recovered()
        log.info(
            "watch.listed",
            kind=self._kind,
            objects=len(listing.keys),
            unreadable=len(listing.unreadable),
            vanished=len(vanished),
            resource_version=resource_version,
            mode=mode,
        )

    def _decode(self, raw: msgspec.Raw) -> "objects.Object | _Unreadable":
        """Decode one object, or report why that is impossible."""
        try:
            decoded = self._decoder.decode(raw)
        except api.UNREADABLE as error:
            broken = self._identify(raw)
            place = _PLACE.match(str(error))
            namespace, name = broken.key
            self._report(
                Problem(
                    kind=self._kind,
                    namespace=namespace,
                    name=name,
                    field=(place and place["field"]) or "",
                    message=place["what"] if place else str(error),
                )
            )
            return broken
        _slim(decoded)
        return decoded

    def _identify(self, raw: msgspec.Raw) -> "_Unreadable":
        try:
            metadata = _IDENTITY_DECODER.decode(raw).metadata
        except api.UNREADABLE:
            return _Unreadable(_NOBODY)
        return _Unreadable(
            (metadata.namespace, metadata.name),
            metadata.resourceVersion,
            (metadata.annotations or {}).get(_INITIAL_EVENTS_END) == "true",
        )


class _Damaged(errors.ApiUnavailable):
    """What came is not what the API sends."""


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _PageMetadata(msgspec.Struct, rename={"continue_": "continue"}):
    resourceVersion: str = ""  # noqa: N815 - the API's field name
    continue_: str | None = None


class _Page(msgspec.Struct):
    metadata: _PageMetadata
    items: list[msgspec.Raw] | None = None  # null is how Go writes an empty list


class _Metadata(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    resourceVersion: str = ""  # noqa: N815 - the API's field name
    annotations: dict[str, str] | None = None


class _Identity(msgspec.Struct):
    metadata: _Metadata


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


class _Unreadable(msgspec.Struct):
    """What can be said of an object from its metadata alone."""

    key: Key
    resource_version: str = ""
    ends_initial_state: bool = False


class _Listing:
    """A list that is not complete yet."""

    def __init__(self) -> None:
        self.keys: set[Key] = set()
        self.unreadable: set[Key] = set()

    def drop(self, key: Key) -> None:
        self.keys.discard(key)
        self.unreadable.discard(key)


# All of them before there are threads: msgspec (0.22) learns a type when it is first asked for, and while
# one thread does that, others that ask for the same type get it half done, and the process crashes.
_EVENT_DECODER: Final = msgspec.json.Decoder(_Event)
_PAGE_DECODER: Final = msgspec.json.Decoder(_Page)
_STATUS_DECODER: Final = msgspec.json.Decoder(_Status)
_IDENTITY_DECODER: Final = msgspec.json.Decoder(_Identity)
_DECODERS: Final = {kind: msgspec.json.Decoder(found) for kind, found in objects.TYPES.items()}


def _key(decoded: objects.Object) -> Key:
    return decoded.metadata.namespace, decoded.metadata.name


def _is_older(one: str, other: str) -> bool:
    # Comparable as numbers since KEP-5504; a server that writes others is not judged.
    if not (one.isascii() and one.isdecimal() and other.isascii() and other.isdecimal()):
        return False
    # As text: Python makes no number of thousands of digits, and raises.
    one, other = one.lstrip("0"), other.lstrip("0")
    return (len(one), one) < (len(other), other)


def _slim(decoded: objects.Object) -> None:
    """Keep one copy of strings that most objects share, and none of what nobody reads."""
    metadata = decoded.metadata
    metadata.namespace = sys.intern(metadata.namespace)
    if metadata.annotations:
        metadata.annotations.pop(_LAST_APPLIED, None)
    if not isinstance(decoded, objects.EndpointSlice):
        return
    if metadata.labels and _SERVICE_NAME in metadata.labels:
        metadata.labels[_SERVICE_NAME] = sys.intern(metadata.labels[_SERVICE_NAME])
    for port in decoded.ports or ():
        port.name = port.name and sys.intern(port.name)
        port.protocol = port.protocol and sys.intern(port.protocol)
    for endpoint in decoded.endpoints or ():
        endpoint.nodeName = endpoint.nodeName and sys.intern(endpoint.nodeName)
        if endpoint.hints:
            for hint in (*(endpoint.hints.forZones or ()), *(endpoint.hints.forNodes or ())):
                hint.name = sys.intern(hint.name)
