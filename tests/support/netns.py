"""
The packet laboratory: a small dual-stack cluster in network namespaces (map: addresses.py).

It promises that nothing outside its own namespaces changes: links are created inside them, never in
the namespace of the host, and lock files are its own. Whoever builds a Lab closes it (``with``);
what a killed process left behind is removed by the next Lab that is built.

Programs started inside see the namespace's links, addresses, rules and ``/proc/sys/net``, but the
host's ``/sys`` and files.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

from kubeproxy_py.model import IPFamily
from tests.support import addresses
from tests.support.addresses import AddressPlan

Backend = Literal["nft", "legacy"]

_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_NETNS_DIR: Final = Path("/run/netns")  # where ``ip netns`` keeps its names
_OWNER: Final = re.compile(r"kpp-(\d+)-\d+-")  # the process that built the lab
_TABLES: Final = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "raw": ("PREROUTING", "OUTPUT"),
    "security": ("INPUT", "FORWARD", "OUTPUT"),
}
_numbers: Final = itertools.count(1)
_libc: Final = ctypes.CDLL(None, use_errno=True)

# What every namespace gets before it has a link, since links inherit "default" when they appear.
_SYSCTLS: Final = {
    # Addresses are usable at once, instead of after a second of duplicate address detection.
    "net/ipv6/conf/*/accept_dad": "0",
    "net/ipv6/conf/*/dad_transmits": "0",
    "net/ipv6/conf/*/disable_ipv6": "0",
    "net/ipv6/conf/*/accept_ra": "0",
    "net/ipv6/conf/*/router_solicitations": "0",
    # A redirect would teach a pod a way around the node, and its packets would miss the rules.
    "net/ipv4/conf/*/accept_redirects": "0",
    "net/ipv6/conf/*/accept_redirects": "0",
    "net/ipv4/conf/*/send_redirects": "0",
    "net/ipv4/conf/*/rp_filter": "0",
    # No kind of ICMP error is limited, neither for a destination nor all together (the kernel's
    # 1,000 a second, 50 at once): a refusal that is kept back looks like a dropped packet.
    "net/ipv4/icmp_ratemask": "0",
    "net/ipv6/icmp/ratemask": "127",  # a type that nobody sends
}
_ROUTER_SYSCTLS: Final = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
}
# Only where br_netfilter is there. Pods reach each other through routing (see _pod_batch), so every
# packet passes the rules exactly once whether or not the kernel has that module.
_BRIDGE_SYSCTLS: Final = {
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
}


class IptablesPrograms(NamedTuple):
    """The names of one backend's programs for one family."""

    command: str
    save: str
    restore: str


def iptables_programs(backend: Backend, family: IPFamily) -> IptablesPrograms:
    """Return e.g. ``ip6tables-legacy``, ``ip6tables-legacy-save``, ``ip6tables-legacy-restore``."""
    stem = f"{'iptables' if family is IPFamily.V4 else 'ip6tables'}-{backend}"
    return IptablesPrograms(stem, f"{stem}-save", f"{stem}-restore")


