# make demo   trains the demo networks and prints a table (a few minutes on 2 cores)
# make docs   the documentation as a site, in site/
# make versions   the tests on the oldest and the newest torch
# make test   lint, types, tests
# make perf   the compiler's deterministic figures against those recorded
# make first-step   time to the first step against compiled backpropagation's (half an hour)
# make gpu-check   parity and step times on a CUDA GPU, under 10 minutes
# make figures   the papers' claims, measured and drawn
# make test-all   the same with the long tests (every operator of torch's database, trainings)
# make coverage   which architectures of torchvision, timm and transformers work (hours)
# make fuzz   2,000 random models against eager gradients
# All create .venv when it is missing. Another Python: make PYTHON=python3.13 demo

PYTHON ?= python3
BIN := .venv/bin
# what `make demo` needs is installed by itself: tests need several times as much
STAMP := .venv/.installed
DEMO := .venv/.demo

.PHONY: demo docs versions test test-all lint types pytest perf first-step gpu-check figures coverage fuzz clean
# One thread a worker: tests are small, and workers share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
.DEFAULT_GOAL := test

# A stamp is touched last: an interrupted install is done again.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "grapefx needs Python >= 3.11; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(2) --disable-pip-version-check -e '.[$(1)]'
	@touch $@
endef

$(STAMP): pyproject.toml
	$(call install,dev,--quiet)

$(DEMO): pyproject.toml
	@echo "installing what the demo needs into .venv: torch is large, this takes a minute or two"
	$(call install,demo)

demo: $(DEMO)
	$(BIN)/python -m tools.demo $(ARGS)

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

test: lint types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	$(PYTEST) -m "not slow" --durations=10 $(ARGS)

test-all: lint types
	$(PYTEST) --durations=10 $(ARGS)

perf: $(STAMP)
	$(BIN)/python -m tools.perf.perf_gate $(ARGS)

first-step: $(STAMP)
	$(BIN)/python -m tools.bench.compile_time --rounds 3 --variants compiled bp dfa \
		--models depth120 resnet18@64 resnet50@64 transformer8-micro $(ARGS)

# where torch is installed already: no environment is made, nothing is downloaded
gpu-check:
	$(PYTHON) -m tools.gpu_check $(ARGS)

# each in an environment of its own: installs torch twice
versions: $(STAMP)
	$(BIN)/nox $(ARGS)

figures: $(STAMP)
	$(BIN)/python -m tools.figures $(ARGS)

coverage: $(STAMP)
	for zoo in other transformers timm torchvision; do $(BIN)/python -m tools.coverage --zoo $$zoo; done
	$(BIN)/python -m tools.coverage --table

fuzz: $(STAMP)
	GRAPEFX_FUZZ_CASES=2000 $(PYTEST) tests/fuzz

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
