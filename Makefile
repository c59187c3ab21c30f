# Every target sets up the environment it needs. Override anything: make teacher-cache RECIPE=my.yaml ARGS="loss.temperature=4"
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/embedded.yaml
WORKERS ?= 2
SWEEP ?= recipes/sweeps/embedded.yaml
REINFORCE ?= recipes/reinforce/embedded.yaml
CHAIN ?= recipes/chains/embedded.yaml
ARGS ?=
CACHE ?= runs/embedded/cache
RUN ?= runs/embedded/student
# Of train-student alone: FLAGS=--overwrite starts over.
FLAGS ?= --resume
KDCACHE = $(VENV)/bin/kdcache
READY = $(VENV)/.ready

.PHONY: help setup embedded teacher-cache train-student sweep chain reinforce evaluate bench-inference export report paper-mini pipelines student-shapes export-cache import-cache inspect fidelity verify repair subset merge push pull test soak gpu lint check constraints clean

help:  ## Show this list
	@echo 'RECIPE=$(RECIPE) ARGS="key.path=value …" FLAGS="$(FLAGS)" CACHE=$(CACHE) RUN=$(RUN)'
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | sort | column -t -s "$$(printf '\t')"

setup: $(READY)  ## Make the virtual environment

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kdcache needs Python 3.11 or newer; give one with PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

embedded: $(READY)  ## Make the built-in data and models of RECIPE
	@$(KDCACHE) embedded $(RECIPE) $(ARGS)

teacher-cache: $(READY)  ## Run the teacher of RECIPE once and write its cache
	@$(KDCACHE) teacher-cache $(RECIPE) $(ARGS)

# Only where the cache is not complete yet: a cache that came from elsewhere needs no teacher here.
train-student: $(READY)  ## Train the student of RECIPE from its cache (made first if incomplete)
	@$(KDCACHE) teacher-cache $(RECIPE) $(ARGS) --if-incomplete
	@$(KDCACHE) train-student $(RECIPE) $(ARGS) $(FLAGS)

sweep: $(READY)  ## Many students from one cache: SWEEP=recipes/sweeps/embedded.yaml
	@$(KDCACHE) sweep $(SWEEP) $(ARGS)

chain: $(READY)  ## Students that teach the next one: CHAIN=recipes/chains/embedded.yaml
	@$(KDCACHE) chain $(CHAIN) $(ARGS)

reinforce: $(READY)  ## Go on from a distilled student with GRPO: RUN=… REINFORCE=recipes/reinforce/embedded.yaml
	@$(KDCACHE) reinforce $(RUN) $(REINFORCE) $(ARGS)

student-shapes: $(READY)  ## Depth and width at a size: RECIPE=… ARGS="--parameters 50M"
	@$(KDCACHE) student-shapes $(RECIPE) $(ARGS)

evaluate: $(READY)  ## Judge finished runs: RUN=… ARGS="--generate 50 --samples 3 --tasks …"
	@$(KDCACHE) evaluate $(RUN) $(ARGS)

bench-inference: $(READY)  ## Speed, memory and size of the students of RUN=…
	@$(KDCACHE) bench-inference $(RUN) $(ARGS)

export: $(READY)  ## A finished student in other forms: RUN=… DEST=… ARGS="--to merged,gguf-q8_0"
	@$(KDCACHE) export $(RUN) $(DEST) $(ARGS)

report: $(READY)  ## Tables, plots and one page of RUN=… (runs or sweeps)
	@$(KDCACHE) report $(RUN) $(ARGS)

paper-mini: $(READY)  ## The reference paper's tables and figures in miniature (most of an hour): ARGS="--data … --teacher … --student …"
	$(VENV)/bin/python benchmarks/paper_mini.py $(ARGS)

pipelines: $(READY)  ## Every published pipeline in miniature (more than an hour): ARGS="--only pruned chain"
	$(VENV)/bin/python benchmarks/pipelines.py $(ARGS)

inspect: $(READY)  ## Facts about a cache: CACHE=…
	@$(KDCACHE) inspect $(CACHE) $(ARGS)

fidelity: $(READY)  ## How faithful per byte the cache of RECIPE is, or would be
	@$(KDCACHE) fidelity $(RECIPE) $(ARGS)

verify: $(READY)  ## Check every byte of a cache: CACHE=…
	@$(KDCACHE) verify $(CACHE) $(ARGS)

repair: $(READY)  ## Mend a cache: CACHE=… ARGS="--from COPY" or ARGS="--recipe RECIPE"
	@$(KDCACHE) repair $(CACHE) $(ARGS)

subset: $(READY)  ## Part of a cache: CACHE=… DEST=… ARGS="--split train --sequences 0:1000"
	@$(KDCACHE) subset $(CACHE) $(DEST) $(ARGS)

merge: $(READY)  ## Several caches as one: CACHE="ONE TWO" DEST=…
	@$(KDCACHE) merge $(CACHE) $(DEST) $(ARGS)

export-cache: $(READY)  ## A cache as others read it: CACHE=… DEST=… ARGS="--to axolotl"
	@$(KDCACHE) export-cache $(CACHE) $(DEST) $(ARGS)

import-cache: $(READY)  ## A cache that others made: SRC=… DEST=… ARGS="--from axolotl --tokenizer …"
	@$(KDCACHE) import-cache $(SRC) $(DEST) $(ARGS)

push: $(READY)  ## Send a cache: CACHE=… DEST=s3://…, hf://datasets/…, a directory
	@$(KDCACHE) push $(CACHE) $(DEST) $(ARGS)

pull: $(READY)  ## Bring a cache: SRC=s3://…, hf://datasets/…, https://… DEST=…
	@$(KDCACHE) pull $(SRC) $(DEST) $(ARGS)

# Two at a time, file by file; TESTS=… names some of them, WORKERS=0 runs them one after the other.
test: $(READY)  ## Run the tests
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

lint: $(READY)  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

soak: $(READY)  ## The long robustness run: a thousand kills, a million damaged files (a quarter of an hour)
	$(VENV)/bin/python benchmarks/robustness.py --soak

# On a machine without a network: PYTHON_ENV is any interpreter that has the packages of pyproject.toml, with pytest and
# pytest-timeout; nothing is set up or installed then, and kdcache is this checkout. What is deprecated there is no failure.
# ARGS are the benchmark's: ARGS="--only steps --output gpu.md".
gpu: $(if $(PYTHON_ENV),,$(READY))  ## GPU tests and benchmark; offline: PYTHON_ENV=python3
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(PYTHON_ENV),$(VENV)/bin/python) -m pytest -m gpu -W default tests/gpu
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(PYTHON_ENV),$(VENV)/bin/python) benchmarks/gpu.py $(ARGS)

check: lint test  ## Everything that must be clean before a change is merged

# Not triton: which release fits is for torch to say, and differs between its builds.
constraints: $(READY)  ## Write what is installed now into constraints.txt
	$(VENV)/bin/pip freeze --exclude-editable --disable-pip-version-check | grep -v '^triton' | sed -E 's/\+cpu$$//' > constraints.txt

clean:  ## Remove the environment and the embedded runs
	rm -rf $(VENV) runs/embedded .pytest_cache .mypy_cache .ruff_cache
