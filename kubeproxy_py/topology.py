"""
Which endpoints a ServicePort may use on this node.

Pure. The rules are kube-proxy's CategorizeEndpoints: traffic policies, terminating fall-back
(KEP-1669), zone and node hints (KEP-2433, KEP-3015).
"""

from collections.abc import Sequence

import msgspec

from kubeproxy_py.model import Endpoint, ServicePort


class Choice(msgspec.Struct, frozen=True):
    """The endpoints to use: by cluster policy, by local policy, and all that are reachable."""

    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    reachable: tuple[Endpoint, ...] = ()
    #: A usable endpoint exists somewhere, on this node or another: tells REJECT from DROP.
    has_any: bool = False


def choose(
    endpoints: Sequence[Endpoint], port: ServicePort, *, node_name: str, zone: str
) -> Choice:
    """Choose among *endpoints* (sorted, without duplicates) for *port* on this node."""
    if not endpoints:
        return Choice()
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    has_any = False
    if port.uses_cluster_endpoints:
        cluster = _cluster(endpoints, node_name, zone)
        has_any = bool(cluster)
    if port.uses_local_endpoints:
        local = usable([ep for ep in endpoints if ep.is_local])
        has_any = has_any or bool(usable(endpoints))
    reachable = cluster if not local else _union(cluster, local)
    return Choice(cluster, local, reachable, has_any)


def _cluster(endpoints: Sequence[Endpoint], node_name: str, zone: str) -> tuple[Endpoint, ...]:
    ready = [ep for ep in endpoints if ep.ready]
    if not ready:
        # Hints say nothing about terminating endpoints: any that still serves is better than none.
        return usable(endpoints)
    # One endpoint without a hint switches that level of hints off: its absence means that the
    # controller's picture is not complete, and honouring half of it would overload some endpoints.
    if all(ep.node_hints for ep in ready):
        same_node = tuple(ep for ep in ready if node_name in ep.node_hints)
        if same_node:
            return same_node
    if zone and all(ep.zone_hints for ep in ready):
        same_zone = tuple(ep for ep in ready if zone in ep.zone_hints)
        if same_zone:
            return same_zone
    return tuple(ready)


def usable(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the ready endpoints or, when there are none, the terminating ones still serving."""
    ready = tuple(ep for ep in endpoints if ep.ready)
    if ready:
        return ready
    # KEP-1669: a rolling update may leave nothing but terminating pods for a moment. Sending them
    # traffic beats dropping it.
    return tuple(ep for ep in endpoints if ep.serving and ep.terminating)


def _union(cluster: tuple[Endpoint, ...], local: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    known = set(cluster)
    return (*cluster, *(ep for ep in local if ep not in known))
