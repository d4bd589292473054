# Each target makes its own environment in .venv; a second run finds the stamp and starts at once.
# Choose another interpreter with `make test PYTHON=python3.12`.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test kills check bench clean

demo: .venv/.runtime  ## the whole story on the embedded practice assistant
	$(BIN)/unbraid demo

test: .venv/.dev  ## every test
	$(BIN)/python -m pytest -q

kills: .venv/.dev  ## every kind of capture and training killed ten times, against an undisturbed run
	OMP_NUM_THREADS=1 $(BIN)/python tests/activations/test_killed.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/training/test_killed.py $(ARGS)

check: .venv/.dev  ## style, types and the order of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

NAME ?= training
bench: .venv/.bench  ## a file of benchmarks/ beside other tools: make bench NAME=training JSON=out.json
	$(BIN)/python benchmarks/$(NAME).py $(if $(JSON),--out $(JSON)) $(ARGS)

clean:  ## remove the environment and the caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch goes first and alone, so that its build is chosen by the pin and not by what another package asks for.
.venv/.runtime: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "unbraid needs Python 3.11 or newer; none was found, set PYTHON=..." >&2; exit 2; }
	@echo "Making .venv (the first run takes some minutes) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.runtime
	$(PIP) -e '.[dev]'
	touch $@

# Other tools whose pins clash with ours, each in an environment of its own (SAELens stands among ours).
PEERS := dictionary_learning=dictionary-learning==0.1.0 sparsify=eai-sparsify==1.3.3
# SAEDashboard's own pins cannot all be had together with this torch, so what it needs is named here.
SAEDASHBOARD := torch==2.13.0 numpy==1.26.4 transformers==4.56.2 transformer-lens==2.17.0 'sae-lens>=6.8,<7' \
	'pyarrow<22' 'datasets<4' decode-clt eindex-callum einops hf-transfer 'jaxtyping<0.3' 'matplotlib<4' \
	'rich<14' safetensors 'dataclasses-json<0.7' 'typer<0.13'
.venv/.bench: .venv/.dev
	for peer in $(PEERS); do \
		place=.venv/peers/$${peer%%=*}; package=$${peer#*=}; \
		$(PYTHON) -m venv $$place || exit; pip="$$place/bin/python -m pip --disable-pip-version-check"; \
		$$pip install --quiet -c constraints.txt torch && \
		$$pip install --quiet -c constraints.txt $$package && \
		$$pip uninstall --quiet --yes torchvision torchaudio || exit; \
	done  # the registry's torchvision and torchaudio do not match this torch and break imports
	$(PYTHON) -m venv .venv/peers/saedashboard
	pip=".venv/peers/saedashboard/bin/python -m pip --disable-pip-version-check"; \
		$$pip install --quiet -c constraints.txt torch && $$pip install --quiet $(SAEDASHBOARD) && \
		$$pip install --quiet --no-deps sae-dashboard==0.8.0 && \
		$$pip uninstall --quiet --yes torchvision torchaudio
	touch $@
