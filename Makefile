# `make demo` and `make test` set up .venv from pinned constraints on first use.
PYTHON ?= python3
BIN := .venv/bin
# One math thread per process: the tests run in parallel, and tiny models do not gain from more.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test torchao timm newest matrix fuzz gpu real lint package site clean
.DEFAULT_GOAL := demo

.venv/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (first time only, a few minutes) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[bench,calibrate,large,ray,serve,train,tune,video]' \
		hypothesis mypy openai peft playwright psutil pytest pytest-timeout pytest-xdist ruff scipy \
		torch-pruning trl
	@touch $@

demo: .venv/.ready  ## ask the embedded model about an image, with all visual tokens and with PyramidDrop
	$(BIN)/foveate demo

test: .venv/.ready  ## run the test suite
	$(BIN)/python -m pytest --numprocesses 2 $(PYTEST_ARGS)

.venv/torchao/.ready: .venv/.ready  # outside the environment: it makes every import of transformers print
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-deps --target .venv/torchao torchao
	@touch $@

torchao: .venv/torchao/.ready  ## test models quantised with torchao
	PYTHONPATH=.venv/torchao $(BIN)/python -m pytest --numprocesses 2 -m torchao \
		tests/conformance/test_quantised.py tests/test_docs.py

.venv/timm/.ready: .venv/.ready  # outside the environment: torchvision breaks image processors there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-deps --target .venv/timm timm torchvision
	cp scripts/vllm_site.py .venv/timm/sitecustomize.py
	@touch $@

timm: .venv/timm/.ready  ## test timm's ViTs
	PYTHONPATH=.venv/timm $(BIN)/python -c 'import timm'  # without it the tests would be skipped
	PYTHONPATH=.venv/timm $(BIN)/python -m pytest --numprocesses 2 \
		tests/vision/test_timm.py tests/conformance/test_matrix.py -k timm

NEWEST := 5.24.0
.venv/transformers-$(NEWEST)/.ready: .venv/.ready  # outside the environment, whose version is pinned
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv/transformers-$(NEWEST) "transformers==$(NEWEST); python_version >= '3.11'"
	@touch $@

newest: .venv/transformers-$(NEWEST)/.ready  ## test families and engine with the newest transformers
	PYTHONPATH=.venv/transformers-$(NEWEST) $(BIN)/python -m pytest --numprocesses 2 \
		tests/families tests/engine/test_generate.py tests/engine/test_assisted.py \
		tests/conformance/test_families.py tests/conformance/test_turns.py \
		tests/conformance/test_chunks.py tests/robots tests/streaming $(PYTEST_ARGS)
	PYTHONPATH=.venv/transformers-$(NEWEST) $(BIN)/python -m pytest --numprocesses 2 \
		tests/conformance -k apertus1p5  # which came with it

matrix: .venv/.ready  ## run every cell of the large test tables
	$(BIN)/python -m pytest --numprocesses 2 --all-cells tests/conformance tests/vision $(PYTEST_ARGS)

CELLS ?= 5000
SEED ?= 1
fuzz: .venv/.ready  ## compare many random cells with the oracle; updates docs/reliability.md
	$(BIN)/python -m tests.fuzz --cells $(CELLS) --seed $(SEED) --write

gpu: .venv/.ready  ## run everything that needs a CUDA GPU, in at most 25 minutes; updates docs/benchmarks.md
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS); status=$$?; \
		$(BIN)/python benchmarks/table.py && exit $$status

real:  ## run a real model on lmms-eval's benchmarks: make real MODEL=hub-id-or-folder DATA=tasks-or-folder
	scripts/lmms_eval.sh --install
	build/lmms-eval/bin/python benchmarks/real.py --model "$(MODEL)" --data "$(DATA)" $(REAL_ARGS)

lint: .venv/.ready  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

package: .venv/.ready  ## build wheel and sdist in dist/, and test them in an empty environment
	scripts/package.sh

.venv/site/.ready: constraints.txt
	$(PYTHON) -m venv .venv/site
	.venv/site/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		mkdocstrings-python ruff zensical
	@touch $@

site: .venv/site/.ready  ## build docs/ as a website in site/; broken links fail
	.venv/site/bin/python -m zensical build --clean --strict

clean:
	rm -rf .venv build dist site *.egg-info
