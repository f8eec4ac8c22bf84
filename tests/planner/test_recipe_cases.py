from dataclasses import replace
from pathlib import Path

import pytest

from turbopump.core.config import load
from turbopump.core.errors import ConfigError, UsageError
from turbopump.core.files import to_json
from turbopump.planner.recipe_cases import model_flops, of_recipe, read_subject, recipe_digest
from turbopump.planner.summary import summarize
from turbopump.planner.workload_file import save

ROOT = Path(__file__).parents[2]
RECIPES = {name: ROOT / "recipes" / f"{name}.toml" for name in ("lm-stdlib", "convnet-digits", "deepspeech2-tones")}
LLAMA = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "intermediate_size": 2816, "vocab_size": 32000}  # fmt: skip


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_bytes(to_json(LLAMA))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_summary_says(name):
    subject, summary = read_subject(RECIPES[name]), summarize(load(RECIPES[name]))
    assert subject.params == summary.params and subject.unit == summary.unit
    assert subject.flops_per_sample * subject.global_batch == pytest.approx(summary.flops_per_step)
    assert subject.units_per_sample * subject.global_batch == summary.units_per_step
    assert (subject.case is not None) == (name == "lm-stdlib")


def test_a_transformers_case_has_its_parameters_and_flops():
    subject = read_subject(RECIPES["lm-stdlib"], ["model.num_kv_heads=2", "model.tied=false"])
    assert subject.case.shape.params == subject.params
    assert model_flops(subject.case.shape, subject.case.seq_len) == pytest.approx(subject.flops_per_sample)
    assert subject.case.global_batch == 16 and subject.case.seq_len == 256


def test_the_recipes_settings_are_the_cases(config_json):
    subject = read_subject(RECIPES["lm-stdlib"], ["model.recompute=full", "microbatch=4", "precision.compute=fp32"])
    assert subject.case.recompute == "full" and subject.case.microbatch == 4
    assert subject.dtypes == ("fp32",) and subject.case.dtype == "fp32"
    assert read_subject(RECIPES["lm-stdlib"]).dtypes == ("bf16", "fp32")  # auto
    assert read_subject(RECIPES["lm-stdlib"], ["optimizer.kind=muon"]).case.optimizer_bytes == 4


def test_samples_are_read_from_storage_or_made_in_memory():
    assert read_subject(RECIPES["lm-stdlib"]).sample_bytes == 257 * 2
    assert read_subject(RECIPES["lm-stdlib"], ["model.vocab_size=100000"]).sample_bytes == 257 * 4
    assert read_subject(RECIPES["convnet-digits"]).sample_bytes == 0


def test_speech_counts_hours_of_audio():
    subject = read_subject(RECIPES["deepspeech2-tones"])
    assert subject.hours_per_sample == pytest.approx(subject.units_per_sample * 0.01 / 3600)


def test_the_digest_knows_model_data_batch_and_optimizer_but_not_what_a_plan_chooses():
    config = load(RECIPES["lm-stdlib"])
    for same in ("microbatch=4", "precision.compute=fp32", "model.recompute=full", "launch.num_processes=2", "name=x",
                 "data.path=elsewhere", "num_steps=7", "optimizer.lr=1e-4"):  # fmt: skip
        assert recipe_digest(load(RECIPES["lm-stdlib"], [same])) == recipe_digest(config), same
    for other in ("model.num_layers=5", "data.seq_len=128", "global_batch=32", "optimizer.kind=muon"):
        assert recipe_digest(load(RECIPES["lm-stdlib"], [other])) != recipe_digest(config), other


def test_a_config_json_takes_sequence_and_batch_from_the_options(config_json):
    subject = read_subject(config_json, seq_len=2048, global_batch=64)
    assert (subject.case.seq_len, subject.global_batch, subject.units_per_sample) == (2048, 64, 2048)
    assert subject.workload is None and subject.num_steps == 0
    assert read_subject(config_json, dtype="fp16").case.dtype == "fp16"


def test_a_workload_json_is_known_at_the_microbatch_of_its_trace(tmp_path):
    path = tmp_path / "workload.json"
    config = load(RECIPES["convnet-digits"])
    workload = of_recipe(config, "r").workload(4, "fp32")
    save(workload, path)
    subject = read_subject(path, global_batch=32)
    assert subject.workload(4, "fp32") == workload and subject.microbatches == (4,)
    assert subject.global_batch == 32 and subject.flops_per_sample == workload.cost.flops / 4
    with pytest.raises(UsageError, match="known for 4 samples in fp32 only"):
        subject.workload(8, "fp32")
    assert subject.recomputes == ("none", "selective", "full")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"global_batch": 30}, "--global-batch (30) must be divisible by the 4 samples of the trace: use 28 or 32"),
        ({"global_batch": 3}, "use 4"),
        ({"global_batch": -4}, "--global-batch: -4 given"),
        ({"seq_len": 128}, "trace the module again at another"),
        ({"dtype": "bf16"}, "was traced in fp32, not bf16"),
        ({"overrides": ["microbatch=2"]}, "'microbatch=2' is a setting of a recipe"),
    ],
)
def test_what_a_trace_does_not_know_is_refused(tmp_path, options, expected):
    path = tmp_path / "workload.json"
    save(of_recipe(load(RECIPES["convnet-digits"]), "r").workload(4, "fp32"), path)
    with pytest.raises(UsageError) as caught:
        read_subject(path, options.pop("overrides", ()), **options)
    assert expected in str(caught.value)


def test_what_is_none_of_the_three_is_refused(tmp_path):
    cases = {"[]": "holds no table", "{": "not valid JSON", '{"rows": []}': "neither a config.json"}
    for text, expected in cases.items():
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UsageError, match=expected):
            read_subject(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot read"):
        read_subject(tmp_path / "absent.json")
    with pytest.raises(UsageError, match="no recipe at"):
        read_subject(tmp_path / "absent.toml")
    with pytest.raises(ConfigError):
        read_subject(RECIPES["lm-stdlib"], ["model.num_layer=3"])


def test_a_recipe_takes_settings_not_options():
    with pytest.raises(UsageError, match=r"--seq-len is for a config.json .* a recipe takes data.seq_len=512"):
        read_subject(RECIPES["lm-stdlib"], seq_len=512)
    with pytest.raises(UsageError, match=r"a recipe takes global_batch=64"):
        read_subject(RECIPES["lm-stdlib"], global_batch=64)


def test_a_live_model_has_to_be_traced():
    config = load(RECIPES["lm-stdlib"], live={"model": {"kind": "live", "reference": "m:f"}})
    with pytest.raises(UsageError, match=r"trace it into a workload.json"):
        of_recipe(config, "r")


def test_flops_of_experts_count_those_that_are_used():
    dense = read_subject(RECIPES["lm-stdlib"]).case.shape
    sparse = replace(dense, experts=8, experts_per_token=2)
    extra = 6.0 * 256 * dense.layers * (dense.mlp_params + dense.hidden * 8)
    assert model_flops(sparse, 256) - model_flops(dense, 256) == pytest.approx(extra)
