"""
Label selectors as kubectl and the API server read them: ``team=payments,tier in (web, api),!legacy``.

Pure. The grammar is that of Kubernetes' labels.Parse (apimachinery), all operators included.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple

Operator = Literal["in", "notin", "exists", "absent", "gt", "lt"]

_TOKEN: Final = re.compile(r"\s*(==|!=|[=!(),<>]|[^\s=!(),<>]+)")
_SPECIAL: Final = frozenset(("==", "!=", "=", "!", "(", ")", ",", "<", ">"))
_OPERATORS: Final[dict[str, Operator]] = {
    "=": "in", "==": "in", "in": "in", "!=": "notin", "notin": "notin", ">": "gt", "<": "lt",
}  # fmt: skip
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_SUBDOMAIN: Final = re.compile(
    r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*"
)
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
# Of the prefix of a key (RFC 1123).
_MAX_SUBDOMAIN: Final = 253


class Requirement(NamedTuple):
    """One part of a selector."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.key)
        match self.operator:
            case "exists":
                return found is not None
            case "absent":
                return found is None
            case "in":
                return found in self.values
            case "notin":
                # An object without the label matches: Kubernetes' rule.
                return found not in self.values
            case _:
                if found is None or not _INTEGER.fullmatch(found):
                    return False
                (limit,) = self.values
                is_more, is_less = int(found) > int(limit), int(found) < int(limit)
                return is_more if self.operator == "gt" else is_less


class Selector(NamedTuple):
    """All requirements of a selector; without any it matches everything."""

    requirements: tuple[Requirement, ...] = ()
    text: str = ""  # as it was written

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tell whether an object with these *labels* is selected."""
        return all(requirement.matches(labels) for requirement in self.requirements)


def parse(text: str) -> Selector:
    """Return the selector that *text* is. Raises ValueError, which says what is wrong in it."""
    try:
        return Selector(tuple(_Parser(text).requirements()), text)
    except ValueError as error:
        raise ValueError(f'cannot parse label selector "{text}": {error}') from None


class _Parser:
    def __init__(self, text: str) -> None:
        # Whatever is neither blank nor special is part of a word, so nothing is left out.
        self._tokens = _TOKEN.findall(text)
        self._at = 0

    def requirements(self) -> Iterator[Requirement]:
        if not self._tokens:
            return
        while True:
            yield self._requirement()
            behind = self._next()
            if not behind:
                return
            if behind != ",":
                raise ValueError(f'found "{behind}", expected a comma or the end')

    def _next(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _word(self, what: str) -> str:
        token = self._next()
        if not token or token in _SPECIAL:
            raise ValueError(f'found "{token}", expected {what}')
        return token

    def _requirement(self) -> Requirement:
        if self._peek() == "!":
            self._next()
            return Requirement(_judged_key(self._word("a key")), "absent")
        key = _judged_key(self._word("a key"))
        if self._peek() in {"", ","}:
            return Requirement(key, "exists")
        sign = self._next()
        if sign not in _OPERATORS:
            raise ValueError(f'found "{sign}", expected one of in, notin, =, ==, !=, >, <')
        operator = _OPERATORS[sign]
        values = self._set() if sign in {"in", "notin"} else [self._value()]
        for value in values:
            if operator in {"gt", "lt"}:
                if not _INTEGER.fullmatch(value):
                    raise ValueError(f'"{value}" is not an integer')
            elif value and not _NAME.fullmatch(value):
                raise ValueError(f'"{value}" is not the value of a label')
        return Requirement(key, operator, frozenset(values))

    def _value(self) -> str:
        # "key=" asks for the empty value.
        return "" if self._peek() in {"", ","} else self._word("a value")

    def _set(self) -> list[str]:
        if self._next() != "(":
            raise ValueError("expected ( and values")
        if self._peek() == ")":
            raise ValueError("a set of values must not be empty")
        values = []
        while True:
            # Between two commas is the empty value.
            values.append("" if self._peek() in {",", ")"} else self._word("a value"))
            behind = self._next()
            if behind == ")":
                return values
            if behind != ",":
                raise ValueError(f'found "{behind}", expected , or )')


def _judged_key(key: str) -> str:
    prefix, slash, name = key.rpartition("/")
    is_prefix = not slash or (len(prefix) <= _MAX_SUBDOMAIN and _SUBDOMAIN.fullmatch(prefix))
    if not is_prefix or not _NAME.fullmatch(name):
        raise ValueError(f'"{key}" is not the key of a label')
    return key
