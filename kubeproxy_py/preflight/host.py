"""
What is wrong, or worth knowing, on this host: facts and configuration → findings.

Pure. Each function looks at one thing and says also that it is well, so that a person sees what was
looked at.
"""

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Final

from kubeproxy_py import addresses, options
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.model import IPFamily
from kubeproxy_py.node_ports import Listener
from kubeproxy_py.preflight.facts import HostFacts
from kubeproxy_py.preflight.findings import Finding, Severity

_NEEDED: Final = ("NET_ADMIN", "NET_RAW")
# iptables-nft before 1.8.3 could not be run beside others and lost rules (kubernetes #71305).
_NFT_SINCE: Final = (1, 8, 3)
_RANDOM_FULLY_SINCE: Final = (1, 6, 2)
# The kernel starts to drop old half-open connections at 95 % and new ones at 100 %; from three
# quarters on there is no room for a bad hour.
_TABLE_WARNING: Final = 0.75
_TABLE_ERROR: Final = 0.95
# The kernel's own default is one to one or four to one; at eight a lookup begins to be felt.
_ENTRIES_PER_BUCKET: Final = 8
_STRICT: Final = 1
# As many as a line has room for.
_NAMED_CHAINS: Final = 5
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
#: What the API server takes node ports from unless told otherwise.
NODE_PORT_RANGE: Final = (30000, 32767)

_FORWARDING: Final = {
    IPFamily.V4: "net/ipv4/ip_forward",
    IPFamily.V6: "net/ipv6/conf/all/forwarding",
}
_BRIDGE_NF: Final = {
    IPFamily.V4: "net/bridge/bridge-nf-call-iptables",
    IPFamily.V6: "net/bridge/bridge-nf-call-ip6tables",
}
_ROUTE_LOCALNET: Final = "net/ipv4/conf/all/route_localnet"
_MAX: Final = "net/netfilter/nf_conntrack_max"
_COUNT: Final = "net/netfilter/nf_conntrack_count"
_PORT_RANGE: Final = "net/ipv4/ip_local_port_range"
_RESERVED: Final = "net/ipv4/ip_local_reserved_ports"


def judge(
    facts: HostFacts, config: KubeProxyConfiguration, ips: options.NodeIPs
) -> Iterator[Finding]:
    """Yield all findings about this host that need no more of the cluster than the Node's IPs."""
    yield Finding("kernel", "ok", f"Linux {facts.release}")
    yield from _rights(facts)
    yield from _state_file(facts)
    yield from _iptables(facts)
    yield from _other_rules(facts)
    yield from _unreadable(facts)
    yield from _events(facts)
    yield from _processes(facts)
    yield from _servers(facts, config)
    yield from _forwarding(facts)
    yield from _bridges(facts)
    yield _rp_filter(facts)
    yield from _route_localnet(facts, config, ips)
    yield from _conntrack(facts)
    yield from (Finding("unchecked", "info", text) for text in facts.unseen)


def _rights(facts: HostFacts) -> Iterator[Finding]:
    if facts.capabilities is not None:
        missing = [f"CAP_{name}" for name in _NEEDED if name not in facts.capabilities]
        if missing:
            found = f"this process lacks {' and '.join(missing)}"
            yield Finding("privileges", "warning", found)
        else:
            yield Finding("privileges", "ok", "CAP_NET_ADMIN and CAP_NET_RAW are there")
    if facts.lock_path and facts.lock_failure:
        found = f"{facts.lock_path}: {facts.lock_failure}"
        yield Finding("xtables-lock", "warning", found)
    elif facts.lock_path:
        yield Finding("xtables-lock", "ok", f"{facts.lock_path} can be locked")
    stuck = [
        f"{_dotted(name)} is {facts.sysctls.get(name, 'absent')}, not {value}"
        for name, value in facts.wanted_sysctls.items()
        if name in facts.read_only_sysctls and facts.sysctls.get(name) != str(value)
    ]
    if stuck:
        found = f"read-only here: {'; '.join(stuck)}"
        yield Finding("conntrack-settings", "error" if _is_root(facts) else "warning", found)
    else:
        yield Finding("conntrack-settings", "ok", "as wanted, or writable")


