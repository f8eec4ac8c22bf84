"""Every way to train a decoder on so many devices, as arrays: each split that divides, times the other choices.

The splits are few (all ordered factorisations of the number of devices whose factors divide the model: 1e2 to 1e4),
so they are listed; microbatch, schedule, recompute, dtype and synchronisation are crossed with them in NumPy. All are
kept: with 1e4 to 1e6 candidates, exhaustive is quicker than clever and misses nothing. What changes the results of
training (another dtype, gradients exchanged quantized or rarely) is crossed in only where the caller holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from turbopump.core.errors import UsageError
from turbopump.core.workload import DTYPE_BYTES
from turbopump.planner.cases import (
    RECOMPUTES,
    SYNCHRONISATIONS,
    Case,
    Cases,
    DecoderShape,
    ParallelDims,
    Recompute,
    Schedule,
    Synchronisation,
)

Column = NDArray[np.int64]
SPLITS = tuple(f.name for f in fields(ParallelDims))
NUMBERS = (*SPLITS, "microbatch", "virtual_stages", "sync_every")
WORDS: Mapping[str, tuple[str, ...]] = {
    "recompute": get_args(Recompute), "schedule": get_args(Schedule), "synchronisation": get_args(Synchronisation),
    "dtype": tuple(name for name in DTYPE_BYTES if name in ("fp32", "tf32", "bf16", "fp16", "fp8")),
}  # fmt: skip
HOLDABLE = (*NUMBERS, *WORDS)
MOST_VIRTUAL_STAGES = 8
LEAST_TOKENS = 8192
"""Of a sequence on one context-parallel rank where its size is not held: the least that was published (Llama 3: 131,072
on 16 ranks; torchtitan 32,768). Nobody measured shorter ones, so that the model of time cannot be trusted there."""
ROWS_AT_ONCE = 1 << 20
UNEVEN = 0.05
"""More layers than there are that stages may be planned for, where the layers do not divide: each then counts as full
as the fullest. Llama 3's 126 layers on 16 stages, at most 8 a stage, count as 128."""
SYNC_EVERY = (16, 128)
"""Steps between exchanges that are tried with local updates (Douillard 2023: 500; 16 to 128 is usual)."""

Holds = Mapping[str, tuple[Any, ...]]
"""Values that a choice may take, by its name; a name that is absent is free."""


