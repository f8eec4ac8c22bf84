"""Batches are a function of the step: any ranks, any readers, any start; errors name the sample."""

import os
import random
import signal
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch

from tests.processes import is_alive, wait_until
from turbopump.core.errors import ConfigError, CorruptDataError, DatasetError, SampleError, UsageError
from turbopump.data import read_choice
from turbopump.data.aligned import aligned_empty
from turbopump.data.digits import DigitsConfig
from turbopump.data.loader import Loader, evaluation_batches
from turbopump.data.read_ahead import Filled, Task
from turbopump.data.read_choice import judged
from turbopump.data.sources import DIGITS, TONES
from turbopump.data.tones import TonesConfig

OTHERS: set[psutil.Process] = set()
"""Children of this process that were there before the test: another test's, or a resource tracker."""


@pytest.fixture(autouse=True)
def others() -> Iterator[None]:
    OTHERS.update(psutil.Process().children())
    yield
    OTHERS.clear()


def readers() -> list[psutil.Process]:
    """The processes that the loaders of this test have, zombies included."""
    return [child for child in psutil.Process().children() if child not in OTHERS]


class Noisy:
    """A user's map-style dataset that draws from all three global generators."""

    def __len__(self):
        return 53

    def __getitem__(self, index):
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([float(index), *draws], dtype=torch.float64), index


class Table:
    """Records of one memory-mapped array, gathered without the GIL into memory that is used again."""

    randomness = "none"
    releases_gil = True

    def __init__(self, path, num=53, width=5000):
        values = np.arange(num * width, dtype=np.int32).reshape(num, width) * 7919
        values.tofile(path)
        self.values = np.asarray(np.memmap(path, np.int32, "r", shape=(num, width)))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index].copy(), np.int64(index)

    def batch_buffers(self, rows):
        return aligned_empty((rows, self.values.shape[1]), np.int32), aligned_empty(rows, np.int64)

    def __getitems__(self, indices, out=None):
        values, numbers = self.batch_buffers(len(indices)) if out is None else out
        np.take(self.values, indices, axis=0, out=values, mode="clip")
        numbers[:] = indices
        return values, numbers


def global_batches(source, world_size, num_workers, start=0, steps=9, microbatch=2, global_batch=8, **options):
    """Steps of all ranks joined in rank order."""
    loaders = [
        Loader(source, global_batch=global_batch, microbatch=microbatch, seed=3, rank=rank, world_size=world_size,
               start_step=start, num_steps=start + steps, num_workers=num_workers, **options)
        for rank in range(world_size)
    ]  # fmt: skip
    joined = []
    for parts in zip(*loaders, strict=True):
        joined.append(tuple(torch.cat([batch[i] for part in parts for batch in part]) for i in range(2)))
    assert not readers()
    return joined


def same(a, b):
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.slow
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
    assert not readers()


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
    assert not readers()
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a loader process was killed")
@pytest.mark.parametrize("batched", [False, True])
def test_a_record_that_kills_its_process_twice_is_named_and_only_in_next(batched):
    source = DeadlyBatches() if batched else Deadly()
    loader = Loader(source, global_batch=4, order="sequential", num_workers=2, workers="processes")
    for _ in range(4):
        next(loader)
    # the reader dies while the training process is elsewhere: nothing is raised here
    wait_until(lambda: not all(is_alive(reader.pid) for reader in readers()), "the death of a reader")
    for step in range(4, 7):  # those before are delivered
        assert next(loader)[0][1].tolist() == list(range(4 * step, 4 * step + 4))
    with pytest.raises(
        SampleError,
        match=rf"killed by SIGKILL while reading sample 30 \(epoch 0\) of {loader.source.__class__.__name__}, again",
    ):
        next(loader)
    assert not readers()


class DiesOnce(Noisy):
    """Record 30 ends the first process that reads it: what a lack of memory looks like."""

    def __init__(self, mark):
        self._mark = mark

    def __getitem__(self, index):
        if index == 30 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_process_that_dies_once_is_started_again_with_the_same_work(tmp_path):
    options = {"global_batch": 4, "order": "sequential", "num_steps": 13}
    expected = list(Loader(Noisy(), **options))
    with pytest.warns(RuntimeWarning, match=r"killed by SIGKILL while reading sample 30 .* started again"):
        with Loader(DiesOnce(tmp_path / "mark"), **options, num_workers=2) as loader:
            got = list(loader)
    assert same([step[0] for step in got], [step[0] for step in expected]) and loader.stats["restarts"] == 1


