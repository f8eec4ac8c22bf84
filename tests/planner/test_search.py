import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

from turbopump.core.errors import PlanError, UsageError
from turbopump.hardware.specs import DeviceSpec, LinkSpec
from turbopump.planner.candidates import LEAST_TOKENS, Space, divisors, enumerate_candidates, read_holds
from turbopump.planner.cases import RECOMPUTES, Case, Cases, DecoderShape, ParallelDims, StepTimes
from turbopump.planner.machine import Machine
from turbopump.planner.search import Fit, Models, rank, search

SHAPE = DecoderShape(512, 12, 8, 1000, 2048, kv_heads=4, name="small")
CASE = Case(SHAPE, 4 * LEAST_TOKENS, 24, 1)
GIB = 1 << 30


def machine(num_devices: int, memory_gib: float = 1000.0, devices_per_node: int = 4) -> Machine:
    device = DeviceSpec("test device", {"bf16": 1e14, "fp8": 2e14}, int(memory_gib * GIB), 1e12)
    return Machine(device, num_devices, devices_per_node, LinkSpec("inside", "node", 1e11, 1e-6),
                   LinkSpec("outside", "rack", 1e10, 1e-5))  # fmt: skip


def times(cases: Cases, place: Machine) -> StepTimes:
    """A model with the trade-offs of a real one: arithmetic, tensor-parallel traffic, bubble, gradients."""
    nothing = np.zeros(len(cases))
    peak = np.array([place.device.flops_per_s[dtype] for dtype in cases.dtype])
    rate = peak * cases.microbatch / (1 + cases.microbatch)
    again = np.array([1.0, 1.1, 1.33])[cases.recompute]
    compute = 6 * cases.params * cases.global_batch * cases.seq_len / cases.num_devices / rate * again
    assert place.node is not None and place.network is not None
    link = np.where(cases.tp > place.devices_per_node, place.network.bytes_per_s, place.node.bytes_per_s)
    tensor = (cases.tp - 1) / cases.tp * cases.global_batch * cases.seq_len * cases.hidden * cases.layers / link
    gradients = (1 - 1 / cases.dp) * cases.params * 4 / cases.tp / cases.pp / place.network.bytes_per_s
    factor = np.array([1.0, 0.25, 1.0])[cases.synchronisation] / cases.sync_every
    bubble = compute * (cases.pp - 1) / cases.num_microbatches / cases.virtual_stages
    return StepTimes(nothing, compute, tensor + gradients * factor, bubble, nothing, nothing + 1e-3)


def memory(cases: Cases, place: Machine) -> Fit:
    states = cases.params * 16 / cases.tp / cases.pp / cases.dp_shard
    kept = cases.microbatch * cases.seq_len * cases.hidden * cases.layers / cases.pp / cases.tp
    peak = states + kept * np.array([60.0, 30.0, 2.0])[cases.recompute]
    assert place.device.memory_bytes is not None
    return Fit(peak, peak <= place.device.memory_bytes)


MODELS = Models(times, memory, lambda cases, _: np.full(len(cases), 0.05))


def brute_force(space: Space) -> set[Case]:
    """Every combination of small sizes that `Case.problems` has nothing against."""
    found = set()
    numbers = divisors(space.num_devices)
    for pp, replicate, shard, cp, tp in itertools.product(numbers, repeat=5):
        if pp * replicate * shard * cp * tp != space.num_devices:
            continue
        for ep in divisors(replicate * shard):
            dims = ParallelDims(pp, replicate, shard, cp, tp, ep)
            for microbatch, stages, mode in itertools.product((1, 2, 3, 4, 6, 8), range(1, 9), RECOMPUTES):
                case = replace(space.base, dims=dims, microbatch=microbatch, virtual_stages=stages, recompute=mode,
                               schedule="interleaved" if stages > 1 else "1f1b", sequence_parallel=tp > 1,
                               reshard_after_forward=pp == 1)  # fmt: skip
                whole_groups = stages == 1 or (pp > 1 and case.num_microbatches % pp == 0)
                if not case.problems() and (cp == 1 or case.seq_len // cp >= LEAST_TOKENS) and whole_groups:
                    found.add(case)
    return found


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, experts=4, experts_per_token=2)])
@pytest.mark.parametrize("num_devices", [1, 4, 6, 8])
def test_the_candidates_are_all_that_divide_and_no_others(shape, num_devices):
    space = Space(replace(CASE, shape=shape), num_devices)
    candidates = enumerate_candidates(space)
    made = [candidates.case(space, i) for i in range(len(candidates))]
    assert len(set(made)) == len(made)
    assert set(made) == brute_force(space)


