"""
kube-proxy's command line as click options, and the settings that flags and file amount to.

A decorator puts a group of flags on a command (of class ``flag_types.Command``), which then receives
``FlagValues``; ``settings_from_flags`` makes ``Settings`` of them. It reads the configuration file and
nothing else, and neither logs nor exits.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import click

import kubeproxy_py
from kubeproxy_py import (
    addresses,
    config,
    config_file,
    config_validation,
    flag_types,
)
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.flag_table import FLAGS, Flag, Group
from kubeproxy_py.label_selector import Selector
from kubeproxy_py.model import IPFamily
from kubeproxy_py.rules import Layout

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What `kube-proxy --version` prints in the release this program behaves as: scripts on nodes read it.
_KUBERNETES_VERSION: Final = "Kubernetes v1.36.2"
#: What ``kubeproxy-py --version`` and ``run --version=raw`` print: who this really is.
VERSION: Final = f"kubeproxy-py {kubeproxy_py.__version__}, behaving as {_KUBERNETES_VERSION}"

_BY_NAME: Final = {flag.name: flag for flag in FLAGS}

# Flags whose empty value leaves the default, so that a template with an unset variable still works.
_EMPTY_KEEPS_DEFAULT: Final = frozenset(
    {
        "bind-address",
        "healthz-bind-address",
        "metrics-bind-address",
        "proxy-mode",
        "detect-local-mode",
    }
)

# Flags that /flagz shows as what they came to, where no file has taken their place.
_SHOWN_RESOLVED: Final = (
    "detect-local-mode",
    "healthz-bind-address",
    "metrics-bind-address",
    "proxy-mode",
)


@dataclass(frozen=True, slots=True)
class FlagValues:
    """What the command line said: values by flag name, and the names that were written on it."""

    values: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    def value(self, name: str) -> Any:
        """Return a flag's value; its default where the command does not have this flag."""
        return self.values[name] if name in self.values else _default(_BY_NAME[name])

    def given_values(self) -> list[tuple[Flag, Any]]:
        return [(flag, self.value(flag.name)) for flag in FLAGS if flag.name in self.given]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """How traffic is counted and shown."""

    detail: Literal["service", "endpoint"] = "service"
    has_bytes: bool = False  # packets and bytes of connections as well
    max_series: int
    namespaces: tuple[str, ...] = ()  # empty: all
    selector: Selector = field(
        default_factory=Selector
    )  # of labels of Services; without requirements: all
    state_file: str = ""  # "": none

    @property
    def selects(self) -> Callable[[Mapping[str, str]], bool] | None:
        """Return what tells by a Service's labels whether it is shown; None: all are."""
        return self.selector.matches if self.selector.requirements else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a person has set, valid and with defaults."""

    config: KubeProxyConfiguration
    config_file: str = ""  # "": there is none
    master: str = ""
    hostname_override: str = ""  # "": the host's own name
    write_config_to: str = ""
    init_only: bool = False
    cleanup: bool = False
    manifests: tuple[str, ...] = ()
    dispatch: Layout = "auto"
    external_ips_allow: tuple[str, ...] = ()  # canonical CIDRs; empty: everywhere
    iptables_backend: str = "auto"  # auto, nft, legacy
    status_socket: str = ""  # "": none
    state_file: str = ""  # "": none is kept
    traffic: Traffic | None = None  # None: not counted
    warnings: tuple[str, ...] = ()
    flag_values: Mapping[str, str] = field(default_factory=dict)  # for /flagz; sorted by name

    @property
    def healthz_disabled(self) -> bool:
        # Only --healthz-port=0 leads here.
        return not self.config.healthz_bind_address

    @property
    def min_sync_period_s(self) -> float | None:
        """The fixed least time between syncs; None: adaptive."""
        return self.config.iptables.min_sync_period_s or None


# --- decorators


def proxy_flags(function: _Function) -> _Function:
    """Add all flags; the command gets ``flag_values: FlagValues``."""
    return _add_flags(function, Group.RUN)


def rule_flags(function: _Function) -> _Function:
    """Add the flags that decide what the rules are; the command gets ``flag_values: FlagValues``."""
    return _add_flags(function, Group.RULES)


def cleanup_flags(function: _Function) -> _Function:
    """Add the flags that matter for removing rules; the command gets ``flag_values: FlagValues``."""
    return _add_flags(function, Group.CLEANUP)


def _add_flags(function: _Function, group: Group) -> _Function:
    flags = [flag for flag in FLAGS if group in flag.group]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        context = click.get_current_context()
        values, given = {}, set()
        for flag in flags:
            parameter = _parameter(flag)
            value = kwargs.pop(parameter)
            values[flag.name] = flag.type.merge(value) if flag.type.is_list else value
            if _is_given(context, parameter):
                given.add(flag.name)
        return function(*args, flag_values=FlagValues(values, frozenset(given)), **kwargs)

    decorated: Any = wrapper
    for flag in reversed(flags):
        decorated = _option(flag)(decorated)
    return decorated  # type: ignore[no-any-return]  # the same signature but for flag_values


def _option(flag: Flag) -> Callable[[_Function], _Function]:
    spellings = ["-v", "--v"] if flag.name == "v" else [f"--{flag.name}"]
    attributes: dict[str, Any] = {}
    if flag.type.is_list:
        attributes["multiple"] = True
    else:
        attributes["default"] = _default(flag)
    if flag.name in {"healthz-port", "metrics-port"}:
        attributes["callback"] = _tell_of_deprecation
    elif flag.name == "version":
        attributes |= {"callback": _print_version, "is_eager": True}
    return click.option(
        *spellings,
        _parameter(flag),
        type=flag.type,
        # The default as it is written; click would show 30.0 for a duration.
        help=flag.help + (f" [default: {flag.default}]" if _is_worth_showing(flag) else ""),
        hidden=flag.is_hidden,
        **attributes,
    )


def _is_worth_showing(flag: Flag) -> bool:
    return flag.default not in {None, "", "false"}


def _parameter(flag: Flag) -> str:
    # Prefixed, so that a command's own options cannot collide with ours.
    return "flag_" + flag.name.replace("-", "_")


def _default(flag: Flag) -> Any:
    if flag.type.is_list:
        return flag.type.merge([])
    return None if flag.default is None else flag.type.parse(flag.default)


def _is_given(context: click.Context, parameter: str) -> bool:
    return context.get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE


def _tell_of_deprecation(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if _is_given(context, str(parameter.name)):
        name = parameter.opts[0].removeprefix("--")
        click.echo(
            f"Flag --{name} has been deprecated, This flag is deprecated and will be removed in a"
            f" future release. Please use --{name.replace('port', 'bind-address')} instead.",
            err=True,
        )
    return value


def _print_version(context: click.Context, _: click.Parameter, value: Any) -> Any:
    if value is not False:
        click.echo(VERSION if value == "raw" else _KUBERNETES_VERSION)
        context.exit(0)
    return value


# --- settings


def settings_from_flags(flag_values: FlagValues) -> Settings:
    """
    Return what flags and configuration file amount to.

    Raises ConfigError with every problem, in kube-proxy's words and grouped by its stages. Whether the
    mode can run here is another question: ``config.require_iptables_mode``.
    """
    path = flag_values.value("config")
    errors: list[str] = []
    warnings: list[str] = []
    effective = KubeProxyConfiguration()
    is_complete = True
    if path:
        warnings += _void_flags_warning(flag_values)
        try:
            effective, file_warnings = config_file.load_file(path)
            warnings += file_warnings
        except ConfigError as error:
            errors.append(str(error))
            is_complete = False
    effective = _overlay(effective, flag_values, has_file=bool(path))

    try:
        effective = _with_hostname(effective, flag_values.value("hostname-override"))
    except ConfigError as error:
        errors.append(str(error))
    gate_errors, gate_warnings = config_validation.check_feature_gates(effective)
    _raise_all(
        {
            "failed complete": errors + gate_errors,
            "initialize logging": config_validation.validate_logging(effective),
            # Judging defaults in the place of an unreadable file would invent problems.
            "failed validate": config_validation.validate(effective) if is_complete else [],
        }
    )
    return Settings(
        config=effective,
        config_file=path,
        master=flag_values.value("master"),
        hostname_override=effective.hostname_override,
        write_config_to=flag_values.value("write-config-to"),
        init_only=flag_values.value("init-only"),
        cleanup=flag_values.value("cleanup"),
        manifests=flag_values.value("manifests"),
        dispatch=flag_values.value("dispatch"),
        external_ips_allow=flag_values.value("external-ips-allow"),
        iptables_backend=flag_values.value("iptables-backend"),
        status_socket=flag_values.value("status-socket"),
        state_file=flag_values.value("state-file"),
        traffic=_traffic(flag_values),
        warnings=(*warnings, *gate_warnings, *_no_effect_warnings(flag_values)),
        flag_values=_shown_values(flag_values, effective),
    )


def _traffic(flag_values: FlagValues) -> Traffic | None:
    detail = flag_values.value("traffic-metrics")
    if detail == "off":
        if flag_values.value("traffic-metrics-bytes"):
            raise ConfigError(
                "cannot use --traffic-metrics-bytes without --traffic-metrics=service or endpoint"
            )
        return None
    return Traffic(
        detail=detail,
        has_bytes=flag_values.value("traffic-metrics-bytes"),
        max_series=flag_values.value("traffic-metrics-max-series"),
        namespaces=flag_values.value("traffic-metrics-namespaces"),
        selector=flag_values.value("traffic-metrics-selector"),
        state_file=flag_values.value("traffic-metrics-state"),
    )


def _raise_all(errors_by_stage: Mapping[str, list[str]]) -> None:
    texts = [
        f"{stage}: {config_validation.aggregate(errors)}"
        for stage, errors in errors_by_stage.items()
        if errors
    ]
    if texts:
        raise ConfigError("; ".join(texts))


def _overlay(
    effective: KubeProxyConfiguration, flag_values: FlagValues, *, has_file: bool
) -> KubeProxyConfiguration:
    """Put the flags that count over *effective*, which is the file's content or the defaults."""
    for flag, value in flag_values.given_values():
        if not flag.field or (has_file and not flag.is_honoured_with_config):
            continue
        if value == "" and flag.name in _EMPTY_KEEPS_DEFAULT:
            continue
        if flag.name == "vmodule":
            value = (*value, *effective.logging.vmodule)  # noqa: PLW2901 - the file's come last
        effective = config.replace(effective, flag.field, value)
    if has_file:
        return effective
    for flag_name, path in (
        ("healthz-port", "healthz_bind_address"),
        ("metrics-port", "metrics_bind_address"),
    ):
        port = flag_values.value(flag_name)
        address = config.with_port(getattr(effective, path), port) if port else ""
        effective = config.replace(effective, path, address)
    return effective


