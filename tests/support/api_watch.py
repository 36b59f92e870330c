"""
One open watch of the tests' API server: from the initial events to its end.

Written by the thread of its connection alone; others reach it through ``cut``, ``end`` and
``send_raw``, which leave a note and wake it.
"""

import collections
import contextlib
import json
import os
import selectors
import threading
import time
from collections.abc import Iterable

from tests.support import api_http, api_selectors, api_status, api_store

_BLOCK = 64 << 10  # initial events are sent in blocks of about this many bytes, not one by one


class Watch:
    """A watch of one resource, already admitted. Use: ``open``, ``run``, ``close``."""

    def __init__(
        self,
        connection: api_http.Connection,
        store: api_store.Store,
        resource: api_store.Resource,
        selector: api_selectors.Selector,
        *,
        has_bookmarks: bool,
        bookmark_interval_s: float,
        has_progress: bool,
        timeout_s: float,
    ) -> None:
        """Subscribe to the store; ``close`` must be called in the end."""
        self.resource = resource
        self._connection = connection
        self._store = store
        self._selector = selector
        self._has_bookmarks = has_bookmarks
        self._bookmark_interval_s = bookmark_interval_s
        self._has_progress = has_progress
        self._deadline = time.monotonic() + timeout_s
        self._version = 0  # everything up to here has been sent or did not concern this watch
        self._told = 0  # a real cacheWatcher leaves out what is not newer, bookmarks included
        self._lock = threading.Lock()
        # Guarded by _lock, because a number that was closed may be somebody else's socket by now:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closed = False
        self._is_ending = False
        # Bytes as they are, and whether to close afterwards; a deque is safe across threads.
        self._raw: collections.deque[tuple[bytes, bool]] = collections.deque()
        store.subscribe(self._wake)

    def cut(self) -> None:
        """Cut the connection in the middle of the stream."""
        self._connection.close()

    def end(self) -> None:
        """End the stream as a timeout would; the connection stays usable."""
        self._is_ending = True
        self._wake()

    def send_raw(self, data: bytes, *, is_framed: bool, closes: bool) -> None:
        """Send *data* as the content of a chunk (*is_framed*) or as bytes on the wire."""
        self._raw.append((api_http.chunk(data) if is_framed else data, closes))
        self._wake()

    def close(self) -> None:
        self._store.unsubscribe(self._wake)
        with self._lock:
            self._is_closed = True
            os.close(self._wake_fd)

    def run_from_state(self, *, is_marked: bool) -> None:
        """Send all objects as ADDED, then (*is_marked*) the bookmark that ends them, then follow."""
        self._version, objects = self._store.snapshot(self.resource)
        self._told = self._version
        self._connection.start_stream()
        self._send_events(("ADDED", stored) for stored in objects if stored.matches(self._selector))
        if is_marked and self._has_bookmarks:
            self._send(self._bookmark({"k8s.io/initial-events-end": "true"}))
        self._follow()

    def run_from_version(self, version: int | None) -> None:
        """Send what happened after *version* (None: now), or the error that this is not known."""
        self._version = self._told = self._store.version if version is None else version
        self._connection.start_stream()
        try:
            self._send_changes(is_first=True)
        except api_store.HistoryExpired as error:
            # The real server too says 200 first: by then the stream has begun.
            status = api_status.body(410, "Expired", str(error))
            self._send(_line("ERROR", status))
            self._connection.send(api_http.LAST_CHUNK)
            return
        self._follow()

    def _follow(self) -> None:
        bookmark_at = time.monotonic() + self._bookmark_interval_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_fd, selectors.EVENT_READ)
            selector.register(self._connection, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if self._is_ending or now >= self._deadline:
                    break
                if self._has_bookmarks and now >= bookmark_at:
                    if self._version > self._told:
                        self._send(self._bookmark({}))
                    bookmark_at = now + self._bookmark_interval_s
                until = min(self._deadline, bookmark_at) if self._has_bookmarks else self._deadline
                ready = selector.select(max(0.0, until - now))
                if any(key.fd == self._wake_fd for key, _ in ready):
                    # Read before looking for work: a wake that comes later is then not lost.
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake_fd)
                elif ready and self._connection.is_hung_up():
                    self._connection.close()
                    return
                elif ready:
                    # A client that pipelines behind a watch gets its answer after the watch.
                    selector.unregister(self._connection)
                if not self._send_raw():
                    return
                try:
                    self._send_changes()
                except api_store.HistoryExpired:
                    # Too slow for the ring: the real server also drops such a watch.
                    break
        self._connection.send(api_http.LAST_CHUNK)

    def _send_raw(self) -> bool:
        """Send what tests have left here; False when the connection is to end with it."""
        while self._raw:
            data, closes = self._raw.popleft()
            self._connection.send(data)
            if closes:
                self._connection.close()
                return False
        return True

    def _send_changes(self, *, is_first: bool = False) -> None:
        version, changes = self._store.changes_after(
            self.resource, self._version, is_first=is_first
        )
        if changes or self._has_progress:
            self._version = version
        self._send_events(
            event for change in changes if (event := change.seen_through(self._selector))
        )

    def _send_events(self, events: Iterable[tuple[str, api_store.Stored]]) -> None:
        block: list[bytes] = []
        size = 0
        for kind, stored in events:
            line = _line(kind, stored.alone)
            block.append(line)
            size += len(line)
            if size >= _BLOCK:
                self._send(b"".join(block))
                block.clear()
                size = 0
        if block:
            self._send(b"".join(block))

    def _bookmark(self, annotations: dict[str, str]) -> bytes:
        metadata: api_store.Json = {"resourceVersion": str(self._version)}
        if annotations:
            metadata["annotations"] = annotations
        obj = self.resource.opening + b'"metadata":' + json.dumps(metadata).encode() + b"}"
        return _line("BOOKMARK", obj)

    def _send(self, lines: bytes) -> None:
        self._connection.send(api_http.chunk(lines))

    def _wake(self) -> None:
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self._wake_fd, 1)


def _line(event_type: str, obj: bytes) -> bytes:
    return b'{"type":"%b","object":%b}\n' % (event_type.encode(), obj)
