"""
Every flag, as data: name, type, default, help, and the configuration field it sets.

The first part is kube-proxy's command line, complete: a node's unit file or DaemonSet must start this
program unchanged. The second part is this program's own.
"""

import enum
from typing import Final, NamedTuple

from kubeproxy_py import flag_types
from kubeproxy_py.config import HEALTHZ_PORT, METRICS_PORT
from kubeproxy_py.flag_types import FlagType
from kubeproxy_py.status_socket import DEFAULT_PATH


class Group(enum.Flag):
    """Which commands have a flag, besides ``run``, which has all."""

    RUN = enum.auto()
    RULES = enum.auto()  # render, plan, explain
    CLEANUP = enum.auto()
    EVERYWHERE = RUN | RULES | CLEANUP


class Flag(NamedTuple):
    """One flag. The default is text as a person would write it."""

    name: str
    type: FlagType
    default: str | None
    help: str
    field: str = ""  # path in KubeProxyConfiguration, in this program's names
    group: Group = Group.RUN
    is_hidden: bool = False
    is_honoured_with_config: bool = False  # else --config makes it void, as with kube-proxy
    has_no_effect: bool = False  # worth a warning: somebody expects one


_TEXT: Final = flag_types.Text()
_BOOLEAN: Final = flag_types.Boolean()
_INTEGER: Final = flag_types.Integer()
_DURATION: Final = flag_types.GoDuration()
_IP_PORT: Final = flag_types.IpPort()
_TEXTS: Final = flag_types.Texts()

_RULES: Final = Group.RUN | Group.RULES
_EVERYWHERE: Final = Group.EVERYWHERE

