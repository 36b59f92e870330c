"""
The objects of the tests' API server and what happened to them.

Like etcd with a watch cache in front: one global resourceVersion, a bounded history per resource,
objects encoded once, when they are applied. Knows nothing of HTTP. All methods may be called from
any thread.
"""

import collections
import dataclasses
import datetime as dt
import json
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal

from tests.support import api_selectors

Json = dict[str, Any]
EventType = Literal["ADDED", "MODIFIED", "DELETED"]


@dataclasses.dataclass(frozen=True, slots=True)
class Resource:
    """A collection that is served, e.g. ``services`` of ``v1``."""

    group_version: str
    plural: str
    kind: str
    is_namespaced: bool = True
    fields: frozenset[str] = frozenset()
    """Field selectors understood beside metadata.name and metadata.namespace."""
    returns_deleted: bool = False
    """Whether DELETE answers with the object, and not with a Status."""

    @property
    def group(self) -> str:
        return self.group_version.rpartition("/")[0]

    @property
    def opening(self) -> bytes:
        """How an object that travels alone begins; items of a list carry neither kind nor version."""
        return f'{{"kind":"{self.kind}","apiVersion":"{self.group_version}",'.encode()

    @property
    def supported_fields(self) -> frozenset[str]:
        return self.fields | {"metadata.name", "metadata.namespace"}


