"""
Parse YAML or JSON text into plain values: dict, list, str, int, float, bool, None.

Never builds anything else and never follows a reference outside the text. The invariant: memory
and time are bounded by a small multiple of the size of the text, whatever the text is.
"""

import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, NoReturn, cast

import msgspec
import yaml

# libyaml parses about fifty times as fast as PyYAML's own scanner; some builds lack it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# API objects nest about 15 deep (a Pod's managedFields). libyaml's time per token grows with the
# depth of "[[[[", so without a limit 200 kB of it costs 40 s.
_MAX_DEPTH: Final = 100
# What aliases may add to the values that are written out, per file: a template of 1,000 values
# repeated 1,000 times, and far from a "billion laughs" bomb. (Without aliases, there are never
# more than two values for a byte: "{a,b}".)
_MAX_ALIASED_VALUES: Final = 1_000_000
# 64-bit integers have at most 20 characters with their sign; the API knows no larger number.
_MAX_INT_LENGTH: Final = 20

_TAG: Final = "tag:yaml.org,2002:"
_PLAIN_TAGS: Final = frozenset(_TAG + name for name in ("null", "bool", "int", "float"))
_MERGE: Final = object()

# The words of YAML 1.1, as kubectl reads them. Dates stay text, as they do for kubectl: PyYAML
# would make datetime objects of them.
_WORDS: Final[dict[str, bool | None]] = {
    spelling: value
    for word, value in (
        ("null", None), ("true", True), ("yes", True), ("on", True),
        ("false", False), ("no", False), ("off", False),
    )
    for spelling in (word, word.capitalize(), word.upper())
} | {"": None, "~": None}  # fmt: skip

# Base-60 numbers ("1:30" is 90 in YAML 1.1) stay text, again as for kubectl.
_INT: Final = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)", re.ASCII)
_FLOAT: Final = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    re.ASCII,
)
_JSON_BYTE: Final = re.compile(r" \(byte (\d+)\)$")


class UnparsableError(ValueError):
    """The text is not YAML or JSON, or exceeds a bound; says where."""


class Document(NamedTuple):
    """One document of a file."""

    line: int  # where it begins, counted from 1
    value: Any


def parse_json(text: bytes) -> list[Document]:
    """Return the one document of *text*. Raises UnparsableError."""
    try:
        # Some editors begin a file with a byte order mark.
        value = msgspec.json.decode(text.removeprefix(b"\xef\xbb\xbf"))
    except msgspec.DecodeError as error:
        where = _JSON_BYTE.search(str(error))
        if where is None:
            raise UnparsableError(f"cannot parse JSON: {error}") from error
        offset = int(where[1])
        line = text.count(b"\n", 0, offset) + 1
        column = offset - (text.rfind(b"\n", 0, offset) + 1) + 1
        reason = str(error)[: where.start()]
        raise UnparsableError(
            f"cannot parse JSON: line {line}, column {column}: {reason}"
        ) from error
    except UnicodeDecodeError as error:
        raise UnparsableError("cannot parse JSON: text is not UTF-8") from error
    except RecursionError as error:
        raise UnparsableError("cannot parse JSON: nested too deep") from error
    return [Document(1, value)]