def _with_hostname(effective: KubeProxyConfiguration, override: str) -> KubeProxyConfiguration:
    if not override:
        return effective
    if not override.strip():
        raise ConfigError("empty hostname-override is invalid")
    return config.replace(effective, "hostname_override", override.strip().lower())


def _void_flags_warning(flag_values: FlagValues) -> list[str]:
    void = [
        f"--{flag.name}"
        for flag, _ in flag_values.given_values()
        if not flag.is_honoured_with_config
    ]
    # kube-proxy says nothing of it, and people search for hours.
    return [f"--config is given, so these flags are ignored: {', '.join(void)}"] if void else []


def _no_effect_warnings(flag_values: FlagValues) -> list[str]:
    if flag_values.value("config"):
        return []  # these are among the ignored ones already
    return [
        f"--{flag.name} has no effect in iptables mode"
        for flag, _ in flag_values.given_values()
        if flag.has_no_effect
    ]


def _shown_values(flag_values: FlagValues, effective: KubeProxyConfiguration) -> dict[str, str]:
    values = {flag.name: flag_values.value(flag.name) for flag in FLAGS}
    if not flag_values.value("config"):
        values |= {name: getattr(effective, _BY_NAME[name].field) for name in _SHOWN_RESOLVED}
    if values["iptables-min-sync-period"] is None:
        values["iptables-min-sync-period"] = config.DEFAULT_MIN_SYNC_PERIOD_S
    shown = {name: _BY_NAME[name].type.show(value) for name, value in values.items()}
    return dict(sorted({**shown, "help": "false"}.items()))


