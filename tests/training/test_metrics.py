"""What a run writes and shows: JSONL that any reader takes, plain lines in a pipe, losses fetched once."""

import json
import math

import pytest
import torch

from turbopump.training.metrics import JsonLogger, StepLosses, TerminalLogger

PROGRESS = {"type": "progress", "step": 20, "loss": 1.23456, "units_per_s": 12345.6, "share_of_limit": 0.314,
            "remaining_s": 75.0}  # fmt: skip


def test_numbers_that_json_cannot_hold_are_null(tmp_path) -> None:
    logger = JsonLogger(tmp_path / "metrics.jsonl")
    logger.log({"type": "step", "step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == "", "steps wait for a progress line"
    logger.log({"type": "progress", "step": 1, "loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"type": "step", "step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    logger.close()
    logger = JsonLogger(tmp_path / "metrics.jsonl")
    logger.log({"type": "note", "text": "again"})
    logger.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (PROGRESS, "step 20/100  loss 1.2346  12.3 k tokens/s  31% of limit  75 s left"),
        ({**PROGRESS, "share_of_limit": None}, "step 20/100  loss 1.2346  12.3 k tokens/s  75 s left"),
        (
            {"type": "evaluation", "step": 20, "split": "validation", "loss": 1.5, "bits_per_byte": 2.25, "s": 1.0,
             "epoch_s": 1e9},
            "evaluation at step 20: loss 1.5000  bits per byte 2.2500",
        ),
        (
            {"type": "checkpoint", "step": 20, "bytes": 1_500_000, "write_s": 0.5, "stall_s": 0.01, "epoch_s": 1e9},
            "checkpoint at step 20: 1.5 MB in 500 ms, of which training waited 10 ms",
        ),
        ({"type": "note", "text": "going on from the checkpoint of step 5"}, "going on from the checkpoint of step 5"),
        ({"type": "step", "step": 1, "loss": 1.0}, ""),
        ({"type": "of a later version"}, ""),
    ],
)  # fmt: skip
def test_lines_in_a_pipe(capsys, record, expected) -> None:
    logger = TerminalLogger("token", 100)
    logger.log(record)
    logger.close()
    assert capsys.readouterr().out.strip() == expected
    quiet = TerminalLogger("token", 100, quiet=True)
    quiet.log(record)
    quiet.close()
    assert capsys.readouterr().out == ""


def test_losses_are_fetched_once_and_in_order() -> None:
    losses = StepLosses(1)
    assert losses.fetch() == []
    for step in (1, 2):
        losses.add(step, torch.tensor(0.5 * step), torch.tensor(2.0), 1e-3)
    assert losses.fetch() == [
        {"type": "step", "step": 1, "loss": 0.5, "grad_norm": 2.0, "lr": 1e-3},
        {"type": "step", "step": 2, "loss": 1.0, "grad_norm": 2.0, "lr": 1e-3},
    ]
    assert losses.fetch() == []