class Slow(Noisy):
    def __getitem__(self, index):
        time.sleep(0.001)
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.parametrize("kill_every", [15, 1])
def test_processes_killed_from_outside_are_started_again_a_few_times(kill_every):
    expected = list(Loader(Noisy(), global_batch=4, num_steps=60))
    loader = Loader(Slow(), global_batch=4, num_steps=60, num_workers=2)
    got = []
    with pytest.warns(RuntimeWarning, match="killed by SIGKILL"):
        try:
            for step, batches in enumerate(loader):
                got.append(batches)
                if step % kill_every == 0:
                    readers()[0].kill()
        except SampleError as error:
            assert kill_every == 1 and ("of this loader: " in str(error) or ", again: " in str(error))
        else:
            assert kill_every == 15 and 1 <= loader.stats["restarts"] <= 4
    assert same([step[0] for step in got], [step[0] for step in expected[: len(got)]])
    assert kill_every == 1 or len(got) == 60
    loader.close()


class DeadlyBatches(Deadly):
    randomness = "none"

    def __getitem__(self, index):
        if index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1), index

    def __getitems__(self, indices):
        return [self[int(index)] for index in indices]


class Located(Broken):
    def locate(self, index):
        return f"train-00012.arrow row {index + 6}"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_says_where_the_sample_lies(num_workers):
    loader = Loader(Located(ValueError("bad")), global_batch=12, order="sequential", num_workers=num_workers)
    with pytest.raises(
        SampleError, match=r"sample 11 \(epoch 0\) at train-00012.arrow row 17 of Located: ValueError: bad"
    ):
        next(loader)


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


KINDS = [(0, "auto"), (1, "threads"), (3, "threads"), (1, "processes"), (3, "processes")]


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "workers"), KINDS)
@pytest.mark.parametrize("copy", [True, False])
def test_every_kind_of_reader_gives_the_same_batches(tmp_path, num_workers, workers, copy):
    source = Table(tmp_path / "table")
    expected = global_batches(source, 1, 0, steps=40, microbatch=0)
    options = {"num_workers": num_workers, "workers": workers, "copy": copy}
    assert same(global_batches(source, 2, steps=40, **options), expected)
    assert same(global_batches(source, 1, start=17, steps=23, microbatch=4, **options), expected[17:])


@pytest.mark.slow
def test_any_schedule_of_ranks_readers_and_stops_gives_the_same_batches(tmp_path):
    table, chosen = Table(tmp_path / "table", width=300), random.Random(5)
    for source in (table, Noisy()):
        expected = global_batches(source, 1, 0, steps=24, microbatch=0)
        for _ in range(3):
            step, got = 0, []
            while step < 24:
                steps = min(chosen.randint(1, 9), 24 - step)
                kinds = KINDS if source is table else [KINDS[0], *KINDS[3:]]
                num_workers, workers = chosen.choice(kinds)
                options = {"workers": workers, "prefetch_steps": chosen.randint(1, 4), "copy": chosen.random() < 0.5}
                got += global_batches(source, chosen.choice([1, 2, 4]), num_workers, step, steps, **options)
                step += steps
            assert same(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "workers"), KINDS)
def test_a_batch_is_kept_or_valid_until_the_next(tmp_path, num_workers, workers):
    options = {"global_batch": 8, "num_steps": 30, "num_workers": num_workers, "workers": workers}
    source = Table(tmp_path / "table", width=40_000)  # a step is more than a hand-off: one in a slot
    with Loader(source, **options) as loader:
        kept = list(loader)
    for step, batches in enumerate(kept):
        assert batches[0][1].tolist() == [index for _, index in loader.ids(step)]
    with Loader(source, **options, copy=False) as loader:
        places = set()
        for step, batches in enumerate(loader):
            values, numbers = batches[0]
            assert torch.equal(values, kept[step][0][0]) and torch.equal(numbers, kept[step][0][1])
            assert values.data_ptr() % 4096 == 0
            places.add(values.data_ptr())
        assert len(places) <= 2 * (num_workers * 2 + 1) + 1  # a slot of processes moves when it grows
    values[:] = 0  # what lies in the ring may be written to, and outlives the loader