def test_the_arrays_are_those_of_the_cases():
    holds = read_holds(["dtype=bf16,fp8", "synchronisation=synchronous,quantized,local"])
    space = Space(CASE, 8, holds)
    candidates = enumerate_candidates(space)
    arrays, made = candidates.cases(space), Cases.of([candidates.case(space, i) for i in range(len(candidates))])
    for item in fields(Cases):
        assert np.array_equal(getattr(arrays, item.name), getattr(made, item.name)), item.name
    assert {made.dtype[i] for i in range(len(made))} == {"bf16", "fp8"}
    assert set(np.unique(made.sync_every)) == {1.0, 16.0, 128.0}


def test_stages_may_be_nearly_even():
    """21 layers on 2 stages: 11 on the fullest, which decides."""
    space = Space(replace(CASE, shape=replace(SHAPE, layers=21)), 2, read_holds(["pp=2", "schedule=1f1b"]))
    candidates = enumerate_candidates(space)
    cases = candidates.cases(space)
    assert len(candidates) and set(cases.layers) == {22.0}
    assert set(cases.params) == {float(space.shape.params + space.shape.layer_params)}
    assert candidates.case(space, 0).shape.layers == 21
    assert not len(enumerate_candidates(replace(space, base=replace(CASE, shape=replace(SHAPE, layers=13)))))


def test_short_sequences_are_split_only_where_that_is_held():
    short = replace(CASE, seq_len=1024)
    assert {row["cp"] for row in search(Space(short, 8), machine(8), MODELS, changes=False).landscape} == {1}
    assert search(Space(short, 8, read_holds(["cp=2"])), machine(8), MODELS, changes=False).best.dims.cp == 2


def test_what_changes_the_results_is_searched_only_where_it_is_named():
    arrays = enumerate_candidates(Space(CASE, 8)).cases(Space(CASE, 8))
    assert set(arrays.dtype) == {"bf16"} and not arrays.synchronisation.any()


def test_the_best_is_the_fastest_that_fits():
    space, place = Space(CASE, 8), machine(8, memory_gib=0.5)
    found = search(space, place, MODELS)
    candidates = enumerate_candidates(space)
    cases = candidates.cases(space)
    step_s = np.where(memory(cases, place).fits, times(cases, place).total, np.inf)
    order = np.argsort(step_s, kind="stable")
    assert found.best.case == candidates.case(space, int(order[0]))
    assert found.best.step_s == pytest.approx(step_s[order[0]])
    assert found.runner_up.step_s == pytest.approx(step_s[order[1]])
    assert found.num_candidates == len(candidates) and found.num_fitting == np.isfinite(step_s).sum() < len(candidates)
    assert found.best.low_s < found.best.step_s < found.best.high_s
    assert found.best.peak_bytes <= 0.5 * GIB


def test_the_margin_is_in_standard_deviations_of_both():
    found = search(Space(CASE, 8), machine(8), MODELS)
    log_ratio = np.log(found.runner_up.step_s / found.best.step_s)
    assert found.margin_sigmas == pytest.approx(log_ratio / (0.05 * 2**0.5))


def test_a_single_candidate_has_no_runner_up():
    holds = read_holds(["microbatch=1", "recompute=none"])
    found = search(Space(CASE, 1, holds), machine(1), MODELS)
    assert found.num_candidates == 1 and found.runner_up is None and found.margin_sigmas is None


