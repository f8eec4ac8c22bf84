"""Mixtures: exact accounting at every step, rows in order, and a refusal of what does not fit together."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core import config, plugins
from turbopump.core.errors import ConfigError, DatasetError, UsageError
from turbopump.data.manifest import Field
from turbopump.data.mixture import MIXTURE, MixtureConfig, MixtureSource, TokensPart, WeightsChange
from turbopump.data.mixture_order import MIX_BLOCK, MixtureOrder, taken_along, taken_of, whole_weights
from turbopump.data.order import Order
from turbopump.data.ragged import Ragged, ragged_of
from turbopump.data.source_order import source_order
from turbopump.pack import pack

WEIGHTS = st.lists(st.integers(0, 1000).map(lambda k: k / 1000), min_size=1, max_size=6).filter(sum)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, places=st.integers(0, 10**15))
def test_the_rule_of_quotas_adds_up_never_falls_and_stays_near_the_weight(weights, places):
    whole = whole_weights(weights)
    taken, more = taken_of(places, whole), taken_of(places + 1, whole)
    assert sum(taken) == places
    assert sorted(b - a for a, b in zip(taken, more)) == [0] * (len(weights) - 1) + [1]
    bound = Fraction(math.ceil(math.log2(len(weights))), 2)
    for count, weight in zip(taken, whole):
        assert abs(count - Fraction(places * weight, sum(whole))) <= bound
        assert weight or not count


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(sum),
    start=st.integers(0, 1 << 70),
    more=st.lists(st.integers(0, 1 << 18), min_size=1, max_size=5).map(sorted),
)
def test_quotas_of_many_blocks_at_once_follow_the_rule(weights, start, more):
    whole = whole_weights(weights)
    found = np.stack(taken_along(start, np.array(more), whole))
    at_start = taken_of(start, whole)
    expected = [[b - a for a, b in zip(at_start, taken_of(start + m, whole))] for m in more]
    assert found.T.tolist() == expected


@st.composite
def mixtures(draw):
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    weights = st.lists(st.integers(0, 100).map(lambda k: k / 100), min_size=len(sizes), max_size=len(sizes)).filter(sum)
    starts = sorted(draw(st.sets(st.integers(1, 300), max_size=3)))
    schedule = [(start, draw(weights)) for start in [0, *starts]]
    return MixtureOrder(
        sizes,
        schedule,
        draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 1000)),
        order=draw(st.sampled_from(["shuffle", "blocks", "sequential"])),
        block_samples=7,
        window_blocks=3,
        block_places=draw(st.integers(1, 3000)),
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(order=mixtures(), data=st.data())
def test_every_draw_is_accounted_for(order, data):
    steps = 400
    epochs, indices = (np.concatenate(part) for part in zip(*(order.step_ids(k) for k in range(steps))))
    sources = np.searchsorted(order.offsets, indices, "right") - 1
    for step in [0, steps, *data.draw(st.lists(st.integers(0, steps), max_size=5))]:
        counts = np.bincount(sources[: step * order.global_batch], minlength=len(order.sizes))
        assert np.array_equal(order.counts(step), counts)
        assert np.allclose(order.epochs(step) * order.sizes, counts)
    for number, size in enumerate(order.sizes):
        mine = sources == number
        local, epoch = indices[mine] - order.offsets[number], epochs[mine]
        assert np.array_equal(epoch, np.arange(len(local)) // size)  # each source walks its own epochs, in turn
        for whole in range(len(local) // size):
            assert np.array_equal(np.sort(local[whole * size : (whole + 1) * size]), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(order=mixtures(), step=st.integers(0, 1 << 40))
def test_a_step_does_not_depend_on_those_asked_before(order, step):
    late = np.stack(order.step_ids(step))
    order.step_ids(0)
    first, count = step * order.global_batch, order.global_batch
    assert np.array_equal(late, np.stack(order.at(first, count)))
    assert np.array_equal(order.ahead(step, 3)[:count], late[1])
    taken = order.counts(step + 1) - order.counts(step)
    assert np.array_equal(
        taken, np.bincount(np.searchsorted(order.offsets, late[1], "right") - 1, minlength=len(taken))
    )


def test_small_weights_are_exact_in_the_long_run():
    order = MixtureOrder([10**6, 10**6, 10**6], [(0, [0.9, 0.0999, 0.0001])], 256)
    steps = 10**7  # 2.56e9 samples, a whole number of blocks
    assert order.counts(steps).tolist() == [2_304_000_000, 255_744_000, 256_000]


def test_samples_are_mixed_inside_a_block():
    indices = MixtureOrder([100, 100], [(0, [0.5, 0.5])], MIX_BLOCK, seed=1).step_ids(0)[1]
    halves = (indices < 100).reshape(2, -1).sum(axis=1)
    assert halves.sum() == MIX_BLOCK // 2 and abs(halves[0] - halves[1]) < 60


def test_weights_of_a_later_step_do_not_change_the_steps_before():
    short = MixtureOrder([50, 60], [(0, [1, 2])], 7, seed=4)
    long = MixtureOrder([50, 60], [(0, [1, 2]), (90, [0, 1])], 7, seed=4)
    for step in range(90):
        assert np.array_equal(np.stack(short.step_ids(step)), np.stack(long.step_ids(step)))
    assert (long.step_ids(90)[1] >= 50).all()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "begin at 0"),
        ([(5, [1, 1])], "begin at 0"),
        ([(0, [1, 1]), (9, [1, 1]), (9, [1, 2])], "begin at 0 and go up"),
        ([(0, [1])], "1 weights from step 0 on for 2 sources"),
        ([(0, [0, 0])], "not all 0"),
        ([(0, [1, -1])], ">= 0"),
        ([(0, [1, float("nan")])], ">= 0"),
        ([(0, [1, float("inf")])], ">= 0"),
    ],
)
def test_schedules_that_do_not_hold(schedule, message):
    with pytest.raises(UsageError, match=message):
        MixtureOrder([10, 10], schedule, 4)


class _Rows:
    """Rows whose values tell where they come from, in one of the forms a source may return."""

    randomness = "none"
    releases_gil = True

    def __init__(self, name, size, form, base):
        self.name, self.size, self.form, self.base = name, size, form, base
        self.digest = f"digest-{name}"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"array": np.int64(self.base + index), "list": str(self.base + index)}.get(
            self.form, (np.int64(self.base + index),)
        )

    def __getitems__(self, indices):
        rows = np.asarray(indices) + self.base
        if self.form == "list":
            return [str(row) for row in rows]
        ragged = ragged_of([np.full(row % 5, row) for row in rows.tolist()]) if len(rows) else None
        return {
            "array": rows,
            "tuple": (rows, rows[:, None] * [1.0, 2.0]),
            "dict": {"x": rows, "inner": {"y": -rows}},
            "ragged": {"x": ragged, "y": rows},
        }[self.form]


def _values(form, batch):
    if form == "array":
        return batch.tolist()
    if form == "list":
        return [int(row) for row in batch]
    if form == "tuple":
        assert np.array_equal(batch[1], batch[0][:, None] * [1.0, 2.0])
        return batch[0].tolist()
    if form == "dict":
        assert np.array_equal(batch["inner"]["y"], -batch["x"])
        return batch["x"].tolist()
    assert isinstance(batch["x"], Ragged)
    assert [row.tolist() for row in batch["x"]] == [[y] * (y % 5) for y in batch["y"].tolist()]
    return batch["y"].tolist()


@pytest.mark.parametrize("form", ["array", "list", "tuple", "dict", "ragged"])
@settings(max_examples=25, deadline=None)
@given(indices=st.lists(st.integers(0, 29), min_size=1, max_size=20))
def test_rows_come_back_in_their_order(form, indices):
    source = MixtureSource([_Rows("a", 10, form, 100), _Rows("b", 5, form, 200), _Rows("c", 15, form, 300)])
    expected = [100 + k if k < 10 else 190 + k if k < 15 else 285 + k for k in indices]
    assert _values(form, source.__getitems__(np.array(indices))) == expected


class _Buffered(_Rows):
    def batch_buffers(self, rows):
        return np.empty(rows, np.int64)

    def __getitems__(self, indices, out=None):
        if out is None:
            return super().__getitems__(indices)
        out[: len(indices)] = np.asarray(indices) + self.base
        return out[: len(indices)]


def test_a_batch_may_lie_in_memory_that_is_used_again():
    source = MixtureSource([_Buffered("a", 10, "array", 100), _Buffered("b", 10, "array", 200)])
    buffers = source.batch_buffers(6)
    first = source.__getitems__(np.array([1, 15, 2, 19, 3, 10]), out=buffers)
    assert first.tolist() == [101, 205, 102, 209, 103, 200]
    second = source.__getitems__(np.array([10, 0, 11]), out=buffers)
    assert second.tolist() == [200, 100, 201] and np.shares_memory(first, second)
    assert source.__getitems__(np.array([3, 4]), out=buffers).tolist() == [103, 104]
    assert not hasattr(MixtureSource([_Rows("a", 3, "array", 0), _Buffered("b", 3, "array", 9)]), "batch_buffers")


def test_what_a_mixture_says_of_itself():
    source = MixtureSource([_Rows("a", 10, "array", 100), _Rows("b", 5, "array", 200)])
    assert len(source) == 15 and source[12] == 202 and source.describe(12) == ("b", 2)
    assert source.randomness == "none" and source.releases_gil and not hasattr(source, "vocab_size")
    swapped = MixtureSource([_Rows("b", 5, "array", 200), _Rows("a", 10, "array", 100)])
    assert source.digest != swapped.digest
    again = pickle.loads(pickle.dumps(source))
    assert again.digest == source.digest and again[12] == 202
    for index in (-1, 15):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.__getitems__(np.array([index]))


def test_a_mixture_makes_its_own_order():
    source = MixtureSource([_Rows("a", 10, "array", 0), _Rows("b", 5, "array", 0)], [(0, [1, 3])])
    order = source_order(source, 4, order="sequential", seed=3)
    assert isinstance(order, MixtureOrder) and order.n == 15
    assert order.counts(256 * 4).tolist() == [1024, 3072]
    with pytest.raises(UsageError, match="bucketed"):
        source_order(source, 4, order="bucketed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": (Field("x", "int32"),)}, "a and b cannot be mixed: field x is array int64 .* array int32"),
        ({"fields": (Field("y", "int64"),)}, "field x is array int64 .* and absent in the other"),
        ({"fields": (Field("x", "int64", (2,)),)}, r"array int64 \[2\] in the other"),
        ({"vocab_size": 300}, "vocab_size is 256 in the one and 300 in the other"),
        ({"seq_len": 9}, "seq_len is 8 in the one and 9"),
    ],
)
def test_datasets_of_different_schemas_are_refused(change, message):
    first, second = _Rows("a", 10, "array", 0), _Rows("b", 10, "array", 0)
    for source in (first, second):
        source.fields, source.vocab_size, source.seq_len = (Field("x", "int64"),), 256, 8
    MixtureSource([first, second])
    for name, value in change.items():
        setattr(second, name, value)
    with pytest.raises(DatasetError, match=message):
        MixtureSource([first, second])


def test_samples_are_compared_where_fields_are_not_named():
    with pytest.raises(DatasetError, match="a and b cannot be mixed: a sample is int64"):
        MixtureSource([_Rows("a", 3, "array", 0), _Rows("b", 3, "list", 0)])
    with pytest.raises(DatasetError, match="no samples"):
        MixtureSource([_Rows("a", 3, "array", 0), _Rows("b", 0, "array", 0)])
    with pytest.raises(DatasetError, match="no datasets"):
        MixtureSource([])


def test_batches_that_differ_after_all_are_refused():
    source = MixtureSource([_Rows("a", 3, "dict", 0), _Rows("b", 3, "tuple", 0)])
    with pytest.raises(DatasetError, match=r"a and b cannot be mixed: a batch is a mapping of x, inner .* tuple of 2"):
        source.__getitems__([0, 4])


PARTS = [
    {"kind": "tokens", "path": "a", "seq_len": 8, "weight": 0.75},
    {"kind": "tokens", "path": "b", "seq_len": 8, "weight": 0.25},
]


@pytest.fixture
def installed(monkeypatch):
    find = plugins.find
    monkeypatch.setattr(plugins, "find", lambda group, kind: MIXTURE if kind == "mixture" else find(group, kind))


def _parsed(**data):
    return config.parse({"model": {"kind": "live"}, "data": {"kind": "mixture", "parts": PARTS, **data}})


def test_a_recipe_holds_a_mixture_and_is_printed_again(installed):
    read = _parsed(schedule=[{"start_step": 100, "weights": [0.5, 0.5]}])
    assert read.data == MixtureConfig(
        parts=(TokensPart(path="a", seq_len=8, weight=0.75), TokensPart(path="b", seq_len=8, weight=0.25)),
        schedule=(WeightsChange(start_step=100, weights=(0.5, 0.5)),),
    )
    assert config.parse(config.from_toml(config.dumps(read))) == read
    assert read.data.weights_by_step == [(0, (0.75, 0.25)), (100, (0.5, 0.5))]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"parts": []}, "data.parts: none given"),
        ({"parts": [*PARTS, {"path": "c", "weight": 1.0}]}, "data.parts.2"),
        ({"parts": [*PARTS, {"kind": "digits", "weight": 1.0}]}, "data.parts.2"),
        ({"parts": [{**PARTS[0], "weight": 0}]}, "data.parts.0.weight: 0 given"),
        (
            {"parts": [{**PARTS[0], "seq_length": 4}]},
            "data.parts.0.seq_length: no such setting; did you mean 'seq_len'",
        ),
        ({"parts": [{"kind": "arrays", "weight": 1.0}]}, "data.parts.0.path: this setting is needed"),
        ({"parts": [PARTS[0], {**PARTS[1], "seq_len": 9}]}, "data.parts: seq_len is 8 and 9"),
        (
            {"parts": [PARTS[0], {"kind": "arrays", "path": "c", "weight": 1.0}]},
            "data.parts: kind is arrays and tokens",
        ),
        ({"schedule": [{"start_step": 5, "weights": [1.0]}]}, "data.schedule: 1 weights from step 5 on for 2 sources"),
        ({"schedule": [{"start_step": 0, "weights": [1, 1]}]}, "data.schedule.0.start_step: 0 given"),
        ({"schedule": [{"start_step": 2, "weights": [1, 1], "step": 3}]}, "data.schedule.0.step: no such setting"),
    ],
)
def test_recipes_with_problems(installed, data, problem):
    with pytest.raises(ConfigError) as caught:
        _parsed(**data)
    assert any(found.startswith(problem) for found in caught.value.problems), caught.value.problems


def _packed(place, text, **options):
    manifest = pack(iter([text] * 40), place, validation=0.2, **options)
    assert manifest.kind == "tokens"
    return {"kind": "tokens", "path": str(place), "seq_len": 16, "weight": 1.0}


def test_packed_token_datasets_are_mixed_and_read(installed, tmp_path):
    parts = [_packed(tmp_path / name, text) for name, text in (("a", "alpha " * 20), ("b", "beta " * 30))]
    data = _parsed(parts=parts).data
    mixture = MIXTURE.open(data, "train")
    alone = [plugins.find("turbopump.sources", "tokens").open(part, "train") for part in data.parts]
    assert MIXTURE.shape(data) == {"seq_len": 16, "vocab_size": mixture.vocab_size}
    assert len(mixture) == sum(map(len, alone)) and mixture.decode(mixture.encode("beta")) == "beta"
    indices = source_order(mixture, 32, seed=1).step_ids(3)[1]
    rows = mixture.__getitems__(indices)
    first = len(alone[0])
    assert np.array_equal(rows, np.stack([alone[0][k] if k < first else alone[1][k - first] for k in indices.tolist()]))
    tokens = [source.num_tokens for source in alone]
    source_bytes = sum(source.bytes_per_token * count for source, count in zip(alone, tokens))
    assert mixture.bytes_per_token == pytest.approx(source_bytes / sum(tokens))


def test_datasets_of_different_tokenizers_are_refused(installed, tmp_path):
    parts = [
        _packed(tmp_path / "a", "some words to learn from " * 20, tokenizer="bpe", vocab_size=260),
        _packed(tmp_path / "b", "others are not the same, 1 2 3 " * 20, tokenizer="bpe", vocab_size=260),
    ]
    with pytest.raises(DatasetError, match=r"cannot be mixed: tokenizer is"):
        MIXTURE.open(_parsed(parts=parts).data, "train")


def test_plain_and_mixed_orders_of_one_source_agree():
    """A mixture of one source is its own order with another seed: nothing is lost or doubled on the way."""
    mixed = MixtureOrder([1000], [(0, [0.3])], 24, order="sequential")
    plain = Order(1000, 24, order="sequential")
    for step in (0, 41, 42, 10**9):
        assert np.array_equal(np.stack(mixed.step_ids(step)), np.stack(plain.step_ids(step)))
