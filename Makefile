# Each target is one thing to do; each line can be run by hand.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv-peers/.installed

.PHONY: demo test checks bench docs

demo: $(INSTALLED)  ## train full and condensed traces side by side, and compare
	$(BIN)/lit-reason demo

test: $(INSTALLED)  ## the tests, as continuous integration runs them
	$(BIN)/python -m pytest -n 2 --dist worksteal

checks: $(INSTALLED)  ## formatting, lint, types, docstrings against signatures
	$(BIN)/ruff format --check lit_reason kernels callbacks tests benchmarks
	$(BIN)/ruff check lit_reason kernels callbacks tests benchmarks
	$(BIN)/mypy -p lit_reason
	$(BIN)/ruff check --preview --select DOC102 lit_reason kernels callbacks   # no docstring names an argument that is gone

bench: $(INSTALLED) $(PEERS)  ## measurements on this machine, beside other libraries, into benchmarks/results
	$(BIN)/python -m benchmarks.run

docs: $(INSTALLED)  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# torch first and alone: where a CPU wheel is offered it is taken, and nothing after it pulls CUDA builds.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# What the benchmarks compare with, in an environment of its own.
$(PEERS): benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet "$$(grep '^torch==' $<)"
	.venv-peers/bin/pip install --quiet --requirement $<
	@touch $@
