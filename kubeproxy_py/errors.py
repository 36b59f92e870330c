"""
Every error this program raises on purpose.

    KubeProxyError
    ├── ConfigError            the command line or a file is wrong; exit 1, all problems at once
    ├── ApiError               the cluster's API
    │   ├── WatchExpired       410: the history is gone, list again
    │   └── ApiUnavailable     no answer or an error answer; try again later
    └── IptablesError          the kernel was not changed, or it is unknown whether it was
        ├── LockTimeout        somebody else holds the xtables lock; the same batch again soon
        ├── BatchRejected      the kernel or the parser refused a rule; the same batch is futile
        └── BackendMissing     no usable iptables binary

A class exists only where a caller treats it differently.
"""

from collections.abc import Sequence


class KubeProxyError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(KubeProxyError):
    """Something a person wrote is wrong. The text names it; nothing was started."""


class ApiError(KubeProxyError):
    """The cluster's API did not give what was asked."""


class WatchExpired(ApiError):
    """The server no longer has the history this watch asked for (HTTP 410)."""


class ApiUnavailable(ApiError):
    """The API cannot be reached or answers with an error."""


class IptablesError(KubeProxyError):
    """An iptables program failed. Whether the kernel was changed is unknown."""


class LockTimeout(IptablesError):
    """Another program held the xtables lock too long. Trying again is right."""


class BackendMissing(IptablesError):
    """No iptables program for the wanted family or backend is there or works."""


class BatchRejected(IptablesError):
    """The kernel or the parser refused our rules. Trying the same batch again is futile."""

    def __init__(self, reason: str, *, batch: str = "", lines: Sequence[int] = ()) -> None:
        """Keep *batch* (the restore input) and the 1-based *lines* complained about, if known."""
        self.reason = reason
        self.batch = batch
        self.lines = tuple(lines)
        self.excerpt = _excerpt(batch, self.lines[0]) if self.lines else ""
        super().__init__(f"cannot restore rules: {reason}")

    def refused(self) -> list[str]:
        """Return the lines of the input that were complained about."""
        texts = self.batch.splitlines()
        return [texts[line - 1] for line in self.lines if 0 < line <= len(texts)]


def _excerpt(batch: str, line: int) -> str:
    # Three lines of context on both sides, as kube-proxy logs them.
    lines = batch.splitlines()
    first = max(0, line - 4)
    return "\n".join(
        f"{number}: {text}" for number, text in enumerate(lines[first : line + 3], start=first + 1)
    )