# --- facts of the host, given instead of learned


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What ``run`` learns from the host, as given on the command line for reproducible results."""

    node_ips: tuple[str, ...] = ()
    interface_addresses: tuple[tuple[str, str], ...] = ()  # device, address with prefix length
    topology_labels: Mapping[str, str] = field(default_factory=dict)
    nfacct: bool = True
    random_fully: bool = True
    conntrack_tcp_be_liberal: bool = False
    ip_family: IPFamily | None = None  # None: not chosen


class _NodeIp(flag_types.FlagType):
    name = "ip"

    def parse(self, text: str) -> str:
        ip = addresses.parse_ip(text)
        if ip is None:
            raise ValueError(f'"{text}" is not a valid IP address')
        return ip


class _InterfaceAddress(flag_types.FlagType):
    name = "dev=cidr"

    def parse(self, text: str) -> tuple[str, str]:
        device, _, cidr = text.partition("=")
        ip, _, prefix = cidr.partition("/")
        address = addresses.parse_ip(ip)
        if not device or address is None or addresses.parse_cidr(cidr) is None:
            raise ValueError(f'"{text}" is not DEV=CIDR, for example eth0=192.168.0.2/24')
        return device, f"{address}/{int(prefix)}"


class _Label(flag_types.FlagType):
    name = "key=value"

    def parse(self, text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(
                f'"{text}" is not KEY=VALUE, for example topology.kubernetes.io/zone=zone-a'
            )
        return key, value


_FACT_OPTIONS: Final = (
    click.option(
        "--ip-family",
        type=flag_types.Choice("ipv4", "ipv6"),
        help="Only this family; without it, both (render: ipv4).",
    ),
    click.option(
        "--node-ip",
        type=_NodeIp(),
        multiple=True,
        help="An IP of this node, primary first; may be repeated.",
    ),
    click.option(
        "--interface-address",
        type=_InterfaceAddress(),
        multiple=True,
        help="An address of one of this node's interfaces; may be repeated.",
    ),
    click.option(
        "--topology-label",
        type=_Label(),
        multiple=True,
        help="A label of this node's Node object; may be repeated.",
    ),
    click.option(
        "--nfacct/--no-nfacct",
        default=True,
        show_default=True,
        help="Whether the kernel has nfacct counters.",
    ),
    click.option(
        "--random-fully/--no-random-fully",
        default=True,
        show_default=True,
        help="Whether iptables knows --random-fully.",
    ),
    click.option(
        "--conntrack-tcp-be-liberal/--no-conntrack-tcp-be-liberal",
        default=False,
        show_default=True,
        help="Whether connection tracking accepts TCP packets outside the window.",
    ),
)

FAMILIES: Final = {"ipv4": IPFamily.V4, "ipv6": IPFamily.V6, None: None}


def host_fact_flags(function: _Function) -> _Function:
    """Add the flags that stand for facts of the host; the command gets ``host_facts: HostFacts``."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        facts = HostFacts(
            ip_family=FAMILIES[kwargs.pop("ip_family")],
            node_ips=kwargs.pop("node_ip"),
            interface_addresses=kwargs.pop("interface_address"),
            topology_labels=dict(kwargs.pop("topology_label")),
            nfacct=kwargs.pop("nfacct"),
            random_fully=kwargs.pop("random_fully"),
            conntrack_tcp_be_liberal=kwargs.pop("conntrack_tcp_be_liberal"),
        )
        return function(*args, host_facts=facts, **kwargs)

    decorated: Any = wrapper
    for option in reversed(_FACT_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]  # the same signature but for host_facts
