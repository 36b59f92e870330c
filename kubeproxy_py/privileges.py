"""
Whether this process may touch netfilter at all, asked before anything is tried.

Without CAP_NET_RAW, iptables looks as if it worked and then refuses single rules for reasons that have
nothing to do with them: legacy cannot open its socket, and nft cannot ask which extensions there are.
"""

import os
from pathlib import Path
from typing import Final

from kubeproxy_py.errors import KubeProxyError

_STATUS: Final = Path("/proc/self/status")
# Bit numbers of linux/capability.h, as proc(5) shows them in CapEff.
_NEEDED: Final = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}


def require_netfilter(status: Path = _STATUS) -> None:
    """Raise KubeProxyError, with the names of what is missing, unless rules may be read and written.

    Passed for a process of another user namespace than its network namespace's: there the kernel
    refuses though the capability is there, and iptables says so.
    """
    effective = _effective(status)
    missing = [name for name, bit in _NEEDED.items() if not effective >> bit & 1]
    if missing:
        raise KubeProxyError(
            f"cannot use iptables without {' and '.join(missing)}, which this process (user "
            f"{os.geteuid()}) does not have: run it as root, in a container or unit that grants them"
        )


def _effective(status: Path) -> int:
    """Return the effective capabilities as a bit set; all, if they cannot be learned."""
    try:
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(int(line[7:], 16) for line in lines if line.startswith("CapEff:"))
    except (OSError, ValueError, StopIteration):
        # Then it is up to iptables to complain.
        return -1
