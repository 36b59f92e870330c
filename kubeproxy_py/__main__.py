"""``python -m kubeproxy_py``."""

from kubeproxy_py.cli import main

main()
