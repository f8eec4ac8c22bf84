"""The result of `evaluate` stands in the headline, beside the compressors; what is missing is left out."""

from pathlib import Path

from tests.synthetic_run import write_run
from turbopump.core.files import to_json
from turbopump.core.rundir import RunDir
from turbopump.reporting.account import summarize
from turbopump.reporting.load import load_run
from turbopump.reporting.words import headline


def test_the_whole_split_is_named_beside_gzip_and_xz(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert "gzip" not in headline(summarize(load_run(tmp_path / "run")))
    result = {"split": "validation", "metrics": {"bits_per_byte": 1.5}, "yardsticks": {"gzip -9": 1.7, "xz -9": 1.25}}
    RunDir(tmp_path / "run").evaluation.write_bytes(to_json(result))
    text = headline(summarize(load_run(tmp_path / "run")))
    assert (
        "On the whole validation split it needs 1.5 bits per byte (on the same text, gzip -9 1.7 and xz -9 1.25)"
        in text
    )
    RunDir(tmp_path / "run").evaluation.write_bytes(b"{cut")
    assert "gzip" not in headline(summarize(load_run(tmp_path / "run")))
