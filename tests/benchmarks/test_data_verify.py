import pytest

from benchmarks import data_verify
from turbopump.data.format import open_dataset, verify_dataset


def test_both_sides_read_all_bytes():
    with data_verify._dataset(1 << 25) as path:
        manifest = open_dataset(path).manifest
        assert verify_dataset(path) == manifest.bytes > 15 << 20
        parts = data_verify.mapped(path)
        assert sum(part.nbytes for part in parts) > manifest.bytes - 8 * len(parts)
        assert data_verify.total(parts) == data_verify.total([part.copy() for part in parts])
    assert not path.exists()


@pytest.mark.slow
def test_the_ratio_is_that_of_the_rates(monkeypatch):
    monkeypatch.setattr(data_verify, "alternating_blocks", lambda contestants, blocks: _run(contestants))
    found = data_verify.measure_verify(quick=True)
    assert found.ratio.value == 0.5 and found.ratio.runs == 2
    assert found.verify_bytes_per_s == found.num_bytes / 2 and found.read_bytes_per_s == found.num_bytes


def _run(contestants):
    for contestant in contestants.values():
        contestant()
    return {name: [2.0, 2.0] if name == "verify" else [1.0, 1.0] for name in contestants}