def test_a_held_choice_is_held():
    found = search(Space(CASE, 8, read_holds(["tp=4", "recompute=full,selective"])), machine(8), MODELS)
    assert found.best.dims.tp == 4 and found.best.settings.recompute in ("full", "selective")
    assert all(one.name != "tp" for one in found.alternatives)
    freed = {change.what: change for change in found.changes if change.kind == "constraint"}
    assert set(freed) == {"without --fix tp=4", "without --fix recompute=full,selective"}
    assert freed["without --fix tp=4"].choice.step_s <= found.best.step_s


def test_alternatives_are_the_best_with_another_value():
    space, place = Space(CASE, 8), machine(8)
    found = search(space, place, MODELS)
    for one in found.alternatives:
        if one.slower is None:
            continue
        held = search(replace(space, holds={one.name: (one.value,)}), place, MODELS, changes=False)
        assert held.best.step_s / found.best.step_s - 1 == pytest.approx(one.slower), one.name
    assert {one.name for one in found.alternatives} >= {"tp", "pp", "dp_shard", "microbatch", "recompute"}


def test_what_does_not_fit_is_no_alternative():
    found = search(Space(CASE, 8), machine(8, memory_gib=0.2), MODELS)
    unfit = {(one.name, one.value) for one in found.alternatives if one.slower is None}
    assert {("recompute", "none"), ("dp_replicate", 8)} <= unfit


def test_another_machine_may_have_another_answer():
    place = machine(8)
    assert place.node is not None
    slow = replace(place, node=replace(place.node, bytes_per_s=place.node.bytes_per_s / 50))
    space = Space(replace(CASE, seq_len=1024), 8)
    fast_best, slow_best = (search(space, m, MODELS, changes=False).best for m in (place, slow))
    assert not fast_best.same_as(slow_best)  # or the next lines could not fail
    slower = [replace(place, node=replace(place.node, bytes_per_s=1e11 / f)) for f in np.geomspace(1, 50, 200)]
    border = next(m for m in slower if not search(space, m, MODELS, changes=False).best.same_as(fast_best))
    assert border.node is not None
    just_before = replace(border, node=replace(border.node, bytes_per_s=border.node.bytes_per_s * 1.5))
    changes = {c.what: c for c in search(space, just_before, MODELS).changes}
    flipped = changes["the link within a host at half the rate"]
    assert flipped.flips and flipped.gain > 0
    assert not flipped.choice.same_as(search(space, just_before, MODELS, changes=False).best)
    assert not changes["10 % more memory"].flips


def test_more_memory_lets_the_faster_one_in():
    space = Space(CASE, 8, read_holds(["recompute=none"]))
    free = search(space, machine(8), MODELS, changes=False).best
    tight = machine(8, memory_gib=free.peak_bytes / GIB / 1.05)
    changes = {change.what: change for change in search(space, tight, MODELS).changes}
    more, less = changes["10 % more memory"], changes["10 % less memory"]
    assert more.flips and more.choice.same_as(free) and more.gain > 0
    assert less.choice is None or less.choice.peak_bytes <= tight.device.memory_bytes * 0.9


def test_other_training_is_named_with_its_gain():
    found = search(Space(CASE, 8, read_holds(["dp_replicate=8"])), machine(8), MODELS)
    kinds = {change.what: change for change in found.changes if change.kind == "training"}
    assert kinds["products in fp8"].choice.settings.dtype == "fp8" and kinds["products in fp8"].gain > 0.1
    assert kinds["gradients exchanged quantized"].choice.settings.synchronisation == "quantized"
    assert kinds["local updates, exchanged every 16 steps"].choice.settings.sync_every == 16
    held = search(Space(CASE, 8, read_holds(["dtype=bf16"])), machine(8), MODELS)
    assert "products in fp8" not in {change.what for change in held.changes}


