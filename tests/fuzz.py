"""
Parsers fed by atheris, which looks where the code goes: ``python -m tests.fuzz PARSER [-max_total_time=60]``.

``make fuzz`` installs atheris and runs all of them. It is not part of the tests: what it finds goes into
tests/unit/test_hostile.py.
"""

import contextlib
import hashlib
import sys
import zlib
from collections.abc import Callable
from typing import Final

import atheris

with atheris.instrument_imports(include=["kubeproxy_py"]):
    from kubeproxy_py import api, config_file, manifest_parser, records, snapshot, watch
    from kubeproxy_py.errors import IptablesError
    from kubeproxy_py.iptables import chains

import msgspec

from kubeproxy_py import objects
from kubeproxy_py.model import Node

_HEAD: Final = msgspec.json.decode(
    snapshot.render(
        snapshot.pack(Node(name="node1"), {}), node="node1", identity="id", saved_at=1.0
    ).partition(b"\n")[0]
)


def _snapshot(data: bytes) -> None:
    packed = zlib.compress(data)
    head = _HEAD | {"size": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
    for text in (data, msgspec.json.encode(head) + b"\n" + packed):
        with contextlib.suppress(snapshot.Unusable):
            snapshot.parse(text, node="node1", identity="id")


def _save(data: bytes) -> None:
    with contextlib.suppress(IptablesError):
        chains.parse_save(data.decode(errors="replace").splitlines())


def _config(data: bytes) -> None:
    # What load_file turns into a ConfigError.
    with contextlib.suppress(ValueError, RecursionError):
        config_file._decode(data)


def _manifest(data: bytes) -> None:
    for parse in (manifest_parser.parse_yaml, manifest_parser.parse_json):
        with contextlib.suppress(manifest_parser.UnparsableError):
            parse(data)


def _event(data: bytes) -> None:
    with contextlib.suppress(*api.UNREADABLE):
        watch._EVENT_DECODER.decode(data)
    with contextlib.suppress(*api.UNREADABLE):
        records.service_record(msgspec.json.decode(data, type=objects.Service))
    with contextlib.suppress(*api.UNREADABLE):
        records.slice_record(msgspec.json.decode(data, type=objects.EndpointSlice), node_name="n")


_PARSERS: Final[dict[str, Callable[[bytes], None]]] = {
    "snapshot": _snapshot,
    "save": _save,
    "config": _config,
    "manifest": _manifest,
    "event": _event,
}

if __name__ == "__main__":
    parser = _PARSERS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, parser)
    atheris.Fuzz()
