# make demo: segment the scan that comes with cdiff, with the model that comes with it.
# make test: what the project asserts about itself; make minutes: the tests that take too long for each change.
# Both need Python 3.11 or newer and make, and install into .venv; PYTHON=... chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := train export runtime cli benchmarks
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python keeps what it compiles, also where the variable forbids it, as in many containers: pip compiles nothing (below), and each of
# the many programs that the tests start would compile anew whatever it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test pytest minutes lint ruff types clean

help:
	@echo "make demo     segment the demo scan with the shipped model into demo-output/ (about a minute)"
	@echo "make test     install what the tests need, then ruff, mypy and pytest"
	@echo "make minutes  the tests that take minutes and that make test leaves out"
	@echo "make lint     ruff and mypy alone"
	@echo "make clean    remove .venv and demo-output"

demo: $(VENV)/cpu.installed
	@$(BIN)/cdiff segment cdiff/demo --fast --page -o demo-output
	@cat cdiff/demo/CREDIT.txt
	@echo "Open the picture: $(CURDIR)/demo-output/demo_preview.png"
	@echo "Leaf through it in a browser: $(CURDIR)/demo-output/demo_page.html"

# One process a core with one thread (tests/conftest.py keeps it to its core): most tests are small, and threads would only wait for
# one another. At most eight, as two of them were seen to take 4.5 GB together.
# The types are checked beside them, as that is a process of its own.
test: ruff
	@$(MAKE) --no-print-directory --jobs=2 types pytest

pytest: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not minutes"

minutes: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m minutes

lint: ruff types

ruff: $(VENV)/test.installed
	$(BIN)/ruff check .

types: $(VENV)/test.installed $(VENV)/types
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p cdiff

clean:
	rm -rf $(VENV) demo-output

# The newest pip prints a warning of setuptools that a folder of the package's name may be imported in its place; clone-on-the-path is the answer.
INSTALL := PYTHONWARNINGS='ignore:Editable installation' $(BIN)/pip install --quiet --no-compile -c constraints.txt

# --no-compile: Python compiles what it imports when it does; to compile every file of every package takes a minute.
# pip comes last: without Debian's python3-venv, or stopped midway, venv leaves a folder that has a python alone.
# A pip of before 25 takes half a minute longer to find the packages; where no newer one is to be had, it does too.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("cdiff needs Python 3.11 or newer, and this is %s; try make PYTHON=python3.12" \
	  % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/pip install --quiet 'pip>=25'

# pip's editable install finds cdiff after all else. A clone that is called cdiff has a folder of the package's name for whoever starts Python
# in the folder above it, without the package's code: Python takes that only if nothing on its path is the package itself. The line is
# ASCII, whatever the clone's path: Python reads it in the locale's encoding, and would not start where it cannot.
define clone-on-the-path
@$(BIN)/python -c 'import os, pathlib, sysconfig; \
  line = f"import os, sys; sys.path.append(os.fsdecode({os.getcwdb()!r}))\n"; \
  pathlib.Path(sysconfig.get_path("purelib"), "cdiff-clone.pth").write_text(line, encoding="ascii")'
endef

$(VENV)/cpu.installed: $(BIN)/pip pyproject.toml constraints.txt
	@echo "Installing cdiff for this machine's CPU into $(VENV) (about a minute)"
	$(INSTALL) -e '.[cpu]'
	$(clone-on-the-path)
	@touch $@

# highdicom apart: on some Pythons it is not in the extra, and pyproject.toml says why.
$(VENV)/test.installed: $(BIN)/pip pyproject.toml constraints.txt
	@echo "Installing cdiff with what training and the tests need into $(VENV) (a few minutes)"
	$(INSTALL) -e '.[cpu,train,bench,test]'
	$(INSTALL) --no-deps highdicom
	$(clone-on-the-path)
	@touch $@

# mypy has no notion of setuptools' package-dir: give it the tree that the import system sees.
$(VENV)/types: $(BIN)/pip Makefile
	@mkdir -p $@/cdiff
	@ln -sfn "$(CURDIR)/cdiff/__init__.py" "$(CURDIR)/cdiff/py.typed" $@/cdiff
	@for package in $(PACKAGES); do ln -sfn "$(CURDIR)/$$package" $@/cdiff/$$package; done
	@touch $@
