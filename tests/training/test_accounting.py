"""The spans of a run agree with an independent clock placed around the same calls, and leave little unexplained."""

import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from turbopump.core.files import read_json_lines
from turbopump.core.rundir import RunDir
from turbopump.core.spans import StepBreakdown, run_breakdown
from turbopump.data.loader import Loader
from turbopump.train import train
from turbopump.training.forward_backward import ForwardBackward
from turbopump.training.optim import StepOptimizer


class Data(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.001)
        return torch.full((512,), float(index))


@pytest.mark.slow
def test_fields_agree_with_an_independent_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[str, list[float]] = {}

    def timed(cls: type, method: str, name: str) -> None:
        original = getattr(cls, method)

        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                measured.setdefault(name, []).append(time.perf_counter() - begin)

        monkeypatch.setattr(cls, method, wrapper)

    timed(Loader, "__next__", "data")
    timed(ForwardBackward, "__call__", "compute")
    timed(StepOptimizer, "step", "optimizer")
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    train(model, Data(), loss=lambda m, x: F.mse_loss(m(x), x), run=tmp_path / "r", num_steps=20, global_batch=16,
          quiet=True, logging={"limit_s": 0.0}, checkpoint={"every_s": 0.0})  # fmt: skip
    records = list(read_json_lines(RunDir(tmp_path / "r").spans(0)))
    steps = [StepBreakdown.from_spans(r["s"], r["spans"]) for r in records if r["type"] == "step"]
    assert len(steps) == 20
    notes = [r["loader"] for r in records if r["type"] == "step"]
    assert all(note.keys() == {"ready_steps", "read_s", "restarts", "wait_s"} for note in notes)
    assert all(note["wait_s"] <= seconds for note, seconds in zip(notes, measured["data"], strict=True))
    for name, seconds in measured.items():
        booked = [getattr(step, name) for step in steps]
        # the typical step: between the two clocks of one of them other work may have had its turn
        assert median(b / s for b, s in zip(booked, seconds, strict=True)) == pytest.approx(1.0, rel=0.03), name
    total = sum(step.total for step in steps)
    assert total == pytest.approx(sum(r["s"] for r in records if r["type"] == "step"), rel=1e-6)
    assert median(step.other / step.total for step in steps) < 0.05
    run = run_breakdown(records)
    end = next(r for r in records if r["type"] == "end")
    assert run.total == pytest.approx(end["s"], rel=1e-3)
