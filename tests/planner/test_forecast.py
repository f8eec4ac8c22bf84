import pytest

from turbopump.core.errors import UsageError
from turbopump.hardware.specs import DeviceSpec, StorageSpec
from turbopump.planner.cases import DecoderShape, ParallelDims
from turbopump.planner.choice import Change, Choice, Settings
from turbopump.planner.forecast import forecast_of, steps_of
from turbopump.planner.recipe_cases import of_shape

SUBJECT = of_shape(DecoderShape(1024, 8, 8, 32000, 4096, name="m"), "c.json", 1000, 64, "bf16")
DEVICE = DeviceSpec("device", {"bf16": 1e15}, power_w=700.0, usd_per_hour=2.0)


def choice(devices: int = 8, **breakdown: float) -> Choice:
    parts = {"data": 0.0, "compute": 1.5, "exposed_communication": 0.4, "bubble": 0.0, "optimizer": 0.1, "other": 0.0}
    return Choice(ParallelDims(dp_shard=devices), Settings(devices, 8, "bf16", 1, 8), {**parts, **breakdown}, 0.1, 1e9)


def test_steps_come_from_the_options_or_the_recipe():
    assert steps_of(SUBJECT, None, None) == 0
    assert steps_of(SUBJECT, 7, None) == 7
    assert steps_of(SUBJECT, None, 64_001) == 2  # a step has 64 x 1000 tokens
    with pytest.raises(UsageError, match="give one of them"):
        steps_of(SUBJECT, 7, 7)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--tokens"):
            steps_of(SUBJECT, None, wrong)


def test_rates_follow_from_the_step():
    made = forecast_of(SUBJECT, choice(), DEVICE, num_steps=1000, peak_flops_per_s=1e15)
    assert made.units_per_s == 64 * 1000 / 2.0
    assert made.reads_per_s == 32.0 and made.read_bytes_per_s == 32.0 * 1001 * 2
    assert made.mfu == pytest.approx(32 * SUBJECT.flops_per_sample / 8e15)
    assert made.bottleneck == "compute" and made.share == 0.75


def test_the_bill_counts_failures_and_devices():
    made = forecast_of(SUBJECT, choice(), DEVICE, num_steps=1_000_000)
    assert made.goodput.wall_s > 2_000_000 and made.goodput.goodput < 1
    assert made.bill.device_hours == pytest.approx(8 * made.goodput.wall_s / 3600)
    assert made.bill.usd == pytest.approx(2.0 * made.bill.device_hours)
    assert made.bill.kwh > 0
    one = forecast_of(SUBJECT, choice(), DEVICE, num_steps=1_000_000, num_devices=1)
    assert one.bill.device_hours < made.bill.device_hours / 7 and one.goodput.num_failures < made.goodput.num_failures
    assert forecast_of(SUBJECT, choice(), DEVICE, num_steps=10, usd_per_hour=3.0).bill.usd == pytest.approx(
        3.0 * forecast_of(SUBJECT, choice(), DEVICE, num_steps=10).bill.device_hours)  # fmt: skip


def test_without_a_number_of_steps_there_is_an_interval_and_no_bill():
    made = forecast_of(SUBJECT, choice(devices=4096), DEVICE)
    assert made.bill is None and made.goodput.interval_s > 0 and made.goodput.num_failures > 10


def test_slow_storage_makes_checkpoints_dearer():
    slow = StorageSpec("disk", 1e6, 1e6, 1e3, 1e-3)
    fast = StorageSpec("disk", 1e10, 1e10, 1e6, 1e-4)
    lost = [forecast_of(SUBJECT, choice(devices=4096), DEVICE, num_steps=100_000, storage=s).goodput.goodput
            for s in (fast, slow)]  # fmt: skip
    assert lost[1] < lost[0]


def test_relief_names_what_was_computed_the_most_effective_first():
    def change(what: str, compute: float) -> Change:
        return Change(what, "machine", choice(compute=compute), 0.0, True)

    changes = [change("a little", 1.4), change("much", 0.5), change("nothing", 1.5)]
    changes.append(Change("nowhere", "machine", None, 0.0, True))
    made = forecast_of(SUBJECT, choice(), DEVICE, changes=changes)
    assert made.relief[:2] == ("much (-50%)", "a little (-5%)") and "more or faster devices" in made.relief[-1]
    assert not any("nothing" in words or "nowhere" in words for words in made.relief)


@pytest.mark.parametrize("name", ["data", "compute", "exposed_communication", "bubble", "optimizer", "other"])
def test_every_bottleneck_has_a_relief(name):
    made = forecast_of(SUBJECT, choice(**{name: 9.0}), DEVICE)
    assert made.bottleneck == name and made.relief
