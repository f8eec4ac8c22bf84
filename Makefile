# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11 or 3.12, make and a C compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format bench clean
