"""Step times: what physics says of them, whatever the parameters."""

from dataclasses import replace

import numpy as np
import pytest

from turbopump.planner.calibration import Calibration, shipped
from turbopump.planner.cases import Case, Cases, DecoderShape, ParallelDims
from turbopump.planner.machine import from_catalog
from turbopump.planner.step import PARTS, step_times

SHAPE = DecoderShape(4096, 32, 32, 50304, 11008, name="7b")
CASE = Case(SHAPE, 2048, 256, 2, ParallelDims(pp=1, dp_replicate=8))
MACHINE = from_catalog("a100", 64, network="infiniband-hdr")
PRIOR = Calibration.prior()


def times(*cases, machine=MACHINE, calibration=PRIOR, **stalls):
    return step_times(Cases.of(cases), machine, calibration, **stalls)


def split(**sizes):
    return replace(CASE, dims=ParallelDims(**sizes))


def test_parts_are_never_negative_and_sum_to_the_total():
    found = times(CASE, split(pp=4, dp_replicate=2, tp=8), split(dp_shard=64), split(pp=2, tp=4, dp_replicate=8))
    parts = np.stack([getattr(found, name) for name in PARTS])
    assert (parts >= 0).all() and np.isfinite(parts).all()
    assert found.total == pytest.approx(parts.sum(0))


def test_never_faster_than_the_peak():
    flops = 6 * (SHAPE.params - SHAPE.vocab * SHAPE.hidden) * 256 * 2048
    for dims in ({"dp_replicate": 8}, {"tp": 8}, {"pp": 8}, {"dp_shard": 64}):
        case = split(**dims)
        assert times(case).total[0] > flops / case.dims.num_devices / MACHINE.peak_flops_per_s("bf16")


def test_one_device_communicates_nothing():
    assert times(split()).exposed_communication[0] == 0
    assert times(split()).bubble[0] == 0


@pytest.mark.parametrize("axis", ["tp", "cp", "dp_replicate", "dp_shard", "pp"])
def test_every_split_communicates(axis):
    assert times(split(**{axis: 4})).exposed_communication[0] > 0


def test_more_tensor_ranks_never_do_more_compute_each_but_exchange_more():
    found = times(*(split(tp=tp) for tp in (1, 2, 4, 8)))
    assert (np.diff(found.compute) < 0).all()
    assert (np.diff(found.exposed_communication) > 0).all()


def test_across_hosts_tensor_ranks_exchange_much_more_slowly():
    one_port = replace(MACHINE, ports_per_node=1)
    inside, outside = times(split(tp=8), split(tp=16), machine=one_port).exposed_communication
    assert outside > 5 * inside


@pytest.mark.parametrize("change", [{"seq_len": 4096}, {"global_batch": 512}, {"shape": replace(SHAPE, layers=48)},
                                    {"shape": replace(SHAPE, hidden=8192)}, {"shape": replace(SHAPE, mlp=22016)},
                                    {"shape": replace(SHAPE, vocab=200000)}])  # fmt: skip
@pytest.mark.parametrize("dims", [ParallelDims(dp_replicate=8), ParallelDims(2, 4, 1, 1, 8), ParallelDims(dp_shard=16)])
def test_more_work_takes_longer(change, dims):
    less, more = times(replace(CASE, dims=dims), replace(CASE, dims=dims, **change)).total
    assert more > less


def test_recomputing_more_takes_longer():
    plain = replace(CASE, fused_attention=False)
    found = times(*(replace(plain, recompute=kind) for kind in ("none", "selective", "full"))).total
    assert (np.diff(found) > 0).all() and found[2] < 1.4 * found[0]


def test_fused_attention_and_compiling_save_time():
    plain = replace(CASE, fused_attention=False)
    found = times(plain, CASE, replace(CASE, compiled=True)).total
    assert (np.diff(found) < 0).all()


def test_quantized_and_local_synchronisation_exchange_less():
    base = split(dp_replicate=64)
    found = times(
        base, replace(base, synchronisation="quantized"), replace(base, synchronisation="local", sync_every=50)
    )
    assert (np.diff(found.exposed_communication) < 0).all()


def test_interleaving_shrinks_the_bubble_and_sends_more():
    base = split(pp=8, tp=8)
    plain, woven = base, replace(base, schedule="interleaved", virtual_stages=4)
    found = times(plain, woven)
    assert found.bubble[1] < found.bubble[0] / 3
    assert found.exposed_communication[1] > found.exposed_communication[0]


def test_a_faster_network_helps_what_crosses_it():
    slow = replace(MACHINE, network=replace(MACHINE.network, bytes_per_s=MACHINE.network.bytes_per_s / 10))
    inside, outside = split(tp=8), split(tp=8, dp_replicate=8)
    assert times(inside, machine=slow).total[0] == times(inside).total[0]
    assert times(outside, machine=slow).total[0] > times(outside).total[0]


def test_a_small_model_waits_for_its_launches():
    tiny = Case(DecoderShape(128, 24, 2, 1000, 512), 64, 8, 1)
    faster = replace(MACHINE, device=replace(MACHINE.device, flops_per_s={"bf16": 1e18}))
    assert times(tiny, machine=faster).total[0] > 0.8 * times(tiny).total[0]


def test_input_and_checkpoint_stalls_are_added_as_given():
    plain, stalled = times(CASE), times(CASE, data_s=0.25, stall_s=0.5)
    assert stalled.data[0] == 0.25
    assert stalled.total[0] == pytest.approx(plain.total[0] + 0.75)


def test_many_cases_are_each_as_alone_also_across_chunks():
    cases = [split(tp=tp, pp=pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4)]
    alone = np.array([times(case, calibration=shipped()).total[0] for case in cases])
    many = Cases.of(cases).take(np.arange(25_000) % len(cases))
    total = step_times(many, MACHINE, shipped()).total
    assert total == pytest.approx(np.tile(alone, 25_000 // len(cases) + 1)[:25_000], rel=1e-12)


def test_experts_cost_what_their_tokens_do():
    dense = replace(SHAPE, mlp=2 * 11008)
    routed = replace(SHAPE, experts=8, experts_per_token=2)
    one, two = times(replace(CASE, shape=dense), replace(CASE, shape=routed)).compute
    assert two == pytest.approx(one, rel=0.25)


@pytest.mark.parametrize("name", ["v100", "h100", "h200", "b200", "mi300x", "l40s"])
@pytest.mark.parametrize("devices", [1, 8, 512, 8192])
def test_any_device_and_number_gives_finite_times(name, devices):
    machine = from_catalog(name, devices)
    dims = ParallelDims(1, devices) if devices < 8 else ParallelDims(2, devices // 8, 1, 1, 4)
    case = replace(CASE, dims=dims, global_batch=2 * max(devices, 64))
    for calibration in (PRIOR, shipped()):
        total = times(case, machine=machine, calibration=calibration).total[0]
        assert np.isfinite(total) and total > 0


def test_a_machine_without_links_still_gives_an_answer():
    bare = replace(MACHINE, node=None, network=None)
    assert np.isfinite(times(split(tp=4, pp=2, dp_replicate=4), machine=bare).total[0])
