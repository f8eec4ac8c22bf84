"""Several datasets as one: `kind = "mixture"` of a recipe's `[data]`, and `MixtureSource` for datasets of any kind.

    [data]
    kind = "mixture"
    [[data.parts]]
    kind = "tokens"
    path = "web"
    weight = 0.9
    [[data.parts]] ...
    [[data.schedule]]
    start_step = 1000
    weights = [0.5, 0.5]

Which source stands at which place is `mixture_order`'s; here lies the index space of all samples one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from turbopump.core import plugins
from turbopump.core.config import BY_KIND, NonNegativeFloat, PositiveFloat, PositiveInt, setting
from turbopump.core.errors import DatasetError
from turbopump.core.files import digest
from turbopump.core.plugins import SourceKind
from turbopump.data.buckets import NUM_BUCKETS, lengths_of
from turbopump.data.mixture_batch import BatchMemory, placed, sample_schema
from turbopump.data.mixture_buckets import MixtureBucketOrder
from turbopump.data.mixture_order import MixtureOrder, Schedule, schedule_problems
from turbopump.data.order import BLOCK_SAMPLES, WINDOW_BLOCKS, OrderKind
from turbopump.data.sources import ArraysConfig, TokensConfig

_WEIGHT_DOC = "share of the samples; only the ratios of the weights matter"
_OF_ALL = ("seq_len", "vocab_size", "fields", "tokenizer", "encode", "decode")  # the same in every source, as checked


@dataclass(frozen=True, kw_only=True)
class TokensPart(TokensConfig):
    """Windows of tokens as a part of a mixture."""

    weight: PositiveFloat = setting(doc=_WEIGHT_DOC)


@dataclass(frozen=True, kw_only=True)
class ArraysPart(ArraysConfig):
    """Rows of arrays as a part of a mixture."""

    weight: PositiveFloat = setting(doc=_WEIGHT_DOC)


@dataclass(frozen=True, kw_only=True)
class WeightsChange:
    """Weights from a step on."""

    start_step: PositiveInt = setting(doc="first step of these weights")
    weights: tuple[NonNegativeFloat, ...] = setting(doc="one weight a part, in their order; 0 lets a part rest")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Several packed datasets of one kind, mixed by weight."""

    kind: Literal["mixture"] = setting("mixture", "several packed datasets of one kind, mixed by weight")
    parts: tuple[Annotated[TokensPart | ArraysPart, BY_KIND], ...] = setting(
        doc="`[[data.parts]]`: of each dataset the `kind` (`tokens` or `arrays`), the settings of that kind, a `weight`"
    )
    schedule: tuple[WeightsChange, ...] = setting(
        (), "`[[data.schedule]]`: other `weights` (one a part) from a `start_step` on"
    )

    @property
    def weights_by_step(self) -> list[tuple[int, tuple[float, ...]]]:
        changes = [(change.start_step, change.weights) for change in self.schedule]
        return [(0, tuple(part.weight for part in self.parts)), *changes]

    def problems(self) -> list[str]:
        """What does not hold between the parts."""
        if not self.parts:
            return ["parts: none given; name at least one dataset in [[data.parts]]"]
        problems = [f"schedule: {problem}" for problem in schedule_problems(self.weights_by_step, len(self.parts))]
        problems += [f"parts.{i}.{problem}" for i, part in enumerate(self.parts) for problem in part.problems()]
        for name in ("kind", "seq_len"):
            values = {getattr(part, name, None) for part in self.parts}
            if len(values) > 1:
                problems.append(f"parts: {name} is {' and '.join(sorted(map(str, values)))}: all parts need the same")
        return problems


