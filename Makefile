# `make help` lists what there is. Each target is safe to repeat.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The newest Python of those that setup.cfg allows, on the path or among pyenv's.
FIND_PYTHON = $(shell for v in $(1); do for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v*/bin/python$$v; do \
  "$$p" -c 'import ensurepip' 2> /dev/null && { command -v "$$p"; exit; }; done; done)
PYTHON ?= $(call FIND_PYTHON,3.13 3.12 3.11)
BIN := .venv/bin
SYNC_OUTPUT := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
SYNC := $(BIN)/uv sync --locked --quiet --extra cpu --extra datasets --extra images --extra plots --extra mlflow --extra onnx
# JVMs of single commands and tests: no optimizing compiler, and classes from an archive.
JVM := -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xlog:disable
DATA ?= digits
DEMO := $(BIN)/python -m spark_mnist
DEMO_STORE := demo-output/models
ON_TWO_RANKS := $(patsubst %,tests/test_%.py,requirements petastorm worker_checks feature_columns shard_writer batches fit score tables tasks callbacks custom ml s3 upgrade cluster)
DEMO_EPOCHS := $(if $(filter mnist,$(DATA)),5,20)

# Spark's machine-local parts need an address; laptops and containers often have no usable host name.
export SPARK_LOCAL_IP ?= 127.0.0.1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo accuracy bench bench-scale bench-peers bench-torch notebooks pack docs test test-driver test-unit test-session test-ranks test-all coverage test-oldest test-spark faults hosts test-gpu soak lint check-tools clean

help: ## Show this list
	@awk '/^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {split($$0, part, ":.*## "); printf "  make %-20s %s\n", part[1], part[2]}' $(MAKEFILE_LIST)

##@ Use it

setup: check-tools .venv/.synced ## Make .venv and install all that is locked

