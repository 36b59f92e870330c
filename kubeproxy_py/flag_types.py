"""
How kube-proxy's flags are spelled: Go's booleans, numbers and durations, lists, maps; ``_`` for ``-``.

Each type reads the text of one occurrence and shows a value as /flagz does. Bad text is a usage error.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

import click

from kubeproxy_py import addresses, config_validation, durations, label_selector, records
from kubeproxy_py.config import VModule
from kubeproxy_py.durations import Duration

# Go's strconv.ParseBool; anything else is refused.
_BOOLEANS: Final = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}

_INTEGER: Final = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+|0|[1-9][0-9]*)")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?")


class FlagType(click.ParamType[Any]):
    """A type whose values can be shown again; ``is_list`` ones collect all occurrences of a flag."""

    name = "string"
    is_list = False

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # click also passes what is converted already.
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self._refuse(error, param, ctx)

    def _refuse(
        self, error: ValueError, param: click.Parameter | None, ctx: click.Context | None
    ) -> NoReturn:
        self.fail(str(error), param, ctx)

    def parse(self, text: str) -> Any:
        """Return the value *text* stands for. Raises ValueError."""
        return text

    def merge(self, values: Sequence[Any]) -> Any:
        """Return what all occurrences of a list flag amount to."""
        return tuple(item for value in values for item in value)

    def show(self, value: Any) -> str:
        return str(value)


class Text(FlagType):
    """Any text."""


class Boolean(FlagType):
    """``--x``, ``--x=true``, ``--x=false``; never ``--x false``, which Go reads as two arguments."""

    name = "boolean"

    def parse(self, text: str) -> bool | str:
        if text not in _BOOLEANS:
            raise ValueError(f'"{text}" is not a boolean; use true or false')
        return _BOOLEANS[text]

    def show(self, value: Any) -> str:
        return "true" if value else "false"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        return "[=true|false]"


class Version(Boolean):
    """``--version`` or ``--version=raw``."""

    def parse(self, text: str) -> bool | str:
        return text if text == "raw" else super().parse(text)

    def show(self, value: Any) -> str:
        return value if isinstance(value, str) else super().show(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        return "[=raw]"


class Integer(FlagType):
    name = "integer"

    def __init__(self, lowest: int = -(2**31), highest: int = 2**31 - 1) -> None:
        """Bound the value; without bounds it is Go's int32."""
        self._lowest = lowest
        self._highest = highest

    def parse(self, text: str) -> int:
        # As Go reads numbers, but for octal written as 017: too easily a decimal by mistake.
        if not _INTEGER.fullmatch(text):
            raise ValueError(f'"{text}" is not an integer')
        value = int(text, 0)
        if not self._lowest <= value <= self._highest:
            raise ValueError(f'"{text}" is out of range ({self._lowest} to {self._highest})')
        return value


class Number(FlagType):
    name = "number"

    def parse(self, text: str) -> float:
        if not _NUMBER.fullmatch(text):
            raise ValueError(f'"{text}" is not a number')
        return float(text)

    def show(self, value: Any) -> str:
        return f"{value:g}"


class GoDuration(FlagType):
    name = "duration"

    def parse(self, text: str) -> Duration:
        return durations.parse(text)

    def show(self, value: Any) -> str:
        return durations.render(value)


class Ip(FlagType):
    """An IP address. The empty text leaves the default."""

    name = "ip"

    def parse(self, text: str) -> str:
        if text and addresses.parse_ip(text) is None:
            raise ValueError(f'"{text}" is not a valid IP address')
        return text


class IpPort(FlagType):
    """An IP address, or IP and port. The empty text leaves the default."""

    name = "ip:port"

    def parse(self, text: str) -> str:
        if not text:
            return text
        # An address without a port gets one later, from the default or a deprecated flag.
        host, port = config_validation.split_host_port(text) or (text, "0")
        if addresses.parse_ip(host) is None:
            raise ValueError(f'"{host}" is not a valid IP address')
        if not (port.isascii() and port.isdigit() and int(port[:9]) <= 65535):
            raise ValueError(f'"{port}" is not a valid number')
        return text


class Texts(FlagType):
    """A list: comma-separated, and repeating the flag adds to it."""

    name = "strings"
    is_list = True

    def parse(self, text: str) -> tuple[str, ...]:
        # Go reads one CSV record; a quoted item may hold a comma.
        return tuple(next(csv.reader([text], strict=True))) if text else ()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except csv.Error as error:
            self.fail(str(error), param, ctx)

    def show(self, value: Any) -> str:
        return f"[{','.join(value)}]"


