# Two commands on a fresh machine: `make demo` and `make test`. They need Python 3.11 or 3.12, make and a C compiler.
#
#   make demo PYTHON=python3.12        another Python
#   make demo TORCH=cuda               torch's CUDA build (3 GB) where pip offers no CPU build
#   make test JOBS=4 ARGS="-k loader"  more test processes; further arguments for pytest
#   make bench QUICK=1                 the same rows from fewer runs

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
TORCH ?= cpu
JOBS ?= 2
BIN := .venv/bin
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench clean
.DELETE_ON_ERROR:

help: ## these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

# ---- the environment: a second run finds the stamps and does nothing -------------------------------------------------

.venv/.made:
	@test -n "$(PYTHON)" || { echo "turbopump needs Python 3.11 or 3.12, and none is on PATH: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] <= (3, 12) else "turbopump needs Python 3.11 or 3.12, and $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.12" % v[:2])'
	"$(PYTHON)" -m venv .venv || { echo "this Python cannot make environments: on Debian, apt install python3-venv"; exit 1; }
	@touch $@

# $(call install,EXTRAS): the package with EXTRAS, every version pinned. uv is used where it works. Unless TORCH=cuda the
# CUDA build cannot be resolved (one of its own dependencies is forbidden), so nobody downloads 3 GB unasked: where the
# first index has no CPU build, it comes from PyTorch's own.
define install
	@{ cat constraints.txt; test "$(TORCH)" = cuda || echo "cuda-toolkit<0"; } > .venv/.constraints
	@echo "installing turbopump[$(1)] into .venv (once; needs a package index)"
	@log=.venv/install.log; export PIP_CONSTRAINT=$(CURDIR)/.venv/.constraints PIP_DISABLE_PIP_VERSION_CHECK=1; \
	uv pip install -q --python $(BIN)/python -c $$PIP_CONSTRAINT -b $$PIP_CONSTRAINT -e '.[$(1)]' > $$log 2>&1 || \
	$(BIN)/python -m pip install -q -e '.[$(1)]' > $$log 2>&1 || \
	$(BIN)/python -m pip install -q -e '.[$(1)]' --retries 0 --timeout 10 --extra-index-url $(CPU_INDEX) >> $$log 2>&1 || \
	{ grep -v ^WARNING $$log; echo "the installation failed (see above). No network? No CPU build of torch for this Python in reach? Its CUDA build: make $(MAKECMDGOALS) TORCH=cuda"; exit 1; }
	@touch $@
endef

.venv/.train: pyproject.toml constraints.txt .venv/.made
	$(call install,train)

.venv/.test: pyproject.toml constraints.txt .venv/.made
	$(call install,test)
	@touch .venv/.train

.venv/.check: pyproject.toml constraints.txt .venv/.made
	$(call install,check)
	@touch .venv/.train .venv/.test

# ---- the demo: the tool's own verbs, one by one, echoed as they run ---------------------------------------------------
# DEMO VERBS BEGIN (make echoes each line; it can be pasted as it stands)

demo: .venv/.train ## train a language model on real text for a few minutes and report where the time went
	test -f datasets/stdlib/manifest.json || $(BIN)/turbopump pack stdlib datasets/stdlib --tokenizer bpe --vocab-size 8192
	$(BIN)/turbopump train recipes/demo.toml
	$(BIN)/turbopump evaluate runs/demo
	$(BIN)/turbopump evaluate runs/demo --sample "def read_lines(path" --num-tokens 120
	$(BIN)/turbopump report runs/demo

# DEMO VERBS END

# ---- habits ------------------------------------------------------------------------------------------------------------

unexport PYTHONDONTWRITEBYTECODE # hundreds of processes in the tests would compile the package anew

test: .venv/.test ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: .venv/.check ## format, lint, types, import rules and the quick tests, in about a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

format: .venv/.check ## put the source in order and write the generated reference anew
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m turbopump.core.reference

bench: .venv/.test ## all benchmarks; results in benchmarks/results/
	for name in $$(grep -l "^TARGETS = " benchmarks/*.py); do \
		$(BIN)/python -m benchmarks.$$(basename $$name .py) $(if $(QUICK),--quick) || exit 1; done

clean: ## remove the environment and all caches, keep runs and datasets
	rm -rf .venv .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find turbopump tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