.venv/.synced: uv.lock setup.cfg pyproject.toml
	@test -x $(BIN)/uv || { "$(PYTHON)" -m venv .venv && $(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.8; }
	@echo "Installing into .venv; the first time Horovod is compiled, some minutes"
	@$(SYNC)
	@touch $@

.venv/spark-classes.jsa: .venv/.synced
	@SPARK_SUBMIT_OPTS="$(JVM) -XX:ArchiveClassesAtExit=$(CURDIR)/$@" \
	  $(BIN)/python -m tests.programs.class_archive > /dev/null 2>&1 || echo "Without an archive of Spark's classes JVMs start slower"

check-tools:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with its venv module is missing: install python3.11 and python3.11-venv"; exit 1; }
	@command -v g++ > /dev/null || { echo "A C++ compiler is missing: install g++ (Debian: build-essential)"; exit 1; }
	@version=$$(java -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' || true); \
	  test "$${version:-0}" -ge 17 || { echo "Java 17 or newer is missing (found: $${version:-none}): install openjdk-17-jre-headless"; exit 1; }

demo: export SPARK_SUBMIT_OPTS ?= $(JVM) -XX:SharedArchiveFile=$(CURDIR)/.venv/spark-classes.jsa
demo: setup .venv/spark-classes.jsa ## Train, continue, predict, evaluate, draw, on real digits (DATA=mnist for MNIST)
	@rm -rf demo-output
	$(DEMO) fit test_model batch_size=32 epochs=$(DEMO_EPOCHS) --input $(DATA):train --store $(DEMO_STORE)
	$(DEMO) fit test_model batch_size=32 epochs=2 continuous=true --input $(DATA):train --store $(DEMO_STORE)
	$(DEMO) predict test_model batch_size=128 interpret=true --input $(DATA):test --store $(DEMO_STORE)
	$(DEMO) eval test_model repeat=2 batch_size=128 rate=0.8 --input $(DATA):test --store $(DEMO_STORE)
	$(BIN)/python examples/pictures.py test_model $(DEMO_STORE) $(DATA) demo-output

##@ Measure it

accuracy: setup ## Train every network on MNIST, with one rank and with two (half an hour)
	$(BIN)/python benchmarks/accuracy.py

bench: setup ## Compare with the other ways to train and predict (NAMES=torch-mlp, ARGS=--json, MNIST_DIR=)
	$(BIN)/python -m benchmarks $(ARGS) $(NAMES)

bench-scale: setup ## Stream six million rows through two ranks, and plan a terabyte (MILLIONS=6, MNIST_DIR=)
	$(BIN)/python -m benchmarks.large $(MILLIONS)

bench-peers: .venv-peers/.synced ## Build the environment of the ways that need older packages

.venv-peers/.synced: benchmarks/peers.txt
	"$(call FIND_PYTHON,3.11)" -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	PATH="$(CURDIR)/.venv-peers/bin:$$PATH" HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
	  HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_GLOO=1 .venv-peers/bin/pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps horovod==0.28.1
	@touch $@

bench-torch: .venv-torch/.synced ## Build the environment of PySpark's TorchDistributor

.venv-torch/.synced: benchmarks/torch_peer.txt
	"$(PYTHON)" -m venv .venv-torch
	.venv-torch/bin/pip install --quiet --disable-pip-version-check -r benchmarks/torch_peer.txt
	@touch $@

##@ Show and ship it

notebooks: setup ## Run the notebooks and keep what they show (NAMES=01_quickstart)
	$(BIN)/python notebooks/render.py $(NAMES)

docs: setup ## Build the documentation site into build/site; a broken link is an error
	PYTHONPATH=. $(BIN)/python docs/tables.py --check
	$(BIN)/mkdocs build --quiet -f .mkdocs.yml

pack: setup ## Pack environment and code for the executors into dist/, for spark-submit
	@rm -rf build/environment dist && mkdir -p build dist
	@"$(PYTHON)" -m venv --without-pip build/environment
	UV_PROJECT_ENVIRONMENT=build/environment $(SYNC) --no-dev --no-install-project --link-mode copy
	$(BIN)/venv-pack --quiet --prefix build/environment --output dist/environment.tar.gz
	$(BIN)/uv build --quiet --wheel --out-dir build/wheel
	@mv build/wheel/spark_mnist-*.whl dist/spark_mnist.zip && rm -rf build/environment build/wheel
	@ls -lh dist

##@ Test it

test: setup .venv/spark-classes.jsa ## Run all tests but the slow ones, those with ranks beside the others
ifdef ARGS
	$(BIN)/pytest $(ARGS)
else
	$(MAKE) --no-print-directory --jobs=2 $(SYNC_OUTPUT) test-driver test-ranks
endif

test-driver: setup .venv/spark-classes.jsa ## Of these, those without ranks
	$(BIN)/pytest -m "not ranks" $(ARGS)

test-unit: setup ## Of these, those that need no JVM (a minute)
	$(BIN)/pytest -m unit $(ARGS)

test-session: setup .venv/spark-classes.jsa ## Those on one Spark session, which train in this process
	$(BIN)/pytest -m spark $(ARGS)

test-ranks: setup .venv/spark-classes.jsa ## Those with ranks, clusters and programs of their own
	$(BIN)/pytest -m ranks $(ARGS)

test-all: setup .venv/spark-classes.jsa ## Run all tests, the slow ones and make faults too (two hours)
	$(BIN)/pytest --all

coverage: setup .venv/spark-classes.jsa ## Count the lines that the tests run, on ranks and executors too (ARGS=tests/test_fit.py)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under 90

test-oldest: .venv-oldest/.synced ## Train on two ranks and score with the oldest packages that setup.cfg allows
	PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" .venv-oldest/bin/python -m pytest $(ON_TWO_RANKS) $(ARGS)

.venv-oldest/.synced: setup.cfg pyproject.toml tests/environment.py
	$(MAKE) --no-print-directory setup
	"$(call FIND_PYTHON,3.11)" tests/environment.py .venv-oldest --oldest
	@touch $@

test-spark: .venv-spark-$(VERSION)/.synced ## The same with the newest packages beside one PySpark (VERSION=4.1)
	PATH="$(CURDIR)/.venv-spark-$(VERSION)/bin:$$PATH" .venv-spark-$(VERSION)/bin/python -m pytest $(ON_TWO_RANKS) $(ARGS)

.venv-spark-%/.synced: setup.cfg pyproject.toml tests/environment.py
	@test -n "$*" || { echo "VERSION is missing: make test-spark VERSION=4.1"; exit 1; }
	$(MAKE) --no-print-directory setup
	"$(PYTHON)" tests/environment.py .venv-spark-$* --with "pyspark==$*.*"
	@touch $@

faults: setup ## Break fits in every way that the tests know, and count (an hour)
	$(BIN)/pytest tests/faults --all $(ARGS)

hosts: setup ## Fit on three hosts made of network namespaces, and cut one off (needs root)
	@$(BIN)/python -c "import sys; from tests.cluster import hosts; sys.exit(hosts.missing())"
	$(BIN)/pytest tests/cluster --all -s $(ARGS)

test-gpu: .venv-gpu/.synced ## Train and score on the GPUs of this machine, with one rank and with two
	PATH="$(CURDIR)/.venv-gpu/bin:$$PATH" .venv-gpu/bin/python -m tests.on_gpus $(ARGS)

.venv-gpu/.synced: setup.cfg
	$(MAKE) --no-print-directory check-tools
	"$(PYTHON)" -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --disable-pip-version-check "setuptools<70" wheel packaging "cmake<4" "tensorflow[and-cuda]>=2.16.2,<2.22"
	PATH="$(CURDIR)/.venv-gpu/bin:$$PATH" HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
	  HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
	  CXXFLAGS="'-DTENSORFLOW_VERSION=(__LINE__<30?0:2016002000)' '-Dgloo_iface_=gloo_iface_=std::string(std::getenv(HOROVOD_GLOO_IFACE)?:GLOO_DEFAULT_IFACE)' -DInitializeForProcessSet=InitializeProcessSetAtIface" \
	  .venv-gpu/bin/pip install --quiet --disable-pip-version-check --no-build-isolation ".[gpu,datasets]" pytest
	@touch $@

soak: setup ## Fit, predict and evaluate fifty times in one session, and see what grows
	$(BIN)/pytest tests/test_soak.py --all -s

##@ Keep it

lint: setup ## ruff, codespell and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

clean: ## Remove what the other targets made
	rm -rf .venv .venv-oldest .venv-peers .venv-torch .venv-gpu .venv-spark-* demo-output models build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
