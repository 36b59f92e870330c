"""
What ``kubectl kustomize`` makes of a directory, for the few features that deploy/kubernetes uses.

A kustomization that uses anything else is refused, so that nothing is silently left out. Where kubectl
is at hand, a test holds this to its word.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

Json = dict[str, Any]

_FIELDS: Final = frozenset({"apiVersion", "kind", "resources", "configMapGenerator", "patches"})
_GENERATOR_FIELDS: Final = frozenset({"name", "namespace", "files", "behavior"})
# By what the items of a list are known, as the API types say it (patchMergeKey). Other lists are
# replaced as a whole.
_MERGE_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
# kustomize writes hashes with letters that make no words.
_HASH_LETTERS: Final = str.maketrans("013ae", "ghkmt")


def build(directory: Path) -> list[Json]:
    """Return the objects that *directory* amounts to, in the order they stand. Raises ValueError."""
    objects, generated = _collect(directory)
    names = {}
    for obj in objects:
        name = obj["metadata"]["name"]
        if obj["kind"] == "ConfigMap" and name in generated:
            names[name] = f"{name}-{_hash(obj)}"
            obj["metadata"]["name"] = names[name]
    for obj in objects:
        for reference in _config_map_references(obj):
            reference["name"] = names.get(reference["name"], reference["name"])
    return objects


def merge(base: Any, patch: Any, key: str = "") -> Any:
    """Return *base* changed by a strategic merge *patch*; *key* is the name of the field."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = dict(base)
        for name, value in patch.items():
            if value is None:
                merged.pop(name, None)
            else:
                merged[name] = merge(merged.get(name), value, name)
        return merged
    if isinstance(base, list) and isinstance(patch, list) and key in _MERGE_KEYS:
        by = _MERGE_KEYS[key]
        changed = {item[by]: item for item in patch}
        kept = [merge(item, changed.pop(item[by], {})) for item in base]
        # What is new comes first, as kustomize has it.
        return list(changed.values()) + kept
    return copy.deepcopy(patch)


def _collect(directory: Path) -> tuple[list[Json], set[str]]:
    """Return objects, and the names of generated ConfigMaps."""
    document = yaml.safe_load((directory / "kustomization.yaml").read_text())
    unknown = set(document) - _FIELDS
    if unknown:
        raise ValueError(f"cannot read {directory}: {sorted(unknown)} is not supported here")
    objects: list[Json] = []
    generated: set[str] = set()
    for entry in document.get("resources", ()):
        path = (directory / entry).resolve()
        if path.is_dir():
            found, names = _collect(path)
            objects += found
            generated |= names
        else:
            objects += (obj for obj in yaml.safe_load_all(path.read_text()) if obj)
    for generator in document.get("configMapGenerator", ()):
        generated.add(generator["name"])
        _generate(directory, generator, objects)
    for entry in document.get("patches", ()):
        if set(entry) != {"path"}:
            raise ValueError(f"cannot read {directory}: a patch has to be a path and nothing else")
        patch = yaml.safe_load((directory / entry["path"]).read_text())
        index = _find(objects, patch)
        if patch.pop("$patch", "") == "delete":
            del objects[index]
        else:
            objects[index] = merge(objects[index], patch)
    return objects, generated


def _generate(directory: Path, generator: Json, objects: list[Json]) -> None:
    unknown = set(generator) - _GENERATOR_FIELDS
    if unknown:
        raise ValueError(f"cannot read {directory}: {sorted(unknown)} is not supported here")
    made = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": generator["name"], "namespace": generator["namespace"]},
        "data": {name: (directory / name).read_text() for name in generator["files"]},
    }
    match generator.get("behavior", "create"):
        case "create":
            objects.append(made)
        case "replace":
            objects[_find(objects, made)] = made
        case other:
            raise ValueError(f"cannot read {directory}: behavior {other} is not supported here")


def _find(objects: list[Json], wanted: Json) -> int:
    for index, obj in enumerate(objects):
        if _identity(obj) == _identity(wanted):
            return index
    raise ValueError(f"cannot find {_identity(wanted)}, which a patch is for")


def _identity(obj: Json) -> tuple[str, str, str, str]:
    metadata = obj["metadata"]
    return obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"]


def _hash(config_map: Json) -> str:
    # As kustomize's hasher: keys sorted, no white space, Go's escapes for HTML; and the name, which the
    # hash will be a part of, does not count.
    content = {"data": config_map["data"], "kind": "ConfigMap", "name": ""}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return digest[:10].translate(_HASH_LETTERS)


def _config_map_references(obj: Json) -> Iterator[Json]:
    pod = obj.get("spec", {}).get("template", {}).get("spec", {})
    for volume in pod.get("volumes", ()):
        if "configMap" in volume:
            yield volume["configMap"]