class MixtureSource:
    """A map-style source over the samples of `sources`, one after the other: sample `offsets[s] + i` is s's sample i.

    `schedule` (see `MixtureOrder`; by default each source in proportion to its size) is what `make_order` mixes by.
    Raises `DatasetError` for no sources, an empty one, or two whose samples differ in fields, dtypes, shapes or
    tokenizer. `batch_buffers` is there where every source has it.
    """

    def __init__(self, sources: Sequence[Any], schedule: Schedule | None = None) -> None:
        if not sources:
            raise DatasetError("a mixture of no datasets: give at least one")
        self.sources = list(sources)
        self.names = [str(getattr(source, "name", type(source).__name__)) for source in sources]
        self.sizes = [len(source) for source in sources]
        if 0 in self.sizes:
            raise DatasetError(f"{self.names[self.sizes.index(0)]} has no samples: leave it out of the mixture")
        self._check_alike()
        self.name = f"mixture of {', '.join(self.names)}"
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.schedule: Schedule = schedule or [(0, self.sizes)]
        self._seeded = [getattr(source, "randomness", "seeded") != "none" for source in sources]
        self.randomness = "seeded" if any(self._seeded) else "none"
        self.releases_gil = all(getattr(source, "releases_gil", False) for source in sources)
        if all(hasattr(source, "batch_buffers") for source in sources):
            self.batch_buffers = self._batch_buffers
        if hasattr(sources[0], "collate"):
            self.collate = sources[0].collate

    def _check_alike(self) -> None:
        first = sample_schema(self.sources[0])
        for name, source in zip(self.names[1:], self.sources[1:]):
            other = sample_schema(source)
            for key in dict.fromkeys([*first, *other]):
                if first.get(key) != other.get(key):
                    raise DatasetError(
                        f"{self.names[0]} and {name} cannot be mixed: {key} is {first.get(key, 'absent')} in the one "
                        f"and {other.get(key, 'absent')} in the other: pack both alike"
                    )

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ALL and "sources" in self.__dict__:
            return getattr(self.sources[0], name)
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __getitem__(self, index: int) -> Any:
        source, local = self._located(index)
        return self.sources[source][local]

    def __getitems__(self, indices: Sequence[int] | np.ndarray, out: BatchMemory | None = None) -> Any:
        """The samples `indices` in their order: a batch of the sources' form, or a list where they give lists.

        With `out` (from `batch_buffers`, of at least as many rows) the batch lies there until it is used again.
        Raises `DatasetError` where what two sources return differs, `IndexError` for an index out of range.
        """
        rows = np.asarray(indices, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"sample index out of range 0 to {len(self) - 1}")
        numbers = np.searchsorted(self.offsets, rows, "right") - 1
        present = np.unique(numbers).tolist() or [0]
        wheres = [np.flatnonzero(numbers == number) for number in present]
        parts = [self._read(number, rows[where] - self.offsets[number], out) for number, where in zip(present, wheres)]
        if len(parts) == 1:
            return parts[0]
        return placed(parts, wheres, [self.names[number] for number in present], out or BatchMemory(len(rows)))

    def _read(self, number: int, local: np.ndarray, out: BatchMemory | None) -> Any:
        source = self.sources[number]
        if not hasattr(source, "__getitems__"):
            return [source[index] for index in local.tolist()]
        if out is not None:
            if number not in out.of_sources:
                out.of_sources[number] = source.batch_buffers(out.rows)
            return source.__getitems__(local, out=out.of_sources[number])
        return source.__getitems__(local if hasattr(source, "randomness") else local.tolist())

    def _batch_buffers(self, rows: int) -> BatchMemory:
        """Memory of a batch of up to `rows` rows; each source's own is made when it is first read from."""
        return BatchMemory(rows)

    def _located(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample index {index} out of range 0 to {len(self) - 1}")
        source = int(np.searchsorted(self.offsets, index, "right")) - 1
        return source, int(index - self.offsets[source])

    def describe(self, index: int) -> tuple[str, int]:
        """The name of the source that sample `index` comes from, and its number there."""
        source, local = self._located(index)
        return self.names[source], local

    @property
    def batches_ahead(self) -> int:
        """How many batches `prefetch` takes: as many as any of the sources."""
        return max(getattr(source, "batches_ahead", 0) for source in self.sources)

    @property
    def samples_ahead(self) -> int:
        return max(getattr(source, "samples_ahead", 0) for source in self.sources)

    def expect_order(self, order: str, window_samples: int) -> None:
        for source in self.sources:
            if hasattr(source, "expect_order"):
                source.expect_order(order, window_samples)

    def prefetch(self, indices: Sequence[int] | np.ndarray) -> None:
        """Tell each source of its rows of a batch to come."""
        rows = np.asarray(indices, np.int64)
        numbers = np.searchsorted(self.offsets, rows, "right") - 1
        for number in np.unique(numbers).tolist():
            if getattr(self.sources[number], "batches_ahead", 0):
                self.sources[number].prefetch(rows[numbers == number] - self.offsets[number])

    def forget(self) -> None:
        """Drop what was announced and not read."""
        for source in self.sources:
            if getattr(source, "batches_ahead", 0):
                source.forget()

    @property
    def digest(self) -> str:
        """Of the sources' digests, in their order; only where all have one."""
        return digest("\0".join(source.digest for source in self.sources).encode())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token over all tokens of all sources; only where all have one."""
        tokens = sum(source.num_tokens for source in self.sources)
        return sum(source.bytes_per_token * source.num_tokens for source in self.sources) / tokens

    def make_order(
        self,
        global_batch: int,
        *,
        order: OrderKind | Literal["bucketed"] = "shuffle",
        seed: int = 0,
        block_samples: int = BLOCK_SAMPLES,
        window_blocks: int = WINDOW_BLOCKS,
        num_buckets: int = NUM_BUCKETS,
    ) -> MixtureOrder | MixtureBucketOrder:
        """The order that a loader reads this source in (the hook described in `source_order`)."""
        mixed = MixtureOrder(
            self.sizes,
            self.schedule,
            global_batch,
            seed=seed,
            order="shuffle" if order == "bucketed" else order,
            block_samples=block_samples,
            window_blocks=window_blocks,
        )
        if order != "bucketed":
            return mixed
        lengths = [lengths_of(source) for source in self.sources]
        return MixtureBucketOrder(mixed, lengths, seed=seed, num_buckets=num_buckets)

    def __reduce__(self) -> tuple[Any, ...]:
        return MixtureSource, (self.sources, self.schedule)


def open_mixture(config: MixtureConfig, split: str) -> MixtureSource:
    sources = [plugins.find("turbopump.sources", part.kind).open(part, split) for part in config.parts]
    return MixtureSource(sources, config.weights_by_step)


def mixture_shape(config: MixtureConfig) -> Mapping[str, int]:
    """Sizes of one sample; raises `DatasetError` where two parts differ."""
    shapes = [dict(plugins.find("turbopump.sources", part.kind).shape(part)) for part in config.parts]
    for part, shape in zip(config.parts, shapes):
        if shape != shapes[0]:
            raise DatasetError(
                f"{config.parts[0].path} and {part.path} cannot be mixed: a sample has {shapes[0]} and {shape}"
            )
    return shapes[0]


MIXTURE = SourceKind(MixtureConfig, open_mixture, mixture_shape)
