"""Steps on a measured machine: what is counted, what a profile's rows do, what bands hold."""

from dataclasses import replace

import pytest

from tests import synthetic_profile
from turbopump.compute.ops import Elementwise, Gemm, Launch, MemoryCopy, OptimizerStep
from turbopump.core.errors import ProfileError
from turbopump.hardware.profile import RunCalibration
from turbopump.models.convnet.config import KIND as CONVNET
from turbopump.models.convnet.config import ConvnetConfig
from turbopump.models.transformer.config import KIND as TRANSFORMER
from turbopump.models.transformer.config import TransformerConfig
from turbopump.planner import own_step
from turbopump.planner.own_step import PARTS, Run, StepModel, Structure, bucket_bytes, computed, structure_of, updated

CONFIG = TransformerConfig(vocab_size=512, num_layers=3, hidden_size=64, num_heads=2)


def work(dtype: str = "fp32", **changes: object):
    return TRANSFORMER.workload(replace(CONFIG, **changes), 4, {"seq_len": 32}, dtype)


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile.build()


@pytest.fixture(scope="module")
def model(profile):
    return StepModel(profile, threads=synthetic_threads(profile))


def synthetic_threads(profile) -> int:
    return next(row.threads for row in profile.rows if row.domain == "compute")


def test_every_operation_is_counted_as_often_as_train_computes_it():
    run = Run(work(), num_microbatches=3)
    counts = dict.fromkeys((op for op, _ in computed(run)), 0)
    for op, count in computed(run):
        counts[op] += count
    plain = dict.fromkeys((op for op, _ in run.workload.ops()), 0)
    for op, count in run.workload.ops():
        plain[op] += count
    assert all(counts[op] >= 3 * count for op, count in plain.items())
    assert counts[Elementwise("residual", run.workload.params, 2, 1, "fp32")] == 2  # sums over three microbatches


def test_recomputed_blocks_go_forward_twice_and_no_others():
    once, again = Run(work()), Run(work(recompute="full"), recompute="full")
    layer = next(b for b in again.workload.blocks if b.name == "blocks")
    head = next(b for b in again.workload.blocks if b.name == "head")

    def forwards(run: Run, block) -> float:
        return sum(c for op, c in computed(run) if op == block.forward[-1])

    assert forwards(again, layer) == forwards(once, layer) + layer.count * layer.forward.count(layer.forward[-1])
    assert forwards(again, head) == forwards(once, head)


def test_bf16_casts_each_weight_forward_and_its_gradient_back():
    fp32, bf16 = list(computed(Run(work()))), list(computed(Run(work("bf16"))))
    assert not any(isinstance(op, MemoryCopy) for op, _ in fp32)
    cast = sum(op.bytes * count for op, count in bf16 if isinstance(op, MemoryCopy))
    layers = 3 * (4 * 64 * 64 + 3 * 64 * CONFIG.mlp_width)
    assert cast == 2 * 3 * (layers + 512 * 64)  # six bytes moved for each, half of them read


def test_the_update_clips_where_it_is_asked_to_and_muon_iterates():
    run = Run(work())
    assert MemoryCopy(4 * run.workload.params) in [op for op, _ in updated(run)]
    assert MemoryCopy(4 * run.workload.params) not in [op for op, _ in updated(replace(run, clip=False))]
    iterations = [(op, count) for op, count in updated(replace(run, optimizer="muon", muon_steps=4))
                  if type(op).__name__ == "BatchedGemm"]  # fmt: skip
    assert iterations and all(count == 4 for _, count in iterations)
    assert sum(isinstance(op, OptimizerStep) for op, _ in updated(run)) == 1


def test_buckets_hold_every_gradient_once():
    assert sum(bucket_bytes(work())) == 4 * work().params
    large = TRANSFORMER.workload(
        TransformerConfig(vocab_size=8192, num_layers=8, hidden_size=768, num_heads=12), 1, {"seq_len": 32}, "fp32"
    )
    sizes = bucket_bytes(large)
    assert len(sizes) > 2 and sum(sizes) == 4 * large.params


def test_parts_sum_and_lie_in_their_bands(model):
    found = model.predict(Run(work(), num_processes=2, data_s=1e-3))
    assert all(getattr(found.step, part) > 0 for part in PARTS if part != "bubble")
    assert all(getattr(found.low, p) <= getattr(found.step, p) <= getattr(found.high, p) for p in PARTS)
    assert found.total_low_s < found.total_s < found.total_high_s
    assert found.total_s == pytest.approx(sum(getattr(found.step, part) for part in PARTS))
    assert 0 <= found.measured_share <= 1 and {kind.kind for kind in found.kinds} >= {"Gemm", "OptimizerStep"}


