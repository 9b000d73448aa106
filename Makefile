# Everything a working copy needs, from a bare machine with make, git and Python >= 3.11 (with venv) on x86-64 Linux.
# `make` alone lists the targets.

PYTHON ?= python3
# Where model weights are kept. Point several clones at one folder to download only once.
MODEL_CACHE ?= .cache/models
# ONCE=1: `make demo` ends by itself and prints a JSON object last.
ONCE ?=
# Versions of vLLM for `make test-matrix`; empty: all.
VERSIONS ?=
# More arguments for pytest, such as ARGS="tests/demo -k group".
ARGS ?=

BIN := .venv/bin
# Program:package of Debian that brings it.
TOOLS := chromium:chromium prometheus:prometheus promtool:prometheus amtool:prometheus-alertmanager \
	prometheus-alertmanager:prometheus-alertmanager node:nodejs npm:npm kubectl:kubernetes-client
INSTALLED := .venv/.installed
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
MODEL := $(MODEL_CACHE)/smollm2
# `buf lint` sees the contract alone; these three plug-ins write the committed code.
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos \
	--python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) --grpc_python_out=$(1) \
	protos/stream_monitor/v1alpha1/*.proto

export MODEL_CACHE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install tools weights test test-long test-matrix lint format protos protos-check protos-baseline docs manifests demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the engine for CPUs and every tool (3 min)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) must be Python 3.11 or newer; name another one with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# The engine pins a CPU build of torch that only some package sources hold: PyTorch's own index is the second try.
	$(BIN)/python -m pip install -e '.[cpu,dev]' \
		|| $(BIN)/python -m pip install -e '.[cpu,dev]' --extra-index-url $(TORCH_CPU_INDEX)
	@# Built for CUDA, these three break the import of transformers beside a CPU torch; text models need none of them.
	$(BIN)/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@

tools: ## the programs that tests run beside Python: a browser, a Prometheus, Node.js (Debian packages; needs root)
	@missing=$$(for each in $(TOOLS); do command -v "$${each%%:*}" > /dev/null || echo "$${each##*:}"; done | sort -u); \
	test -z "$$missing" && exit 0; \
	command -v apt-get > /dev/null && test "$$(id -u)" = 0 \
		|| { echo "make: the tests need these Debian packages: "$$missing >&2; exit 1; }; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing > /dev/null

weights: $(INSTALLED) ## fetch SmolLM2-135M-Instruct into MODEL_CACHE, .cache/models unless told otherwise (93 MB)
	@$(BIN)/python -m stream_monitor.demo.weights $(MODEL)

test: install tools weights ## set everything up, then run the suite
	$(BIN)/python -m pytest -m "not long" $(ARGS)

test-long: install tools weights ## the tests that take minutes
	$(BIN)/python -m pytest -m long $(ARGS)

test-matrix: install weights ## the engine tests against every CPU build of vLLM from 0.28 on (VERSIONS="0.28.0 ..."; 15 min each)
	$(BIN)/python -m tests.matrix $(VERSIONS)

lint: $(INSTALLED) ## ruff, mypy, buf
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy stream_monitor kernels/stream_kernels benchmarks
	$(BIN)/buf lint

format: $(INSTALLED) ## format the code, mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(INSTALLED) ## write stream_monitor/v1alpha1 anew from protos/
	$(call PROTOC,.)

protos-check: $(INSTALLED) ## fail if protos/ breaks what is deployed, or the committed generated code is not what it gives
	@$(BIN)/buf breaking --against protos/baseline.binpb
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(call PROTOC,"$$folder") \
		&& diff -r -x __pycache__ -x __init__.py "$$folder/stream_monitor/v1alpha1" stream_monitor/v1alpha1 \
		|| { echo "make: generated code and protos/ differ; run make protos" >&2; exit 1; }

protos-baseline: $(INSTALLED) ## at a release: what protos/ holds now may not be broken any more
	$(BIN)/buf build --exclude-source-info -o protos/baseline.binpb

docs: $(INSTALLED) ## write the pages and the dashboards anew that are made from code and protos
	$(BIN)/python docs/configuration.py > docs/configuration.md
	$(BIN)/python docs/metrics.py > docs/metrics.md
	$(BIN)/python deploy/grafana/dashboard.py > deploy/grafana/stream-monitor.json
	$(BIN)/python deploy/grafana/fleet_dashboard.py > deploy/grafana/fleet/stream-monitor-fleet.json
	$(BIN)/python docs/wire.py > docs/wire.md

manifests: $(INSTALLED) ## write deploy/kubernetes/base/prometheusrule.yaml anew from deploy/prometheus
	$(BIN)/python deploy/kubernetes/prometheus_rule.py > deploy/kubernetes/base/prometheusrule.yaml

demo: install weights ## a real engine, a monitor and live reasoning on one screen (ONCE=1: ends by itself)
	@$(BIN)/python -m stream_monitor.demo --model $(MODEL) $(if $(ONCE),--once)

clean: ## delete build output and tool caches; .venv and weights stay
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