class Namespace:
    """One network namespace, and the way into it."""

    def __init__(
        self, name: str, netns: str, env: Mapping[str, str], own: Mapping[IPFamily, str]
    ) -> None:
        """Open the existing namespace *netns*; *name* is what people call it in this lab."""
        self.name = name
        self.netns = netns  # as `ip netns` knows it
        self.addresses = dict(own)
        self._env = dict(env)
        self._children: list[subprocess.Popen[str]] = []
        self._fd = os.open(_NETNS_DIR / netns, os.O_RDONLY | os.O_CLOEXEC)

    def __repr__(self) -> str:
        return f"<Namespace {self.netns}>"

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment of programs that run in it."""
        return self._env

    def address(self, family: IPFamily) -> str:
        return self.addresses[family]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the current thread, and no other, into the namespace until the block ends.

        A socket stays for ever in the namespace where it was opened; a child process starts in
        that of the thread which started it.
        """
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self._fd)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | None = None,  # noqa: A002 - as subprocess.run names it
        check: bool = True,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end. Raises AssertionError, with its stderr, if it fails."""
        with self.entered():
            done = subprocess.run(
                argv,
                input=input,
                stdin=subprocess.DEVNULL if input is None else None,
                capture_output=True,
                text=True,
                env=self._env,
                timeout=timeout_s,
                check=False,
            )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(argv)!r} in {self.name} ended with {done.returncode}:"
                f" {done.stderr.strip()}"
            )
        return done

    def popen(self, argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[str]:
        """Start a program; it is ended when the lab is closed, if it is still running then."""
        options: dict[str, Any] = {"env": self._env, "stdin": subprocess.DEVNULL} | kwargs
        with self.entered():
            child = subprocess.Popen(argv, text=True, **options)
        self._children.append(child)
        return child

    def read_sysctl(self, key: str) -> str:
        """Return the value of e.g. ``net/ipv4/ip_forward`` in this namespace."""
        with self.entered():
            return Path("/proc/sys", key).read_text().strip()

    def write_sysctls(self, values: Mapping[str, str]) -> None:
        """Set sysctls in this namespace. ``*`` in a key stands for both ``all`` and ``default``."""
        with self.entered():
            for key, value in values.items():
                for scope in ("all", "default") if "*" in key else ("",):
                    Path("/proc/sys", key.replace("*", scope)).write_text(value)

    def close(self) -> None:
        """End what popen started, and let go of the namespace."""
        for child in self._children:
            _end(child)
        self._children.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclasses.dataclass(eq=False)
class Lab:
    """The namespaces of one small cluster. Build it with ``with Lab.build() as lab``."""

    node: Namespace  # the node under test: all rules go here
    node2: Namespace  # another node; also node's neighbour on the same network
    gateway: Namespace
    outside: Namespace
    local_pods: tuple[Namespace, ...]
    remote_pods: tuple[Namespace, ...]
    env: dict[str, str]  # for programs inside: the host's, with a lock file of its own
    directory: Path  # scratch space, removed with the lab

    @classmethod
    def build(
        cls, *, local_pods: int = 2, remote_pods: int = 2, node_of: int | None = None
    ) -> Self:
        """Build the cluster of the address plan. Needs root; takes about 0.1 s.

        Args:
            local_pods: how many pods the node has.
            remote_pods: how many node2 has.
            node_of: a process, a container's say, whose network namespace becomes the node's. It must
                have no links yet. It lives as long as the process; the rest goes with the lab.

        Raises:
            AssertionError: an ``ip`` command failed. Nothing is left behind then.
        """
        if local_pods < 1 or remote_pods < 1:
            # A bridge without ports never has a carrier, which is what building waits for.
            raise ValueError("cannot build a lab without a pod on each node")
        remove_stale()
        prefix = f"kpp-{os.getpid()}-{next(_numbers)}"
        pods = [f"pod{n}" for n in range(1, local_pods + 1)]
        remotes = [f"remote{n}" for n in range(1, remote_pods + 1)]
        names = ["gateway", "node", "node2", "outside", *pods, *remotes]
        directory = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
        # xtables' lock is a file, not a part of the namespace: with the host's, labs would wait
        # for each other and for whatever the host does.
        env = dict(os.environ) | {"XTABLES_LOCKFILE": str(directory / "xtables.lock")}
        opened: dict[str, Namespace] = {}
        try:
            made = {name: f"netns add {prefix}-{name}" for name in names}
            if node_of is not None:
                made["node"] = f"netns attach {prefix}-node {node_of}"
            _ip_batch("", list(made.values()))
            for name in names:
                own = {family: _address(plan, name) for family, plan in addresses.PLANS.items()}
                opened[name] = Namespace(name, f"{prefix}-{name}", env, own)
                _set_sysctls(opened[name])
            _connect_all(opened)
        except BaseException:
            _remove(opened.values(), [f"{prefix}-{name}" for name in names], directory)
            raise
        return cls(
            node=opened["node"],
            node2=opened["node2"],
            gateway=opened["gateway"],
            outside=opened["outside"],
            local_pods=tuple(opened[name] for name in pods),
            remote_pods=tuple(opened[name] for name in remotes),
            env=env,
            directory=directory,
        )

    @property
    def pods(self) -> tuple[Namespace, ...]:
        return self.local_pods + self.remote_pods

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        return (self.node, self.node2, self.gateway, self.outside, *self.pods)

    def namespace(self, name: str) -> Namespace:
        """Return the namespace called *name*, e.g. ``pod1``, ``remote2`` or ``outside``."""
        return next(ns for ns in self.namespaces if ns.name == name)

    @contextlib.contextmanager
    def loopback_over_the_wire(self) -> Iterator[Namespace]:
        """Let node2 send what it addresses to 127.0.0.0/8 to node, as in CVE-2020-8558.

        Yields node2. IPv6 has no such hole: the kernel never takes ::1 from a wire.
        """
        before = {"net/ipv4/conf/*/route_localnet": "0", "net/ipv4/conf/eth0/route_localnet": "0"}
        self.node2.write_sysctls(dict.fromkeys(before, "1"))
        # The rule for local addresses comes first by nature: it goes behind ours for a while.
        aim = (
            "rule add pref 0 to 127.0.0.0/8 lookup 77",
            "rule add pref 1 lookup local",
            "rule delete pref 0 lookup local",
            f"route add 127.0.0.0/8 via {addresses.V4.node} src {addresses.V4.node2} table 77",
        )
        undo = (
            "rule add pref 0 lookup local",
            "rule delete pref 1 lookup local",
            "rule delete pref 0 to 127.0.0.0/8 lookup 77",
            "route flush table 77",
        )
        _ip_batch(self.node2.netns, aim)
        try:
            yield self.node2
        finally:
            _ip_batch(self.node2.netns, undo)
            self.node2.write_sysctls(before)

    def reset_rules(self) -> None:
        """Empty node's tables of both backends and families, and forget its connections.

        Two backends in one namespace both see every packet, so a test that changes the backend
        needs this first. Sysctls stay as they are.
        """
        self.node.run(["nft", "flush", "ruleset"])
        for family, names_file in (
            (IPFamily.V4, "ip_tables_names"),
            (IPFamily.V6, "ip6_tables_names"),
        ):
            tables = self._legacy_tables(names_file)
            if tables:
                # Restoring without --noflush empties a table and deletes its chains. Tables that
                # do not exist are left out, since restoring them would bring them into being.
                text = "".join(_empty_table(table) for table in tables)
                self.node.run([iptables_programs("legacy", family).restore, "-w"], input=text)
        self.node.run(["conntrack", "-F"])

    def close(self) -> None:
        """Remove everything. Closing again changes nothing."""
        _remove(self.namespaces, [ns.netns for ns in self.namespaces], self.directory)

    def _legacy_tables(self, names_file: str) -> list[str]:
        with self.node.entered():
            # Not /proc/net: that is the main thread's namespace, which may be another.
            path = Path("/proc/thread-self/net", names_file)
            return path.read_text().split() if path.exists() else []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def remove_stale() -> None:
    """Remove what labs left whose process is gone (killed before it could close them)."""
    _remove_netns([path.name for path in _NETNS_DIR.glob("kpp-*") if _is_stale(path.name)])
    for path in Path(tempfile.gettempdir()).glob("kpp-*"):
        if _is_stale(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _is_stale(name: str) -> bool:
    match = _OWNER.match(name)
    return match is not None and not Path("/proc", match[1]).exists()


def _connect_all(opened: Mapping[str, Namespace]) -> None:
    """Lay the cables, give the addresses, set the routes.

    Leaves come first, since they create both ends of their cables; the far ends appear in the
    namespace of the router at once.
    """
    for name, ns in opened.items():
        if name.startswith("pod"):
            _ip_batch(ns.netns, _pod_batch(opened["node"], name))
        elif name.startswith("remote"):
            _ip_batch(ns.netns, _pod_batch(opened["node2"], name))
    _ip_batch(opened["outside"].netns, _outside_batch(opened["gateway"]))
    for name in ("node", "node2"):
        cables = [other for other in opened if other.startswith(_POD_PREFIX[name])]
        _ip_batch(opened[name].netns, _node_batch(opened["gateway"], name, cables))
    _ip_batch(opened["gateway"].netns, _gateway_batch())
    for name in ("gateway", "node", "node2"):
        _wait_for_carrier(opened[name].netns)


def _wait_for_carrier(netns: str) -> None:
    """Wait until all links are in operation: until then a bridge drops what comes in.

    The kernel takes note of a new link's carrier in the background, within milliseconds.
    """
    deadline = time.monotonic() + 5
    while True:
        links = _ip(["-n", netns, "-o", "link", "show", "up"]).splitlines()
        late = [line for line in links if " state UP " not in line and "LOOPBACK" not in line]
        if not late:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"links of {netns} did not come up: {late}")


_POD_PREFIX: Final = {"node": "pod", "node2": "remote"}


def _pod_batch(node: Namespace, name: str) -> list[str]:
    """Give a pod its address without a network.

    All its packets then go through node's routing, as with point-to-point network plugins. With a
    network on the link, replies of a pod to its neighbour would take a short cut through the
    bridge and never be translated back.
    """
    lines = ["link set lo up", _cable(node, name), "link set eth0 up"]
    for plan in addresses.PLANS.values():
        gateway = plan.pod_gateway if name.startswith("pod") else plan.node2_pod_gateway
        lines += [
            f"address add {_address(plan, name)}/{plan.host_bits} dev eth0 {_nodad(plan)}",
            f"route add {gateway}/{plan.host_bits} dev eth0",
            f"route add default via {gateway} dev eth0 onlink",
        ]
    return lines


def _outside_batch(gateway: Namespace) -> list[str]:
    lines = ["link set lo up", _cable(gateway, "outside"), "link set eth0 up"]
    for plan in addresses.PLANS.values():
        own = plan.prefixed(plan.outside, plan.outside_cidr)
        other = plan.prefixed(plan.outside_blocked, plan.outside_cidr)
        lines += [
            f"address add {own} dev eth0 {_nodad(plan)}",
            f"address add {other} dev eth0 {_nodad(plan)} {_not_by_default(plan)}",
            f"route add default via {plan.outside_gateway} dev eth0",
        ]
    return lines


def _node_batch(gateway: Namespace, name: str, pods: Sequence[str]) -> list[str]:
    lines = ["link set lo up", _cable(gateway, name), "link set eth0 up"]
    # A bridge without an address of its own takes the lowest of its ports', which changes as ports
    # come: neighbours would remember the wrong one.
    lines += _bridge("cni0", "02:00:00:00:01:01" if name == "node" else "02:00:00:00:02:01", pods)
    for plan in addresses.PLANS.values():
        here, there = (plan.pod_gateway, plan.pod_cidr), (plan.node2, plan.node2_pod_cidr)
        if name == "node2":
            here, there = (plan.node2_pod_gateway, plan.node2_pod_cidr), (plan.node, plan.pod_cidr)
        own = plan.prefixed(_address(plan, name), plan.node_cidr)
        lines.append(f"address add {own} dev eth0 {_nodad(plan)}")
        if name == "node":
            alternate = plan.prefixed(plan.node_alternate, plan.node_cidr)
            lines.append(f"address add {alternate} dev eth0 {_nodad(plan)} {_not_by_default(plan)}")
        lines += [
            f"address add {plan.prefixed(*here)} dev cni0 {_nodad(plan)}",
            f"route add {there[1]} via {there[0]} dev eth0",
            f"route add default via {plan.gateway} dev eth0",
        ]
    return lines


def _gateway_batch() -> list[str]:
    lines = ["link set lo up", "link set outside up"]
    lines += _bridge("lan0", "02:00:00:00:00:01", ["node", "node2"])
    for plan in addresses.PLANS.values():
        lines += [
            f"address add {plan.prefixed(plan.gateway, plan.node_cidr)} dev lan0 {_nodad(plan)}",
            f"address add {plan.prefixed(plan.outside_gateway, plan.outside_cidr)}"
            f" dev outside {_nodad(plan)}",
            f"route add {plan.node2_pod_cidr} via {plan.node2} dev lan0",
        ]
        # Cluster IPs are not routed in a real network; here they are, so that a test can show what
        # the rules do with a packet that comes all the same.
        for cidr in (
            plan.pod_cidr,
            plan.service_cidr,
            plan.external_ip_cidr,
            *plan.load_balancer_cidrs,
        ):
            lines.append(f"route add {cidr} via {plan.node} dev lan0")
    return lines


def _cable(far: Namespace, name: str) -> str:
    """Connect eth0 of the namespace of the batch with a new link called *name* in *far*.

    The index keeps the two ends' numbers apart. If both happen to be link 2 of their namespace, the
    kernel does not see that they are a pair, and notices the carrier only at its next round, up to
    a second later.
    """
    return f"link add eth0 index 100 type veth peer name {name} netns {far.netns}"


def _bridge(name: str, mac: str, ports: Sequence[str]) -> list[str]:
    # Multicast snooping could hold back neighbour solicitations until it knows who listens.
    lines = [f"link add {name} address {mac} type bridge stp_state 0 mcast_snooping 0"]
    lines += [f"link set {port} master {name} up" for port in ports]
    lines.append(f"link set {name} up")
    return lines


def _address(plan: AddressPlan, name: str) -> str:
    """Return the address by which *name* is reached."""
    if name.startswith("pod"):
        return plan.local_pod(int(name.removeprefix("pod")))
    if name.startswith("remote"):
        return plan.remote_pod(int(name.removeprefix("remote")))
    found: str = getattr(plan, name)
    return found


def _nodad(plan: AddressPlan) -> str:
    return "nodad" if plan.family is IPFamily.V6 else ""


def _not_by_default(plan: AddressPlan) -> str:
    # IPv4 prefers the address that was added first; IPv6 does not, unless the other is deprecated.
    return "preferred_lft 0" if plan.family is IPFamily.V6 else ""


def _set_sysctls(ns: Namespace) -> None:
    ns.write_sysctls(_SYSCTLS)
    if ns.name in ("node", "node2", "gateway"):
        ns.write_sysctls(_ROUTER_SYSCTLS)
    if Path("/proc/sys/net/bridge").exists():
        ns.write_sysctls(_BRIDGE_SYSCTLS)


def _empty_table(table: str) -> str:
    chains = "".join(f":{chain} ACCEPT [0:0]\n" for chain in _TABLES[table])
    return f"*{table}\n{chains}COMMIT\n"


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter network namespace: {os.strerror(code)}")


def _ip_batch(netns: str, lines: Sequence[str]) -> None:
    where = ["-n", netns] if netns else []
    _ip([*where, "-batch", "-"], "".join(f"{line}\n" for line in lines))


def _ip(arguments: Sequence[str], text: str = "") -> str:
    done = subprocess.run(
        ["ip", *arguments], input=text, capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        raise AssertionError(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _remove(opened: Iterable[Namespace], netns: Sequence[str], directory: Path) -> None:
    for ns in opened:
        ns.close()
    _remove_netns([name for name in netns if (_NETNS_DIR / name).exists()])
    shutil.rmtree(directory, ignore_errors=True)


def _remove_netns(names: Sequence[str]) -> None:
    if names:
        # -force goes on after a failure: another lab may remove the same stale name right now.
        subprocess.run(
            ["ip", "-force", "-batch", "-"],
            input="".join(f"netns delete {name}\n" for name in names),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


def _end(child: subprocess.Popen[str]) -> None:
    """End a child politely, then not, and close its pipes."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=5)  # what a daemon may take to stop in order
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(timeout=5)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()
