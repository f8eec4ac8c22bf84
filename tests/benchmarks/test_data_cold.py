import shutil

import pytest

from benchmarks import data_cold
from turbopump.data.direct import DirectReader
from turbopump.data.scratch import ScratchFile


@pytest.fixture
def file(tmp_path):
    with ScratchFile(tmp_path) as file:
        file.fill(4 << 20)
        yield file


def test_all_that_was_prefetched_is_read(file):
    with DirectReader() as reader:
        handle = reader.open(f"/proc/self/fd/{file.handle}")
        speed = data_cold.read_records(reader, handle, file.num_bytes, 2048, run_s=0.0)
        assert speed.reads_per_s > 0 and speed.cpu_s_per_read > 0
        reader.read([handle], [0], [1])  # nothing is left that would have to be read first


def test_without_fio_there_is_no_ratio(file, monkeypatch):
    monkeypatch.setattr(data_cold.shutil, "which", lambda name: None)
    result = data_cold._measure(file, "12 KB", rounds=1, run_s=0.0)
    assert result.ratio is None and result.best is None
    assert set(result.speeds) == {"ours", "ours, threads"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_is_measured_at_each_setting(file):
    result = data_cold._measure(file, "12 KB", rounds=1, run_s=0.05)
    assert set(data_cold.FIO) < set(result.speeds) and result.best in data_cold.FIO
    assert result.ratio is not None and result.ratio.runs == 1
    assert all(speed.reads_per_s > 0 for speed in result.speeds.values())