def read_holds(given: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The choices that `--fix NAME=VALUE[,VALUE]` holds; raises `UsageError` for names and values that are none."""
    holds: dict[str, tuple[Any, ...]] = {}
    for text in given:
        name, equals, listed = text.partition("=")
        name = name.strip()
        values = [value.strip() for value in listed.split(",") if value.strip()]
        if not equals or not values:
            raise UsageError(f"--fix {text!r} is not of the form NAME=VALUE, e.g. --fix tp=4")
        if name not in HOLDABLE:
            raise UsageError(f"--fix {text!r}: no such choice (known: {', '.join(HOLDABLE)})")
        if name in holds:
            raise UsageError(f"--fix {name} is given twice: list its values once, e.g. --fix {name}={','.join(values)}")
        if name in WORDS:
            if wrong := [value for value in values if value not in WORDS[name]]:
                raise UsageError(f"--fix {text!r}: {wrong[0]!r} is none of {', '.join(WORDS[name])}")
            holds[name] = tuple(values)
        else:
            if wrong := [value for value in values if not value.isdecimal() or not 0 < int(value) < 1 << 31]:
                raise UsageError(f"--fix {text!r}: {wrong[0]!r} is no whole number above 0, e.g. --fix {name}=4")
            holds[name] = tuple(dict.fromkeys(int(value) for value in values))
    return holds


@dataclass(frozen=True)
class Space:
    """What is searched: a case whose sizes and other settings all candidates share, on so many devices."""

    base: Case
    num_devices: int
    holds: Holds = field(default_factory=dict)
    """Choices that change what is learned (`dtype`, `synchronisation`) are those of `base` where they are not named."""

    @property
    def shape(self) -> DecoderShape:
        return self.base.shape

    def held(self, name: str, value: Any) -> bool:
        """Whether a choice may take the value."""
        return name not in self.holds or value in self.holds[name]

    def without(self, name: str) -> Space:
        return replace(self, holds={key: value for key, value in self.holds.items() if key != name})


@dataclass(frozen=True)
class Candidates:
    """The choices of each candidate, whole numbers in columns of one length. Words are indices."""

    pp: Column
    dp_replicate: Column
    dp_shard: Column
    cp: Column
    tp: Column
    ep: Column
    microbatch: Column
    virtual_stages: Column
    recompute: Column
    dtype: Column
    synchronisation: Column
    sync_every: Column
    dtypes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pp)

    def take(self, index: NDArray[Any]) -> Candidates:
        """Those at `index` (positions or a mask)."""
        return Candidates(**{name: getattr(self, name)[index] for name in _COLUMNS}, dtypes=self.dtypes)

    def value(self, name: str, position: int) -> Any:
        """The choice `name` of one candidate, in words where it has words."""
        if name == "schedule":
            return "interleaved" if self.virtual_stages[position] > 1 else "1f1b"
        number = int(getattr(self, name)[position])
        words = {"recompute": RECOMPUTES, "synchronisation": SYNCHRONISATIONS, "dtype": self.dtypes}.get(name)
        return words[number] if words else number

    def values(self, name: str) -> Column:
        """A column that tells the values of a choice apart."""
        return (self.virtual_stages > 1).astype(np.int64) if name == "schedule" else getattr(self, name)

    def cases(self, space: Space) -> Cases:
        """The candidates as the models of time and memory want them."""
        base, count = space.base, len(self)
        pattern = Cases.of([base])
        columns: dict[str, Any] = {
            f.name: np.broadcast_to(getattr(pattern, f.name), count) for f in fields(Cases) if f.name != "dtype"
        }
        columns |= {name: getattr(self, name).astype(np.float64) for name in NUMBERS}
        dp = columns["dp_replicate"] * columns["dp_shard"]
        layers = padded(base.shape.layers, self.pp * self.virtual_stages).astype(np.float64)
        columns |= {
            "layers": layers,
            "params": base.shape.params + (layers - base.shape.layers) * base.shape.layer_params,
            "num_microbatches": base.global_batch // (columns["microbatch"] * dp),
            # without cost in time, and memory falls (Korthikanti 2022)
            "sequence_parallel": (self.tp > 1).astype(np.float64),
            # a pipeline would gather the weights again for every microbatch: torchtitan's default too
            "reshard_after_forward": (self.pp == 1).astype(np.float64),
            "recompute": self.recompute,
            "schedule": (self.virtual_stages > 1).astype(np.int64),
            "synchronisation": self.synchronisation,
        }
        names = np.array(self.dtypes)[self.dtype] if count else np.array([], dtype=str)
        return Cases(**columns, dtype=tuple(names.tolist()))

    def case(self, space: Space, position: int) -> Case:
        """One candidate in full."""
        return replace(
            space.base, microbatch=self.value("microbatch", position),
            dims=ParallelDims(**{name: self.value(name, position) for name in SPLITS}),
            recompute=self.value("recompute", position), dtype=self.value("dtype", position),
            schedule=self.value("schedule", position), virtual_stages=self.value("virtual_stages", position),
            sequence_parallel=self.value("tp", position) > 1, reshard_after_forward=self.value("pp", position) == 1,
            synchronisation=self.value("synchronisation", position), sync_every=self.value("sync_every", position),
        )  # fmt: skip


_COLUMNS = tuple(f.name for f in fields(Candidates) if f.name != "dtypes")


def enumerate_candidates(space: Space) -> Candidates:
    """All of them; none where nothing divides (`turbopump.planner.search` says why)."""
    choices = [_microbatches(space), _stages(space), _recomputes(space), _dtypes(space)]
    grid = np.array(np.meshgrid(*choices, indexing="ij"), np.int64).reshape(4, -1)
    splits = np.array(list(_splits(space)), np.int64).reshape(-1, 6)
    at_once = max(1, ROWS_AT_ONCE // max(1, grid.shape[1]))
    parts = [_crossed(space, splits[i : i + at_once], grid) for i in range(0, max(1, len(splits)), at_once)]
    found = tuple(np.concatenate(column) for column in zip(*parts))
    return _synchronised(space, found)


def _crossed(space: Space, splits: Column, grid: Column) -> tuple[Column, ...]:
    """Each split [N, 6] with each of the other choices [4, M], where the sizes divide: 10 columns."""
    rows = np.repeat(np.arange(len(splits)), grid.shape[1])
    pp, dp_replicate, dp_shard, cp, tp, ep = splits[rows].T
    microbatch, stages, recompute, dtype = np.tile(grid, (1, len(splits)))
    dp = dp_replicate * dp_shard
    divides = (space.base.global_batch % (dp * microbatch) == 0) & even_enough(space.shape.layers, pp * stages)
    # the interleaved schedule takes microbatches in groups of as many as there are stages (Narayanan 2021)
    whole_groups = (space.base.global_batch // (dp * microbatch)) % pp == 0
    keep = divides & ((stages == 1) | ((pp > 1) & whole_groups))
    columns = (pp, dp_replicate, dp_shard, cp, tp, ep, microbatch, stages, recompute, dtype)
    return tuple(column[keep] for column in columns)


def _synchronised(space: Space, found: tuple[Column, ...]) -> Candidates:
    """Each candidate with each way to exchange gradients that it can use: alone, there is nothing to exchange."""
    parts = []
    several = found[1] * found[2] > 1
    for name in space.holds.get("synchronisation", (space.base.synchronisation,)):
        for every in space.holds.get("sync_every", SYNC_EVERY) if name == "local" else (1,):
            usable = several if name != "synchronous" else np.ones(len(several), bool)
            # local updates keep whole copies that drift apart: not with shards of one copy over all ranks
            usable = usable & (found[1] > 1) if name == "local" else usable
            index = np.full(int(usable.sum()), SYNCHRONISATIONS.index(name), np.int64)
            parts.append((*(column[usable] for column in found), index, np.full(len(index), every, np.int64)))
    if not parts:
        parts = [tuple(np.empty(0, np.int64) for _ in _COLUMNS)]
    columns = dict(zip(_COLUMNS, (np.concatenate(column) for column in zip(*parts))))
    return Candidates(**columns, dtypes=_dtype_names(space))


def divisors(number: int) -> list[int]:
    """All, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def padded(layers: int, chunks: Any) -> Any:
    """The layers there would be if every chunk had as many as the fullest; numbers or arrays."""
    return -(-layers // chunks) * chunks


def even_enough(layers: int, chunks: Any) -> Any:
    """Whether so many chunks of layers are filled, or nearly."""
    return padded(layers, chunks) <= layers * (1 + UNEVEN)


def _splits(space: Space) -> Iterator[tuple[int, ...]]:
    """(pp, dp_replicate, dp_shard, cp, tp, ep) of each split of all devices that divides the model."""
    shape, base = space.shape, space.base
    for tp in divisors(space.num_devices):
        if not space.held("tp", tp) or shape.heads % tp or shape.keys % min(tp, shape.keys):
            continue
        for pp in divisors(space.num_devices // tp):
            if not space.held("pp", pp) or not even_enough(shape.layers, pp):
                continue
            for cp in divisors(space.num_devices // tp // pp):
                if not space.held("cp", cp) or base.seq_len % cp:
                    continue
                if cp > 1 and "cp" not in space.holds and base.seq_len // cp < LEAST_TOKENS:
                    continue
                dp = space.num_devices // (tp * pp * cp)
                if base.global_batch % dp:
                    continue
                experts = [ep for ep in divisors(dp) if shape.experts % ep == 0 and space.held("ep", ep)]
                for dp_shard in divisors(dp):
                    if space.held("dp_shard", dp_shard) and space.held("dp_replicate", dp // dp_shard):
                        for ep in experts:
                            yield pp, dp // dp_shard, dp_shard, cp, tp, ep


def _microbatches(space: Space) -> list[int]:
    """Divisors of the batch that are small or powers of two: products gain nothing from others in between."""
    if "microbatch" in space.holds:
        return list(space.holds["microbatch"])
    return [n for n in divisors(space.base.global_batch) if n <= 8 or n & (n - 1) == 0]


def _stages(space: Space) -> list[int]:
    """Chunks of layers a stage holds: 1 for the plain schedule, more for the interleaved one."""
    known = [1, *range(2, min(MOST_VIRTUAL_STAGES, space.shape.layers) + 1)]
    if "virtual_stages" in space.holds:
        known = list(space.holds["virtual_stages"])
    return [n for n in known if space.held("schedule", "interleaved" if n > 1 else "1f1b")]


def _recomputes(space: Space) -> list[int]:
    return [i for i, name in enumerate(RECOMPUTES) if space.held("recompute", name)]


def _dtypes(space: Space) -> list[int]:
    return list(range(len(_dtype_names(space))))


def _dtype_names(space: Space) -> tuple[str, ...]:
    if "dtype" in space.holds:
        return tuple(space.holds["dtype"])
    return (space.base.dtype,)
