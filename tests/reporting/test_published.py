"""Published tables: read or refused with their path; matched to our rows by operation and dtype, a table each."""

from dataclasses import replace

import pytest

from tests.synthetic_profile import Maker, build
from turbopump.compute import deepbench
from turbopump.core.errors import UsageError
from turbopump.reporting.published import beside, read

HEADER = "platform,precision,M,N,K,transA,transB,time_ms\n"


def write(directory, *lines):
    (directory / "deepbench_gemm.csv").write_text(HEADER + "".join(f"{line}\n" for line in lines))
    return directory


@pytest.fixture
def measured():
    """64 x 32 x 64 in fp32 and bf16, 1 ms each."""
    maker = Maker()
    ops = [deepbench.gemm(64, 32, 64, "N", "T", dtype) for dtype in ("fp32", "bf16")]
    rows = [replace(maker.row("compute", op, "default", 1e-3), median_s=1e-3) for op in ops]
    return replace(build(), rows=tuple(rows))


def test_a_table_for_each_dtype_and_the_median_of_each_platform(tmp_path, measured):
    write(tmp_path, "NV_A,fp32,64,32,64,N,T,0.5", "NV_B,tensorcore,64,32,64,N,T,0.1", "NV_A,fp32,65,32,64,N,T,9")
    said = beside(measured, read(tmp_path), 80)
    bf16, fp32, medians = said.split("\n\n")
    assert bf16.startswith("Gemm bf16") and "100 µs" in bf16 and "NV_A" not in bf16
    assert fp32.startswith("Gemm fp32") and "500 µs" in fp32 and "100 µs" not in fp32
    assert [line.split()[-1] for line in medians.splitlines()] == ["Gemm", "2", "10"]
    assert all(len(line) <= 80 and line == line.rstrip() for line in said.splitlines())


def test_nothing_in_common_is_said(tmp_path, measured):
    write(tmp_path, "NV_A,fp32,65,32,64,N,T,9")
    assert "none of the published operations was measured here" in beside(measured, read(tmp_path))


@pytest.mark.parametrize("line", ["NV_A,fp32,x,32,64,N,T,1", "NV_A,fp99,64,32,64,N,T,1", "NV_A"])
def test_a_table_of_another_form_is_refused_by_its_path(tmp_path, line):
    with pytest.raises(UsageError, match=r"deepbench_gemm\.csv is not in the form of docs/probe\.md"):
        read(write(tmp_path, line))


def test_no_table_at_all_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--published: no DeepBench tables in"):
        read(tmp_path)
