"""
Lets nothing be written before it is known that this host's iptables can be trusted with our rules.

Probes one family again and again until it can be programmed, and says what is missing: in the log, as
metrics and on /readyz. A host that cannot be programmed now may be a moment later: a module is loaded,
a package is mended.
"""

from collections.abc import Callable
from typing import Final

import structlog

from kubeproxy_py.errors import IptablesError, LockTimeout
from kubeproxy_py.iptables import probe
from kubeproxy_py.metrics import Metrics

log = structlog.get_logger()

# Whoever holds the lock may let go at any moment; a probe has waited for it for seconds already.
_LOCKED_RETRY_S: Final = 0.2
# Somebody has to do something about it, and will want to see soon that it helped. Each attempt takes
# some 30 ms where tables are small, and writes.
_FIRST_RETRY_S: Final = 1.0
_LONGEST_RETRY_S: Final = 30.0


class Prober:
    """Probes one family. For one thread; ``refusal`` may be read from any."""

    def __init__(
        self,
        kernel: probe.Kernel,
        metrics: Metrics,
        *,
        ensure_counters: Callable[[], bool],
        wait: Callable[[float], bool],
    ) -> None:
        """
        Probe *kernel*.

        Args:
            kernel: of one family.
            metrics: where it is told what there is.
            ensure_counters: makes the nfacct counters; False: there are none on this host.
            wait: waits so many seconds; True: it is time to stop.
        """
        self._kernel = kernel
        self._metrics = metrics
        self._ensure_counters = ensure_counters
        self._wait = wait
        self._told: object = None
        #: Why nothing may be written, for people; "" if rules may be.
        self.refusal = ""

    def run(self) -> probe.Findings | None:
        """Probe until rules may be written; None: stopped before."""
        refused_s = _FIRST_RETRY_S
        while True:
            pause_s = refused_s
            try:
                found = self._probe()
            except LockTimeout as error:
                # Who has it is in the log already.
                pause_s = _LOCKED_RETRY_S
                self.refusal = str(error)
            except IptablesError as error:
                self._refuse(str(error))
            else:
                self._tell(found)
                if not found.refusal:
                    self.refusal = ""
                    return found
                self._refuse(found.refusal)
            if self._wait(pause_s):
                return None
            if pause_s == refused_s:
                refused_s = min(2 * refused_s, _LONGEST_RETRY_S)

    def _probe(self) -> probe.Findings:
        missing = {}
        if not self._ensure_counters():
            missing["nfacct"] = "this kernel has no such counters, or does not let us have them"
        return probe.probe(self._kernel, missing)

    def _refuse(self, reason: str) -> None:
        if reason != self.refusal:
            self.refusal = reason
            log.error("capability.refused", ip_family=self._kernel.family.value, reason=reason)

    def _tell(self, found: probe.Findings) -> None:
        if found == self._told:
            return
        self._told = found
        family = found.family.value
        for capability in probe.CAPABILITIES:
            has_it = found.has(capability.name)
            self._metrics.capability.labels(capability.name, family).set(has_it)
            if not has_it:
                log.warning(
                    "capability.missing",
                    ip_family=family,
                    capability=capability.name,
                    consequence=capability.consequence,
                    reason=found.missing.get(capability.name)
                    or "reads back otherwise: {1!r}".format(*found.garbled[capability.name]),
                )