def parse_yaml(text: bytes) -> list[Document]:
    """Return the documents of *text*, empty ones left out. Raises UnparsableError."""
    try:
        return list(_Builder(text).documents())
    except yaml.MarkedYAMLError as error:
        mark = cast("Any", error.problem_mark)
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UnparsableError(f"cannot parse YAML: {at}{error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count(b"\n", 0, error.position) + 1
        raise UnparsableError(f"cannot parse YAML: line {line}: {error.reason}") from error


class _Open:
    """A list or mapping whose end has not been read yet."""

    __slots__ = ("anchor", "is_list", "items", "mark", "marks", "size")

    def __init__(self, anchor: str, mark: Any, *, is_list: bool) -> None:
        self.anchor = anchor
        self.mark = mark
        self.is_list = is_list
        self.items: list[Any] = []  # a mapping's keys and values by turns
        self.marks: list[Any] = []  # where each item stands
        self.size = 1  # values in it, those that come by aliases counted each time


class _Builder:
    """
    Builds values from the parser's events.

    From events, not from PyYAML's node graph: nodes take some 500 bytes a value and are built
    recursively in C, and PyYAML's constructor neither notices keys that stand twice nor bounds
    what merge keys expand to.
    """

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._aliased_values = 0
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._open: list[_Open] = []
        self._root: Any = None

    def documents(self) -> Iterator[Document]:
        # The pure-Python loader reads ahead in its constructor, so this can raise, too.
        loader = _Loader(self._text)
        line = 1
        try:
            while loader.check_event():
                event = loader.get_event()
                mark = event.start_mark
                if isinstance(event, yaml.DocumentStartEvent):
                    line = mark.line + 1
                    self._anchors = {}
                    self._root = None
                elif isinstance(event, yaml.DocumentEndEvent):
                    if self._root is not None:
                        yield Document(line, self._root)
                else:
                    self._take(event)
        finally:
            loader.dispose()

    def _take(self, event: Any) -> None:
        mark = event.start_mark
        if isinstance(event, yaml.ScalarEvent):
            value = _MERGE if self._is_merge_key(event) else _scalar(event)
            if event.anchor:
                self._anchors[event.anchor] = (value, 1)
            self._add(value, 1, mark)
        elif isinstance(event, yaml.AliasEvent):
            self._add(*self._aliased(event.anchor or "", mark), mark)
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            is_list = isinstance(event, yaml.SequenceStartEvent)
            if event.tag not in (None, "!", _TAG + ("seq" if is_list else "map")):
                _fail(mark, f"tag {_short(event.tag)} is not supported")
            if len(self._open) >= _MAX_DEPTH:
                _fail(mark, f"nested deeper than {_MAX_DEPTH} levels")
            # An anchor that is used again hides the earlier one from here on.
            self._anchors.pop(event.anchor or "", None)
            self._open.append(_Open(event.anchor or "", mark, is_list=is_list))
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            done = self._open.pop()
            value = done.items if done.is_list else _mapping(done)
            if done.anchor:
                self._anchors[done.anchor] = (value, done.size)
            self._add(value, done.size, done.mark)

    def _is_merge_key(self, event: Any) -> bool:
        if event.value != "<<" or not event.implicit[0] or not self._open:
            return False
        parent = self._open[-1]
        return not parent.is_list and len(parent.items) % 2 == 0

    def _aliased(self, anchor: str, mark: Any) -> tuple[Any, int]:
        if anchor not in self._anchors:
            # Also an alias inside the very value it names, which has no end yet.
            _fail(mark, f"alias {_short(anchor)} names nothing that is complete")
        value, size = self._anchors[anchor]
        self._aliased_values += size
        if self._aliased_values > _MAX_ALIASED_VALUES:
            _fail(mark, "aliases expand to too many values")
        return value, size

    def _add(self, value: Any, size: int, mark: Any) -> None:
        if not self._open:
            self._root = value
            return
        parent = self._open[-1]
        parent.items.append(value)
        parent.marks.append(mark)
        parent.size += size


def _mapping(done: _Open) -> dict[Any, Any]:
    own: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    items = done.items
    for index in range(0, len(items), 2):
        key, value, mark = items[index], items[index + 1], done.marks[index]
        if key is _MERGE:
            for source in value if isinstance(value, list) else [value]:
                if not isinstance(source, dict):
                    _fail(mark, "a merge key (<<) needs a mapping or a list of mappings")
                merged = source | merged  # of several sources, the first wins
            continue
        if isinstance(key, list | dict):
            _fail(mark, "a key must not be a list or a mapping")
        if key in own:
            _fail(mark, f"key {_short(key)} is there twice")
        own[key] = value
    return merged | own if merged else own


def _scalar(event: Any) -> Any:
    text: str = event.value
    tag: str | None = event.tag
    if tag in (None, "!"):
        # The first of the pair says: neither quoted nor tagged.
        if not event.implicit[0]:
            return text
        return _plain(text, event.start_mark)
    if tag == _TAG + "str":
        return text
    if tag not in _PLAIN_TAGS:
        _fail(event.start_mark, f"tag {_short(tag)} is not supported")
    return _plain(text, event.start_mark)


def _plain(text: str, mark: Any) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    # Only these can begin a number: most scalars are words and skip the patterns.
    if text[0] not in "0123456789+-.":
        return text
    if _INT.fullmatch(text):
        if len(text) > _MAX_INT_LENGTH:
            _fail(mark, f"number {_short(text)} is too large")
        try:
            return _integer(text.replace("_", ""))
        except ValueError:  # "0b_" or "09": not a number, so a word
            return text
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _integer(text: str) -> int:
    digits = text.lstrip("+-")
    sign = -1 if text.startswith("-") else 1
    if digits.startswith("0") and digits[1:2].isdigit():
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fail(mark: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
