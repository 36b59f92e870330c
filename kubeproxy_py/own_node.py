"""
This node's own Node object: waited for at the start, and held against what it was then.

It reads the store and never the API server. The invariant it guards: rules that depend on what the
Node was at the start are not kept by a process whose Node is another.
"""

from collections.abc import Callable
from typing import Final

import structlog

from kubeproxy_py import host
from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.health import ProxyHealth
from kubeproxy_py.lifecycle import Lifecycle
from kubeproxy_py.model import Node
from kubeproxy_py.store import Store

log = structlog.get_logger()

# kube-proxy's own limits for what may still come from a Node that is being set up.
_IPS_WAIT_S: Final = 30.0
_POD_CIDRS_WAIT_S: Final = 300.0
# How soon to look whether the Node is there: a local API server answers within milliseconds.
_FIRST_LOOK_S: Final = 0.05
_LONGEST_LOOK_S: Final = 1.0


class OwnNode:
    """What this process knows of its Node."""

    def __init__(
        self,
        name: str,
        *,
        is_in_files: bool,
        needs_pod_cidrs: bool,
        life: Lifecycle,
        health: ProxyHealth,
    ) -> None:
        """
        Know nothing yet.

        Args:
            name: of the Node.
            is_in_files: there is no API server; what the files do not say, nobody will.
            needs_pod_cidrs: rules depend on the Node's pod CIDRs (detectLocalMode: NodeCIDR).
            life: waited with, and ended if the process has to start again.
            health: is told whether the Node may get traffic.
        """
        self._name = name
        self._is_in_files = is_in_files
        self._needs_pod_cidrs = needs_pod_cidrs
        self._life = life
        self._health = health
        #: As it was when the wait for it ended; None: it has not come to that yet.
        self.at_start: Node | None = None

    def wait(self, store: Store) -> Node | None:
        """Wait for the Node, from the API or the state file, then for what it may lack.

        Returns a Node without addresses if there is none, and None if it is time to stop.

        Raises:
            KubeProxyError: the pod CIDRs are needed, and did not come in time.
        """
        pause_s = _FIRST_LOOK_S
        while not store.has_listed("Node") and store.restored_at is None:
            if self._life.rest(pause_s):
                return None
            pause_s = min(1.2 * pause_s, _LONGEST_LOOK_S)
        if self._is_in_files and store.node is None:
            # Nobody registers Nodes where there is no API server; a file may, but need not.
            log.info("node.absent", message="no Node object in the manifests; going on without one")
            self._health.set_node(eligible=True)
        else:
            self._wait_for_what_it_lacks(store)
        if self._life.stop.is_set():
            return None
        self.at_start = store.node or Node(name=self._name)
        return self.at_start

    def _wait_for_what_it_lacks(self, store: Store) -> None:
        if self._still_lacks(store, lambda node: bool(node.ips), _IPS_WAIT_S):
            what = "to exist" if store.node is None else "to be assigned IPs"
            log.error("node.wait_ended", message=f"Timed out waiting for node {what}")
        if self._needs_pod_cidrs and self._still_lacks(
            store, lambda node: bool(node.pod_cidrs), _POD_CIDRS_WAIT_S
        ):
            name = f'"{self._name}"'
            raise KubeProxyError(
                f"timeout waiting for node {name} to exist"
                if store.node is None
                else f"timeout waiting for PodCIDR allocation on node {name}"
            )

    def _still_lacks(self, store: Store, has_it: Callable[[Node], bool], limit_s: float) -> bool:
        """Wait until the Node *has_it*, for *limit_s*; return False if it has, or it is time to stop."""
        is_there = host.wait_until(
            lambda: (node := store.node) is not None and has_it(node),
            self._life.rest,
            0.0 if self._is_in_files else limit_s,
        )
        return not is_there and not self._life.stop.is_set()

    def changed(self, node: Node) -> None:
        """Take note of what the Node is now. From any thread."""
        self._health.set_node(eligible=node.is_eligible)
        before = self.at_start
        if before is None:
            return
        if node.ips != before.ips:
            log.info(
                "node.ips_changed",
                message="the IPs of the start are still used, until a restart",
                ips=node.ips,
                started_with=before.ips,
            )
        if self._needs_pod_cidrs and node.pod_cidrs != before.pod_cidrs:
            self._life.fail(
                f"PodCIDRs changed for the node: {', '.join(node.pod_cidrs)} instead of "
                f"{', '.join(before.pod_cidrs)}"
            )
