"""Batches are a function of the step: any ranks, any workers, any start; and every end leaves nothing behind."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from turbopump.core.errors import ConfigError, CorruptDataError, DatasetError, SampleError, UsageError
from turbopump.data.digits import DigitsConfig
from turbopump.data.loader import Loader, evaluation_batches
from turbopump.data.sources import DIGITS, TONES
from turbopump.data.tones import TonesConfig


class Noisy:
    """A user's map-style dataset that draws from all three global generators."""

    def __len__(self):
        return 53

    def __getitem__(self, index):
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([float(index), *draws], dtype=torch.float64), index


def global_batches(source, world_size, num_workers, start=0, steps=9, microbatch=2, global_batch=8):
    """Steps of all ranks joined in rank order."""
    loaders = [
        Loader(source, global_batch=global_batch, microbatch=microbatch, seed=3, rank=rank, world_size=world_size,
               start_step=start, num_steps=start + steps, num_workers=num_workers)
        for rank in range(world_size)
    ]  # fmt: skip
    joined = []
    for parts in zip(*loaders, strict=True):
        joined.append(tuple(torch.cat([batch[i] for part in parts for batch in part]) for i in range(2)))
    assert not multiprocessing.active_children()
    return joined


def same(a, b):
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", [Noisy(), DIGITS.open(DigitsConfig(shift=2), "train")], ids=["user", "digits"])
def test_the_same_global_batches_on_any_ranks_and_workers(source, world_size, num_workers):
    expected = global_batches(source, 1, 0, microbatch=0)
    assert same(global_batches(source, world_size, num_workers), expected)
    assert same(global_batches(source, world_size, num_workers, start=4, steps=5), expected[4:])


def test_augmentation_differs_by_epoch_and_sample_and_ids_name_the_samples():
    loader = Loader(Noisy(), global_batch=53, order="shuffle", seed=1)
    first, second = next(loader)[0], next(loader)[0]
    assert loader.ids(0) == [(0, i) for i in first[1].tolist()] and loader.ids(1)[0][0] == 1
    assert sorted(first[1].tolist()) == list(range(53)) and first[1].tolist() != second[1].tolist()
    draws = {tuple(row[1:].tolist()) for row in torch.cat([first[0], second[0]])}
    assert len(draws) == 106


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_training_process_keeps_its_random_states(num_workers):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with Loader(Noisy(), global_batch=4, num_workers=num_workers) as loader:
        next(loader)
        list(evaluation_batches(Noisy(), batch=20))
        assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_seek_goes_anywhere_with_and_without_workers():
    for num_workers in (0, 2):
        with Loader(Noisy(), global_batch=4, num_workers=num_workers) as loader:
            steps = [next(loader)[0][0] for _ in range(6)]
            loader.seek(2)
            assert torch.equal(next(loader)[0][0], steps[2]) and loader.step == 3
    assert not multiprocessing.active_children()


def test_sizes_that_do_not_divide_name_the_nearest_that_do():
    with pytest.raises(ConfigError, match=r"\(30\) must be divisible by the data-parallel size \(4\): use 28 or 32"):
        Loader(Noisy(), global_batch=30, world_size=4)
    with pytest.raises(ConfigError, match=r"global_batch \(24\) .* microbatch \(5\) times .* \(2\): use 20 or 30"):
        Loader(Noisy(), global_batch=24, microbatch=5, world_size=2)
    with pytest.raises(UsageError, match="not a map-style dataset"):
        Loader(iter([1]), global_batch=1)
    with pytest.raises(DatasetError, match="list has no samples"):
        Loader([], global_batch=1)


class Broken(Noisy):
    def __init__(self, error):
        self._error = error

    def __getitem__(self, index):
        if index == 11:
            raise self._error
        return super().__getitem__(index)


class BrokenBatches(Broken):
    randomness = "none"

    def __getitems__(self, indices):
        return [self[int(i)] for i in indices]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cls", [Broken, BrokenBatches])
