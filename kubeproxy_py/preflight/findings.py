"""
What a pre-flight can find: every topic with its meaning and what to do, and findings about them.

Pure. The topics are the catalogue that docs/check.md prints; a finding adds what was found here.
"""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, get_args

Severity = Literal["error", "warning", "info", "ok"]

#: Worst first.
SEVERITIES: Final[tuple[Severity, ...]] = get_args(Severity)

#: As everywhere in this program 1 is an error; 2 is what `plan` says for "something".
_EXIT_STATUS: Final[dict[Severity, int]] = {"error": 1, "warning": 2, "info": 0, "ok": 0}


class Topic(NamedTuple):
    """Something that is looked at."""

    meaning: str
    action: str


class Finding(NamedTuple):
    """What was found of a topic."""

    topic: str
    severity: Severity
    found: str
    command: str = ""  # what mends this very finding, ready for a shell


TOPICS: Final[dict[str, Topic]] = {
    # Configuration.
    "config": Topic(
        "Flags and configuration file, read as `run` reads them.",
        "Mend each field that is named; `run` does not start before.",
    ),
    "config-doubts": Topic(
        "A setting that works, but has no effect or is incomplete.",
        "Remove or complete it.",
    ),
    "manifests": Topic(
        "Files of `--manifests`, read as `run` reads them.",
        "Mend each object and field that is named; they are left out until then.",
    ),
    # Rights and kernel.
    "kernel": Topic("Kernel and machine.", "Nothing; for whoever asks."),
    "privileges": Topic(
        "Rules, connection tracking and sysctls need CAP_NET_ADMIN, and iptables CAP_NET_RAW too.",
        "Start it as root, or with these capabilities.",
    ),
    "xtables-lock": Topic(
        "Every program that writes rules locks this file; one that cannot, fails.",
        "Mount it into the container, writable.",
    ),
    "conntrack-settings": Topic(
        "`run` sets these sysctls at its start and ends if it cannot.",
        "Run `kubeproxy-py run --init-only` where it can, make /proc/sys writable, or set the option to 0.",
    ),
    "state-file": Topic(
        "The last good state is kept there, for a node that comes up while its API server is away.",
        "Give it a directory of root's on a disk, in a container one of the host's; or none: `--state-file=`.",
    ),
    "iptables-backend": Topic(
        "The iptables programs that would be used, and why these.",
        "Install iptables; `--iptables-backend` overrides the choice.",
    ),
    "iptables-version": Topic(
        "Some versions of iptables lose or misread rules.",
        "Install a newer one, the same on the host and in containers.",
    ),
    "ip-families": Topic(
        "Families that cannot be programmed on this host are left out.",
        "Nothing, if the cluster does not use that family.",
    ),
    "other-backend": Topic(
        "Packets pass the rules of both backends, and rules left in the other one are renewed by nobody.",
        "Remove them once nothing uses that backend.",
    ),
    "kubelet-backend": Topic(
        "The kubelet and this proxy must write into the same backend, or each misses the other's rules.",
        "Leave `--iptables-backend` at auto, and restart this proxy after the kubelet's backend changed.",
    ),
    "nft-mode-tables": Topic(
        "Tables of kube-proxy's nftables mode handle Services a second time.",
        "Stop that kube-proxy; `run` and `cleanup` delete the tables.",
    ),
    "nft-rules": Topic(
        "Rules that `nft` has written into iptables' own tables, in words that iptables does not have, "
        "hide these tables from iptables-save, and from whoever reads them by it; ours are kept up.",
        "Write such rules into a table of their own.",
    ),
    "rule-events": Topic(
        "nft: the kernel tells who changes rules; otherwise changes are found within 30 s, without a name.",
        "Give it CAP_NET_ADMIN; use a kernel with nf_tables.",
    ),
    "lock-events": Topic(
        "legacy: fanotify tells who changes rules; otherwise changes are noticed without a name.",
        "Give it CAP_SYS_ADMIN.",
    ),
    "nfacct": Topic(
        "Two rules count packets if the kernel has nfacct; they are written without otherwise.",
        "Load the module nfnetlink_acct if the two metrics are wanted.",
    ),
    # Other programs.
    "other-proxy": Topic(
        "kube-proxy writes the same chains; two proxies undo each other's work.",
        "Stop kube-proxy on this node before this one starts: remove its DaemonSet's Pod or its unit.",
    ),
    "own-process": Topic("Whether kubeproxy-py runs here.", "Nothing; for whoever asks."),
    "firewalld": Topic(
        "A reload of firewalld removes others' rules in its iptables backend, and its zones reject "
        "traffic of pods and node ports in both; our rules are repaired at once, pod traffic is not.",
        "Switch it off, or put the pods' interfaces and CIDRs into the trusted zone.",
    ),
    "ports": Topic(
        "The metrics and health servers need their ports; a taken one is tried again every 5 s.",
        "Stop the other program, or move ours: `--metrics-bind-address`, `--healthz-bind-address`.",
    ),
    # Network of the host.
    "ip-forward": Topic(
        "Without forwarding nothing goes between pods, other nodes and Services.",
        "Switch it on, also in /etc/sysctl.d.",
    ),
    "bridge-nf": Topic(
        "Pods on one bridge reach each other through Services only if bridged packets pass iptables.",
        "Switch it on; needed where the network plugin uses a bridge without hairpin routing.",
    ),
    "rp-filter": Topic(
        "Strict reverse path filtering drops answers that come back by another interface.",
        "Use loose mode (2) on nodes with several uplinks.",
    ),
    "route-localnet": Topic(
        "Node ports on 127.0.0.1 need it; otherwise it only opens loopback to neighbours (CVE-2020-8558).",
        "Switch it off where node ports on localhost are not wanted: `--iptables-localhost-nodeports=false`.",
    ),
    "conntrack": Topic(
        "NAT is impossible without connection tracking.",
        "Load the module nf_conntrack.",
    ),
    "conntrack-table": Topic(
        "A full table of connections drops every new one.",
        "Raise `conntrack.maxPerCore` or `conntrack.min`; look for leaks with `conntrack -S`.",
    ),
    "conntrack-buckets": Topic(
        "Long hash chains make every packet slow.",
        "Raise the number of buckets to a quarter of the limit.",
    ),
    "conntrack-drops": Topic(
        "Since boot: drop and early_drop mean that the table was full; insert_failed that two packets "
        "raced for one entry, often DNS over UDP.",
        "See conntrack-table; against races, a DNS cache on the node.",
    ),
    "node-port-listeners": Topic(
        "A node port takes all connections to it; the local process gets none, without an error.",
        "Move the process or the node port; `nodePortAddresses` limits where node ports are served.",
    ),
    "node-port-range": Topic(
        "Outgoing connections may get a local port that is a node port, and then lose their answers.",
        "Reserve the node ports.",
    ),
    "node-port-addresses": Topic(
        "Where node ports are served.",
        "Set `nodePortAddresses: [primary]` to serve them on the Node's own address alone.",
    ),
    # Cluster.
    "api-config": Topic(
        "How the API server is found, and with which credentials.",
        "Mend the kubeconfig, or give another with `--kubeconfig`.",
    ),
    "api-reachable": Topic(
        "Nothing is programmed before Services and EndpointSlices are read.",
        "Test the address, the network and the certificates.",
    ),
    "api-version": Topic(
        "EndpointSlices of discovery.k8s.io/v1 are there since Kubernetes 1.21.",
        "Upgrade the API server.",
    ),
    "api-cluster-ip": Topic(
        "A proxy that reaches the API server through a Service depends on its own rules.",
        "Use the control plane's own address in the kubeconfig.",
    ),
    "api-permissions": Topic(
        "What this identity may do.",
        "Bind it to the ClusterRole `system:node-proxier`.",
    ),
    "clock": Topic(
        "Certificates, tokens and latencies are wrong when clocks differ.",
        "Run a time service on this node and the control plane.",
    ),
    "node-object": Topic(
        "The Node of this host gives its IPs, zone and pod CIDRs.",
        "Give its name with `--hostname-override`.",
    ),
    "cluster-cidr": Topic(
        "It tells which traffic comes from pods; wrong, either too much or too little is masqueraded.",
        "Set it to the pods' CIDRs, one of each family.",
    ),
    "objects": Topic(
        "Objects, or parts of them, that are left out because they are invalid.",
        "Mend each field that is named.",
    ),
    "external-addresses": Topic(
        "External IPs and load balancer VIPs that get no rules, because they would take others' traffic "
        "or are not allowed.",
        "See docs/operations.md, External addresses.",
    ),
    "shadowed-addresses": Topic(
        "External IPs and load balancer VIPs that are one of the Node's addresses or the API server's.",
        "Nothing, if it is meant (ServiceLB, MetalLB on one node); else give the Service another address.",
    ),
    "unchecked": Topic("What could not be looked at.", "Run it as root, or with the flags named."),
}


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the worst severity there is; ok if there is none."""
    found = {finding.severity for finding in findings}
    return next((severity for severity in SEVERITIES if severity in found), "ok")


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 1 if there are errors, else 2 if there are warnings, else 0."""
    return _EXIT_STATUS[worst(findings)]


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by severity and then as the catalogue has the topics."""
    topics = list(TOPICS)
    return sorted(
        findings,
        key=lambda finding: (SEVERITIES.index(finding.severity), topics.index(finding.topic)),
    )
