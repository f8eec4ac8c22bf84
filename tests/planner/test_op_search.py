from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest

from tests.synthetic_profile import build
from turbopump.core.config import load
from turbopump.core.errors import PlanError, ProfileError, UsageError
from turbopump.hardware.accelerators import device, link
from turbopump.hardware.datasheet import profile_from_datasheet
from turbopump.hardware.profile import Measurement
from turbopump.planner.candidates import read_holds
from turbopump.planner.op_search import Option, Place, parts_of, predict_option, search_ops
from turbopump.planner.own_run import run_of
from turbopump.planner.own_step import StepModel
from turbopump.planner.recipe_cases import read_subject

RECIPES = Path(__file__).parents[2] / "recipes"
PROFILE = build(domains=("compute", "memory", "host", "comms", "data"))


def cores(count: int, *threads: int):
    """The synthetic host with so many cores, its rows measured with these numbers of threads."""
    rows: list[Measurement] = []
    for number in threads or (1,):
        rows += [replace(row, threads=number) if row.domain in ("compute", "memory", "host") else row
                 for row in PROFILE.rows]  # fmt: skip
    return replace(PROFILE, rows=tuple(rows), machine={**PROFILE.machine, "num_cores": count, "memory_bytes": 16 << 30})


LM = read_subject(RECIPES / "lm-stdlib.toml", ["precision.compute=fp32"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm-stdlib", "convnet-digits", "deepspeech2-tones"])
def test_every_recipe_is_planned(name):
    found = search_ops(read_subject(RECIPES / f"{name}.toml"), Place(cores(2, 1, 2)))
    best = found.best
    assert isfinite(best.step_s) and 0 < best.low_s < best.step_s < best.high_s
    assert best.breakdown["compute"] > 0 and best.breakdown["optimizer"] > 0 and best.peak_bytes > 0
    assert found.num_candidates > 1 and found.runner_up.step_s >= best.step_s
    assert [row["step_s"] for row in found.landscape] == sorted(row["step_s"] for row in found.landscape)


H100 = profile_from_datasheet(device("h100-sxm"), links=(link("nvlink4"), link("infiniband-ndr")))


def test_on_an_accelerator_the_time_is_the_sum_of_its_operations():
    place = Place(H100, 1, 1)
    choice = predict_option(LM, place, Option(1, 4, "fp32", "none"))
    workload = LM.workload(4, "fp32")
    one = sum(place.cost.predict(op).seconds * count for op, count in workload.ops())
    assert choice.breakdown["compute"] == pytest.approx(4 * one) and choice.settings.num_microbatches == 4
    assert choice.breakdown["exposed_communication"] == 0


def test_on_accelerators_gradients_are_exchanged_over_the_links_there_are():
    within, between = (predict_option(LM, Place(H100, n, 8), Option(n, 1, "fp32", "none")) for n in (8, 16))
    assert between.breakdown["exposed_communication"] >= within.breakdown["exposed_communication"]
    alone = profile_from_datasheet(device("h100-sxm"))
    with pytest.raises(ProfileError, match="nothing is known of AllReduce"):
        predict_option(LM, Place(alone, 8, 8), Option(8, 1, "fp32", "none"))


def test_on_a_host_it_is_what_a_run_there_would_take():
    profile = cores(1)
    config = load(RECIPES / "convnet-digits.toml", ["microbatch=16", "precision.compute=fp32"])
    expected = StepModel(profile).predict(run_of(config, "fp32"))
    subject = read_subject(RECIPES / "convnet-digits.toml", ["precision.compute=fp32"])
    choice = predict_option(subject, Place(profile), Option(1, 16, "fp32", "none"))
    assert choice.breakdown["compute"] == pytest.approx(expected.step.compute)
    assert choice.breakdown["data"] > 0 and choice.low_s < expected.total_s < choice.high_s


def test_a_plan_may_come_before_its_data():
    assert not Path(LM.config.data.path).exists()
    assert predict_option(LM, Place(cores(1)), Option(1, 4, "fp32", "none")).breakdown["data"] == 0


def test_computing_again_costs_a_forward_of_the_blocks_and_saves_memory():
    place = Place(cores(1))
    none, full = (predict_option(LM, place, Option(1, 16, "fp32", mode)) for mode in ("none", "full"))
    assert full.breakdown["compute"] > 1.1 * none.breakdown["compute"]
    assert full.peak_bytes < none.peak_bytes
    assert sum(parts_of(LM, full).values()) == full.peak_bytes


def test_processes_share_the_batch_and_exchange_gradients():
    place = Place(cores(2, 1))
    two = predict_option(LM, place, Option(2, 8, "fp32", "none"))
    assert two.breakdown["exposed_communication"] > 0 and two.settings.num_microbatches == 1
    assert parts_of(LM, two)["buffers"] == 4 * LM.params


def test_threads_that_were_not_measured_are_left_out_and_told():
    found = search_ops(LM, Place(cores(2, 1)))
    assert found.best.dims.dp_replicate == 2  # one process would compute with 2 threads
    assert len(found.notes) == 1 and "2 threads" in found.notes[0]
    with pytest.raises(ProfileError, match="2 threads"):
        search_ops(LM, Place(cores(2, 1), num_devices=1))


def test_a_data_sheet_does_as_well():
    place = Place(profile_from_datasheet(device("h100-sxm"), links=()), 1, 1)
    found = search_ops(read_subject(RECIPES / "convnet-digits.toml"), place)
    assert found.best.dims.dp_replicate == 1 and isfinite(found.best.step_s)


def test_a_held_choice_is_held_and_others_are_refused():
    place = Place(cores(1))
    assert search_ops(LM, place, read_holds(["microbatch=2"])).best.settings.microbatch == 2
    assert search_ops(LM, place, read_holds(["tp=1", "schedule=1f1b"])).best
    for given in ("tp=2", "synchronisation=local", "schedule=interleaved"):
        with pytest.raises(UsageError, match="split over data only"):
            search_ops(LM, place, read_holds([given]))


def test_sizes_that_do_not_divide_name_those_that_do():
    with pytest.raises(PlanError, match=r"batch of 16 cannot be shared by 3 devices: use 2 devices, .* 15 or 18"):
        search_ops(LM, Place(cores(3), num_devices=3))
    with pytest.raises(PlanError, match=r"--fix microbatch=3: a batch of 16 on 1 devices takes 1, 2, 4, 8, 16"):
        search_ops(LM, Place(cores(1), num_devices=1), read_holds(["microbatch=3"]))
    with pytest.raises(PlanError, match=r"--fix recompute=selective: .* only: none, full"):
        search_ops(LM, Place(cores(1)), read_holds(["recompute=selective"]))


def test_a_model_that_does_not_fit_says_what_would_help():
    profile = cores(1)
    small = replace(profile, machine={**profile.machine, "memory_bytes": 1 << 20},
                    devices=tuple(replace(d, memory_bytes=None) for d in profile.devices))  # fmt: skip
    with pytest.raises(PlanError, match=r"lm-stdlib does not fit .* a device with more memory"):
        search_ops(LM, Place(small))
    with pytest.raises(PlanError, match=r"use --fix recompute=full, or use a smaller --fix microbatch"):
        search_ops(LM, Place(small), read_holds(["recompute=none", "microbatch=16"]))
