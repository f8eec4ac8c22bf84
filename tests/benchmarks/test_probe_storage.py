import pytest

from benchmarks import probe_storage
from turbopump.data import fio
from turbopump.data.ops import RandomRead
from turbopump.hardware.profile import Measurement, Trial
from turbopump.hardware.timing import Timing


def row(op, seconds, route="pread"):
    return Measurement.of(Trial(op, route), "data", Timing("wall", 5, 10, seconds, seconds, seconds, seconds, 0.0))


def test_figures_of_rows_that_are_known():
    rows = [row(RandomRead(size, depth, cached), 1e-6 * size)
            for size in (512, 4096, 32768) for depth in (1, 4, 16) for cached in (False, True)]  # fmt: skip
    errors = probe_storage.interpolation_errors(rows)
    assert {name: len(values) for name, values in errors.items()} == {
        "size, cold": 3, "depth, cold": 3, "size, cached": 3, "depth, cached": 3}  # fmt: skip
    assert all(
        value == pytest.approx(0.0, abs=1e-9) for values in errors.values() for value in values
    )  # pure bandwidth
    assert probe_storage.shares_of_fio(rows) == {}
    theirs = row(RandomRead(4096, 4), 2e-3, fio.ROUTE)
    slow = row(RandomRead(4096, 4), 1.0, "mmap")
    assert probe_storage.shares_of_fio([*rows, theirs, slow]) == {theirs.op_key: pytest.approx(2e-3 / 4096e-6)}


@pytest.mark.slow
def test_a_short_run_measures_what_the_figures_need(tmp_path):
    rows = probe_storage.storage_rows(tmp_path, row_s=0.002, budget_s=1.0)
    assert rows and all(row.works or row.problem for row in rows) and list(tmp_path.iterdir()) == []
