# `make` prints the targets. CI calls only these, so home and CI never differ.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# What the daemon, the demo and the tests run (nfacct: only tests); python-iptables is compiled here, and
# so is what shifts a test's wall clock.
APT := python3-venv python3-dev gcc libc6-dev iptables iproute2 nftables conntrack nfacct openssl ca-certificates
# What clients in the tests of e2e/ ask with; on a cluster, their image has both.
APT += curl netcat-openbsd
PYTEST := $(SUDO) $(BIN)/python -m pytest
TYPED := kubeproxy_py tests/support benchmarks deploy/demo/demo.py tests/packet/conftest.py
TYPED += $(filter-out e2e/test_%,$(wildcard e2e/*.py))

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: install ## a node in a namespace: rules programmed from files, real traffic, shares shown
	$(SUDO) $(BIN)/python -m deploy.demo.demo $(DEMO)

# Tests of the monitoring files run it. From the package of Debian and Ubuntu, but not installed: that
# would start a server on this machine.
build/promtool:
	@mkdir -p build/prometheus
	@cd build/prometheus && { apt-get download -qq prometheus || { $(SUDO) apt-get update -qq && apt-get download -qq prometheus; }; }
	@cd build/prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xf - --strip-components=3 -C .. ./usr/bin/promtool
	@rm -r build/prometheus && touch $@

.PHONY: test
test: check build/promtool ## everything: lint, types, import contracts, unit and packet tests
	$(PYTEST) $(TESTS)

.PHONY: test-unit
test-unit: install ## unit tests only: no root, no network but loopback
	$(BIN)/python -m pytest tests/unit

.PHONY: test-packet
test-packet: install ## packet tests only: real kernel, own namespaces
	$(PYTEST) tests/packet

.PHONY: soak
soak: install ## the long forms of tests, which take minutes each: faults that last, traffic all the time
	$(PYTEST) -m soak $(TESTS)

FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: install ## hostile input, as hypothesis and atheris think of it: FUZZ_SECONDS for each parser; not in CI
	mkdir -p build
	$(BIN)/pip install --quiet atheris==3.0.0
	$(BIN)/python -m pytest --hypothesis-profile=fuzz --timeout 3600 tests/unit/test_hostile.py tests/unit/test_snapshot.py
	for parser in snapshot save config manifest event; do \
	  $(BIN)/python -m tests.fuzz $$parser -max_total_time=$(FUZZ_SECONDS) -timeout=20 -artifact_prefix=build/; \
	done

.PHONY: e2e
e2e: install ## tests on a cluster of kind made for them (E2E="--family dual"), or on another (E2E="--kubeconfig FILE")
	$(BIN)/python -m e2e $(E2E)

.PHONY: coverage
coverage: install ## branch coverage of the pure modules, which must be complete
	$(BIN)/python -m pytest tests/unit -q --cov --cov-report=term-missing:skip-covered

BENCH := $(if $(SIZES),--sizes $(SIZES)) $(if $(BACKENDS),--backends $(BACKENDS)) $(if $(LAYOUTS),--layouts $(LAYOUTS))
BENCH += $(if $(ONLY),--only $(ONLY)) $(if $(DOCS),--docs $(DOCS))

.PHONY: bench
bench: install ## measure all sizes, both backends and layouts (SIZES=100,1000 ONLY=sync,change; DOCS=docs renews tables)
	$(SUDO) $(BIN)/python -m benchmarks --json build/bench.json $(BENCH)

# What the image is called and made of. BASE: another base image; PLATFORM: for another machine, as linux/arm64;
# IMAGE_FLAGS: more for the build, as --network=host. PIP_INDEX_URL and the like are passed on if they are set.
DOCKER ?= docker
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION = $(shell git describe --always --dirty 2>/dev/null || echo unknown)
IMAGE ?= kubeproxy-py:$(VERSION)
PIP_SETTINGS := PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST

.PHONY: image
image: ## the container image (IMAGE, BASE, PLATFORM, DOCKER=docker|podman, IMAGE_FLAGS=--network=host)
	$(DOCKER) build $(if $(PLATFORM),--platform $(PLATFORM)) $(if $(BASE),--build-arg BASE=$(BASE)) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
	  $(foreach name,$(PIP_SETTINGS),$(if $($(name)),--build-arg $(name))) $(IMAGE_FLAGS) --tag $(IMAGE) .

.PHONY: image-base
image-base: ## a base image by debootstrap, where none can be pulled (BASE=name; SUITE, MIRROR, CA)
	$(SUDO) env DOCKER="$(DOCKER)" deploy/image/make-base $(or $(BASE),kubeproxy-py-base)

.PHONY: image-test
image-test: install ## build the image and run it for real: needs docker and root, never uses the host's network
	@$(DOCKER) info >/dev/null 2>&1 || { echo "cannot test the image: no answer from '$(DOCKER)' (is its daemon running?)" >&2; exit 2; }
	$(MAKE) image
	$(SUDO) env IMAGE="$(IMAGE)" DOCKER="$(DOCKER)" $(BIN)/python -m pytest tests/image

# Where `make install-systemd` puts it: PREFIX (/usr/local); DESTDIR for packagers.
.PHONY: install-systemd
install-systemd: ## install or upgrade as a systemd service (PREFIX, DESTDIR, PYTHON); flags: /etc/default/kubeproxy-py
	$(SUDO) env PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" PYTHON="$(PYTHON)" deploy/systemd/install

.PHONY: uninstall-systemd
uninstall-systemd: ## remove it; rules stay (kubeproxy-py cleanup removes them), and so does /etc/default/kubeproxy-py
	$(SUDO) env PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" deploy/systemd/install --remove

# Pinned, so that whoever runs it gets the same file. 0.13.9 is what the files were made with.
UV := uv==0.13.9
LOCK := --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock"

.PHONY: lock
lock: ## renew deploy/requirements*.txt, the exact dependencies of image and service (LOCK_FLAGS=--upgrade)
	mkdir -p build
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/pip install --quiet '$(UV)'
	build/lock/bin/uv pip compile $(LOCK) $(LOCK_FLAGS) pyproject.toml --output-file deploy/requirements.txt
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  | build/lock/bin/uv pip compile $(LOCK) $(LOCK_FLAGS) - --output-file deploy/requirements-build.txt
	rm -rf build/lock

.PHONY: check
check: install ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports

.PHONY: fmt
fmt: install ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: install
install: $(VENV)/.installed ## system packages and the virtual environment

$(VENV)/.installed: pyproject.toml
	@if ! dpkg -s $(APT) >/dev/null 2>&1; then \
	  $(SUDO) apt-get update -qq; \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(APT) >/dev/null; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit("cannot go on: Python 3.11 or newer is needed (set PYTHON=)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --editable . --group dev
	@touch $@

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
