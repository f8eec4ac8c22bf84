"""`turbopump plan` as a user meets it: what it says, what it writes, what it refuses."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.synthetic_profile import build
from turbopump.cli import main
from turbopump.core.config import load
from turbopump.core.errors import ProfileError, UsageError
from turbopump.core.files import to_json
from turbopump.hardware import accelerators
from turbopump.hardware import profile as machine_file
from turbopump.plan import find_target, plan
from turbopump.planner import plan_file
from turbopump.planner.recipe_cases import of_recipe
from turbopump.planner.workload_file import save as save_workload

ROOT = Path(__file__).parents[1]
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "_name_or_path": "llama-8b",
}  # fmt: skip
SECTIONS = ("model", "machine", "best", "step", "speed", "memory", "to finish", "data", "bottleneck", "runner-up")
CLUSTER = ("--device", "h100-sxm", "--count", "64", "--link", "infiniband-ndr")
CHIP = """
[mine]
name = "My chip"
bf16_tflops = 500
memory_gib = 64
memory_tb_per_s = 2
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with config.json, workload.json, the recipes and the machine.json of a host."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes(to_json(LLAMA_8B))
    for name in ("lm-stdlib", "convnet-digits", "deepspeech2-tones"):
        (tmp_path / f"{name}.toml").write_bytes((ROOT / "recipes" / f"{name}.toml").read_bytes())
    save_workload(of_recipe(load("convnet-digits.toml"), "r").workload(16, "fp32"), "workload.json")
    profile = build(domains=("compute", "memory", "host", "comms", "data"))
    machine_file.save(replace(profile, machine={**profile.machine, "num_cores": 1, "memory_bytes": 16 << 30}),
                      tmp_path / "machine.json")  # fmt: skip
    (tmp_path / "chips.toml").write_text(CHIP)
    return tmp_path


