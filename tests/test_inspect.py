"""The verb `inspect`: what stands there is what is on disk, names as they are, nothing that steers a terminal."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.synthetic_profile import ONEDNN, build, datasheet
from turbopump.core.checkpoint_store import latest
from turbopump.core.errors import CorruptCheckpointError, CorruptDataError, ProfileError, UsageError
from turbopump.core.rundir import RunDir
from turbopump.hardware.profile import save
from turbopump.inspect import format_facts, inspect


def test_a_run(place) -> None:
    facts = inspect("runs/lm", verify=True)
    assert (facts["kind"], facts["model"], facts["data"], facts["steps"]) == ("run", "transformer", "tokens", 6)
    assert [c["step"] for c in facts["checkpoints"]] == [2, 4, 6] and facts["verified"] is True
    assert facts["evaluation"]["step"] == 6 and facts["evaluation"]["loss"] > 0
    assert facts["seconds"]["steps"] > 0 and facts["environment"]["workload"]["unit"] == "token"
    assert "problem" not in facts


def test_a_checkpoint_with_its_tensors_under_their_own_names(place, cli) -> None:
    newest = latest(RunDir(Path("runs/lm")).checkpoints)
    said = cli("inspect", str(newest), "--verify")
    assert said.code == 0
    assert "model.blocks.0.attention_norm.weight F32 [16]" in said.out and "verified" in said.out
    assert "more (all with --json)" in said.out
    facts = json.loads(cli("inspect", str(newest), "--json").out)
    assert facts["tensors"]["optimizer.embed.weight.exp_avg"] == facts["tensors"]["model.embed.weight"]
    assert facts["values"]["step"] == 6


def test_a_dataset(place) -> None:
    facts = inspect("datasets/text", verify=True)
    assert (facts["kind"], facts["holds"], facts["verified"]) == ("dataset", "tokens", True)
    train, held_out = facts["splits"]["train"], facts["splits"]["validation"]
    assert facts["rows"] == train["rows"] + held_out["rows"]
    assert train["sample"].startswith("line 0: the quick brown fox")
    assert sum(train["document_sizes"].values()) == train["documents"] == 4


def test_arrays_and_weights_of_others(tmp_path, cli) -> None:
    import numpy as np

    from turbopump.pack import pack

    pack({"image": np.zeros((40, 1, 4, 4), np.float32), "label": np.arange(40)}, tmp_path / "arrays")
    facts = inspect(tmp_path / "arrays")
    assert facts["holds"] == "arrays" and [f["name"] for f in facts["fields"]] == ["image", "label"]
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "w.safetensors")
    assert inspect(tmp_path / "w.safetensors")["tensors"] == {"a.weight": "F32 [2, 3]"}
    assert "a.weight" in cli("inspect", str(tmp_path / "w.safetensors")).out


def test_a_recipe_shows_its_settings_as_they_are_written(place, cli) -> None:
    said = cli("inspect", "lm.toml")
    assert said.code == 0
    shown = dict(line.split()[:2] for line in said.out.splitlines() if len(line.split()) > 1)
    assert shown["rope_theta"] == "10000.0" and shown["every_s"] == "0.0" and shown["loggers"] == "[]"
    assert "parameters" in said.out and "misfits" not in said.out
    (place / "bad.toml").write_text((place / "lm.toml").read_text().replace("num_heads = 2", "vocab_size = 9"))
    assert "model.vocab_size: 9 given; the dataset has 256 tokens" in cli("inspect", "bad.toml").out


@pytest.mark.parametrize("data", [b"{}", b"[1, 2]", b"not json"])
def test_json_of_others(tmp_path, data: bytes, cli) -> None:
    (tmp_path / "x.json").write_bytes(data)
    said = cli("inspect", str(tmp_path / "x.json"))
    assert said.code == (2 if data == b"not json" else 0)
    assert ("is not valid JSON" in said.err) == (said.code == 2)


def test_verify_finds_what_was_changed(place) -> None:
    shard = Path("datasets/text/validation-00000.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptDataError, match=r"validation-00000\.arrow"):
        inspect("datasets/text", verify=True)
    checkpoint = RunDir(Path("runs/lm")).checkpoints / "step-00000004"
    (checkpoint / "index.json").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match=r"index\.json"):
        inspect("runs/lm", verify=True)
    problems = [c["problem"] for c in inspect("runs/lm")["checkpoints"]]
    assert problems[0] is None and "index.json" in problems[1]


def test_what_is_none_of_ours(place) -> None:
    for path, expected in (
        ("nowhere", "nothing at nowhere"),
        ("texts", "no artefact"),
        ("texts/t0.txt", "no artefact"),
    ):
        with pytest.raises(UsageError, match=expected):
            inspect(path)


def test_a_run_that_has_only_begun(place) -> None:
    for name in ("metrics.jsonl", "env.json"):
        (place / "runs/lm" / name).unlink()
    for name in ("spans", "checkpoints"):
        shutil.rmtree(place / "runs/lm" / name)
    facts = inspect("runs/lm")
    assert facts["steps"] == 0 and facts["checkpoints"] == [] and facts["attempts"] == 0
    assert "steps" in format_facts(facts)


def test_facts_as_lines() -> None:
    facts = {
        "num_bytes": 1500, "wait_s": 0.25, "rate_per_s": 2.5, "none": None, "empty": [], "text": "a\nb\x1b[2J",
        "settings": {"lr_peak": 3e-4, "blocks": [1, 2]}, "many": list(range(50)), "rows": [{"a_bytes": 10, "b": None}],
    }  # fmt: skip
    assert format_facts(facts).splitlines()[:7] == [
        "num bytes                1.5 kB",
        "wait s                   250 ms",
        "rate per s               2.5",
        "text                     a\\nb\N{REPLACEMENT CHARACTER}[2J",
        "settings",
        "  lr_peak                0.0003",
        "  blocks                 [1, 2]",
    ]
    assert format_facts(facts).splitlines()[-3:] == ["  ... and 10 more (all with --json)", "rows", "  a_bytes 10 B"]


def test_a_machine_file_says_its_peaks_and_how_far_to_trust_it(tmp_path, cli) -> None:
    path = tmp_path / "machine.json"
    profile = build()
    save(profile, path)
    facts = inspect(path, verify=True)
    assert (facts["kind"], facts["provenance"], facts["verified"]) == ("machine", "measured", True)
    best = {peak["dtype"]: peak for peak in facts["peaks"]}
    assert best["fp32"]["route"] == ONEDNN and best["fp32"]["flops_per_s"] > 1e11
    assert facts["memory_bytes_per_s"] < facts["cache_bytes_per_s"]
    assert facts["rows"]["Gemm"] == 98 and facts["without_times"] == {"Gemm": 2}
    assert json.loads(cli("inspect", str(path), "--json").out)["quality"] == facts["quality"]
    said = cli("inspect", str(path), "--verify").out
    assert "dtype fp32  flops_per_s 181 GFLOP/s" in said and "page cache could not be dropped" in said


def test_a_machine_file_of_figures_that_cannot_be_is_refused(tmp_path, cli) -> None:
    path = tmp_path / "machine.json"
    profile = build(("memory",))
    save(replace(profile, rows=(replace(profile.rows[0], median_s=-1.0), *profile.rows[1:])), path)
    assert inspect(path)["rows"]["MemoryCopy"] == 16  # shown, until it is asked to verify
    with pytest.raises(ProfileError, match=r"(?s)cannot be: probe the machine again.*row 0 .*median_s is -1"):
        inspect(path, verify=True)
    said = cli("inspect", str(path), "--verify")
    assert said.code == 2 and "no positive time" in said.err and "Traceback" not in said.err


def test_machine_files_of_another_schema_and_of_nothing_measured(tmp_path) -> None:
    path = tmp_path / "machine.json"
    save(replace(build(), schema=99), path)
    with pytest.raises(ProfileError, match="schema 99"):
        inspect(path)
    save(datasheet(), path)
    facts = inspect(path, verify=True)
    assert (
        facts["peaks"] == []
        and {"device": "NVIDIA H100 SXM", "dtype": "bf16", "flops_per_s": 989e12} in facts["on_paper"]
    )
    assert facts["memory_bytes_per_s"] == 3.35e12 and facts["curves"] == 6
    (tmp_path / "rows.json").write_text('{"rows": [], "benchmark": "probe"}')
    assert inspect(tmp_path / "rows.json")["kind"] == "json"  # any other file of JSON stays one
