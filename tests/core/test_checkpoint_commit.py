"""What a dead attempt leaves, what is kept, and how checkpoints are found, without torch."""

from __future__ import annotations

import pytest

from turbopump.core.checkpoint_commit import clear_abandoned, commit, remove, set_aside, stage, steps_to_keep
from turbopump.core.checkpoint_store import (
    CheckpointInfo,
    checkpoint_paths,
    find_checkpoint,
    latest,
    list_checkpoints,
    step_name,
)
from turbopump.core.config import CheckpointConfig
from turbopump.core.errors import CheckpointError


def save(directory, step, loss=None):
    metrics = None if loss is None else {"loss": loss}
    index = {"run_id": "r", "step": step, "world_size": 1, "metrics": metrics, "values": {}, "tensors": {}}
    return commit(stage(directory, step, 0), index, {})


def test_a_dead_attempt_is_cleared_and_a_half_replaced_step_comes_back(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    stage(tmp_path, 3, 0)
    (tmp_path / step_name(1)).rename(tmp_path / ".step-00000001.ab12.replaced")
    (tmp_path / ".step-00000009.ab12.trash").mkdir()
    (tmp_path / ".mine").mkdir()
    assert len(clear_abandoned(tmp_path)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", step_name(1), step_name(2)]
    assert all(info.problem is None for info in list_checkpoints(tmp_path))


def test_a_staged_checkpoint_is_not_listed_until_it_is_committed(tmp_path):
    staging = stage(tmp_path, 7, 0)
    assert list_checkpoints(tmp_path) == [] and latest(tmp_path) is None
    index = {"run_id": "r", "step": 7, "world_size": 1, "metrics": None, "values": {"a": 1}, "tensors": {}}
    assert commit(staging, index, {}).path == latest(tmp_path) == tmp_path / step_name(7)


def test_removed_and_set_aside_ones_leave_the_listing(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    remove(tmp_path / step_name(1))
    first = set_aside(tmp_path / step_name(2))
    save(tmp_path, 2)
    second = set_aside(tmp_path / step_name(2))
    assert checkpoint_paths(tmp_path) == [] and first != second and first.exists() and second.exists()


def test_damage_shows_in_the_listing_and_latest_passes_it_over(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / step_name(2) / "index.json").write_text("{}")
    good, bad = list_checkpoints(tmp_path)
    assert good.problem is None and "index.json differs from its checksum" in bad.problem
    assert latest(tmp_path) == find_checkpoint(tmp_path) == good.path


def test_needed_and_free_bytes_are_named_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"has .* free, 1 EB are needed: free some space"):
        stage(tmp_path / "c", 5, 10**18)
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize(
    "settings, losses, kept",
    [
        ({"keep_last": 2, "keep_best": False}, {}, {4, 5}),
        ({"keep_last": 9}, {}, {1, 2, 3, 4, 5}),
        ({"keep_last": 1, "keep_every": 2, "keep_best": False}, {1: 0.0}, {2, 4, 5}),
        ({"keep_last": 1}, {1: 0.5, 2: 0.5, 3: 0.7}, {2, 5}),
        ({"keep_last": 1}, {1: float("nan"), 2: float("-inf"), 3: 9.0}, {3, 5}),
        ({"keep_last": 1}, {}, {5}),
    ],
)
def test_what_is_kept(tmp_path, settings, losses, kept):
    infos = [
        CheckpointInfo(tmp_path, step, metrics={"loss": losses[step]} if step in losses else None)
        for step in range(1, 6)
    ]
    assert steps_to_keep(infos, CheckpointConfig(**settings)) == kept