# ---- what it says


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("config.json", *CLUSTER, "--tokens", "1e12", "--price", "2.5"),
        ("config.json", "--on", "h100-sxm", "--count", "8"),
        ("config.json", "--device", "chips.toml:mine", "--count", "16", "--fix", "tp=4", "recompute=full,none"),
        ("lm-stdlib.toml",),
        ("lm-stdlib.toml", "--on", "machine.json", "microbatch=4"),
        ("lm-stdlib.toml", "--device", "a100", "--count", "4"),
        ("convnet-digits.toml", "--device", "h100-sxm", "--count", "4"),
        ("deepspeech2-tones.toml", "--on", "machine.json"),
        ("workload.json", "--on", "machine.json", "--global-batch", "64", "--steps", "1000"),
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_every_model_on_every_machine_has_a_page_of_at_most_100_columns(here, cli, monkeypatch, arguments):
    for columns in ("60", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        said = cli("plan", *arguments)
        assert said.code == 0, said.err
        lines = said.out.splitlines()
        assert max(map(len, lines)) <= min(100, int(columns)) and len(lines) < 70
        for name in SECTIONS:
            assert any(line.startswith(name) for line in lines), name
        assert "80 % certainty" in said.out


def test_the_page_says_what_was_asked_for(here, cli):
    said = cli("plan", "config.json", *CLUSTER, "--tokens", "1e12", "--price", "2.5").out
    assert "llama-8b" in said and "64 x NVIDIA H100 SXM" in said
    assert all(word in said for word in ("tokens/s", "MFU", "GiB", "$", "Wh", "goodput", "checkpoint every", "reads/s"))
    without = cli("plan", "config.json", *CLUSTER).out
    assert "give --steps or --tokens" in without and "device-hours" not in without


def test_speech_counts_hours_of_audio(here, cli):
    assert "hours of audio a second" in cli("plan", "deepspeech2-tones.toml").out


def test_json_has_all_of_it(here, cli):
    table = json.loads(cli("plan", "config.json", *CLUSTER, "--tokens", "1e12", "--price", "2", "--json").out)
    prediction = table["prediction"]
    assert sum(prediction["breakdown"].values()) == pytest.approx(prediction["step_s"])
    assert prediction["low_s"] < prediction["step_s"] < prediction["high_s"]
    assert set(table["memory"]) == {"first", "middle", "last"} and table["cost"]["usd"] > 0
    assert table["forecast"]["goodput"]["interval_steps"] >= 1 and 0 < table["forecast"]["goodput_share"] <= 1
    assert table["forecast"]["reads_per_s"] == pytest.approx(512 / prediction["step_s"])
    assert table["runner_up"]["step_s"] >= prediction["step_s"] and table["margin_sigmas"] >= 0
    assert table["landscape"][0]["step_s"] == pytest.approx(prediction["step_s"])
    assert {"alternatives", "changes", "notes"} <= table.keys()
    assert table["best"]["dims"] == table["dims"]


def test_a_held_choice_is_in_the_plan(here):
    made = plan("config.json", device="h100-sxm", count=64, fix=["tp=4", "dtype=fp8"])
    assert made.file.dims.tp == 4 and made.file.settings.dtype == "fp8" and made.file.dims.num_devices == 64


def test_more_devices_are_faster_and_dearer(here):
    few, many = (plan("config.json", device="h100-sxm", count=n, tokens=1e12, usd_per_hour=2.0) for n in (32, 256))
    assert many.found.best.step_s < few.found.best.step_s / 3
    assert many.forecast.bill.usd > few.forecast.bill.usd


def test_a_machine_of_the_catalog_and_one_of_a_file_are_told_apart(here):
    assert find_target("h100-sxm").profile is None and find_target(None).profile is not None
    assert find_target("chips.toml").device.name == "My chip"
    (here / "h100-sxm").mkdir()  # a folder of that name is no machine
    assert find_target("h100-sxm").profile is None


def gpus(here: Path, count: int) -> None:
    """machine.json of a host with so many measured H100s."""
    profile = build(domains=("compute", "memory", "host", "comms", "data"))
    on_gpu = ("compute", "memory", "host")
    rows = tuple(replace(row, device="cuda") if row.domain in on_gpu else row for row in profile.rows)
    spec = accelerators.device("h100-sxm")
    machine = {**profile.machine, "gpus": [spec.name] * count}
    profile = replace(profile, rows=rows, devices=(spec, *profile.devices), machine=machine)
    machine_file.save(profile, here / "gpus.json")


@pytest.mark.slow
def test_a_probed_host_of_gpus_is_planned_as_such(here, cli):
    gpus(here, 8)
    assert find_target("gpus.json").machine().num_devices == 8
    made = plan("config.json", on="gpus.json")
    assert made.file.dims.num_devices == 8 and "8 x NVIDIA H100 SXM" in made.target.words
    assert made.file.prediction == plan("config.json", device="h100-sxm", count=8).file.prediction
    assert plan("config.json", on="gpus.json", count=64, link="infiniband-ndr").file.dims.num_devices == 64
    assert plan("convnet-digits.toml", on="gpus.json", count=1).file.dims.num_devices == 1
    for arguments, expected in (
        ("--count 64", "say with --link"),
        ("--count 12 --link infiniband-ndr", "use 8 or 16"),
        ("--devices-per-node 4", "is for devices of the catalog"),
    ):
        said = cli("plan", "config.json", "--on", "gpus.json", *arguments.split())
        assert said.code == 2 and expected in said.err


# ---- plan.toml, and train that follows it


def test_the_plan_is_written_with_what_it_rests_on(here, cli):
    said = cli("plan", "lm-stdlib.toml", "--output", "plan.toml")
    assert said.code == 0 and said.out.rstrip().endswith("next: turbopump train lm-stdlib.toml --plan plan.toml")
    table = tomllib.loads(Path("plan.toml").read_text())
    assert table["schema"] == 1 and table["turbopump_version" if "turbopump_version" in table else "written_by"]
    assert all(table["inputs"][name] for name in ("recipe", "recipe_digest", "machine", "machine_digest"))
    assert plan_file.read("plan.toml").prediction.step_s > 0
    assert "inputs" in cli("inspect", "plan.toml").out and cli("inspect", "plan.toml", "--json").code == 0
    page = Path("plan.html").read_text()
    assert "lm-stdlib" in page and "Where a step" in page


@pytest.mark.slow
def test_train_follows_a_plan_and_keeps_it(place, cli):
    profile = build(domains=("compute", "memory", "host", "comms", "data"))
    machine_file.save(replace(profile, machine={**profile.machine, "num_cores": 1}), place / "machine.json")
    fixed = ("--fix", "microbatch=2", "dtype=bf16", "recompute=full")
    assert cli("plan", "lm.toml", "precision.compute=bf16", *fixed, "--output", "plan.toml").code == 0
    said = cli("train", "lm.toml", "name=planned", "--plan", "plan.toml", "--quiet")
    assert said.code == 0, said.err
    config = load("runs/planned/config.toml")
    assert (config.microbatch, config.precision.compute, config.model.recompute) == (2, "bf16", "full")
    assert config.launch.num_processes == 1
    assert plan_file.read("runs/planned/plan.toml") == plan_file.read("plan.toml")
    again = cli("train", "lm.toml", "name=planned", "num_steps=8", "--plan", "plan.toml", "--quiet")
    assert again.code == 0, again.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lm.toml", "--plan", "absent.toml"], ["no plan at absent.toml"]),
        (["lm.toml", "--plan", "lm.toml"], ["lm.toml is no plan"]),
        (["lm.toml", "--plan", "split.toml"], ["cannot be followed by train", "dims.tp (4)", "--fix tp=1"]),
        (["lm.toml", "--plan", "plan.toml", "model.num_layers=2"], ["made for another model"]),
        (["lm.toml", "--plan", "plan.toml", "microbatch=4"], ["microbatch: 4 given, and plan.toml says 2"]),
        (["lm.toml", "--plan", "plan.toml", "--dry-run"], ["--plan is for training"]),
    ],
)
def test_a_plan_that_cannot_be_followed_says_why(place, cli, arguments, expected):
    profile = build(domains=("compute", "memory", "host", "comms", "data"))
    machine_file.save(replace(profile, machine={**profile.machine, "num_cores": 1}), place / "machine.json")
    assert cli("plan", "lm.toml", "--fix", "microbatch=2", "--output", "plan.toml").code == 0
    made = plan_file.read("plan.toml")
    plan_file.write(replace(made, dims=replace(made.dims, tp=4)), "split.toml")
    said = cli("train", *arguments, "name=new", "--quiet")
    assert said.code == 2 and all(text in said.err for text in expected), said.err
    assert not Path("runs/new").exists()