class Cidrs(Texts):
    """CIDRs, kept in their canonical spelling."""

    name = "cidrs"

    def parse(self, text: str) -> tuple[str, ...]:
        found = []
        for item in super().parse(text):
            cidr = addresses.parse_cidr(item.strip())
            if cidr is None:
                raise ValueError(f'"{item}" is not a CIDR, for example 192.0.2.0/24')
            found.append(cidr)
        return tuple(found)


class Namespaces(Texts):
    """Names of namespaces; a typing error would count nothing and say nothing."""

    name = "namespaces"

    def parse(self, text: str) -> tuple[str, ...]:
        names = super().parse(text)
        for name in names:
            if not records.is_label(name):
                raise ValueError(f'"{name}" is not the name of a namespace')
        return names


class LabelSelector(FlagType):
    """A Kubernetes label selector."""

    name = "selector"

    def parse(self, text: str) -> label_selector.Selector:
        return label_selector.parse(text)

    def show(self, value: Any) -> str:
        return str(value.text)


class Paths(Texts):
    """Paths, one per occurrence: they may hold commas."""

    name = "path"

    def parse(self, text: str) -> tuple[str, ...]:
        if not text:
            raise ValueError("a path must not be empty")
        return (text,)


class Gates(FlagType):
    """Feature gates: ``A=true,B=false``; repeating the flag adds to the map."""

    name = "gates"
    is_list = True

    def parse(self, text: str) -> dict[str, bool]:
        gates = {}
        for pair in filter(None, text.split(",")):
            name, equals, value = (part.strip() for part in pair.partition("="))
            if not equals:
                raise ValueError(f'"{pair}" is malformed, expect NAME=true or NAME=false')
            if value not in _BOOLEANS:
                raise ValueError(f'invalid value of {name}: "{value}" is not true or false')
            gates[name] = _BOOLEANS[value]
        return gates

    def merge(self, values: Sequence[Any]) -> Any:
        return {name: is_on for gates in values for name, is_on in gates.items()}

    def show(self, value: Any) -> str:
        gates: Mapping[str, bool] = value
        return ",".join(f"{name}={'true' if gates[name] else 'false'}" for name in sorted(gates))


class VModules(FlagType):
    """Verbosity per file: ``pattern=N,...``."""

    name = "pattern=n"
    is_list = True

    def parse(self, text: str) -> tuple[VModule, ...]:
        modules = []
        for item in filter(None, text.split(",")):
            pattern, _, level = item.partition("=")
            if not pattern or not re.fullmatch("[0-9]{1,9}", level):
                raise ValueError(f'"{item}" does not have the pattern=N format')
            modules.append(VModule(file_pattern=pattern, verbosity=int(level)))
        return tuple(modules)

    def show(self, value: Any) -> str:
        return ",".join(f"{module.file_pattern}={module.verbosity}" for module in value)


class Choice(FlagType):
    name = "choice"

    def __init__(self, *choices: str) -> None:
        self._choices = choices
        self.name = "|".join(choices)

    def parse(self, text: str) -> str:
        if text not in self._choices:
            raise ValueError(f'"{text}" is not one of {", ".join(self._choices)}')
        return text

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        return f"[{self.name}]"


class Command(click.Command):
    """A command that reads its arguments as Go's pflag does, where click differs."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        """Take what click.Command takes."""
        super().__init__(*args, **attributes)
        self.context_settings.setdefault("token_normalize_func", _with_dashes)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        booleans = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and isinstance(parameter.type, Boolean)
            for name in parameter.opts
        }
        return super().parse_args(ctx, [*_as_click_reads_them(args, booleans)])


def _with_dashes(name: str) -> str:
    return name.replace("_", "-")


def _as_click_reads_them(args: Sequence[str], booleans: set[str]) -> Iterator[str]:
    for index, arg in enumerate(args):
        if arg == "--":
            yield from args[index:]
            return
        if _with_dashes(arg) in booleans:
            # An optional value in click would swallow the argument that follows.
            yield f"{arg}=true"
        elif arg.startswith("-v="):
            # click knows -v2 and --v=2, and would read this as the number "=2".
            yield f"-v{arg[3:]}"
        else:
            yield arg