def _state_file(facts: HostFacts) -> Iterator[Finding]:
    file = facts.state_file
    if file is None:
        return
    if file.failure:
        severity: Severity = "warning" if _is_root(facts) else "info"
        yield Finding("state-file", severity, f"{file.path} cannot be kept: {file.failure}")
        return
    # Whoever writes it decides where this node's traffic goes after a reboot.
    if file.is_foreign or file.is_open:
        why = "belongs to another user" if file.is_foreign else "can be written by others"
        yield Finding("state-file", "warning", f"{file.directory} {why}")
    if file.filesystem in _IN_MEMORY:
        found = f"{file.path} is in memory ({file.filesystem}), and no reboot leaves it"
        yield Finding("state-file", "warning", found)
    elif file.filesystem == "overlay":
        found = (
            f"{file.path} is on an overlay: if it is a container's own, it goes with the container"
        )
        yield Finding("state-file", "info", found)
    elif not (file.is_foreign or file.is_open):
        yield Finding("state-file", "ok", f"{file.path} can be kept")


def _is_root(facts: HostFacts) -> bool:
    # Without rights of its own this process cannot tell what one with rights could write.
    return facts.capabilities is not None and "NET_ADMIN" in facts.capabilities


def _iptables(facts: HostFacts) -> Iterator[Finding]:
    if not facts.backend:
        yield Finding("iptables-backend", "error", facts.backend_failure)
        return
    own = [program for program in facts.programs if program.backend == facts.backend]
    versions = sorted({program.version for program in own})
    said = ", ".join("v" + ".".join(map(str, version)) for version in versions)
    found = f"{facts.backend}, {said} ({facts.backend_reason})"
    yield Finding("iptables-backend", "ok", found)
    oldest = versions[0] if versions else _NFT_SINCE
    if facts.backend == "nft" and oldest < _NFT_SINCE:
        yield Finding(
            "iptables-version", "warning", f"{said} loses rules in nft mode; 1.8.3 does not"
        )
    elif oldest < _RANDOM_FULLY_SINCE:
        yield Finding("iptables-version", "info", f"{said} does not know --random-fully")
    else:
        yield Finding("iptables-version", "ok", said)
    if not facts.has_ipv6:
        yield Finding("ip-families", "info", "IPv6 is not in this kernel, or switched off")
    elif len(own) < len(IPFamily):
        found = f"only {own[0].family.value} has programs for {facts.backend}"
        yield Finding("ip-families", "info", found)
    else:
        yield Finding("ip-families", "ok", "IPv4 and IPv6")


def _other_rules(facts: HostFacts) -> Iterator[Finding]:
    for leftover in facts.leftovers:
        reached = {
            True: "packets pass them",
            False: "nothing leads there",
            None: "whether packets pass them cannot be seen",
        }[leftover.is_reached]
        yield Finding(
            "other-backend",
            "info" if leftover.is_reached is False else "warning",
            f"rules of kube-proxy's in {leftover.backend} {leftover.family.value} tables (chains: "
            f"{leftover.chains}), while {facts.backend} is used; {reached}",
            f"kubeproxy-py cleanup --backend {leftover.backend}",
        )
    if facts.backend and not facts.leftovers:
        yield Finding("other-backend", "ok", f"no rules of kube-proxy's outside of {facts.backend}")
    for family in facts.kubelet_elsewhere:
        found = (
            f"the kubelet's hint for {family.value} is in the backend that is not {facts.backend}"
        )
        yield Finding("kubelet-backend", "warning", found)
    if facts.backend and not facts.kubelet_elsewhere:
        yield Finding("kubelet-backend", "ok", "no hint of the kubelet's elsewhere")
    tables = sorted(facts.nft_tables & {"ip kube-proxy", "ip6 kube-proxy"})
    if tables:
        command = "; ".join(f"nft delete table {table}" for table in tables)
        yield Finding("nft-mode-tables", "warning", f"nft tables {', '.join(tables)}", command)
    else:
        yield Finding("nft-mode-tables", "ok", "none")