def test_more_work_takes_longer(model):
    once, more = Run(work()), Run(work(), num_microbatches=4)
    assert 3 < model.predict(more).step.compute / model.predict(once).step.compute < 5
    again = Run(work(recompute="full"), recompute="full")
    assert model.predict(again).step.compute > model.predict(once).step.compute
    assert model.predict(Run(work(num_layers=6))).total_s > model.predict(once).total_s


def test_a_row_of_the_operation_and_the_models_own_kernel_decide(profile):
    threads, product = synthetic_threads(profile), Gemm(128, 64, 64, "fp32")
    like = next(row for row in profile.of_kind("Gemm", "fp32") if row.route == "default")
    op = {"m": 128, "n": 64, "k": 64, "dtype": "fp32", "layout": "nt"}
    row = replace(like, op=op, min_s=0.9, median_s=1.0, p90_s=1.1, flops=product.cost.flops, bytes=product.cost.bytes,
                  flushed_s=None)  # fmt: skip
    assert product in dict(computed(Run(work())))
    slow = StepModel(replace(profile, rows=(*profile.rows, row)), threads=threads).predict(Run(work()))
    assert slow.step.compute > 6  # queries and output of three layers
    assert slow.measured_share > 0.5
    mine = replace(row, route="transformer", median_s=0.1, min_s=0.1, p90_s=0.1)
    own = StepModel(replace(profile, rows=(*profile.rows, row, mine)), threads=threads).predict(Run(work()))
    assert 0.05 < (slow.step.compute - own.step.compute) / slow.step.compute < 0.95
    assert own.measured_share < slow.measured_share  # of the other products the default says more than one row


def test_a_small_working_set_stays_in_the_cache(model):
    image = ConvnetConfig(in_channels=1, num_classes=10, width=4, blocks=(1, 1, 1))
    small = CONVNET.workload(image, 2, {"channels": 1, "height": 8, "width": 8}, "fp32")
    assert model.coldness(Run(small)) < 0.05 < model.coldness(Run(work(hidden_size=512)))


@pytest.mark.slow
def test_numbers_of_the_structure_do_what_they_say(profile):
    threads = synthetic_threads(profile)
    run = Run(work(), num_processes=2, data_s=1e-3)

    def step(**numbers: float):
        return StepModel(profile, threads=threads, structure=Structure(**numbers)).predict(run).step

    plain = step()
    assert step(compute=1.2).compute == pytest.approx(1.2 * plain.compute)
    assert step(host=3.0).compute > plain.compute and step(tensor=3.0).optimizer > plain.optimizer
    assert step(data=2.0).data == pytest.approx(2 * plain.data)
    assert step(straggling=0.1).exposed_communication > plain.exposed_communication


def test_what_the_profile_lacks_is_said(profile):
    with pytest.raises(ProfileError, match="threads"):
        StepModel(profile, threads=97)
    without = replace(profile, rows=tuple(r for r in profile.rows if r.domain != "comms"), links=())
    with pytest.raises(ProfileError, match="only comms"):
        StepModel(without, threads=synthetic_threads(profile)).predict(Run(work(), num_processes=2))


def test_a_calibration_of_another_version_is_refused(profile):
    made = RunCalibration({"compute": 1.1}, {"compute": 0.05}, "0" * 16, ("demo",), 100, "", 0.1, 0.05)
    found = structure_of(replace(profile, calibration=made))
    assert found.compute == 1.1 and found.band("compute") == 0.05 and found.host == Structure().host
    assert structure_of(profile) == Structure()
    with pytest.raises(ProfileError, match="calibrate again"):
        structure_of(replace(profile, calibration=replace(made, values={"phlogiston": 1.0})))


def test_a_profile_without_flushed_rows_or_launches_has_typical_ones(profile):
    rows = tuple(replace(row, flushed_s=None) for row in profile.rows if row.kind != Launch.__name__)
    bare = StepModel(replace(profile, rows=rows), threads=synthetic_threads(profile))
    assert bare.launch_s == own_step.TYPICAL_LAUNCH_S and bare.predict(Run(work())).total_s > 0
