"""
Which Services must not wait for the others when thousands have changed.

Pure. What everything else in a cluster needs to get up, and what sends connections to an endpoint
that is no more. Only the order in which rules are written depends on it, never what they are.
"""

from typing import Final

from kubeproxy_py import topology
from kubeproxy_py.model import ServiceName, ServiceState

_API: Final = ServiceName("default", "kubernetes")
# What installers call a cluster's DNS, whatever namespace they put it in.
_DNS_NAMES: Final = frozenset({"kube-dns", "coredns"})
_SYSTEM: Final = "kube-system"
_DNS_PORT: Final = 53


def is_essential(name: ServiceName, state: ServiceState | None) -> bool:
    """Tell whether this is the API server or a cluster's DNS."""
    if name == _API or name.name in _DNS_NAMES:
        return True
    if name.namespace != _SYSTEM or state is None:
        return False
    return any(port.port == _DNS_PORT for port in state.ports.values())


def loses_endpoints(before: ServiceState | None, after: ServiceState | None) -> bool:
    """Tell whether new connections may still go to an endpoint that *after* does not have.

    A Service that is deleted loses nothing: its endpoints may well live on, and nobody is told to
    use another one instead.
    """
    if before is None or after is None:
        return False
    for key, endpoints in before.endpoints.items():
        left = {endpoint.address for endpoint in topology.usable(after.endpoints.get(key, ()))}
        if any(endpoint.address not in left for endpoint in topology.usable(endpoints)):
            return True
    return False