def _events(facts: HostFacts) -> Iterator[Finding]:
    if facts.backend == "nft":
        yield _works("rule-events", "the kernel tells of changes", facts.rule_events_failure)
    if facts.backend == "legacy":
        yield _works("lock-events", "fanotify works", facts.lock_events_failure)
    found = "the kernel has it" if facts.has_nfacct else "the kernel has none, or does not tell"
    yield Finding("nfacct", "ok" if facts.has_nfacct else "info", found)


def _unreadable(facts: HostFacts) -> Iterator[Finding]:
    if facts.unreadable:
        more = len(facts.unreadable) - _NAMED_CHAINS
        said = ", ".join(facts.unreadable[:_NAMED_CHAINS]) + (
            f" and {more} more" if more > 0 else ""
        )
        yield Finding("nft-rules", "info", f"rules that only `nft` can show are in {said}")
    elif facts.backend == "nft":
        yield Finding("nft-rules", "ok", "iptables can show all rules of its tables")


def _works(topic: str, found: str, failure: str) -> Finding:
    return Finding(topic, "info", failure) if failure else Finding(topic, "ok", found)


def _processes(facts: HostFacts) -> Iterator[Finding]:
    pids = {
        role: [process.pid for process in facts.processes if process.role == role]
        for role in ("kube-proxy", "kubeproxy-py", "firewalld")
    }
    others, own, firewall = pids["kube-proxy"], pids["kubeproxy-py"], pids["firewalld"]
    if others:
        both = f", and so does kubeproxy-py (pid {own[0]})" if own else ""
        severity: Severity = "error" if own else "warning"
        found = f"kube-proxy runs here (pid {_listed(others)}){both}"
        yield Finding("other-proxy", severity, found, f"kill {' '.join(map(str, others))}")
    else:
        yield Finding("other-proxy", "ok", "no kube-proxy runs here")
    if len(own) > 1:
        yield Finding("other-proxy", "error", f"kubeproxy-py runs twice (pid {_listed(own)})")
    elif own:
        yield Finding("own-process", "ok", f"kubeproxy-py runs here (pid {own[0]})")
    if firewall or "inet firewalld" in facts.nft_tables:
        by = f"pid {firewall[0]}" if firewall else "its nft table is there"
        found = f"firewalld is active ({by})"
        yield Finding("firewalld", "warning", found, "systemctl disable --now firewalld")
    else:
        yield Finding("firewalld", "ok", "not active")


def _servers(facts: HostFacts, config: KubeProxyConfiguration) -> Iterator[Finding]:
    ours = {process.pid for process in facts.processes if process.role == "kubeproxy-py"}
    for name, address in (
        ("metrics", config.metrics_bind_address),
        ("health", config.healthz_bind_address),
    ):
        host, _, port = address.rpartition(":")
        taken = _on(facts.listeners, host.strip("[]"), int(port or 0))
        if taken is None:
            if address:
                yield Finding("ports", "ok", f"{address} ({name}) is free")
            continue
        pid, program = facts.owners.get(taken.inode, (0, ""))
        if pid in ours:
            yield Finding("ports", "ok", f"{address} ({name}) is ours (pid {pid})")
            continue
        who = f"{program} (pid {pid})" if pid else "a process that cannot be seen"
        severity: Severity = "error" if config.bind_address_hard_fail else "warning"
        yield Finding("ports", severity, f"{address} ({name}) is taken by {who}")


