"""
Read API objects from files, for nodes without an API server, tests and commands that only look.

The daemon sees the same objects through the same Sink as from a cluster; what the API server and
the controllers would add (defaults, EndpointSlices) is added here. It never writes a file. The
invariant: nothing is lost because a file is half written, broken or gone for a moment with its
whole directory. Only what a readable file no longer holds, or a deleted file held, goes.
"""

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from kubeproxy_py import (
    endpoint_controller,
    errors,
    inotify,
    manifest_objects,
    manifest_parser,
    objects,
)
from kubeproxy_py.manifest_objects import AnyObject, Key
from kubeproxy_py.model import Kind, Problem

log = structlog.get_logger()

_SUFFIXES: Final = (".yaml", ".yml", ".json")
# A dump of 10,000 Services with their EndpointSlices is about 40 MB.
_MAX_FILE_BYTES: Final = 64 * 2**20
# Editors and kubelets replace a file within a few milliseconds. The kernel stamps files with a
# resolution of up to 10 ms, so a longer pause also makes sure that a write which follows our
# reading changes the signature.
_SETTLE_S: Final = 0.02
# A file that is written without pause is read all the same after half a second.
_MAX_SETTLE_LOOKS: Final = 25
# How long stopping may take: an Event cannot wake a thread that waits for inotify.
_STOP_CHECK_S: Final = 0.2
# kubelets swap the contents of a ConfigMap volume by renaming this link.
_CONFIGMAP_LINK: Final = "..data"

_Signature = tuple[int, ...]


class Loaded(NamedTuple):
    """What some files hold, with the defaults and EndpointSlices that a cluster would add."""

    objects: dict[Kind, tuple[objects.Object, ...]]  # every Kind; sorted by namespace and name
    problems: tuple[Problem, ...]
    broken_files: tuple[Path, ...]  # not readable as a whole, so what they hold is unknown


def load(paths: Sequence[Path]) -> Loaded:
    """
    Read *paths*, files or directories with all below them.

    Raises:
        ConfigError: one of *paths* itself cannot be read. Whatever else is wrong is a Problem.
    """
    roots = _roots(paths)
    scan = _scan(roots)
    _require_readable(roots, scan)
    loaded, _ = _Reader().read(scan)
    return loaded


def _nothing() -> None:
    pass


class ManifestSource:
    """Keeps a Sink equal to what the files hold."""

    def __init__(
        self,
        paths: Sequence[Path],
        sink: objects.Sink,
        report: Callable[[Problem], None],
        *,
        stop: threading.Event,
        poll_s: float = 1.0,
        beat: Callable[[], None] = _nothing,
    ) -> None:
        """
        Check that *paths* can be read now; nothing is read, opened or started before run().

        Args:
            paths: Files, or directories with all below them.
            sink: Takes the objects, in the thread of run().
            report: Takes each Problem when it arises, and again when its file was rewritten.
            stop: Ends run(), within 0.2 s.
            poll_s: How often to look even if inotify reports nothing, as on network file systems.
            beat: Called whenever the thread turns, so that one which hangs is missed.

        Raises:
            ConfigError: one of *paths* cannot be read.
        """
        self._roots = _roots(paths)
        _require_readable(self._roots, _scan(self._roots))
        self._sink = sink
        self._report = report
        self._stop = stop
        self._poll_s = poll_s
        self._beat = beat
        self._reader = _Reader()
        self._inotify: inotify.Inotify | None = None
        self._scan: _Scan | None = None  # what was last read and given to the sink
        self._given: dict[Kind, dict[tuple[str, str], objects.Object]] = {}

    def run(self) -> None:
        """Give the sink all objects, then their changes, until stopped."""
        with contextlib.ExitStack() as stack:
            try:
                self._inotify = stack.enter_context(inotify.Inotify())
            except OSError as error:
                self._go_without_inotify(error)
            while not self._stop.is_set():
                self._beat()
                try:
                    has_changed = self._refresh()
                except Exception:
                    # Whatever it was: the objects stay, and the next look tries again.
                    log.exception("manifests.refresh_failed")
                    has_changed = False
                if not has_changed:
                    # Something else is written to these directories, a log file perhaps:
                    # looking at each of its writes would keep a processor busy.
                    self._stop.wait(_SETTLE_S)
                self._wait()

    def _refresh(self) -> bool:
        scan = self._look()
        if scan == self._scan and not self._reader.has_unread_files:
            return False
        scan = self._settle(scan)
        loaded, problems = self._reader.read(scan)
        for problem in problems:
            self._report(problem)
        # The sink takes the first objects for all there are. A path that is gone since the
        # constructor saw it would make it remove the rules of everything in there.
        if self._given or not any(root in scan.unreadable for root in self._roots):
            self._give(loaded)
        has_changed = scan != self._scan
        # Last, so that a failure above is tried again.
        self._scan = scan
        return has_changed

    def _settle(self, scan: "_Scan") -> "_Scan":
        for _ in range(_MAX_SETTLE_LOOKS):
            if self._stop.wait(_SETTLE_S):
                break
            # Directories found by the last look are watched by now, and what was written to
            # them before that is found by this one.
            again = self._look()
            if again == scan:
                break
            scan = again
        return scan

    def _look(self) -> "_Scan":
        scan = _scan(self._roots)
        if self._inotify:
            try:
                self._inotify.watch(scan.watched)
            except OSError as error:
                self._inotify = None
                self._go_without_inotify(error)
        return scan

    def _go_without_inotify(self, error: OSError) -> None:
        log.warning("manifests.inotify_unavailable", error=str(error), poll_s=self._poll_s)

    def _wait(self) -> None:
        deadline = time.monotonic() + self._poll_s
        while not self._stop.is_set() and (left_s := deadline - time.monotonic()) > 0:
            if self._inotify is None:
                self._stop.wait(left_s)
            elif self._inotify.wait(min(left_s, _STOP_CHECK_S)):
                return

    def _give(self, loaded: Loaded) -> None:
        upserted = 0
        gone: list[tuple[Kind, tuple[str, str]]] = []
        for kind, wanted in loaded.objects.items():
            by_name = {(obj.metadata.namespace, obj.metadata.name): obj for obj in wanted}
            is_first = kind not in self._given
            given = self._given.setdefault(kind, {})
            for name, obj in by_name.items():
                if given.get(name) != obj:
                    self._sink.upsert(kind, obj)
                    given[name] = obj
                    upserted += 1
            gone += [(kind, name) for name in given.keys() - by_name.keys()]
            if is_first:
                self._sink.listed(kind)
        # After all that is new: an endpoint that moves to another slice is then never missing.
        for kind, identity in sorted(gone):
            self._sink.delete(kind, *identity)
            del self._given[kind][identity]
        write = log.info if upserted or gone else log.debug
        write(
            "manifests.applied",
            upserted=upserted,
            deleted=len(gone),
            problems=len(loaded.problems),
            broken_files=len(loaded.broken_files),
        )


