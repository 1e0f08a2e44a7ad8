PYTHON ?= python3
BIN := .venv/bin

.PHONY: path quick shakespeare test bench help clean
path: .venv/ready                ## set up, then the whole life of a model on the tiny world, and a report card
	$(BIN)/python runs/path.py

quick: .venv/ready               ## the same ten stages, smaller, in about two minutes
	$(BIN)/python runs/path.py --quick

shakespeare: .venv/ready         ## text -> tokenizer -> trained GPT -> samples, in three minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/laptop.sh

test: .venv/ready-dev            ## run every test, on two cores; needs no network once set up
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder tests

bench: .venv/ready               ## measure against nanoGPT: make bench NANOGPT=path/to/its/checkout
	$(BIN)/python bench/train.py --nanogpt=$(NANOGPT)

help:                            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'

clean:                           ## remove runs and the environment; datasets stay
	rm -rf .venv out

# torch first and alone: pip then finds it satisfied and fetches nothing larger
.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 14), f'Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12'"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@
