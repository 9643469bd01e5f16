# SPDX-License-Identifier: Apache-2.0
# make quickstart: demo data, both training stages on the CPU, pictures and metrics (under 10 minutes on 2 cores)
# make test:       linters, types and tests
# make docs:       the documentation as a site, in build/site
#
# On Linux PyPI's torch brings several GB of CUDA libraries. A machine without GPU can do without them:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
SHELL := /bin/sh
BIN := .venv/bin
# The scripts of .venv (accelerate's, ffmpeg, ninja) are found by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
RUN := outputs/quickstart

.PHONY: quickstart test docs
.DELETE_ON_ERROR:

# Threads that spin for a while before they sleep: a third faster where nobody else needs the cores.
quickstart: export GOMP_SPINCOUNT ?= 20000
quickstart: .venv/quickstart.stamp data/demo-shards/manifest.json
	$(BIN)/igae train --config quickstart.yaml
	@test -d $(RUN)/orbits || { echo "stopped before its end: make quickstart goes on"; exit 1; }
	@echo
	@echo "Done. Look at:"
	@echo "  $(RUN)/report.html     all of the following in one page"
	@echo "  $(RUN)/pictures/       truth, autoencoder, decoded render, latents, depth"
	@echo "  $(RUN)/orbits/         a video around each object"
	@echo "  $(RUN)/metrics.json    metrics at the end"
	@echo "  $(RUN)/metrics.jsonl   metrics during training"

# Hundreds of processes begin in the tests: none has to compile igae, or tests, again.
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy igae
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

docs: .venv/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

data/demo/demo.json: | .venv/quickstart.stamp
	$(BIN)/python data_tools/make_demo.py --output data/demo

data/demo-shards/manifest.json: data/demo/demo.json | .venv/quickstart.stamp
	rm -rf $(@D)
	$(BIN)/python data_tools/pack_shards.py --scenes data/demo/train/objaverse --subset square64 \
		--images data/demo/train/imagenet/square64 --output $(@D)
	@touch $@

.venv/quickstart.stamp: .venv/made.stamp setup.py setup.cfg constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,tracking]'
	@touch $@

.venv/dev.stamp: .venv/made.stamp setup.py setup.cfg constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); use: make PYTHON=/path/to/python3 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { \
		rm -rf .venv; echo "error: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@