# Finding files -----------------------------------------------------------------------------------


class _Scan(NamedTuple):
    """Which files there are; equal scans mean that no file has changed between them."""

    files: dict[str, _Signature]  # empty: the name is there, but what it names is not
    unreadable: dict[str, str]  # paths given, or directories below them; and why
    watched: dict[str, frozenset[str] | None]  # directories where a change of these names matters

    def hides(self, path: str) -> bool:
        """Tell whether *path* may still exist although it was not found."""
        return any(
            path == hidden or path.startswith(hidden.rstrip("/") + "/")
            for hidden in self.unreadable
        )


def _roots(paths: Iterable[Path]) -> tuple[str, ...]:
    # Links are kept: one may point elsewhere tomorrow.
    return tuple(sorted({os.path.abspath(path) for path in paths}))  # noqa: PTH100 - resolve() would follow links


def _require_readable(roots: Iterable[str], scan: _Scan) -> None:
    reasons = [
        f"{root}: {scan.unreadable.get(root, 'Permission denied')}"
        for root in roots
        if root in scan.unreadable or not os.access(root, os.R_OK)
    ]
    if reasons:
        raise errors.ConfigError(f"cannot read manifests: {'; '.join(reasons)}")


def _scan(roots: Iterable[str]) -> _Scan:
    scan = _Scan({}, {}, {})
    seen: set[tuple[int, int]] = set()
    for root in roots:
        # The parent tells when a path that was replaced or deleted is there again.
        parent, name = os.path.split(root)
        if scan.watched.get(parent, frozenset()) is not None:
            known = scan.watched.get(parent) or frozenset()
            scan.watched[parent] = known | {name, _CONFIGMAP_LINK}
        try:
            status = os.stat(root)  # noqa: PTH116 - thousands of Paths a second cost more than the looking
        except OSError as error:
            scan.unreadable[root] = error.strerror or str(error)
            continue
        if stat.S_ISDIR(status.st_mode):
            _scan_directory(root, scan, seen)
        else:
            scan.files[root] = _signature(status)
    return scan


def _scan_directory(root: str, scan: _Scan, seen: set[tuple[int, int]]) -> None:
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            status = os.stat(directory)  # noqa: PTH116 - as above
            if (status.st_dev, status.st_ino) in seen:  # links may lead in circles
                continue
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if directory == root or not isinstance(error, FileNotFoundError):
                scan.unreadable[directory] = error.strerror or str(error)
            continue
        seen.add((status.st_dev, status.st_ino))
        scan.watched[directory] = None
        for entry in entries:
            # Hidden: editors' swap files, and the real directories behind a ConfigMap volume's
            # links, where everything would be found a second time.
            if entry.name.startswith("."):
                continue
            is_manifest = entry.name.lower().endswith(_SUFFIXES)
            try:
                if entry.is_dir():
                    pending.append(entry.path)
                elif is_manifest:
                    scan.files[entry.path] = _signature(entry.stat())
            except OSError as error:
                is_gone = isinstance(error, FileNotFoundError) and not entry.is_symlink()
                if is_manifest and not is_gone:
                    scan.files[entry.path] = ()