def test_a_sample_that_fails_is_named(num_workers, cls):
    loader = Loader(cls(ValueError("bad pixel")), global_batch=4, order="sequential", num_workers=num_workers)
    next(loader), next(loader)
    with pytest.raises(SampleError, match=rf"sample 11 \(epoch 0\) of {cls.__name__}: ValueError: bad pixel"):
        next(loader)
    assert not multiprocessing.active_children()
    with pytest.raises(UsageError, match="closed"):
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_typed_errors_keep_their_type(num_workers):
    loader = Loader(Broken(CorruptDataError("block 3")), global_batch=20, order="sequential", num_workers=num_workers)
    with pytest.raises(CorruptDataError, match=r"^block 3$"):
        next(loader)


class Ragged(Noisy):
    def __getitem__(self, index):
        return torch.zeros(index)


def test_samples_that_do_not_stack_name_the_way_out():
    with pytest.raises(SampleError, match=r"samples 0, 1 cannot be made of Ragged|give the dataset a collate"):
        next(Loader(Ragged(), global_batch=2, order="sequential"))


class Deadly(Noisy):
    def __getitem__(self, index):
        if index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_worker_ends_with_a_typed_error_and_only_in_next():
    loader = Loader(Deadly(), global_batch=4, order="sequential", num_workers=2)
    for _ in range(4):
        next(loader)
    time.sleep(0.5)  # the worker dies while the training process is elsewhere: nothing is raised here
    with pytest.raises(SampleError, match="a loader process died while reading step"):
        for _ in range(8):
            next(loader)
    assert not multiprocessing.active_children()


def test_own_collation_and_tones_in_microbatches():
    loader = Loader(TONES.open(TonesConfig(train_samples=20), "train"), global_batch=8, microbatch=4, num_workers=1)
    with loader:
        batches = next(loader)
    assert len(batches) == 2
    for batch in batches:
        assert batch["features_BFT"].shape == (4, 64, int(batch["lengths_B"].max()))
        assert batch["labels_BL"].dtype == batch["label_lengths_B"].dtype == torch.int64


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("max_samples", [0, 10, 1000])
def test_evaluation_reads_each_sample_once(world_size, max_samples):
    batches = [
        list(evaluation_batches(Noisy(), batch=4, max_samples=max_samples, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    indices = [i for part in batches for batch in part for i in batch[1].tolist()]
    assert indices == ([53 * i // 10 for i in range(10)] if max_samples == 10 else list(range(53)))
    whole = torch.cat([b[0] for b in evaluation_batches(Noisy(), batch=53, max_samples=max_samples)])
    assert torch.equal(torch.cat([batch[0] for part in batches for batch in part]), whole)


def test_rank_0_has_a_share_of_the_fewest_samples():
    shares = [list(evaluation_batches(Noisy(), batch=4, max_samples=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [1, 0]


SCRIPT = textwrap.dedent("""
    import multiprocessing, sys, time, torch
    from turbopump.data.loader import Loader
    class Data:
        def __len__(self): return 100
        def __getitem__(self, index): time.sleep(0.01); return torch.zeros(3)
    loader = Loader(Data(), global_batch=2, num_workers=2)
    next(loader)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    for batch in loader: pass
""")


def start_script(body=SCRIPT):
    process = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    return process, [int(pid) for pid in process.stdout.readline().split()]


def all_gone(pids, within_s):
    end = time.monotonic() + within_s
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_ctrl_c_leaves_no_process_behind():
    process, pids = start_script()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, stderr = process.communicate(timeout=20)
    assert len(pids) == 2 and all_gone(pids, 5)
    assert stderr.count("KeyboardInterrupt") == 1  # the workers printed no traceback of their own


def test_an_end_without_close_does_not_hang():
    process, pids = start_script(SCRIPT.replace("for batch in loader: pass", "sys.exit(3)"))
    process.communicate(timeout=20)
    assert process.returncode == 3 and all_gone(pids, 5)


@pytest.mark.slow
def test_a_killed_training_process_takes_its_workers_with_it():
    process, pids = start_script()
    process.kill()
    process.communicate(timeout=20)
    assert all_gone(pids, 20)