# A table: one flag, one line.
# fmt: off
_KUBE_PROXY_FLAGS: Final = (
    # What stays valid beside --config.
    Flag("config", _TEXT, "", "Read the configuration from this file; most other flags are then ignored.", group=_EVERYWHERE, is_honoured_with_config=True),
    Flag("write-config-to", _TEXT, "", "Write the effective configuration to this file and exit.", is_honoured_with_config=True),
    Flag("cleanup", _BOOLEAN, "false", "Remove all rules that kube-proxy or this program wrote, and exit.", is_honoured_with_config=True),
    Flag("init-only", _BOOLEAN, "false", "Do only what needs full privileges, such as setting sysctls, and exit.", is_honoured_with_config=True),
    Flag("master", _TEXT, "", "URL of the API server; takes precedence over the one in the kubeconfig.", group=_RULES, is_honoured_with_config=True),
    Flag("hostname-override", _TEXT, "", "Name of this node's Node object, if it is not the host name.", group=_RULES, is_honoured_with_config=True),
    Flag("version", flag_types.Version(), "false", "Print the Kubernetes version this program behaves as, and exit.", is_honoured_with_config=True),
    # The API server.
    Flag("kubeconfig", _TEXT, "", "Reach the API server as this file says. Without it: as a pod, from inside the cluster.", "client_connection.kubeconfig", _RULES),
    Flag("kube-api-content-type", _TEXT, "application/vnd.kubernetes.protobuf", "Content type for requests to the API server.", "client_connection.content_type"),
    Flag("kube-api-burst", _INTEGER, "10", "How many requests to the API server may exceed the rate for a moment.", "client_connection.burst"),
    Flag("kube-api-qps", flag_types.Number(), "5", "Requests to the API server per second.", "client_connection.qps"),
    Flag("config-sync-period", _DURATION, "15m0s", "How often all objects are looked at again.", "config_sync_period_s"),
    # Addresses, servers, process.
    Flag("bind-address", flag_types.Ip(), "0.0.0.0", "This node's primary IP, if it should not be taken from the Node object. Nothing is bound to it.", "bind_address", _RULES),  # noqa: S104 - not bound to
    Flag("healthz-bind-address", _IP_PORT, f"0.0.0.0:{HEALTHZ_PORT}", "Where the health server listens. An empty value keeps the default.", "healthz_bind_address"),
    Flag("metrics-bind-address", _IP_PORT, f"127.0.0.1:{METRICS_PORT}", "Where the metrics server listens. An empty value keeps the default.", "metrics_bind_address"),
    Flag("healthz-port", _INTEGER, str(HEALTHZ_PORT), "Port of the health server; 0 switches it off.", is_hidden=True),
    Flag("metrics-port", _INTEGER, str(METRICS_PORT), "Port of the metrics server.", is_hidden=True),
    Flag("bind-address-hard-fail", _BOOLEAN, "false", "Exit if the health or metrics server cannot listen, instead of trying again.", "bind_address_hard_fail"),
    Flag("profiling", _BOOLEAN, "false", "Serve /debug/flags/v on the metrics port, which shows and sets the log level.", "enable_profiling"),
    Flag("show-hidden-metrics-for-version", _TEXT, "", "Show metrics that were hidden in this release; only the previous minor version is allowed.", "show_hidden_metrics_for_version"),
    Flag("oom-score-adj", _INTEGER, "-999", "How unwillingly the kernel kills this process when memory is short (-1000 to 1000).", "oom_score_adj"),
    Flag("feature-gates", flag_types.Gates(), "", "Feature gates as NAME=true,NAME=false; may be repeated.", "feature_gates", _RULES),
    # Rules.
    Flag("proxy-mode", _TEXT, "", "How to proxy. Only iptables is built in, which is also the default.", "mode", _RULES),
    Flag("iptables-masquerade-bit", _INTEGER, "14", "Bit of the packet mark (0 to 31) that says a packet's source must be rewritten.", "iptables.masquerade_bit", _RULES),
    Flag("masquerade-all", _BOOLEAN, "false", "Rewrite the source of all traffic to cluster IPs.", "iptables.masquerade_all", _RULES),
    Flag("iptables-localhost-nodeports", _BOOLEAN, "true", "Let node ports be reached through 127.0.0.1 (IPv4 only).", "iptables.localhost_node_ports", _RULES),
    Flag("iptables-sync-period", _DURATION, "30s", "Longest time from one complete check of the rules to the next.", "iptables.sync_period_s"),
    Flag("iptables-min-sync-period", _DURATION, None, "Least time from one sync to the next. Not set, or 0: adapts to what a sync costs.", "iptables.min_sync_period_s"),
    Flag("detect-local-mode", _TEXT, "", "How to tell traffic of this node's pods: ClusterCIDR (default), NodeCIDR, BridgeInterface or InterfaceNamePrefix.", "detect_local_mode", _RULES),
    Flag("cluster-cidr", _TEXT, "", "Addresses of the cluster's pods; in a dual-stack cluster one CIDR of each family, comma-separated.", "cluster_cidr", _RULES),
    Flag("pod-bridge-interface", _TEXT, "", "The bridge that this node's pods are attached to, for BridgeInterface.", "detect_local.bridge_interface", _RULES),
    Flag("pod-interface-name-prefix", _TEXT, "", "How the names of pod interfaces on this node begin, for InterfaceNamePrefix.", "detect_local.interface_name_prefix", _RULES),
    Flag("nodeport-addresses", _TEXTS, "", "CIDRs of the local addresses that have node ports, or 'primary'. Without it: all addresses.", "node_port_addresses", _RULES),
    # Connection tracking.
    Flag("conntrack-max-per-core", _INTEGER, "32768", "Connections to track per CPU core; 0 leaves the kernel's limit alone.", "conntrack.max_per_core"),
    Flag("conntrack-min", _INTEGER, "131072", "Connections to track at least, whatever the number of cores.", "conntrack.min"),
    Flag("conntrack-tcp-timeout-established", _DURATION, "24h0m0s", "How long an idle TCP connection is tracked; 0 leaves the kernel's value alone.", "conntrack.tcp_established_timeout_s"),
    Flag("conntrack-tcp-timeout-close-wait", _DURATION, "1h0m0s", "How long a half-closed TCP connection is tracked; 0 leaves the kernel's value alone.", "conntrack.tcp_close_wait_timeout_s"),
    Flag("conntrack-tcp-be-liberal", _BOOLEAN, "false", "Accept TCP packets outside the tracked window instead of dropping them.", "conntrack.tcp_be_liberal"),
    Flag("conntrack-udp-timeout", _DURATION, "0s", "How long a one-way UDP flow is tracked; 0 leaves the kernel's value alone.", "conntrack.udp_timeout_s"),
    Flag("conntrack-udp-timeout-stream", _DURATION, "0s", "How long a two-way UDP flow is tracked; 0 leaves the kernel's value alone.", "conntrack.udp_stream_timeout_s"),
    # Logging.
    Flag("v", flag_types.Integer(lowest=0), "0", "How much to log; 4 and more also log single objects.", "logging.verbosity", _EVERYWHERE, is_honoured_with_config=True),
    Flag("vmodule", flag_types.VModules(), "", "Log levels per source file, as pattern=N,...; accepted, without effect.", "logging.vmodule", is_hidden=True, is_honoured_with_config=True),
    Flag("logging-format", _TEXT, "text", "How to log: text or json.", "logging.format", _EVERYWHERE, is_honoured_with_config=True),
    Flag("log-flush-frequency", _DURATION, "5s", "Accepted; logs are never held back.", "logging.flush_frequency_s", is_hidden=True, is_honoured_with_config=True),
    Flag("log-text-split-stream", _BOOLEAN, "false", "Not available.", "logging.options.text.split_stream", is_hidden=True, is_honoured_with_config=True),
    Flag("log-json-split-stream", _BOOLEAN, "false", "Not available.", "logging.options.json.split_stream", is_hidden=True, is_honoured_with_config=True),
    Flag("log-text-info-buffer-size", _TEXT, "0", "Not available.", "logging.options.text.info_buffer_size", is_hidden=True, is_honoured_with_config=True),
    Flag("log-json-info-buffer-size", _TEXT, "0", "Not available.", "logging.options.json.info_buffer_size", is_hidden=True, is_honoured_with_config=True),
    # Accepted because command lines have them.
    Flag("ipvs-sync-period", _DURATION, "30s", "ipvs mode only.", is_hidden=True, has_no_effect=True),
    Flag("ipvs-min-sync-period", _DURATION, "1s", "ipvs mode only.", is_hidden=True, has_no_effect=True),
    Flag("ipvs-scheduler", _TEXT, "", "ipvs mode only.", "ipvs.scheduler", is_hidden=True, has_no_effect=True),
    Flag("ipvs-exclude-cidrs", _TEXTS, "", "ipvs mode only.", "ipvs.exclude_cidrs", is_hidden=True, has_no_effect=True),
    Flag("ipvs-strict-arp", _BOOLEAN, "false", "ipvs mode only.", "ipvs.strict_arp", is_hidden=True, has_no_effect=True),
    Flag("ipvs-tcp-timeout", _DURATION, "0s", "ipvs mode only.", "ipvs.tcp_timeout_s", is_hidden=True, has_no_effect=True),
    Flag("ipvs-tcpfin-timeout", _DURATION, "0s", "ipvs mode only.", "ipvs.tcp_fin_timeout_s", is_hidden=True, has_no_effect=True),
    Flag("ipvs-udp-timeout", _DURATION, "0s", "ipvs mode only.", "ipvs.udp_timeout_s", is_hidden=True, has_no_effect=True),
    Flag("boot-id-file", _TEXT, "/proc/sys/kernel/random/boot_id", "Not used.", is_hidden=True),
    Flag("machine-id-file", _TEXT, "/etc/machine-id,/var/lib/dbus/machine-id", "Not used.", is_hidden=True),
)