def test_a_live_model_follows_no_plan(place):
    from torch import nn

    from turbopump.train import train

    with pytest.raises(UsageError, match="give that recipe's path"):
        train(nn.Linear(1, 1), [1.0], loss=lambda m, b: m(b).mean(), plan="plan.toml")


# ---- what it learns from runs, and how good it is


@pytest.mark.slow
def test_runs_refine_the_machine_file(place, cli):
    profile = build(domains=("compute", "memory", "host", "comms", "data"))
    machine = {name: value for name, value in profile.machine.items() if name != "cpu"}
    cpu = json.loads(Path("runs/lm/env.json").read_text())["cpu"]
    machine_file.save(replace(profile, machine={**machine, "num_cores": 1, "cpu": cpu}), place / "machine.json")
    assert cli("train", "lm.toml", "name=longer", "num_steps=20", "evaluation.at_start=false", "--quiet").code == 0
    before = plan("lm.toml").found.best.step_s
    said = cli("plan", "--calibrate", "runs/longer")
    assert said.code == 0 and "1 runs" in said.out and said.out.rstrip().endswith("written to machine.json"), said.err
    made = plan("lm.toml")
    assert made.found.best.step_s != before and made.file.inputs.calibration == "1 runs"
    assert made.file.inputs.calibration_digest == machine_file.load("machine.json").calibration.digest
    assert json.loads(cli("plan", "--calibrate", "runs/longer", "--json").out)["runs"] == ["longer"]
    short = cli("plan", "--calibrate", "runs/lm")
    assert short.code == 2 and "a calibration needs" in short.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "plan needs a recipe, a config.json or a workload.json"),
        (["config.json", "--validate", "tables"], "give one of them"),
        (["--validate", "tables", "--calibrate", "runs/a"], "give one of them"),
        (["config.json", *CLUSTER, "--frozen"], "--frozen is for --validate"),
        (["--validate", "absent"], "absent"),
        (["--validate", "tables"], "tables"),
        (["--validate", "unknown"], "iter_ms"),
        (["--calibrate", "runs/absent"], "runs/absent is not a run directory"),
    ],
)
def test_wrong_tables_and_runs_are_named(here, cli, arguments, expected):
    (here / "tables").mkdir()
    (here / "unknown").mkdir()
    (here / "unknown" / "gpt_3d_parallel_runs.csv").write_text("set,gpus,colour\nx,1,red\n")
    said = cli("plan", *arguments)
    assert said.code == 2 and expected in said.err and not said.out, said
    assert "Traceback" not in said.err