RESOURCES: Final = (
    Resource(
        "v1",
        "services",
        "Service",
        fields=frozenset(["spec.clusterIP", "spec.type"]),
        returns_deleted=True,
    ),
    Resource("v1", "nodes", "Node", is_namespaced=False, fields=frozenset(["spec.unschedulable"])),
    Resource("discovery.k8s.io/v1", "endpointslices", "EndpointSlice"),
    # Never used by our daemon, but kube-proxy itself does not start without it.
    Resource("networking.k8s.io/v1", "servicecidrs", "ServiceCIDR", is_namespaced=False),
    Resource("v1", "events", "Event"),
    Resource("events.k8s.io/v1", "events", "Event"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """One version of one object."""

    resource: Resource
    key: str  # "namespace/name", or the name: the order of lists
    namespace: str
    version: int
    uid: str
    created: str
    labels: Mapping[str, str]
    fields: Mapping[str, str]
    body: bytes  # JSON without kind and apiVersion

    @property
    def alone(self) -> bytes:
        """The JSON of the object by itself, with kind and apiVersion."""
        return self.resource.opening + self.body[1:]

    def decode(self) -> Json:
        obj: Json = json.loads(self.alone)
        return obj

    def with_version(self, version: int) -> "Stored":
        """Return the same object at another resourceVersion: a deletion has a version of its own."""
        obj = json.loads(self.body)
        obj["metadata"]["resourceVersion"] = str(version)
        return dataclasses.replace(self, version=version, body=_encode(obj))

    def matches(self, selector: api_selectors.Selector) -> bool:
        return selector.matches(self.namespace, self.labels, self.fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One entry of the history. Exactly one of *before* and *after* may be None."""

    version: int
    key: str
    before: Stored | None
    after: Stored | None

    def seen_through(self, selector: api_selectors.Selector) -> tuple[EventType, Stored] | None:
        """Return the event a watch with *selector* gets, or None.

        An object that stops matching is gone as far as that watch is concerned, and one that
        begins to match is new: what the API server's watch cache does.
        """
        before = self.before if self.before and self.before.matches(selector) else None
        after = self.after if self.after and self.after.matches(selector) else None
        if after is not None:
            return ("MODIFIED" if before else "ADDED"), after
        if before is not None:
            return "DELETED", before.with_version(self.version)
        return None


class HistoryExpired(Exception):
    """The history needed begins too late; *oldest* is the first version still known."""

    def __init__(self, asked: int, oldest: int) -> None:
        """Keep both versions for the server's message."""
        self.asked = asked
        self.oldest = oldest
        super().__init__(f"too old resource version: {asked} ({oldest})")


@dataclasses.dataclass(slots=True)
class _Shelf:
    """The objects and the history of one resource."""

    objects: dict[str, Stored]
    changes: collections.deque[Change]
    dropped: int = 0  # version of the newest change that fell out of the ring
    compacted: int = 0  # new readers may not begin below this; old readers have read it already


class Store:
    """All objects, by resource."""

    def __init__(self, *, history: int, is_realistic: bool = False) -> None:
        """Remember the last *history* changes of each resource."""
        self._is_realistic = is_realistic
        self._lock = threading.RLock()
        # Guarded by _lock:
        # A real cluster's etcd has seen some writes before anything of ours is stored, and
        # resourceVersion "0" has a meaning of its own.
        self._version = 100
        self._shelves = {
            resource: _Shelf({}, collections.deque(maxlen=history)) for resource in RESOURCES
        }
        self._wakes: set[Callable[[], None]] = set()

    @property
    def version(self) -> int:
        """The resourceVersion of the newest write."""
        with self._lock:
            return self._version

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Have *wake* called, under the lock, after every write."""
        with self._lock:
            self._wakes.add(wake)

    def unsubscribe(self, wake: Callable[[], None]) -> None:
        with self._lock:
            self._wakes.discard(wake)

    def apply(self, resource: Resource, objects: Iterable[Json]) -> list[Stored]:
        """Create or replace *objects*; one that would not change is not written, as in etcd."""
        with self._lock:
            stored = [self._apply_one(resource, obj) for obj in objects]
            self._wake()
        return stored

    def delete(self, resource: Resource, key: str) -> Stored | None:
        """Remove the object and return it, with the version of its deletion; None if there is none."""
        with self._lock:
            shelf = self._shelves[resource]
            before = shelf.objects.pop(key, None)
            if before is None:
                return None
            self._version += 1
            self._remember(shelf, Change(self._version, key, before, None))
            self._wake()
            return before.with_version(self._version)

    def find(self, resource: Resource, key: str) -> Stored | None:
        with self._lock:
            return self._shelves[resource].objects.get(key)

    def update(
        self,
        resource: Resource,
        key: str,
        change: Callable[[Stored | None], Json],
    ) -> Stored:
        """Write what *change* makes of the present object (None: there is none), atomically.

        Whatever *change* raises passes through; then nothing is written.
        """
        with self._lock:
            obj = change(self._shelves[resource].objects.get(key))
            return self.apply(resource, [obj])[0]

    def snapshot(self, resource: Resource, version: int | None = None) -> tuple[int, list[Stored]]:
        """Return all objects in key order as of *version* (None: now), and that version.

        Raises HistoryExpired if that far back is no longer known.
        """
        with self._lock:
            shelf = self._shelves[resource]
            objects = dict(shelf.objects)
            if version is not None:
                self._check(shelf, version)
                for change in reversed(shelf.changes):
                    if change.version <= version:
                        break
                    if change.before is None:
                        del objects[change.key]
                    else:
                        objects[change.key] = change.before
            at = self._version if version is None else version
        return at, [objects[key] for key in sorted(objects)]

    def changes_after(
        self, resource: Resource, version: int, *, is_first: bool = False
    ) -> tuple[int, list[Change]]:
        """Return the changes since *version*, and the version up to which they are complete.

        Raises HistoryExpired if some of them were lost. A reader that has kept up is not disturbed
        by compact(); one that *is_first* reading is.
        """
        with self._lock:
            shelf = self._shelves[resource]
            if is_first:
                self._check(shelf, version)
            elif version < shelf.dropped:
                raise HistoryExpired(version, shelf.dropped)
            changes: list[Change] = []
            for change in reversed(shelf.changes):
                if change.version <= version:
                    break
                changes.append(change)
            changes.reverse()
            return max(version, self._version), changes

    def compact(self) -> None:
        """Forget the history: reading that begins before the newest version has expired."""
        with self._lock:
            for shelf in self._shelves.values():
                shelf.compacted = self._version

    def roll_back(self, version: int) -> None:
        """Be what was stored at *version*, as an etcd that is restored from a backup of then."""
        with self._lock:
            for resource, shelf in self._shelves.items():
                _, objects = self.snapshot(resource, version)
                shelf.objects = {stored.key: stored for stored in objects}
                shelf.changes.clear()
                shelf.dropped = shelf.compacted = version
            self._version = version

    def _check(self, shelf: _Shelf, version: int) -> None:
        oldest = max(shelf.dropped, shelf.compacted)
        if version < oldest:
            raise HistoryExpired(version, oldest)

    def _apply_one(self, resource: Resource, obj: Json) -> Stored:
        key = key_of(resource, obj)
        shelf = self._shelves[resource]
        before = shelf.objects.get(key)
        if before is not None:
            same = self._stored(resource, key, obj, before.version, before)
            if same.body == before.body:
                return before
        after = self._stored(resource, key, obj, self._version + 1, before)
        self._version += 1
        shelf.objects[key] = after
        self._remember(shelf, Change(self._version, key, before, after))
        return after

    def _remember(self, shelf: _Shelf, change: Change) -> None:
        if len(shelf.changes) == shelf.changes.maxlen:
            shelf.dropped = shelf.changes[0].version
        shelf.changes.append(change)

    def _wake(self) -> None:
        for wake in self._wakes:
            wake()

    def _stored(
        self, resource: Resource, key: str, obj: Json, version: int, before: Stored | None
    ) -> Stored:
        given = obj["metadata"]
        namespace = key.rpartition("/")[0]
        metadata: Json = {
            **given,
            "uid": given.get("uid") or (before.uid if before else str(uuid.uuid4())),
            "resourceVersion": str(version),
            "creationTimestamp": given.get("creationTimestamp")
            or (before.created if before else _now()),
        }
        if resource.is_namespaced:
            metadata["namespace"] = namespace
        data = {
            name: value for name, value in obj.items() if name not in ("kind", "apiVersion")
        } | {"metadata": metadata}
        if self._is_realistic:
            _add_noise(resource, data)
        return Stored(
            resource=resource,
            key=key,
            namespace=namespace,
            version=version,
            uid=metadata["uid"],
            created=metadata["creationTimestamp"],
            labels=metadata.get("labels") or {},
            fields={name: _field(data, name) for name in resource.supported_fields},
            body=_encode(data),
        )


def key_of(resource: Resource, obj: Json) -> str:
    """Return the key of *obj*; a namespaced object without a namespace is in ``default``."""
    metadata = obj.get("metadata") or {}
    name = metadata.get("name")
    if not name:
        raise ValueError(f"cannot store {resource.kind}: metadata.name is missing")
    return make_key(resource, metadata.get("namespace", ""), name)


def make_key(resource: Resource, namespace: str, name: str) -> str:
    return f"{namespace or 'default'}/{name}" if resource.is_namespaced else name


def resource_of(obj: Json) -> Resource:
    """Return the resource of *obj* by its kind (and apiVersion, where a kind exists twice)."""
    kind, version = obj.get("kind"), obj.get("apiVersion")
    alike = [resource for resource in RESOURCES if resource.kind == kind]
    for resource in alike:
        if resource.group_version == version:
            return resource
    if alike and version is None:
        return alike[0]
    raise ValueError(f"cannot store {version} {kind}: not served here")


def resources_named(name: str) -> tuple[Resource, ...]:
    """Return the resources with this kind or plural name; events are in two API groups."""
    found = tuple(resource for resource in RESOURCES if name in (resource.kind, resource.plural))
    if not found:
        raise ValueError(f"cannot find resource {name!r}: not served here")
    return found


def _encode(obj: Json) -> bytes:
    return json.dumps(obj, separators=(",", ":"), ensure_ascii=False).encode()


def _field(data: Json, path: str) -> str:
    value: Any = data
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        # Go's zero values: a field selector compares what the typed object holds.
        return "false" if path == "spec.unschedulable" else ""
    return str(value)


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _add_noise(resource: Resource, data: Json) -> None:
    """Add what nobody reads and real objects are full of: managedFields and applied manifests."""
    metadata = data["metadata"]
    content = {name: value for name, value in data.items() if name != "metadata"}
    if resource.kind == "Service":
        manifest = {**content, "metadata": {"name": metadata["name"]}}
        metadata["annotations"] = (metadata.get("annotations") or {}) | {
            "kubectl.kubernetes.io/last-applied-configuration": _encode(manifest).decode() + "\n"
        }
    owner = "kubectl-client-side-apply" if resource.kind == "Service" else "kube-controller-manager"
    owned = {
        "f:metadata": _field_set(
            {name: metadata[name] for name in ("annotations", "labels") if metadata.get(name)}
        ),
        **_field_set(content),
    }
    metadata["managedFields"] = [
        {
            "manager": owner,
            "operation": "Update",
            "apiVersion": resource.group_version,
            "time": metadata["creationTimestamp"],
            "fieldsType": "FieldsV1",
            "fieldsV1": owned,
        }
    ]


def _field_set(value: Any) -> Json:
    if isinstance(value, dict):
        return {f"f:{name}": _field_set(inner) for name, inner in value.items()}
    if isinstance(value, list):
        # Only lists with keys are tracked item by item: Service ports by port and protocol.
        return {
            "k:" + json.dumps({"port": item["port"], "protocol": item["protocol"]}): {
                ".": {},
                **_field_set(item),
            }
            for item in value
            if isinstance(item, dict) and "port" in item and "protocol" in item
        }
    return {}
