"""Evaluation: means over all samples whatever the batch, in eval mode, leaving the model as it was."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from turbopump.training.evaluation import evaluate_model

CPU = torch.device("cpu")


class Numbers:
    randomness = "none"

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.float32:
        return np.float32(index)


def mean_of_values(model: nn.Module, batch: torch.Tensor) -> dict[str, tuple[float, float]]:
    return {"loss": (float(model(batch[:, None]).sum()), len(batch)), "largest": (float(batch.max()), 1)}


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_the_mean_is_over_samples_not_over_batches(batch: int) -> None:
    values = evaluate_model(nn.Identity(), mean_of_values, Numbers(), batch=batch, device=CPU)
    assert values["loss"] == pytest.approx(4.5)


def test_max_samples_takes_that_many_evenly_spaced() -> None:
    values = evaluate_model(nn.Identity(), mean_of_values, Numbers(), batch=4, max_samples=5, device=CPU)
    assert values["loss"] == pytest.approx((0 + 2 + 4 + 6 + 8) / 5)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.9))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        first = evaluate_model(model, mean_of_values, Numbers(), batch=4, device=CPU)
        assert first == evaluate_model(model, mean_of_values, Numbers(), batch=4, device=CPU), "no dropout in it"
        assert model.training is mode
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_metric_that_raises_leaves_the_model_training() -> None:
    model = nn.Identity().train()

    def broken(model: nn.Module, batch: torch.Tensor) -> dict[str, tuple[float, float]]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate_model(model, broken, Numbers(), batch=4, device=CPU)
    assert model.training


def test_language_models_get_bits_per_byte_and_nothing_to_count_is_nan() -> None:
    source = Numbers()
    source.bytes_per_token = 4.0  # type: ignore[attr-defined]
    values = evaluate_model(nn.Identity(), mean_of_values, source, batch=4, device=CPU)
    assert values["bits_per_byte"] == pytest.approx(4.5 / math.log(2) / 4)
    nothing = evaluate_model(nn.Identity(), lambda m, b: {"loss": (0.0, 0)}, Numbers(), batch=4, device=CPU)
    assert math.isnan(nothing["loss"])