def _on(listeners: Iterable[Listener], host: str, port: int) -> Listener | None:
    """Return a TCP listener that leaves no room for a server of *host* and *port*."""
    wanted = addresses.parse_ip(host)
    if wanted is None:
        return None
    family = addresses.family_of(wanted)
    for listener in listeners:
        is_same = listener.address == wanted or _is_any(listener.address) or _is_any(wanted)
        if (
            (listener.protocol, listener.port) == ("tcp", port)
            and listener.takes(family)
            and is_same
        ):
            return listener
    return None


def _is_any(ip: str) -> bool:
    return ipaddress.ip_address(ip).is_unspecified


def _forwarding(facts: HostFacts) -> Iterator[Finding]:
    for family, name in _FORWARDING.items():
        value = facts.sysctls.get(name)
        if value is None or (family is IPFamily.V6 and not _speaks_ipv6(facts)):
            continue
        found = f"{_dotted(name)} is {value}"
        if value == "0":
            yield Finding("ip-forward", "error", found, f"sysctl -w {_dotted(name)}=1")
        else:
            yield Finding("ip-forward", "ok", found)


def _speaks_ipv6(facts: HostFacts) -> bool:
    """Tell whether this host has more of IPv6 than every kernel gives itself."""
    return facts.has_ipv6 and any(
        ":" in ip and not ipaddress.ip_address(ip).is_link_local and not addresses.is_loopback(ip)
        for ip in facts.addresses
    )


def _bridges(facts: HostFacts) -> Iterator[Finding]:
    for family, name in _BRIDGE_NF.items():
        value = facts.sysctls.get(name)
        if value is None or (family is IPFamily.V6 and not _speaks_ipv6(facts)):
            continue
        found = f"{_dotted(name)} is {value}"
        if value == "0":
            yield Finding("bridge-nf", "warning", found, f"sysctl -w {_dotted(name)}=1")
        else:
            yield Finding("bridge-nf", "ok", found)


def _rp_filter(facts: HostFacts) -> Finding:
    strict = sorted(name for name in facts.uplinks if facts.rp_filter.get(name) == _STRICT)
    if not strict:
        return Finding("rp-filter", "ok", "not strict on interfaces with a default route")
    found = f"strict on {', '.join(strict)}"
    if len(facts.uplinks) == 1:
        return Finding("rp-filter", "ok", f"{found}, the only interface with a default route")
    command = "; ".join(f"sysctl -w net.ipv4.conf.{name}.rp_filter=2" for name in strict)
    return Finding("rp-filter", "warning", f"{found}, of several with a default route", command)


def _route_localnet(
    facts: HostFacts, config: KubeProxyConfiguration, ips: options.NodeIPs
) -> Iterator[Finding]:
    value = facts.sysctls.get(_ROUTE_LOCALNET)
    if value is None:
        return
    is_needed = options.has_localhost_node_ports(config, options.node_port_cidrs(config, ips))
    name = _dotted(_ROUTE_LOCALNET)
    if value == "0" and is_needed and _ROUTE_LOCALNET in facts.read_only_sysctls:
        found = f"{name} is 0 and read-only, and `run` ends if it cannot set it"
        yield Finding("route-localnet", "error" if _is_root(facts) else "warning", found)
    elif value == "0" and is_needed:
        found = f"{name} is 0; `run` sets it, for node ports on 127.0.0.1"
        yield Finding("route-localnet", "info", found)
    elif value != "0" and not is_needed:
        command = f"sysctl -w {name}=0"
        yield Finding(
            "route-localnet", "warning", f"{name} is 1, and nothing here needs it", command
        )
    else:
        yield Finding("route-localnet", "ok", f"{name} is {value}, as it should be")


