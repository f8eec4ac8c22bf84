"""Predicted beside measured: every field, what lies outside its band, and what is said where nothing was predicted."""

from dataclasses import asdict

import pytest

from tests.synthetic_run import Shape, write_run
from turbopump.core.files import from_json, to_json
from turbopump.core.spans import RunBreakdown, StepBreakdown
from turbopump.report import report, report_from_command_line
from turbopump.reporting.load import RUN_FIELDS, STEP_FIELDS
from turbopump.reporting.predicted import HOW, beside
from turbopump.reporting.predicted_page import predicted_card, predicted_lines

STEP = StepBreakdown(data=0.004, compute=0.118, optimizer=0.011, other=0.0012)


def table(values: dict[str, float], factor: float = 1.0) -> dict[str, float]:
    scaled = {name: factor * value for name, value in values.items()}
    return scaled | {"total": sum(scaled.values())}


def record(step: StepBreakdown = STEP, run: RunBreakdown | None = None) -> dict[str, object]:
    run = run or RunBreakdown(startup=6.0, steps=200.0, evaluation=25.0, checkpoint=1.0, idle=5.0)
    return {
        "schema_version": 1, "machine_name": "a processor", "machine_date": "today", "measured_share": 0.9,
        "step": table(asdict(step)), "low": table(asdict(step), 0.9), "high": table(asdict(step), 1.1),
        "run": table(asdict(run)), "run_low": table(asdict(run), 0.5), "run_high": table(asdict(run), 2.0),
    }  # fmt: skip


def test_every_field_of_both_stands_beside_its_measurement():
    run = RunBreakdown(startup=6.5, steps=201.0)
    found = beside(record(), STEP, run, finished=True)
    assert [part.name for part in found.step] == [*STEP_FIELDS, "total"]
    assert [part.name for part in found.run] == [*RUN_FIELDS, "total"]
    assert found.part("compute").measured_s == 0.118 and not found.part("compute").outside


def test_only_what_matters_differs():
    slow = StepBreakdown(data=0.004, compute=0.160, optimizer=0.011, other=0.0019)
    found = beside(record(), slow, None, finished=False)
    assert {part.name for part in found.step if part.outside} >= {"compute", "other", "total"}
    assert [part.name for part in found.differing] == ["compute", "total"]  # 0.7 ms are not worth a word
    assert found.run == ()  # it did not come to its end
    text = "\n".join(predicted_lines(found))
    assert "forward and backward" in text and "outside the band" in text


@pytest.mark.parametrize("broken", [{}, {"problem": "another machine"}, {"step": 3}, {"step": {"compute": "fast"}}])
def test_what_cannot_be_read_is_said_or_left_out(broken):
    found = beside(broken, STEP, None, finished=True)
    if broken.get("problem") or not broken:
        assert found.how == HOW and "nothing was predicted" in "\n".join(predicted_lines(found))
        assert "probe" in predicted_card(found)
    else:
        assert found.step == () and found.differing == ()


def test_the_report_shows_it_in_all_three_forms(tmp_path):
    run = write_run(tmp_path / "demo", Shape(num_steps=100, evaluate_every=50, checkpoint_every=50))
    run.prediction.write_bytes(to_json(record(StepBreakdown(data=0.004, compute=0.05, optimizer=0.011, other=0.0012))))
    text = report_from_command_line([run.path])
    assert "predicted: a step takes" in text and "differs: forward and backward of a step" in text
    page = run.report_html.read_text(encoding="utf-8")
    assert "Predicted and measured" in page and "80 % band" in page and "a processor" in page
    content = from_json(run.report_json.read_bytes())["summary"]["predicted"]
    assert {part["name"] for part in content["step"]} == {*STEP_FIELDS, "total"}
    assert {part["name"] for part in content["run"]} == {*RUN_FIELDS, "total"}


def test_without_one_the_report_says_how_to_get_it(tmp_path):
    run = write_run(tmp_path / "demo", Shape(num_steps=60))
    assert "turbopump probe" in report_from_command_line([run.path])
    files = report([run.path])
    assert "nothing was predicted" in files.html.read_text(encoding="utf-8")
