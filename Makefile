# make demo   trains a tiny preset on builtin data on the CPU and probes it
# make test   runs the tests
# make test-timm   the tests of timm models, in .venv-timm: timm needs the torchvision of a newer torch
# make mutations  inserts bugs into a copy of the code, one at a time; each must make a test fail
# make mutants MODULE=ema.py TESTS=tests/test_ema.py   makes random but reproducible changes to operators, constants and statements
# of a module, and lists those that no test detects; NUMBER=40
# make lint   ruff and mypy
# make docs   README, guides and API as a site in build/docs; a warning is an error
# make bench        benchmarks the loss against its alternatives, writes $(RESULTS)
# make bench-check  measures the cases of $(RESULTS) again; fails if a ratio fell more than 15 % or the machine is slow
# make bench-report prints tables and a plot from $(RESULTS), updates the tables of README and docs/speed.md
# … ONLY="test_splicing" to select tests, RESULTS=FILE.json for another file
# … BENCH=step      the same for whole steps, their parts and a sweep over sizes; also BENCH=ema, BENCH=monitor
# make gpu          on a machine with a GPU: tests, compute-sanitizer if installed, 10 minutes of benchmarks, results and tables;
#                   FULL=1 for all cases, DRY=1 for a dry run without a GPU
# Everything is installed into .venv; another Python: make PYTHON=python3.12 …, another torch: make TORCH=torch==2.11.0 …

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= dev,docs,tensorboard
BIN := $(VENV)/bin
DEMO ?= vision/tiny-2
RUN ?= runs/demo
BENCH ?= loss
RESULTS ?= benchmarks/results/cpu-$(BENCH).json
MEASURE := OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest benchmarks/test_bench_$(BENCH).py -q --benchmark-columns=median $(if $(ONLY),-k "$(ONLY)")

.PHONY: demo test test-slow test-timm mutations mutants lint docs bench bench-check bench-report gpu clean

# torch first, pinned: this version may be available as a CPU build, while the newest one pulls gigabytes of CUDA.
$(BIN)/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet '$(TORCH)' -e '.[$(EXTRAS)]'
	touch $@

demo: $(BIN)/.installed
	rm -rf $(RUN)
	$(BIN)/d2v-train --config $(DEMO) train.output=$(RUN)
	$(BIN)/d2v-probe $(RUN)

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow

.venv-timm/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/*)
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1
	.venv-timm/bin/pip install --quiet -e '.[timm]' pytest
	touch $@

test-timm: .venv-timm/.installed
	.venv-timm/bin/python -m pytest tests/test_timm.py

mutations: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow -n 2 tests/test_mutations.py

mutants: $(BIN)/.installed
	$(BIN)/python -m tests.mutants $(MODULE) $(TESTS) --number $(or $(NUMBER),40)

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(BIN)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(BIN)/.installed
	$(MEASURE) --benchmark-json=$(RESULTS)

bench-check: $(BIN)/.installed
	mkdir -p build
	$(MEASURE) --cases-of=$(RESULTS) --benchmark-json=build/bench.json
	$(BIN)/python -m benchmarks.report build/bench.json --against $(RESULTS)

bench-report: $(BIN)/.installed
	$(BIN)/python -m benchmarks.report $(RESULTS) --plot $(RESULTS:.json=.svg) --update README.md docs/speed.md

gpu: $(BIN)/.installed
	$(BIN)/python -m benchmarks.gpu $(if $(FULL),--full) $(if $(DRY),--dry)

clean:
	rm -rf $(VENV) .venv-timm build *.egg-info d2v_fast/ops/*.so
