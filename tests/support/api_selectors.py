"""
Label and field selectors, read and matched as the API server does.

Grammar and semantics: Kubernetes' documentation of labels and of field selectors. What the API
server refuses with 400 raises ``SelectorError`` here.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal

Operator = Literal["=", "!=", "in", "notin", "exists", "absent"]

_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9./_-]*[A-Za-z0-9])?"
_LABEL_SET = re.compile(rf"^({_KEY})\s+(in|notin)\s*\(([^()]*)\)$")
_LABEL_VALUE = re.compile(rf"^({_KEY})\s*(!=|==|=)\s*([A-Za-z0-9._-]*)$")
_LABEL_EXISTS = re.compile(rf"^(!?)\s*({_KEY})$")
_FIELD = re.compile(r"^([A-Za-z0-9.]+)(!=|==|=)(.*)$", re.DOTALL)
# Commas inside the parentheses of "in (a,b)" do not separate requirements.
_OUTER_COMMA = re.compile(r",(?![^(]*\))")
_UNESCAPED_COMMA = re.compile(r"(?<!\\),")


class SelectorError(ValueError):
    """A selector that the API server would refuse with 400."""


@dataclasses.dataclass(frozen=True, slots=True)
class Requirement:
    """One comma-separated part of a selector."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, present: Mapping[str, str]) -> bool:
        match self.operator:
            case "exists":
                return self.key in present
            case "absent":
                return self.key not in present
            case "=" | "in":
                return self.key in present and present[self.key] in self.values
            case "!=" | "notin":
                # An object without the label matches too: Kubernetes' rule, and a common surprise.
                return self.key not in present or present[self.key] not in self.values


@dataclasses.dataclass(frozen=True, slots=True)
class Selector:
    """All that a request selects by; without requirements it matches everything."""

    labels: tuple[Requirement, ...] = ()
    fields: tuple[Requirement, ...] = ()
    namespace: str = ""  # "": all

    def __bool__(self) -> bool:
        """Whether labels or fields are selected by; a namespace is a key prefix, not a selector."""
        return bool(self.labels or self.fields)

    def matches(self, namespace: str, labels: Mapping[str, str], fields: Mapping[str, str]) -> bool:
        if self.namespace and self.namespace != namespace:
            return False
        for requirement in self.labels:
            if not requirement.matches(labels):
                return False
        return all(requirement.matches(fields) for requirement in self.fields)


def parse_labels(text: str) -> tuple[Requirement, ...]:
    """Read a labelSelector. Raises SelectorError."""
    return tuple(_label_requirements(text))


def parse_fields(text: str, *, supported: frozenset[str]) -> tuple[Requirement, ...]:
    """Read a fieldSelector; fields other than *supported* raise SelectorError, as in the server."""
    requirements = []
    for part in filter(None, _UNESCAPED_COMMA.split(text)):
        found = _FIELD.match(part)
        if found is None:
            raise SelectorError(f"invalid selector: {text!r}; can't understand {part!r}")
        key, operator, value = found.groups()
        if key not in supported:
            raise SelectorError(f"field label not supported: {key}")
        requirements.append(
            Requirement(
                key,
                "!=" if operator == "!=" else "=",
                frozenset([re.sub(r"\\([\\,=])", r"\1", value)]),
            )
        )
    return tuple(requirements)


def _label_requirements(text: str) -> Iterator[Requirement]:
    if not text.strip():
        return
    for part in map(str.strip, _OUTER_COMMA.split(text)):
        if found := _LABEL_SET.match(part):
            key, word, values = found.groups()
            yield Requirement(
                key,
                "in" if word == "in" else "notin",
                frozenset(value.strip() for value in values.split(",")),
            )
        elif found := _LABEL_VALUE.match(part):
            key, sign, value = found.groups()
            yield Requirement(key, "!=" if sign == "!=" else "=", frozenset([value]))
        elif found := _LABEL_EXISTS.match(part):
            yield Requirement(found.group(2), "absent" if found.group(1) else "exists")
        else:
            raise SelectorError(f"unable to parse requirement: {part!r}")
