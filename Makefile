# make demo   trains a tiny preset on builtin data and probes it, on the CPU
# make test   runs the tests
# make lint   ruff
# Everything is installed into .venv; another Python: make PYTHON=python3.12 …

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= vision/tiny
RUN ?= runs/demo

.PHONY: demo test test-slow lint clean

# torch first and by its exact version: a CPU build of it may be at hand, the newest one brings gigabytes of CUDA.
$(BIN)/.installed: setup.py CMakeLists.txt $(wildcard kernels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev,tensorboard]'
	touch $@

demo: $(BIN)/.installed
	rm -rf $(RUN)
	$(BIN)/d2v-train --config $(DEMO) train.output=$(RUN)
	$(BIN)/d2v-probe $(RUN)

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info d2v_fast/ops/*.so
