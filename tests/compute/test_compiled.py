"""Compiled operations give what the kernels one by one give; nothing of the compiler's is left behind or heard."""

import os
import warnings

import pytest
import torch

from turbopump.compute import compiled, kernels
from turbopump.compute.compiled import CACHE_VARIABLE, ROUTES, facts
from turbopump.compute.ops import CrossEntropy, Elementwise, Gemm, Norm

ROUTE = ROUTES[0]
CASES = (
    Norm("rms", 96, 64, "fp32"),
    Norm("batch", 96, 24, "fp32", backward=True),
    Elementwise("swiglu", 4096, 2, 1, "fp32"),
    CrossEntropy(48, 100, "fp32", backward=True),
)


@pytest.fixture(autouse=True)
def fresh():
    compiled._no_compiler.cache_clear()
    yield
    compiled._no_compiler.cache_clear()


@pytest.mark.slow
def test_compiled_is_as_exact_and_leaves_no_trace(capfd):
    if problem := compiled._no_compiler("cpu"):
        pytest.skip(problem)
    from torch._functorch import config

    before = dict(os.environ), config.donated_buffer, torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in CASES:
            given = kernels.inputs(op, "cpu", torch.Generator().manual_seed(0))
            with ROUTE.setting():
                run = ROUTE.ready(op, given)
                ours = [run() for _ in range(3)][-1]
                assert os.environ[CACHE_VARIABLE].startswith(compiled._directory().name)
            theirs = kernels.function(op)(*kernels.prepare(op, given))
            pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else list(zip(ours, theirs, strict=True))
            for a, b in pairs:
                assert a.shape == b.shape and float((a - b).detach().norm() / b.detach().norm()) < 1e-6, op.key
            assert facts(op)["compile_s"] > 0
    assert (dict(os.environ), config.donated_buffer, torch.get_num_threads()) == before
    assert "".join(capfd.readouterr()) == ""


def test_why_there_is_no_compiled_route(monkeypatch):
    assert "libraries" in ROUTE.problem(Gemm(8, 8, 8, "fp32"), "cpu")
    assert facts(Norm("rms", 3, 5, "fp32")) == {}
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not found" in ROUTE.problem(CASES[0], "cpu")
    compiled._no_compiler.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "needs a C++ compiler: g++" in ROUTE.problem(CASES[0], "cpu")


def test_missing_headers_and_triton_are_named(monkeypatch, tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in ROUTE.problem(CASES[0], "cpu")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert "Triton" in ROUTE.problem(CASES[0], "cuda")


def test_settings_are_put_back_after_a_failure(monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "as before")
    with pytest.raises(RuntimeError), ROUTE.setting():
        raise RuntimeError
    assert os.environ[CACHE_VARIABLE] == "as before"
