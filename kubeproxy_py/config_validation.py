"""
What kube-proxy accepts in a configuration, with its words for what it does not.

Pure. Every error is found at once; people who repair files by trial have a node without rules meanwhile.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kubeproxy_py import addresses, config, durations
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.durations import Duration

# The previous minor version of the release this program behaves as, 1.36.
_HIDDEN_METRICS_VERSION: Final = "1.35"

# What the sections are called in kube-proxy's messages, which are people's search terms.
_ROOT: Final = "KubeProxyConfiguration"
_CONNTRACK: Final = f"{_ROOT}.KubeProxyLinuxConfiguration.KubeProxyConntrackConfiguration"

_NOT_NEGATIVE: Final = "must be greater than or equal to 0"
_POSITIVE: Final = "must be greater than 0"

_LOCAL_MODES: Final = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix", "")


class _Gate(NamedTuple):
    is_ga: bool = False
    is_locked: bool = False


# The gates that mean something to this program or that kube-proxy refuses to switch off. Any other
# name is only a warning in kube-proxy too, so there is no need for the hundreds Kubernetes has.
_GATES: Final = {
    "AllAlpha": _Gate(),
    "AllBeta": _Gate(),
    "AllowServiceExternalIPs": _Gate(is_ga=True),
    "ComponentFlagz": _Gate(),
    "ComponentStatusz": _Gate(),
    "ContextualLogging": _Gate(),
    "LoggingAlphaOptions": _Gate(),
    "LoggingBetaOptions": _Gate(),
    "MultiCIDRServiceAllocator": _Gate(is_ga=True, is_locked=True),
    "NFTablesProxyMode": _Gate(is_ga=True, is_locked=True),
    "NativeHistograms": _Gate(),
    "PreferSameTrafficDistribution": _Gate(is_ga=True, is_locked=True),
}


def check_feature_gates(config: KubeProxyConfiguration) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings that the feature gates of *config* give rise to."""
    errors, warnings = [], []
    for name, is_on in sorted(config.feature_gates.items()):
        gate = _GATES.get(name)
        if gate is None:
            warnings.append(f"unrecognized feature gate: {name}")
        elif gate.is_locked and not is_on:
            errors.append(
                f"cannot set feature gate {name} to false, feature is locked to true",
            )
        elif gate.is_ga:
            warnings.append(
                f"setting GA feature gate {name}={'true' if is_on else 'false'}."
                " It will be removed in a future release."
            )
    return errors, warnings


def validate(configuration: KubeProxyConfiguration) -> list[str]:
    """Return everything that kube-proxy would refuse, in its order and words; empty if it is valid."""
    return [*_validate(configuration)]


def aggregate(errors: Sequence[str]) -> str:
    """Join error texts as kube-proxy does: ``[e1, e2]``, a single one without brackets."""
    return errors[0] if len(errors) == 1 else f"[{', '.join(errors)}]"