def test_steps_are_not_read_further_ahead_than_the_ring_is_long(tmp_path):
    read = []

    class Counted(Table):
        def __getitems__(self, indices, out=None):
            read.append(len(indices))
            return super().__getitems__(indices, out)

    with Loader(Counted(tmp_path / "t", width=70000), global_batch=4, num_workers=2, prefetch_steps=3) as loader:
        for _ in range(4):
            next(loader)
        time.sleep(0.2)
        assert len(read) <= 4 + 2 * 3  # four given, and every slot filled but the one in hand
        assert loader.stats.keys() == {"ready_steps", "read_s", "wait_s", "restarts"}


@pytest.mark.slow
def test_auto_measures_and_its_choice_can_be_given_back(tmp_path):
    cases = [(Noisy(), "processes"), (Slow(), "processes"), (Table(tmp_path / "t", 53, 300), "threads"),
             (Table(tmp_path / "u", 53, 300_000), "threads")]  # fmt: skip
    for source, kind in cases:
        expected = list(Loader(source, global_batch=4, num_steps=12))
        with Loader(source, global_batch=4, num_steps=12, num_workers="auto") as loader:
            got = list(loader)
        assert same([step[0] for step in got], [step[0] for step in expected])
        assert loader.choice["workers"] in (kind, "none") and "a step is read in" in loader.choice["why"]
        assert loader.choice["evidence"]["step_bytes"] == sum(tensor.nbytes for tensor in got[0][0])
        with Loader(source, global_batch=4, num_steps=12, choice=loader.choice) as again:
            assert same([step[0] for step in again], [step[0] for step in expected])
            assert again.choice == loader.choice
    with pytest.raises(ConfigError, match="choice: workers 'gpus'"):
        Loader(Noisy(), global_batch=4, choice={"workers": "gpus", "num_workers": 1})
    with pytest.raises(ConfigError, match="num_workers: -1 given"):
        Loader(Noisy(), global_batch=4, num_workers=-1)


@pytest.mark.parametrize(
    ("read_s", "every_s", "workers"), [(1e-4, 5e-5, "none"), (2e-3, 1e-3, "threads"), (2e-3, 3e-3, "none")]
)
def test_readers_are_taken_where_steps_come_as_fast_as_the_caller_reads_them(read_s, every_s, workers):
    tried = {"workers": "threads", "num_workers": 2, "why": "tried"}
    ends = [0.5, 0.5, *(0.5 + every_s * (number + 1) for number in range(3))]  # starting up took half a second
    done = [Filled(Task(step, 1, step), [[]], read_s, 100, end) for step, end in enumerate(ends)]
    choice = judged(tried, done, 5)
    assert choice["workers"] == workers and choice["evidence"]["read_s"] == read_s
    assert judged(tried, done[:2], 5)["workers"] == ("none" if read_s < 1e-3 else "threads")


@pytest.mark.parametrize("quick_read_s", [0.0, 10.0])
def test_auto_tells_a_bad_sample_as_ever(monkeypatch, quick_read_s):
    monkeypatch.setattr(read_choice, "QUICK_READ_S", quick_read_s)
    loader = Loader(Broken(ValueError("bad")), global_batch=4, order="sequential", num_workers="auto")
    next(loader), next(loader)
    with pytest.raises(SampleError, match="sample 11"):
        next(loader)


def test_threads_are_refused_to_a_source_that_draws_random_numbers():
    with pytest.raises(UsageError, match=r"Noisy draws from the global random number generators.*workers=processes"):
        next(Loader(Noisy(), global_batch=4, num_workers=2, workers="threads"))


class Reversed:
    def __init__(self, global_batch=4, **settings):
        assert global_batch == 4

    def step_ids(self, step):
        return np.full(4, step), np.arange(4)[::-1] + step


def test_an_order_may_come_from_the_caller_or_the_source(tmp_path):
    table = Table(tmp_path / "t")
    assert next(Loader(table, global_batch=4, order=Reversed(), start_step=3))[0][1].tolist() == [6, 5, 4, 3]
    table.make_order = lambda global_batch, **_: Reversed(global_batch=global_batch)
    assert Loader(table, global_batch=4).ids(1) == [(1, 4), (1, 3), (1, 2), (1, 1)]


def test_a_process_that_cannot_be_forked_is_an_error_of_the_loader(monkeypatch):
    def refused():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    with pytest.raises(SampleError, match=r"cannot be started \(Resource temporarily.*smaller loader.num_workers"):
        next(Loader(Noisy(), global_batch=4, num_workers=2))