def _signature(status: os.stat_result) -> _Signature:
    # ctime tells of what keeps size and mtime: permissions, links, files put back by cp -p.
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
    )  # fmt: skip


# Reading files -----------------------------------------------------------------------------------


class _File(NamedTuple):
    signature: _Signature | None  # None: it could not be read, so it has to be tried again
    objects: dict[Key, AnyObject]
    problems: tuple[Problem, ...] = ()
    is_broken: bool = False


class _Reader:
    """Remembers what it has read from each file, so as to read only what has changed."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._problems: frozenset[Problem] = frozenset()

    @property
    def has_unread_files(self) -> bool:
        return any(file.signature is None for file in self._files.values())

    def read(self, scan: _Scan) -> tuple[Loaded, list[Problem]]:
        """Return what all files hold, and those Problems that are new or of rewritten files."""
        files: dict[str, _File] = {}
        rewritten: set[Problem] = set()
        for path, signature in scan.files.items():
            known = self._files.get(path)
            if known is None or known.signature != signature:
                files[path] = _read(path, signature, known)
                if files[path].signature is not None:
                    rewritten.update(files[path].problems)
            else:
                files[path] = known
        for path, known in self._files.items():
            if path not in files and scan.hides(path):
                files[path] = known
        merged, duplicates = _merge(files)
        problems = [
            Problem(kind="File", name=path, message=f"cannot be read: {why}; its objects stay")
            for path, why in sorted(scan.unreadable.items())
        ]
        problems += [problem for _, file in sorted(files.items()) for problem in file.problems]
        problems += duplicates
        loaded = Loaded(
            objects=_complete(merged),
            problems=tuple(problems),
            broken_files=tuple(Path(path) for path in sorted(files) if files[path].is_broken),
        )
        fresh = [item for item in problems if item not in self._problems or item in rewritten]
        self._files = files
        self._problems = frozenset(problems)
        return loaded, fresh


def _merge(files: Mapping[str, _File]) -> tuple[dict[Key, AnyObject], list[Problem]]:
    merged: dict[Key, AnyObject] = {}
    found_in: dict[Key, str] = {}
    problems = []
    for path, file in sorted(files.items()):
        for key, obj in file.objects.items():
            if key in merged:
                message = f"is in {found_in[key]} and in {path}; the latter is used"
                problems.append(manifest_objects.problem_of(key, message))
            merged[key] = obj
            found_in[key] = path
    return merged, problems


def _complete(merged: Mapping[Key, AnyObject]) -> dict[Kind, tuple[objects.Object, ...]]:
    by_kind: dict[str, dict[Key, Any]] = {kind: {} for kind in manifest_objects.TYPES}
    for key, obj in merged.items():
        by_kind[key.kind][key] = obj
    slices = by_kind["EndpointSlice"]
    built = endpoint_controller.build_slices(
        services=by_kind["Service"].values(),
        pods=by_kind["Pod"].values(),
        endpoints=by_kind["Endpoints"].values(),
        existing_slices=slices.values(),
    )
    for item in built:
        key = Key("EndpointSlice", item.metadata.namespace, item.metadata.name)
        slices.setdefault(key, item)
    return {
        kind: tuple(obj for _, obj in sorted(by_kind[kind].items(), key=lambda item: item[0]))
        for kind in objects.TYPES
    }


def _read(path: str, signature: _Signature, known: _File | None) -> _File:
    before = known.objects if known else {}
    kept = "; what it held before stays" if before else ""
    try:
        documents = _documents(path, was_empty=not before)
    except OSError as error:
        # Not the file's fault perhaps, and then no change of it would make us try again.
        return _broken(None, before, path, f"cannot be read: {error.strerror}{kept}")
    except manifest_parser.UnparsableError as error:
        return _broken(signature, before, path, f"{error}{kept}")
    found, problems = manifest_objects.build(path, documents, before)
    return _File(signature, found, tuple(problems))


def _broken(
    signature: _Signature | None, before: dict[Key, AnyObject], path: str, message: str
) -> _File:
    problem = Problem(kind="File", name=path, message=message)
    return _File(signature, before, (problem,), is_broken=True)


def _documents(path: str, *, was_empty: bool) -> list[manifest_parser.Document]:
    text = _read_bytes(path)
    # An editor that writes in place truncates first.
    if not was_empty and not text.strip():
        raise manifest_parser.UnparsableError("is empty (delete it to remove what it held)")
    if path.lower().endswith(".json"):
        return manifest_parser.parse_json(text)
    return manifest_parser.parse_yaml(text)


def _read_bytes(path: str) -> bytes:
    # O_NONBLOCK: opening a pipe that happens to have such a name would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise manifest_parser.UnparsableError("is not a regular file")
        text = file.read(_MAX_FILE_BYTES + 1)
    if len(text) > _MAX_FILE_BYTES:
        raise manifest_parser.UnparsableError(f"is larger than {_MAX_FILE_BYTES} bytes")
    return text