_OUR_FLAGS: Final = (
    Flag("manifests", flag_types.Paths(), "", "Take objects from this file or directory (YAML or JSON) instead of an API server; may be repeated.", group=_RULES, is_honoured_with_config=True),
    Flag("dispatch", flag_types.Choice("auto", "flat", "tree"), "auto", "Layout of KUBE-SERVICES and the other shared chains: flat is rule for rule as kube-proxy writes it; tree makes every lookup pass a few dozen rules; auto is a tree where there are more than 64 entries.", group=_RULES, is_honoured_with_config=True),
    Flag("status-socket", _TEXT, DEFAULT_PATH, "Tell root how things are on this unix socket (kubeproxy-py status); empty: nowhere.", is_honoured_with_config=True),
    Flag("state-file", _TEXT, "/var/lib/kubeproxy-py/state", "Keep the last good state of the cluster in this file, for a reboot without an API server; empty: do not.", is_honoured_with_config=True),
    Flag("external-ips-allow", flag_types.Cidrs(), "", "CIDRs that external IPs and load balancer VIPs of Services must be in; others get no rules. Comma-separated, may be repeated. Without it: all but other Services' cluster IPs and the API servers' own address and port.", group=_RULES, is_honoured_with_config=True),
    Flag("traffic-metrics", flag_types.Choice("off", "service", "endpoint"), "off", "Count connections and refused packets of each Service, or of each endpoint as well, and show them on the metrics port.", is_honoured_with_config=True),
    Flag("traffic-metrics-bytes", _BOOLEAN, "false", "Count packets and bytes of each Service's connections as well, which the kernel then counts for every connection. With --traffic-metrics only.", is_honoured_with_config=True),
    Flag("traffic-metrics-max-series", flag_types.Integer(lowest=1), "500", "At most so many series for each of these metrics and each IP family; the rest is counted together.", is_honoured_with_config=True),
    Flag("traffic-metrics-namespaces", flag_types.Namespaces(), "", "Count only Services of these namespaces. Without it: all.", is_honoured_with_config=True),
    Flag("traffic-metrics-selector", flag_types.LabelSelector(), "", "Show only Services whose labels this selector selects, such as team=payments,tier in (web,api). Without it: all.", is_honoured_with_config=True),
    Flag("traffic-metrics-state", _TEXT, "/run/kubeproxy-py/traffic.json", "Keep the totals in this file, so that a restart goes on from them. An empty value keeps none.", is_honoured_with_config=True),
    Flag("iptables-backend", flag_types.Choice("auto", "nft", "legacy"), "auto", "Which iptables programs to use; auto takes the ones this node's other programs use.", group=_RULES, is_honoured_with_config=True),
)
# fmt: on

FLAGS: Final = (*_KUBE_PROXY_FLAGS, *_OUR_FLAGS)
