"""A kube-proxy replacement for Linux nodes, in iptables mode."""

import sys

__version__ = "0.1.0"

# structlog loads rich, where it is installed, to draw tracebacks, which we log as text: 3 MiB and 50 ms
# of every process. None is what the import system takes for "not to be had" (``sys.modules`` in Python's
# reference); ``top_screen``, which draws with rich, lets it in again.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
