# The image of kubeproxy-py. `make image` builds it; docs/install.md says how to run it.
#
# Written for every builder there is (docker with and without BuildKit, podman, buildah): no mounts, no heredocs.
# Any Debian or Ubuntu with Python 3.11 or newer can be the base, by digest too: --build-arg BASE=debian@sha256:...
ARG BASE=debian:bookworm-slim

# --- everything is installed here: compiler, headers, pip and index settings stay behind in this stage
FROM ${BASE} AS build

# Where packages come from, if not from PyPI. pip reads these variables itself.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST

# python-iptables is compiled; it alone needs gcc and headers.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates gcc libc6-dev python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# The system's certificate authorities, so that a base image may bring its own.
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt

COPY LICENSE README.md pyproject.toml /src/
COPY deploy/make-venv deploy/requirements.txt deploy/requirements-build.txt /src/deploy/
COPY kubeproxy_py /src/kubeproxy_py
RUN /src/deploy/make-venv /opt/kubeproxy-py

# --- what runs
FROM ${BASE}

# iptables: both backends and libxtables. nftables: removes the tables of kube-proxy's nftables mode. kmod: with it
# iptables-legacy loads its modules, in a container that may. Connection tracking and counters need no programs.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends iptables kmod nftables python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

COPY --from=build /opt/kubeproxy-py /opt/kubeproxy-py
RUN ln -s /opt/kubeproxy-py/bin/kubeproxy-py /usr/local/bin/kubeproxy-py

# Root, as iptables wants it (the xtables lock belongs to root); two capabilities are enough: NET_ADMIN and NET_RAW.
ENTRYPOINT ["/usr/local/bin/kubeproxy-py"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kubeproxy-py" \
      org.opencontainers.image.description="A kube-proxy replacement (iptables mode) that diffs, explains and repairs its rules" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