# ---- what it refuses


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["config.json"], ["planned on accelerators", "--device"]),
        (["absent.toml"], ["no recipe at absent.toml"]),
        (["config.json", "--on", "h100-sxm", "--device", "a100"], ["both name a machine"]),
        (["config.json", "--device", "h1000"], ["no device 'h1000'", "did you mean"]),
        (["config.json", "--on", "absent.json"], ["no machine file at absent.json", "turbopump probe"]),
        (["config.json", *CLUSTER[:4], "--link", "token-ring"], ["no link 'token-ring'"]),
        (["config.json", "--device", "h100-sxm", "--count", "0"], ["--count: 0 given"]),
        (
            ["config.json", "--device", "h100-sxm", "--count", "12"],
            ["by --devices-per-node (8)", "use 8 or 16"],
        ),
        (["config.json", "--device", "h100-sxm", "--count", "7"], ["no split of 7 devices", "use 6 or 8 devices"]),
        (["config.json", *CLUSTER, "--fix", "tp=3"], ["--fix tp=3 leaves nothing", "use tp=2, tp=4"]),
        (["config.json", *CLUSTER, "--fix", "tp"], ["NAME=VALUE"]),
        (["config.json", *CLUSTER, "--fix", "width=3"], ["no such choice"]),
        (["config.json", *CLUSTER, "--tokens", "-5"], ["--tokens: -5 given"]),
        (["config.json", *CLUSTER, "--tokens", "5", "--steps", "5"], ["give one of them"]),
        (["config.json", *CLUSTER, "--global-batch", "-5"], ["--global-batch: -5 given"]),
        (["config.json", *CLUSTER, "num_steps=3"], ["'num_steps=3' is a setting of a recipe"]),
        (["config.json", "--device", "h100-sxm"], ["does not fit on 1 x NVIDIA H100 SXM", "GiB", "devices or more"]),
        (["config.json", "--device", "wrong.toml"], ["memory_tb_per_s"]),
        (["config.json", "--device", "dimensionless.toml"], ["bf16: no such key (each names its unit)", "bf16_tflops"]),
        (["config.json", "--device", "peakless.toml"], ["no peak is known"]),
        (["retnet.json", *CLUSTER], ["model_type: 'retnet' is not known"]),
        (["bare.json", *CLUSTER], ["fields are missing", "hidden (hidden_size"]),
        (["lm-stdlib.toml", "--on", "old.json"], ["has schema 0", "probe the machine again"]),
        (["lm-stdlib.toml", "--link", "infiniband-ndr"], ["a host without any: leave it out"]),
        (["lm-stdlib.toml", "--seq-len", "64"], ["data.seq_len=64"]),
        (["lm-stdlib.toml", "--fix", "tp=2"], ["split over data only"]),
        (["lm-stdlib.toml", "--count", "5"], ["batch of 16 cannot be shared by 5", "use 4 devices"]),
        (["lm-stdlib.toml", "--output", "absent/../config.json/x"], ["config.json"]),
    ],
)
def test_wrong_input_says_what_to_do(here, cli, arguments, expected):
    (here / "wrong.toml").write_text(CHIP.replace("memory_tb_per_s = 2", ""))
    (here / "dimensionless.toml").write_text(CHIP.replace("bf16_tflops", "bf16"))
    (here / "peakless.toml").write_text(CHIP.replace("bf16_tflops = 500", ""))
    (here / "retnet.json").write_bytes(to_json({**LLAMA_8B, "model_type": "retnet"}))
    (here / "bare.json").write_bytes(to_json({"model_type": "llama", "vocab_size": 7}))
    (here / "old.json").write_bytes(to_json({"schema": 0, "rows": []}))
    said = cli("plan", *arguments)
    assert said.code in (1, 2) and said.err.startswith("error: ") and not said.out, said
    assert all(text in said.err for text in expected), said.err
    assert len(said.err.splitlines()) <= 6 and "Traceback" not in said.err


def test_without_a_machine_file_it_says_how_to_make_one(here, cli):
    (here / "machine.json").unlink()
    said = cli("plan", "lm-stdlib.toml")
    assert said.code == 2 and "no machine file at machine.json: write one with `turbopump probe" in said.err
    with pytest.raises(ProfileError):
        plan("lm-stdlib.toml")


@pytest.mark.slow
def test_it_works_without_torch(here):
    code = "import sys; sys.modules['torch'] = None; from turbopump.cli import main; sys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in (["config.json", *CLUSTER], ["lm-stdlib.toml", "--output", "p.toml"], ["workload.json", "--json"]):
        command = [sys.executable, "-c", code, "plan", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr


def test_debug_shows_the_traceback(here):
    with pytest.raises(UsageError):
        main(["plan", "absent.toml", "--debug"])
