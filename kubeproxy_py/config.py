"""
KubeProxyConfiguration, version kubeproxy.config.k8s.io/v1alpha1: its fields, defaults and text forms.

Field for field kube-proxy's, so that a node's file works here unchanged and /configz reads the same.
Pure: ``config_file`` reads files, ``config_validation`` judges what was read.
"""

from typing import Annotated, Any, Final, cast

import msgspec
import yaml

from kubeproxy_py import addresses, durations
from kubeproxy_py.durations import Duration
from kubeproxy_py.errors import ConfigError

API_VERSION: Final = "kubeproxy.config.k8s.io/v1alpha1"
KIND: Final = "KubeProxyConfiguration"

HEALTHZ_PORT: Final = 10256  # what load balancers and kubeadm's probes ask; kube-proxy's own
METRICS_PORT: Final = 10249  # what everybody's Prometheus scrapes; kube-proxy's own

# What /configz and kube-proxy's flag show for minSyncPeriod where none was set. Here that means
# adaptive pacing; a reader of such pages expects this number.
DEFAULT_MIN_SYNC_PERIOD_S: Final = Duration(1)

_Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
_UInt32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]

_API_NAMES: Final = {
    "cluster_cidr": "clusterCIDR",
    "exclude_cidrs": "excludeCIDRs",
    "strict_arp": "strictARP",
    "enable_dsr": "enableDSR",
}


def _api_name(name: str) -> str:
    """Return how the API spells a field: camel case, and no unit since durations carry theirs."""
    first, *others = name.removesuffix("_s").split("_")
    return _API_NAMES.get(name) or first + "".join(word.capitalize() for word in others)


class _Section(msgspec.Struct, frozen=True, kw_only=True, rename=_api_name):
    """
    A part of the file; fields stand in the order of kube-proxy's /configz.

    Field defaults are the effective ones. Where kube-proxy has pointers, an explicit zero differs from
    an absent field and is kept; elsewhere ``_with_defaults`` turns zero into the default.
    """


class ClientConnection(_Section, frozen=True):
    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5.0
    burst: _Int32 = 10


class VModule(_Section, frozen=True):
    file_pattern: str = ""
    verbosity: _UInt32 = 0


class LogOutput(_Section, frozen=True):
    split_stream: bool = False
    info_buffer_size: str | int = "0"  # a Kubernetes quantity


class LogOptions(_Section, frozen=True):
    text: LogOutput = LogOutput()
    json: LogOutput = LogOutput()


class Logging(_Section, frozen=True):
    format: str = "text"
    flush_frequency_s: Duration = Duration(5)
    verbosity: _UInt32 = 0
    vmodule: tuple[VModule, ...] = ()
    options: LogOptions = LogOptions()


class Iptables(_Section, frozen=True):
    masquerade_bit: _Int32 = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period_s: Duration = Duration(30)
    min_sync_period_s: Duration | None = None  # None: not set, adaptive pacing


class Ipvs(_Section, frozen=True):
    sync_period_s: Duration = Duration(0)
    min_sync_period_s: Duration = Duration(0)
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_timeout_s: Duration = Duration(0)
    tcp_fin_timeout_s: Duration = Duration(0)
    udp_timeout_s: Duration = Duration(0)


class Nftables(_Section, frozen=True):
    masquerade_bit: _Int32 = 14
    masquerade_all: bool = False
    sync_period_s: Duration = Duration(0)
    min_sync_period_s: Duration = Duration(0)


class Winkernel(_Section, frozen=True):
    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = False
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(_Section, frozen=True):
    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(_Section, frozen=True):
    max_per_core: _Int32 = 32768
    min: _Int32 = 131072
    tcp_established_timeout_s: Duration = Duration(24 * 3600)
    tcp_close_wait_timeout_s: Duration = Duration(3600)
    tcp_be_liberal: bool = False
    udp_timeout_s: Duration = Duration(0)
    udp_stream_timeout_s: Duration = Duration(0)


class KubeProxyConfiguration(_Section, frozen=True):
    """The whole configuration, with defaults in place. ``KubeProxyConfiguration()`` is the default one."""

    feature_gates: dict[str, bool] = {}
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"  # noqa: S104 - means "learn it from the Node"; nothing is bound to it
    healthz_bind_address: str = f"0.0.0.0:{HEALTHZ_PORT}"  # "": no health server
    metrics_bind_address: str = f"127.0.0.1:{METRICS_PORT}"
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = "iptables"
    iptables: Iptables = Iptables()
    ipvs: Ipvs = Ipvs()
    nftables: Nftables = Nftables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: str = "ClusterCIDR"
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = ""
    node_port_addresses: tuple[str, ...] = ()
    oom_score_adj: _Int32 = -999
    conntrack: Conntrack = Conntrack()
    config_sync_period_s: Duration = Duration(15 * 60)
    port_range: str = ""
    windows_run_as_service: bool = False

    @property
    def cluster_cidrs(self) -> tuple[str, ...]:
        # Blanks stay, as with kube-proxy: validation then names the element.
        return tuple(self.cluster_cidr.split(",")) if self.cluster_cidr else ()


def replace(config: KubeProxyConfiguration, path: str, value: Any) -> KubeProxyConfiguration:
    """Return *config* with the field at *path* (``iptables.masquerade_bit``) set to *value*."""
    sections: list[Any] = [config]
    *parents, name = path.split(".")
    for parent in parents:
        sections.append(getattr(sections[-1], parent))
    for section, field in zip(reversed(sections), (name, *reversed(parents)), strict=True):
        value = msgspec.structs.replace(section, **{field: value})
    return cast("KubeProxyConfiguration", value)


