"""
Says loudly when rules of kube-proxy's or ours stand in the backend that is not used.

It looks at the start and every minute, tells each finding once, and changes nothing: whose rules they
are, nobody can tell from here, and a process that removed another's would be the next fault. When the
kubelet moves to the other backend, that is told and no more: our rules go on working where they are, as
long as they are all in one place, while a restart would leave the old ones behind, for packets to meet.
"""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from kubeproxy_py.iptables import backends, runner
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

# A look costs some milliseconds; who mixes backends does it once, when something is installed.
_PERIOD_S: Final = 60.0

SurveyOf = Callable[[runner.Backend, Sequence[IPFamily]], backends.Survey]


def _to_nobody(_leftover: backends.Leftover) -> None:
    pass


class BackendWatch:
    """Looks at the backend that is not used. ``reason`` may be asked from any thread."""

    def __init__(
        self,
        backend: runner.Backend,
        families: Sequence[IPFamily],
        metrics: Metrics,
        *,
        wait: Callable[[float], bool],
        survey: SurveyOf = backends.survey,
        tell: Callable[[backends.Leftover], None] = _to_nobody,
    ) -> None:
        """
        Use *backend* for *families*.

        Args:
            backend: the one that is used.
            families: those that are programmed.
            metrics: where it is told what was found.
            wait: waits so many seconds; True: it is time to stop.
            survey: looks at the other backend.
            tell: is told of what was not there at the look before; must not block.
        """
        self._backend = backend
        self._families = families
        self._metrics = metrics
        self._wait = wait
        self._survey = survey
        self._tell = tell
        #: What was found last. Replaced as a whole: other threads read it.
        self.found = backends.Survey()

    def run(self) -> None:
        """Look, until it is time to stop."""
        self.look()
        while not self._wait(_PERIOD_S):
            self.look()

    def look(self) -> None:
        """Look once, and tell what is new."""
        before = self.found
        found = _completed(self._survey(self._backend, self._families), before)
        self.found = found
        for family in self._families:
            here = [leftover for leftover in found.leftovers if leftover.family is family]
            labels = (family.value,)
            self._metrics.other_backend_chains.labels(*labels).set(sum(one.count for one in here))
            self._metrics.other_backend_jumps.labels(*labels).set(
                sum(len(one.jumps or ()) for one in here)
            )
        for leftover in found.leftovers:
            if leftover not in before.leftovers:
                log.error(
                    "backend.mixed",
                    ip_family=leftover.family.value,
                    backend=leftover.backend,
                    count=leftover.count,
                    chains=list(leftover.chains),
                    jumps=None if leftover.jumps is None else list(leftover.jumps),
                    message=f"{leftover}; {_advice(leftover)}",
                )
                self._tell(leftover)
        for leftover in before.leftovers:
            if leftover.family not in {one.family for one in found.leftovers}:
                log.info(
                    "backend.unmixed",
                    ip_family=leftover.family.value,
                    backend=leftover.backend,
                )
        for family in found.moved:
            if family not in before.moved:
                # Where a person chose our backend, that is as it was meant.
                log.warning(
                    "backend.moved",
                    ip_family=family.value,
                    kubelet=backends.other(self._backend),
                    ours=self._backend,
                    message="rules go on working where they are; drain the node, clean up and "
                    "start again to follow the kubelet",
                )
        for failure in found.failures:
            if failure not in before.failures:
                log.warning("backend.unknown", error=failure)

    def reason(self) -> str | None:
        """Return why this node is not ready: packets meet rules that nobody keeps up to date."""
        met = [leftover for leftover in self.found.leftovers if leftover.is_met]
        return "; ".join(f"{leftover}: {_advice(leftover)}" for leftover in met) or None


def _completed(found: backends.Survey, before: backends.Survey) -> backends.Survey:
    """Return *found* with what was known *before* of what could not be looked at now."""
    known = {leftover.family: leftover for leftover in before.leftovers}
    leftovers = [
        msgspec.structs.replace(leftover, jumps=known[leftover.family].jumps)
        if leftover.jumps is None and leftover.family in known
        else leftover
        for leftover in found.leftovers
    ]
    leftovers += [known[family] for family in found.unknown if family in known]
    moved = (*found.moved, *(family for family in before.moved if family in found.unknown))
    return msgspec.structs.replace(found, leftovers=tuple(leftovers), moved=moved)


def _advice(leftover: backends.Leftover) -> str:
    return f"kubeproxy-py cleanup --backend={leftover.backend} removes them"