def _conntrack(facts: HostFacts) -> Iterator[Finding]:
    limit, count = _number(facts, _MAX), _number(facts, _COUNT)
    if limit is None or count is None:
        text = "/proc/sys/net/netfilter/nf_conntrack_max is not there"
        yield Finding("conntrack", "error", text, "modprobe nf_conntrack")
        return
    yield Finding("conntrack", "ok", "the kernel tracks connections")
    wanted = facts.wanted_sysctls.get(_MAX, limit)
    found = f"{count:,} of {limit:,} connections"
    if wanted != limit:
        found += f"; `run` sets the limit to {wanted:,}"
    share = count / limit if limit else 0.0  # 0: no limit
    command = f"sysctl -w net.netfilter.nf_conntrack_max={2 * limit}"
    if share >= _TABLE_ERROR:
        yield Finding("conntrack-table", "error", f"nearly full: {found}", command)
    elif share >= _TABLE_WARNING:
        yield Finding("conntrack-table", "warning", f"{share:.0%} full: {found}", command)
    else:
        yield Finding("conntrack-table", "ok", found)
    if facts.conntrack_buckets:
        buckets = facts.conntrack_buckets
        found = f"{limit:,} connections in {buckets:,} buckets"
        if limit > _ENTRIES_PER_BUCKET * buckets:
            path = "/sys/module/nf_conntrack/parameters/hashsize"
            command = f"echo {limit // 4} > {path}"
            yield Finding("conntrack-buckets", "warning", found, command)
        else:
            yield Finding("conntrack-buckets", "ok", found)
    yield from _drops(facts)


def _drops(facts: HostFacts) -> Iterator[Finding]:
    stats = facts.conntrack_stats
    if not stats:
        return
    counted = {name: stats.get(name, 0) for name in ("drop", "early_drop", "insert_failed")}
    found = ", ".join(f"{name} {count:,}" for name, count in counted.items())
    if counted["drop"] or counted["early_drop"]:
        yield Finding("conntrack-drops", "warning", found)
    else:
        severity: Severity = "info" if counted["insert_failed"] else "ok"
        yield Finding("conntrack-drops", severity, found)


def judge_port_range(facts: HostFacts, node_ports: Iterable[int]) -> Finding | None:
    """Return whether *node_ports* may be given to outgoing connections; None: cannot be told.

    Without any, the range that they usually come from is looked at.
    """
    low, _, high = facts.sysctls.get(_PORT_RANGE, "").partition("\t")
    if not (low.isdigit() and high.isdigit()):
        return None
    reserved = _ranges(facts.sysctls.get(_RESERVED, ""))
    known = sorted(set(node_ports))
    checked = known or range(NODE_PORT_RANGE[0], NODE_PORT_RANGE[1] + 1)
    clashing = [
        port
        for port in checked
        if int(low) <= port <= int(high)
        and not any(first <= port <= last for first, last in reserved)
    ]
    local = f"local ports are {low}-{high}"
    if not clashing:
        return Finding("node-port-range", "ok", local)
    first, last = NODE_PORT_RANGE
    old = facts.sysctls.get(_RESERVED, "")
    wanted = ",".join(filter(None, (old, f"{min(first, clashing[0])}-{max(last, clashing[-1])}")))
    command = f"sysctl -w net.ipv4.ip_local_reserved_ports={wanted}"
    what = f"node ports {_listed(clashing)}" if known else f"node ports usually {first}-{last}"
    severity: Severity = "warning" if known else "info"
    return Finding("node-port-range", severity, f"{local}, {what}, not reserved", command)


def _ranges(text: str) -> list[tuple[int, int]]:
    pairs = (part.partition("-") for part in text.split(",") if part)
    return [(int(first), int(last or first)) for first, _, last in pairs]


def _number(facts: HostFacts, name: str) -> int | None:
    text = facts.sysctls.get(name, "")
    return int(text) if text.isdigit() else None


def _listed(numbers: Iterable[int]) -> str:
    shown = [str(number) for number in numbers]
    # As many as a line has room for.
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return ", ".join(shown[:5]) + more


def _dotted(name: str) -> str:
    return name.replace("/", ".")