def _validate(c: KubeProxyConfiguration) -> Iterator[str]:
    if not 0 <= c.iptables.masquerade_bit <= 31:
        yield _invalid(
            f"{_ROOT}.KubeProxyIPTablesConfiguration.MasqueradeBit",
            c.iptables.masquerade_bit,
            "must be within the range [0, 31]",
        )
    yield from _validate_conntrack(c.conntrack)
    if not -1000 <= c.oom_score_adj <= 1000:
        yield _invalid(
            f"{_ROOT}.KubeProxyLinuxConfiguration.OOMScoreAdj",
            c.oom_score_adj,
            "must be within the range [-1000, 1000]",
        )
    if c.mode not in {"iptables", "ipvs", "nftables"}:
        yield _invalid(
            f"{_ROOT}.Mode.ProxyMode",
            c.mode,
            "must be iptables, ipvs, nftables or blank "
            "(blank means the best-available proxy [currently iptables])",
        )
    if c.client_connection.burst < 0:
        yield _invalid(f"{_ROOT}.ClientConnection.Burst", c.client_connection.burst, _NOT_NEGATIVE)
    if c.config_sync_period_s <= 0:
        yield _invalid(f"{_ROOT}.ConfigSyncPeriod", c.config_sync_period_s, _POSITIVE)
    yield from _validate_periods(c.iptables)
    if addresses.parse_ip(c.bind_address) is None:
        yield _invalid(
            f"{_ROOT}.BindAddress",
            c.bind_address,
            "not a valid textual representation of an IP address",
        )
    if c.healthz_bind_address:
        yield from _validate_host_port(f"{_ROOT}.HealthzBindAddress", c.healthz_bind_address)
    yield from _validate_host_port(f"{_ROOT}.MetricsBindAddress", c.metrics_bind_address)
    yield from _validate_node_port_addresses(c.node_port_addresses)
    if c.show_hidden_metrics_for_version not in {"", _HIDDEN_METRICS_VERSION}:
        detail = _invalid(
            "showHiddenMetricsForVersion",
            c.show_hidden_metrics_for_version,
            f"must be omitted or have the value '{_HIDDEN_METRICS_VERSION}'; "
            "only the previous minor version is allowed",
        )
        yield _invalid(
            f"{_ROOT}.ShowHiddenMetricsForVersion",
            c.show_hidden_metrics_for_version,
            f"invalid showHiddenMetricsForVersion: {detail}",
        )
    yield from _validate_detect_local(c)


def _validate_conntrack(conntrack: config.Conntrack) -> Iterator[str]:
    for name, value in (
        ("MaxPerCore", conntrack.max_per_core),
        ("Min", conntrack.min),
        ("TCPEstablishedTimeout", conntrack.tcp_established_timeout_s),
        ("TCPCloseWaitTimeout", conntrack.tcp_close_wait_timeout_s),
        ("UDPTimeout", conntrack.udp_timeout_s),
        ("UDPStreamTimeout", conntrack.udp_stream_timeout_s),
    ):
        if value < 0:
            yield _invalid(f"{_CONNTRACK}.{name}", value, _NOT_NEGATIVE)


def _validate_periods(iptables: config.Iptables) -> Iterator[str]:
    period_s = iptables.sync_period_s
    # Where none was set, kube-proxy judges its default of one second; a file must not be valid here
    # and invalid there.
    min_period_s = config.min_sync_period_shown_s(iptables)
    if period_s <= 0:
        yield _invalid(f"{_ROOT}.SyncPeriod", period_s, _POSITIVE)
    if min_period_s < 0:
        yield _invalid(f"{_ROOT}.MinSyncPeriod", min_period_s, _NOT_NEGATIVE)
    if min_period_s > period_s:
        yield _invalid(
            f"{_ROOT}.SyncPeriod",
            min_period_s,
            f"must be greater than or equal to {_ROOT}.MinSyncPeriod",
        )


def _validate_host_port(path: str, address: str) -> Iterator[str]:
    split = split_host_port(address)
    if split is None:
        yield _invalid(path, address, "must be IP:port")
        return
    host, port = split
    if addresses.parse_ip(host) is None:
        yield _invalid(path, host, "must be a valid IP")
    if not re.fullmatch(r"[+]?[0-9]+", port) or not 1 <= int(port) <= 65535:
        yield _invalid(path, port, "must be a valid port")


def split_host_port(address: str) -> tuple[str, str] | None:
    """Split ``IP:port`` or ``[IP]:port``; None if *address* has another form."""
    match = re.fullmatch(r"\[([^\[\]]*)\]:([^:\[\]]*)|([^:\[\]]*):([^:\[\]]*)", address)
    if match is None:
        return None
    bracketed, bracketed_port, host, port = match.groups()
    return (host, port) if bracketed is None else (bracketed, bracketed_port)


def _validate_node_port_addresses(cidrs: Sequence[str]) -> Iterator[str]:
    for index, cidr in enumerate(cidrs):
        path = f"{_ROOT}.NodePortAddresses[{index}]"
        if cidr == "primary":
            if len(cidrs) > 1:
                yield _invalid(path, cidr, "can't use both 'primary' and CIDRs")
        elif addresses.parse_cidr(cidr) is None:
            yield _invalid(path, cidr, "must be a valid CIDR")