def test_the_landscape_has_each_split_once_the_fastest_first():
    space = Space(CASE, 8)
    rows = search(space, machine(8), MODELS, changes=False).landscape
    splits = [tuple(row[name] for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")) for row in rows]
    assert len(set(splits)) == len(splits)
    assert [row["step_s"] for row in rows] == sorted(row["step_s"] for row in rows)


def test_chunks_do_not_change_the_ranking(monkeypatch):
    space, place = Space(CASE, 8), machine(8, memory_gib=0.5)
    whole = rank(space, place, MODELS)
    monkeypatch.setattr("turbopump.planner.search.CHUNK", 7)
    monkeypatch.setattr("turbopump.planner.candidates.ROWS_AT_ONCE", 11)
    parts = rank(space, place, MODELS)
    assert np.array_equal(whole.order, parts.order) and np.array_equal(whole.step_s, parts.step_s)


# ---- no plan


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["tp"], ["not of the form NAME=VALUE"]),
        (["tp="], ["not of the form NAME=VALUE"]),
        (["tensor=4"], ["no such choice", "tp"]),
        (["tp=4", "tp=8"], ["given twice"]),
        (["tp=0"], ["'0' is no whole number above 0"]),
        (["tp=two"], ["'two' is no whole number"]),
        (["recompute=all"], ["'all' is none of none, selective, full"]),
        (["dtype=fp7"], ["'fp7' is none of", "bf16"]),
    ],
)
def test_wrong_holds_say_what_is_allowed(given, expected):
    with pytest.raises(UsageError) as caught:
        read_holds(given)
    assert all(text in str(caught.value) for text in expected), caught.value


def test_a_held_size_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(PlanError, match=r"--fix tp=3 leaves nothing that divides 12 layers, 8 heads") as caught:
        search(Space(CASE, 8, read_holds(["tp=3"])), machine(8), MODELS)
    assert "use tp=2, tp=4" in str(caught.value)
    with pytest.raises(PlanError, match=r"use microbatch=4, microbatch=6"):
        search(Space(CASE, 1, read_holds(["microbatch=5"])), machine(1), MODELS)


def test_held_sizes_that_contradict_each_other_are_named():
    with pytest.raises(PlanError, match=r"--fix tp=5 --fix pp=7 leave nothing .* take one of them away"):
        search(Space(CASE, 8, read_holds(["tp=5", "pp=7"])), machine(8), MODELS)


def test_a_number_of_devices_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(PlanError, match=r"no split of 7 devices .* use 6 or 8 devices, or a global batch of 21 or 28"):
        search(Space(CASE, 7), machine(7, devices_per_node=7), MODELS)


def test_a_model_that_fits_nowhere_names_the_fewest_devices_that_hold_it():
    place = machine(4, memory_gib=0.05)
    with pytest.raises(PlanError, match=r"small does not fit on 4 x test device: .* use \d+ devices") as caught:
        search(Space(CASE, 4), place, MODELS)
    count = int(str(caught.value).rpartition("use ")[2].split()[0])
    assert search(Space(CASE, count), replace(place, num_devices=count), MODELS, changes=False).best
    for fewer in range(8, count, 4):
        with pytest.raises(PlanError):
            search(Space(CASE, fewer), replace(place, num_devices=fewer), MODELS)


def test_a_model_that_fits_nowhere_names_the_recompute_that_would_do():
    space = Space(CASE, 4)
    full = search(replace(space, holds={"recompute": ("full",)}), machine(4), MODELS, changes=False)
    least = min(row["peak_bytes"] for row in full.landscape)
    with pytest.raises(PlanError, match=r"use --fix recompute=(selective|full)"):
        search(replace(space, holds={"recompute": ("none",)}), machine(4, memory_gib=least * 1.2 / GIB), MODELS)


def test_a_model_that_fits_on_no_number_of_devices_says_so():
    with pytest.raises(PlanError, match="a device with more memory, or a smaller model"):
        search(Space(CASE, 4), machine(4, memory_gib=1e-6), MODELS)
