"""A kube-proxy replacement for Linux nodes, in iptables mode."""

__version__ = "0.1.0"
