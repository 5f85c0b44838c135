# Everything a person runs here. Each target starts from a bare clone: it installs first where that is missing.
#
#   make install   .venv with everything (Python 3.11 or newer; PYTHON=... chooses one)
#   make demo      enhance the tiny CLIP, train a tiny LLaVA without and with it, report: no download, minutes on a CPU
#   make test      the tests; make check: format, lint, types
#   make help      the rest

SHELL := bash
.DEFAULT_GOAL := help
VENV := .venv
COMPAT := .venv-compat
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := train,eval,dev
ARGS ?=
CODE := llava_genhancer tests benchmarks tools setup.py
# The environment's tools first on PATH: DeepSpeed looks for ninja there.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install demo test test-slow test-compat check format bench bench-llava chaos fuzz fuzz-guided lock clean

help:
	@sed -n 's/^##  *//p' $(MAKEFILE_LIST)

##  make install      .venv with everything
install: $(STAMP)
	@echo "$(VENV) is ready; next: make demo"

$(STAMP): pyproject.toml setup.py constraints.txt scripts/make_venv.sh
	@bash scripts/make_venv.sh $(VENV)
	@echo "installing (about 7 GB, mostly torch) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@$(BIN)/python -m pip check
	@touch $@

##  make demo         the whole chain in the toy world (RUN=runs/tiny)
RUN ?= runs/tiny
demo: $(STAMP)
	@bash scripts/enhance_then_llava.sh tiny --output_dir $(RUN) $(ARGS)

##  make test         the tests (ARGS="-k words" for some of them)
test: $(STAMP)
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

##  make test-slow    the tests that take longer
test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ] # 5: there is none yet

##  make test-compat  towers inside the original LLaVA (llava-torch, transformers 4.37.2): load, train, generate
test-compat: $(STAMP)
	@bash scripts/compat_env.sh $(COMPAT) $(VENV)
	@LLAVA_GENHANCER_COMPAT_PYTHON=$(CURDIR)/$(COMPAT)/bin/python $(BIN)/python -m pytest tests/compat $(ARGS)

##  make check        format, lint, types
check: $(STAMP)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/mypy

##  make format       put the code into the house's format
format: $(STAMP)
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix $(CODE)

##  make bench        all benchmarks and one table of them (ARGS="--only data" for one; full size: scripts/gpu_check.sh)
bench: $(STAMP)
	@$(BIN)/python benchmarks/table.py $(ARGS)

##  make bench-llava  our LLaVA trainings beside llava-torch's own: tokens per second and memory
bench-llava: $(STAMP)
	@bash scripts/compat_env.sh $(COMPAT) $(VENV)
	@$(BIN)/python benchmarks/llava_train.py --compat $(COMPAT)/bin/python $(ARGS)

##  make fuzz         broken and hostile files by the thousand: what was tried, what held (ARGS="--seed N")
fuzz: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py $(ARGS)

##  make fuzz-guided  the same by coverage, a minute for each sort of file (ARGS="--seconds N"); adds atheris
fuzz-guided: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz_guided.py $(ARGS)

##  make chaos        faults on purpose: kills, full disks, damage, NaN, two hosts (an hour at most; ARGS="--seed N")
chaos: $(STAMP)
	@$(BIN)/python benchmarks/chaos $(ARGS)

##  make lock         write constraints.txt anew: the newest versions that pyproject.toml allows
lock:
	@bash scripts/lock.sh '$(EXTRAS),fuzz'

##  make clean        remove what was built and measured, environments aside
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find llava_genhancer tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