def _validate_detect_local(c: KubeProxyConfiguration) -> Iterator[str]:
    mode = c.detect_local_mode
    if mode not in _LOCAL_MODES:
        supported = ", ".join(_quoted(name) for name in _LOCAL_MODES)
        yield (
            f"{_ROOT}.DetectLocalMode: Unsupported value: {_quoted(mode)}: "
            f"supported values: {supported}"
        )
    path = f"{_ROOT}.DetectLocalConfiguration"
    if mode == "BridgeInterface" and not c.detect_local.bridge_interface:
        yield _invalid(f"{path}.InterfaceName", "", "must not be empty")
    if mode == "InterfaceNamePrefix" and not c.detect_local.interface_name_prefix:
        yield _invalid(f"{path}.InterfacePrefix", "", "must not be empty")
    if mode == "ClusterCIDR" and c.cluster_cidrs:
        yield from _validate_cluster_cidrs(f"{path}.ClusterCIDRs", c.cluster_cidrs)


def _validate_cluster_cidrs(path: str, cidrs: tuple[str, ...]) -> Iterator[str]:
    pair = (
        "must be a either a single CIDR or dual-stack pair of CIDRs "
        "(e.g. [10.100.0.0/16, fde4:8dba:82e1::/48]"
    )
    if len(cidrs) > 2:
        yield _invalid(path, cidrs, pair)
        return
    canonical = []
    for index, cidr in enumerate(cidrs):
        parsed = addresses.parse_cidr(cidr)
        if parsed is None:
            yield _invalid(
                f"{path}[{index}]",
                cidr,
                "must be a valid CIDR block (e.g. 10.100.0.0/16 or fde4:8dba:82e1::/48)",
            )
        else:
            canonical.append(parsed)
    if len(canonical) == 2 and len({addresses.family_of(cidr) for cidr in canonical}) == 1:
        yield _invalid(path, cidrs, pair)


def validate_logging(configuration: KubeProxyConfiguration) -> list[str]:
    """Return what is wrong with the logging section; kube-proxy finds it before all the rest."""
    return [*_validate_logging(configuration)]


def _validate_logging(c: KubeProxyConfiguration) -> Iterator[str]:
    logging = c.logging
    if logging.format not in {"text", "json"}:
        yield _invalid("logging.format", logging.format, "Unsupported log format")
    if logging.flush_frequency_s <= 0:
        yield _invalid(
            "logging.flushFrequency", logging.flush_frequency_s, "Must be greater than zero"
        )
    if logging.vmodule and logging.format != "text":
        yield "logging.vmodule: Forbidden: Only supported for text log format"
    for index, item in enumerate(logging.vmodule):
        path = f"logging.vmodule[{index}].filePattern"
        if not item.file_pattern:
            yield f"{path}: Required value: File pattern must not be empty"
        elif set(item.file_pattern) & set("=,"):
            yield _invalid(
                path, item.file_pattern, "File pattern must not contain equal sign or comma"
            )
    alpha_allowed = c.feature_gates.get("LoggingAlphaOptions", False)
    for name, output in (("text", logging.options.text), ("json", logging.options.json)):
        path = f"logging.options.{name}"
        size = str(output.info_buffer_size)
        if not _QUANTITY.fullmatch(size):
            yield _invalid(f"{path}.infoBufferSize", size, "must be a quantity like 64Ki")
        elif re.search("[1-9]", size) and not alpha_allowed:
            yield f"{path}.infoBufferSize: Forbidden: Feature LoggingAlphaOptions is disabled"
        if output.split_stream and not alpha_allowed:
            yield f"{path}.splitStream: Forbidden: Feature LoggingAlphaOptions is disabled"


# A Kubernetes quantity. Only whether it is zero matters: there is no such buffer here.
_QUANTITY: Final = re.compile(
    r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?"
)


def _invalid(path: str, value: object, reason: str) -> str:
    return f"{path}: Invalid value: {_shown(value)}: {reason}"


def _shown(value: object) -> str:
    if isinstance(value, Duration):
        return _quoted(durations.render(value))
    if isinstance(value, tuple):
        return f"[{','.join(_shown(item) for item in value)}]"
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
