# `make demo` and `make test` work on a machine with Python 3.11+, pip, make and gcc, with nothing done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests share two cores with pytest-xdist; threads inside torch would fight over them.
ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
JOBS ?= 2

.PHONY: install demo test test-all test-vllm lint types format bench docs surface clean

install: $(VENV)/.base $(VENV)/.dev

# Constraints name every version that the tests were run with. torch comes first: alone it resolves to one build.
$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools -c constraints.txt
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install -q --no-build-isolation -e . -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test,dev,otel]" -c constraints.txt
	mkdir -p $(VENV)/src && ln -sfn "$(CURDIR)" $(VENV)/src/outspoken
	touch $@

demo: $(VENV)/.base
	$(ENV) $(BIN)/outspoken demo $(ARGS)

test: $(VENV)/.dev
	$(ENV) $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not vllm" $(ARGS)

# DeepSpeed lies beside the environment, for the tests that start processes with it: accelerate imports it into every
# process that can see it. Where it cannot be built, those tests are skipped.
$(VENV)/.deepspeed: $(VENV)/.dev
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install -q --no-build-isolation --no-deps --upgrade \
		--target $(VENV)/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo -c constraints.txt && touch $@ \
		|| echo "deepspeed could not be installed; its tests are skipped"

test-all: $(VENV)/.dev $(VENV)/.deepspeed
	$(ENV) $(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

# The real vLLM, in an environment of its own: it pins versions of what others here need newer.
VLLM := .venv-vllm
$(VLLM)/.ready: constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --upgrade pip
	$(VLLM)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	mkdir -p $(VLLM)/src && ln -sfn "$(CURDIR)" $(VLLM)/src/outspoken
	touch $@

test-vllm: $(VLLM)/.ready
	$(ENV) PYTHONPATH=$(VLLM)/src $(VLLM)/bin/python -m pytest -q -m vllm tests/test_vllm_real.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

# The checkout's folder has any name; the link gives mypy the package's.
types: $(VENV)/.dev
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p outspoken.diagnostics -p outspoken.schemas -p outspoken.agent_api -p outspoken.trainers -p outspoken.cli -m outspoken

bench: $(VENV)/.dev
	$(ENV) $(BIN)/python benchmarks/cost.py
	$(ENV) $(BIN)/python benchmarks/offline.py --quick
	$(ENV) $(BIN)/python benchmarks/online.py --quick

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

docs: $(VENV)/.dev
	$(BIN)/python docs/make_rules.py
	$(BIN)/python docs/make_bad_input.py
	$(BIN)/python docs/make_systems.py

# After a wanted change of public names, arguments or defaults.
surface: $(VENV)/.dev
	$(BIN)/python docs/make_surface.py
