"""
Reading a KubeProxyConfiguration from a file, YAML or JSON.

As tolerant as kube-proxy and no more: what a strict reader refuses (unknown and duplicate fields) is
returned as warnings, what has the wrong type or version is an error. Only the one file is read.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from kubeproxy_py import config, durations
from kubeproxy_py.config import KubeProxyConfiguration, VModule
from kubeproxy_py.durations import Duration
from kubeproxy_py.errors import ConfigError

# Fields whose default depends on bindAddress: with_defaults has to see that they are absent.
_DERIVED: Final = ("healthzBindAddress", "metricsBindAddress")

# Sections of modes that do not run, and what may stand in them without being a wish: the zeros and
# nulls that kubeadm writes, and kube-proxy's own defaults.
_UNUSED_SECTIONS: Final = ("ipvs", "nftables", "winkernel")
_UNREMARKABLE_PERIODS_S: Final = {"sync_period_s": 30, "min_sync_period_s": 1}


def load_file(path: Path | str) -> tuple[KubeProxyConfiguration, list[str]]:
    """
    Read a configuration file, YAML or JSON, and put defaults in place.

    Unknown and duplicate fields are warnings, as with kube-proxy: a file written for a newer or older
    release must not keep a node without its rules. Everything else that is wrong raises ConfigError.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"open {path}: {reason}") from error
    try:
        decoded, problems = _decode(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"cannot use {str(path)!r}: failed to decode: {reason}") from error
    warnings = []
    if problems:
        warnings.append(
            f"{path}: using lenient decoding as strict decoding failed: "
            f"strict decoding error: {', '.join(problems)}"
        )
    if decoded.mode in {"", "iptables"}:
        warnings += (
            f"{path}: {field} has no effect in iptables mode" for field in _ignored_fields(decoded)
        )
    return config.with_defaults(decoded), warnings


def _decode(content: bytes) -> tuple[KubeProxyConfiguration, list[str]]:
    """Return what the file says, and what a strict reader would refuse. Raises ValueError."""
    document, problems = _parse(content.decode())
    document = {} if document is None else _without_nulls(document)
    if not isinstance(document, dict):
        raise ValueError("the top level must be a mapping")  # noqa: TRY004 - one class for callers
    kind, version = document.pop("kind", ""), document.pop("apiVersion", "")
    if not kind:
        raise ValueError("Object 'Kind' is missing")
    if not version:
        raise ValueError("Object 'apiVersion' is missing")
    if (kind, version) != (config.KIND, config.API_VERSION):
        raise ValueError(f'no kind "{kind}" is registered for version "{version}"')
    problems += (f'unknown field "{field}"' for field in _unknown(document, KubeProxyConfiguration))
    _accept_nanoseconds(document)
    for name in _DERIVED:
        document.setdefault(name, "")
    try:
        decoded = msgspec.convert(document, KubeProxyConfiguration, dec_hook=_decode_duration)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).rpartition(" - at `$.")
        raise ValueError(f"{where.rstrip('`')}: {reason}") from error
    return decoded, problems


class _Loader(yaml.SafeLoader):
    """YAML whose duplicate keys are remembered; the last value wins, as with kube-proxy."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                self.duplicates.append(
                    f'line {key.start_mark.line + 1}: key "{key.value}" already set in map'
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> tuple[Any, list[str]]:
    if text.lstrip().startswith("{"):
        # JSON is nearly YAML, but the YAML parser refuses tabs between its tokens.
        duplicates: list[str] = []

        def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name for name, _ in pairs]
            duplicates.extend(
                f'duplicate field "{name}"'
                for name in sorted({n for n in names if names.count(n) > 1})
            )
            return dict(pairs)

        try:
            return json.loads(text, object_pairs_hook=collect), duplicates
        except json.JSONDecodeError:
            pass  # YAML's flow style begins with a brace as well
    loader = None
    try:
        loader = _Loader(text)
        documents = [loader.get_data() for _ in range(2) if loader.check_data()]  # type: ignore[no-untyped-call]
        problems = loader.duplicates
        if len(documents) > 1:
            problems.append("only the first YAML document is used")
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"yaml: {line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"yaml: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return (documents[0] if documents else None), problems


def _without_nulls(value: Any) -> Any:
    """Drop fields that are null (to Go the same as absent); make all keys text."""
    if isinstance(value, dict):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _unknown(document: dict[str, Any], struct: type[msgspec.Struct], at: str = "") -> Iterator[str]:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    for name, value in document.items():
        if name not in fields:
            yield f"{at}{name}"
            continue
        kind = fields[name]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
            yield from _unknown(value, kind, f"{at}{name}.")
        elif kind == tuple[VModule, ...] and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _unknown(item, VModule, f"{at}{name}[{index}].")


def _accept_nanoseconds(document: dict[str, Any]) -> None:
    # The one duration that the API also takes as a number of nanoseconds.
    logging = document.get("logging")
    if isinstance(logging, dict) and type(logging.get("flushFrequency")) is int:
        logging["flushFrequency"] = f"{logging['flushFrequency']}ns"


def _decode_duration(_kind: type, value: object) -> Duration:
    # Duration is the only type that msgspec does not know itself.
    if not isinstance(value, str):
        raise ValueError(f"Expected a duration like `30s`, got `{type(value).__name__}`")  # noqa: TRY004 - msgspec adds the field to a ValueError only
    return durations.parse(value)


def _ignored_fields(decoded: KubeProxyConfiguration) -> Iterator[str]:
    for section_name in _UNUSED_SECTIONS:
        section = getattr(decoded, section_name)
        for field in msgspec.structs.fields(section):
            value = getattr(section, field.name)
            if value not in (field.default, _UNREMARKABLE_PERIODS_S.get(field.name, field.default)):
                yield f"{section_name}.{field.encode_name}"