def allows_service_external_ips(config: KubeProxyConfiguration) -> bool:
    """Tell whether spec.externalIPs of Services get rules (feature gate AllowServiceExternalIPs)."""
    return config.feature_gates.get("AllowServiceExternalIPs", True)


def with_defaults(config: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """Turn the zero values for which kube-proxy has defaults into these."""
    default = KubeProxyConfiguration()
    bind = config.bind_address or default.bind_address
    # What is no address at all counts as IPv6 in kube-proxy; validation refuses it anyway.
    is_v4 = ":" not in (addresses.parse_ip(bind) or ":")
    return msgspec.structs.replace(
        config,
        client_connection=msgspec.structs.replace(
            config.client_connection,
            content_type=config.client_connection.content_type
            or default.client_connection.content_type,
            qps=config.client_connection.qps or default.client_connection.qps,
            burst=config.client_connection.burst or default.client_connection.burst,
        ),
        logging=_logging_with_defaults(config.logging),
        bind_address=bind,
        healthz_bind_address=with_port(config.healthz_bind_address, HEALTHZ_PORT)
        or (default.healthz_bind_address if is_v4 else f"[::]:{HEALTHZ_PORT}"),
        metrics_bind_address=with_port(config.metrics_bind_address, METRICS_PORT)
        or (default.metrics_bind_address if is_v4 else f"[::1]:{METRICS_PORT}"),
        mode=config.mode or default.mode,
        iptables=msgspec.structs.replace(
            config.iptables,
            sync_period_s=config.iptables.sync_period_s or default.iptables.sync_period_s,
            min_sync_period_s=config.iptables.min_sync_period_s or None,
        ),
        # As on kube-proxy's /configz: the periods of the modes that do not run are shown as zero.
        ipvs=msgspec.structs.replace(
            config.ipvs, sync_period_s=Duration(0), min_sync_period_s=Duration(0)
        ),
        nftables=msgspec.structs.replace(
            config.nftables, sync_period_s=Duration(0), min_sync_period_s=Duration(0)
        ),
        detect_local_mode=config.detect_local_mode or default.detect_local_mode,
        config_sync_period_s=config.config_sync_period_s or default.config_sync_period_s,
    )


def _logging_with_defaults(logging: Logging) -> Logging:
    return msgspec.structs.replace(
        logging,
        format=logging.format or "text",
        flush_frequency_s=logging.flush_frequency_s or Logging().flush_frequency_s,
        options=LogOptions(
            text=_log_output_with_defaults(logging.options.text),
            json=_log_output_with_defaults(logging.options.json),
        ),
    )


def _log_output_with_defaults(output: LogOutput) -> LogOutput:
    return msgspec.structs.replace(output, info_buffer_size=str(output.info_buffer_size or 0))


def with_port(address: str, port: int) -> str:
    """Add *port* to an address that is an IP alone; leave everything else to validation."""
    if addresses.parse_ip(address) is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def require_iptables_mode(config: KubeProxyConfiguration) -> None:
    """
    Raise ConfigError unless the mode is iptables.

    kube-proxy's other modes are valid values of a file but not what this program does, and to use
    iptables in their place would leave two kinds of rules on a node that was set up for one.
    """
    if config.mode != "iptables":
        raise ConfigError(
            f"cannot run in mode {config.mode!r}: only iptables mode is built in; "
            "set mode (--proxy-mode) to 'iptables' or leave it empty"
        )


# --- text forms


def to_json(config: KubeProxyConfiguration) -> bytes:
    """Return the body of /configz: compact JSON, keys in kube-proxy's order."""
    document = {"kind": KIND, "apiVersion": API_VERSION} | _to_document(config)
    document["iptables"]["minSyncPeriod"] = durations.render(
        min_sync_period_shown_s(config.iptables)
    )
    return msgspec.json.encode({"kubeproxy.config.k8s.io": document})


def to_yaml(config: KubeProxyConfiguration) -> str:
    """
    Return a file that ``config_file.load_file`` reads as an equal configuration.

    A minSyncPeriod that was never set is written as 0s. Both programs read this as "not set", so it
    stays adaptive here; kube-proxy's 1s would come back as a wish for a fixed second.
    """
    document = {"kind": KIND, "apiVersion": API_VERSION} | _to_document(config)
    document["iptables"]["minSyncPeriod"] = durations.render(config.iptables.min_sync_period_s or 0)
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=True, width=_NEVER_FOLD)
    return text


def min_sync_period_shown_s(iptables: Iptables) -> Duration:
    """Return the minSyncPeriod that kube-proxy would have with this configuration."""
    period_s = iptables.min_sync_period_s
    return DEFAULT_MIN_SYNC_PERIOD_S if period_s is None else period_s


def _to_document(config: KubeProxyConfiguration) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(config, enc_hook=durations.render)
    # The API leaves these out when they are empty, and writes null for an empty list.
    for section, field in (
        (document, "featureGates"),
        (document, "windowsRunAsService"),
        (document["logging"], "vmodule"),
        (document["logging"]["options"]["text"], "splitStream"),
        (document["logging"]["options"]["json"], "splitStream"),
    ):
        if not section[field]:
            del section[field]
    for section, field in ((document, "nodePortAddresses"), (document["ipvs"], "excludeCIDRs")):
        section[field] = section[field] or None
    qps = config.client_connection.qps
    document["clientConnection"]["qps"] = int(qps) if qps.is_integer() else qps
    return document


# Folded strings are legal but hard to read and to grep for.
_NEVER_FOLD: Final = 2**31


class _Dumper(yaml.SafeDumper):
    """Quotes as Go's YAML writer does: double where the text would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain_tag = dumper.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    style = None if plain_tag == "tag:yaml.org,2002:str" else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
