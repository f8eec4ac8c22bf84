"""Operations compiled by inductor (torch.compile) instead of run one kernel after the other, as routes to be measured.

For what moves bytes: norms, element-wise chains and cross-entropy, forward and backward. Products and convolutions
call the same libraries either way. The forward is compiled as autograd sees it, the backward as inductor derives it.

Compiling happens in `prepare`, which is not timed; what it took is in `facts`. It needs a C++ compiler and Python's
headers on a CPU, Triton on a GPU. Kernels are built in a directory that is removed when the process ends, by this
thread alone (inductor's pool of compiler processes would stay); nothing is written to the user's own cache.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbopump.compute import kernels
from turbopump.compute.kernels import Function, Outputs, Route
from turbopump.compute.ops import CrossEntropy, Elementwise, Norm
from turbopump.core.workload import Op

NAME = "inductor"
KINDS = (Norm, Elementwise, CrossEntropy)
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
VARIABLES = (CACHE_VARIABLE, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR")  # inductor sets both by itself
FIRST_S = 3.0  # of an operation, twice compiled (its error too); the first of a process 10 s, on an idle EPYC core
_compile_s: dict[str, float] = {}
_functions: dict[str, Function] = {}


def facts(op: Op) -> dict[str, float]:
    """`compile_s`: seconds of wall time that compiling `op` took in this process; empty where it was not compiled."""
    return {"compile_s": round(_compile_s[op.key], 3)} if op.key in _compile_s else {}


def _prepare(op: Op, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Compiles, and computes once: inductor compiles a backward when it is first run."""
    begin = time.perf_counter()
    kernel = kernels.KERNELS[type(op)]
    _functions[op.key] = run = torch.compile(kernel.forward(op), fullgraph=True, dynamic=False)
    if getattr(op, "backward", False):
        *forward_inputs, grad = given
        wanted = kernel.wanted(op)
        leaves = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(forward_inputs)]
        with torch.enable_grad():
            output = run(*leaves)
        given = (output if isinstance(output, Tensor) else output[0], grad, *(leaves[i] for i in wanted))
        kernels.function(op)(*given)
    else:
        run(*given)
    _compile_s[op.key] = time.perf_counter() - begin
    return given


def _function(op: Op) -> Function:
    """Of what `_prepare` returned: a backward runs the compiled graph that hangs on the output."""
    if getattr(op, "backward", False):
        return kernels.function(op)
    key = op.key

    def run(*given: Tensor) -> Outputs:
        return _functions[key](*given)  # made by `_prepare`, which comes later

    return run


def _problem(op: Op, device: str) -> str:
    if not isinstance(op, KINDS):
        return f"compiled are {', '.join(kind.__name__ for kind in KINDS)}: other kernels come from libraries"
    return _no_compiler(torch.device(device).type)


@cache
def _no_compiler(device: str) -> str:
    """What is missing to compile for a device; empty where all is there."""
    if device != "cpu":
        return "" if importlib.util.find_spec("triton") else "inductor needs Triton on a GPU, which is not installed"
    given = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([given] if given else ["g++", "c++", "clang++"])):
        return f"inductor needs a C++ compiler: {given or 'g++, c++ or clang++'} is not found; install one or set CXX"
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        return f"inductor needs Python's headers: there is no {include}/Python.h"
    return ""


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    """One for the process, since inductor keeps precompiled headers there; it removes itself at exit."""
    return tempfile.TemporaryDirectory(prefix="turbopump-inductor-")


@contextmanager
def _compiling() -> Iterator[None]:
    """Inductor in its own directory, silent, with graphs that may be run backward many times; all put back."""
    before = {name: os.environ.get(name) for name in VARIABLES}  # importing inductor sets one of them
    import torch._dynamo as dynamo  # these take a second to import
    import torch._functorch.config
    import torch._inductor.config

    inductor: Any = torch._inductor.config
    functorch: Any = torch._functorch.config
    os.environ[CACHE_VARIABLE] = _directory().name
    try:
        with (
            _silence(),
            inductor.patch(compile_threads=1, fx_graph_cache=False),
            functorch.patch(donated_buffer=False, enable_autograd_cache=False),
        ):
            yield
    finally:
        _functions.clear()
        dynamo.reset()  # what it compiled counts against its limit of versions of one function
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _silence() -> Iterator[None]:
    """No warning of the compiler's reaches the user: whether it works is seen by time and error."""

    def serious(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.split(".")[0] == "torch"]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for handler in handlers:
            handler.addFilter(serious)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(serious)


ROUTES: tuple[Route, ...] = (
    Route(NAME, _function, _problem, _prepare, _compiling, f"inductor of torch {torch.__version__}", FIRST_S),
)
"""The compiler, for the operations it can change."""
