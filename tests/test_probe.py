"""`probe` with domains that measure nothing: budget, turns, resuming, which file is replaced, what is said."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.conftest import RECIPE
from tests.fake_domains import Fake, products
from tests.processes import PATIENCE_S
from turbopump import probe as verb
from turbopump.compute import deepbench
from turbopump.compute.ops import Gemm
from turbopump.core.errors import (
    Interrupted,
    NoisyProfileError,
    ProfileError,
    RunDirectoryError,
    TurbopumpError,
    UsageError,
)
from turbopump.core.units import parse_seconds
from turbopump.hardware.journal import journal_path, read_journal
from turbopump.hardware.profile import SCHEMA, Curve, MachineProfile, Measurement, load, save
from turbopump.hardware.sanity import oddities
from turbopump.hardware.specs import DeviceSpec, LinkSpec, StorageSpec
from turbopump.pack import pack
from turbopump.probe import probe

ROOT = Path(__file__).parents[1]
LOUD = 0.9


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "machine.json"


def run(output, *benches, budget_s=20.0, **more):
    """`probe` with fakes named as the domains are, and the outcome."""
    outcomes = []
    named = dict(zip(("compute", "data", "comms"), benches))
    profile = probe(output, budget_s=budget_s, domains=named, device="cpu", finished=outcomes.append, **more)
    assert outcomes[0].profile == profile
    return outcomes[0]


def test_it_writes_a_profile_of_this_machine_and_its_page(output):
    outcome = run(output, Fake(products(4)), Fake(products(2, dtype="bf16")))
    profile = load(output)
    assert profile == outcome.profile and len(profile.rows) == 6 and profile.provenance == "measured"
    assert profile.quality["noisy"] == 0 and profile.devices and not profile.left_out
    assert profile.request["suite"] == "generic" and profile.machine["num_cores"] >= 1
    assert outcome.page == output.with_name("probe.html") and "<html" in outcome.page.read_text()
    assert not journal_path(output).exists()
    assert sorted(path.name for path in output.parent.iterdir()) == ["machine.json", "probe.html"]


def test_the_page_of_another_file_has_another_name(output):
    assert run(output.with_name("laptop.json"), Fake(products(1))).page.name == "laptop.html"


# ---- budget and turns


def test_the_first_tier_of_every_domain_comes_before_the_second_of_any(output):
    order = output.with_name("order")
    compute = Fake(products(3, tier=1) + products(3, tier=0, first=50), log=order)
    data = Fake(products(2, dtype="bf16") + products(2, tier=2, dtype="bf16", first=50), log=order)
    tiers = {trial.key: trial.tier for bench in (compute, data) for trial in bench.wanted}
    run(output, compute, data)
    measured = order.read_text().splitlines()
    assert len(measured) == 10 and [tiers[key] for key in measured] == sorted(tiers.values())


@pytest.mark.slow
def test_a_short_budget_leaves_out_what_it_says_and_still_knows_something_of_each_domain(output):
    compute, data = Fake(products(400), row_s=0.01), Fake(products(100, dtype="bf16"), row_s=0.01)
    outcome = run(output, compute, data, budget_s=1.0)
    left = outcome.profile.left_out
    dtypes = {row.dtype for row in outcome.profile.rows}
    assert dtypes == {"fp32", "bf16"} and 20 < len(outcome.profile.rows) < 120
    assert "rows; all should fit in --budget 1m" in left[1] and len(left) in (3, 4)
    assert any(line.startswith("compute: ") and "of 400 Gemm fp32, about " in line for line in left)


@pytest.mark.slow
def test_what_one_domain_does_not_spend_the_others_have(output):
    slow = Fake(products(90), row_s=0.01)
    run(output, Fake([]), slow, Fake([]), budget_s=3.0)
    assert len(slow.asked) == 90  # its share alone is a quarter


def test_a_budget_too_small_for_the_first_tier_says_so_and_writes_what_it_has(output):
    outcome = run(output, Fake(products(200), row_s=0.01), budget_s=0.3)
    assert 1 < len(load(output).rows) < 100
    assert outcome.profile.left_out[0].startswith("the budget is too small for the first tier")
    assert "--budget 30s or more" in outcome.profile.left_out[0]


def test_a_budget_that_holds_nothing_is_wrong_usage_and_leaves_nothing(output):
    with pytest.raises(UsageError, match=r"a budget of 100 ms holds none of 3 rows: give --budget 30s"):
        run(output, Fake(products(3), row_s=1.0), budget_s=0.1)
    assert not list(output.parent.iterdir())


def test_nothing_to_measure_names_the_domains(output):
    with pytest.raises(UsageError, match="nothing to measure of comms on this machine"):
        run(output, Fake([]), only=["comms"])


def test_the_time_of_a_row_follows_the_budget(output):
    short, long = Fake(products(100)), Fake(products(100))
    run(output, short, budget_s=1)
    run(output, long, budget_s=1000)
    assert short.requests[-1].row_s < long.requests[-1].row_s


def test_what_is_asked_for_reaches_the_domains(output):
    bench = Fake(products(1))
    run(output, bench, suite="deepbench", threads=(1,), only=("memory", "compute"), directory=output.parent)
    request = bench.requests[0]
    assert (request.suite, request.threads, request.domains) == ("deepbench", (1,), ("compute", "memory"))
    assert request.directory == output.parent and request.device == "cpu" and request.max_ranks >= 2


def test_an_operation_in_recipe_and_grid_is_measured_once(output):
    bench = Fake(products(3) + products(3))
    assert len(run(output, bench).profile.rows) == 3 and len(bench.asked) == 3


# ---- noise


def test_noisy_rows_are_repeated_twice_at_most_and_the_least_noisy_is_kept(output):
    trials = products(3)
    bench = Fake(trials, noisy={trials[0].key: [LOUD, 0.01], trials[1].key: [0.8, 0.6, 0.7]})
    outcome = run(output, bench)
    assert [bench.asked.count(trial.key) for trial in trials] == [2, 3, 1]
    by_key = {row.key: row for row in outcome.profile.rows}
    assert not by_key[trials[0].key].noisy
    assert by_key[trials[1].key].spread == pytest.approx(0.6 / 1.3)
    assert outcome.repeated == 3 and outcome.profile.quality["noisy"] == pytest.approx(1 / 3)


def test_rows_of_the_cpu_clock_are_looked_at_four_times_and_the_shortest_is_kept(output):
    trials = products(3)
    bench = Fake(trials, clock="thread_cpu", looks_s=[2e-3, 1e-3, 3e-3, 4e-3])
    outcome = run(output, bench)
    assert [bench.asked.count(trial.key) for trial in trials] == [4, 4, 4] and outcome.measured == 3
    assert [row.seconds for row in outcome.profile.rows] == pytest.approx([1e-3 * 1.01] * 3)


def test_a_good_row_is_kept_where_the_new_one_is_noisy_unless_told(output):
    trials = products(8)
    first = run(output, Fake(trials)).profile
    again = Fake(trials, noisy={trials[2].key: [LOUD]}, seconds=2e-3)
    outcome = run(output, again)
    kept = [row for row in outcome.profile.rows if row in first.rows]
    assert [row.key for row in kept] == [trials[2].key] == list(outcome.joined.kept)
    assert any("1 older rows were kept" in line for line in outcome.profile.uncertain)
    assert "7 were renewed, 1 kept, the new ones being noisier" in " ".join(verb.notes(outcome))
    told = run(output, Fake(trials, noisy={trials[2].key: [LOUD]}), overwrite=True)
    assert sum(row.noisy for row in told.profile.rows) == 1


def test_a_noisier_profile_does_not_replace_a_good_one(output):
    trials = products(8)
    run(output, Fake(trials))
    before = output.read_bytes()
    loud = Fake(trials, noisy={trial.key: [LOUD] for trial in trials})
    with pytest.raises(NoisyProfileError, match="100% of the 8 rows") as caught:
        run(output, loud)
    aside = output.with_name("machine.noisy.json")
    assert caught.value.exit_code == 1 and "--overwrite" in str(caught.value) and str(aside) in str(caught.value)
    assert output.read_bytes() == before and len(load(aside).rows) == 8 and not journal_path(output).exists()
    assert all(row.noisy for row in run(output, loud, overwrite=True).profile.rows)


# ---- the file that is there


def test_a_file_of_this_machine_is_extended(output):
    run(output, Fake(products(3)))
    outcome = run(output, Fake(products(2, dtype="bf16")), only=["compute"])
    assert len(load(output).rows) == 5 and outcome.joined.added == 2


def test_two_alike_probes_say_by_how_much_they_differ(output):
    run(output, Fake(products(9)))
    outcome = run(output, Fake(products(9), seconds=1.02e-3))
    assert "the median of 9 rows measured before differs by 2.0%" in verb.notes(outcome)


def test_another_machines_file_is_refused_with_both_names_unless_told(output):
    profile = run(output, Fake(products(2))).profile
    save(replace(profile, fingerprint="f" * 16, name="Another Processor 9000"), output)
    before, bench = output.read_bytes(), Fake(products(1))
    with pytest.raises(ProfileError) as caught:
        run(output, bench)
    assert "Another Processor 9000" in str(caught.value) and profile.name in str(caught.value)
    assert "--overwrite" in str(caught.value) and caught.value.exit_code == 2
    assert output.read_bytes() == before and not bench.asked  # before anything was measured
    assert len(run(output, bench, overwrite=True).profile.rows) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"schema": SCHEMA + 1, "rows": [], "written_by": "9.9.9"}, "written by turbopump 9.9.9"),
        ({"schema": SCHEMA, "rows": []}, "not a valid machine file"),
        ({"name": "x"}, "not a machine file"),
    ],
)
def test_a_file_that_cannot_be_extended_is_refused_unless_told(output, content, said):
    output.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=said) as caught:
        run(output, Fake(products(1)))
    assert "--overwrite" in str(caught.value)
    assert json.loads(output.read_text()) == content
    assert len(run(output, Fake(products(1)), overwrite=True).profile.rows) == 1


def test_a_datasheets_profile_is_not_mixed_with_measurements(output):
    profile = run(output, Fake(products(1))).profile
    save(replace(profile, provenance="datasheet"), output)
    with pytest.raises(ProfileError, match=r"is a datasheet profile of .*--overwrite"):
        run(output, Fake(products(1)))


def test_rows_of_other_versions_are_named(output):
    profile = run(output, Fake(products(3))).profile
    save(replace(profile, software={**profile.software, "torch": "1.0"}), output)
    outcome = run(output, Fake(products(1)))
    assert any(line.startswith("2 rows were measured with torch 1.0 (now ") for line in outcome.profile.uncertain)


# ---- stopping and going on

KILLED = """
import sys
from pathlib import Path
from tests.fake_domains import Fake, products
from turbopump.pack import pack
from turbopump.probe import probe
log, kill_at, number = Path("log"), int(sys.argv[1]), int(sys.argv[2])
bench = Fake(products(12), kill_at=kill_at, signal_number=number, log=log)
try:
    probe("machine.json", budget_s=600, domains={"compute": bench}, device="cpu")
finally:
    Path("put_back").write_text(str(bench.put_back))
"""


def start(place, kill_at, number):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(kill_at), str(number)], cwd=place, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path}, check=False, timeout=PATIENCE_S,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(output):
    assert start(output.parent, 5, signal.SIGKILL).returncode == -signal.SIGKILL
    assert not output.exists() and len(read_journal(journal_path(output))[1]) == 5
    bench = Fake(products(12))
    outcome = run(output, bench)
    assert len(bench.asked) == 7 and not set(bench.asked) & set(output.with_name("log").read_text().splitlines())
    assert outcome.resumed == 5 and outcome.measured == 7 and len(load(output).rows) == 12
    assert verb.notes(outcome)[0].startswith("went on with 5 rows of the probe begun 20")
    assert not journal_path(output).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly_and_says_how_to_go_on(output, number):
    done = start(output.parent, 4, number)
    assert "interrupted; 4 of 12 rows are in machine.json.partial.jsonl, and the same command" in done.stderr
    assert output.with_name("put_back").read_text() == "1"  # the domain closed what it had open
    assert len(read_journal(journal_path(output))[1]) == 4
    assert len(run(output, Fake(products(12))).profile.rows) == 12


def test_exit_code_of_a_signal(output):
    bench = Fake(products(9), kill_at=2, signal_number=signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run(output, bench)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_ends_it_with_the_earlier_rows_on_disk(output, monkeypatch):
    from turbopump.hardware.journal import Journal

    append, count = Journal.append, 0

    def full(self, row):
        nonlocal count
        count += 1
        if count > 3:
            raise RunDirectoryError(f"no space left on the device that holds {self.path}")
        append(self, row)

    monkeypatch.setattr(Journal, "append", full)
    bench = Fake(products(6))
    with pytest.raises(RunDirectoryError, match="no space left"):
        run(output, bench)
    assert bench.put_back == 1 and len(read_journal(journal_path(output))[1]) == 3 and not output.exists()
    monkeypatch.setattr(Journal, "append", append)
    assert len(run(output, Fake(products(6))).profile.rows) == 6


def test_a_journal_stays_where_the_profile_cannot_be_written(output, monkeypatch):
    def refuse(profile, path):
        raise RunDirectoryError("no space left")

    monkeypatch.setattr(verb, "save", refuse)
    with pytest.raises(RunDirectoryError):
        run(output, Fake(products(3)))
    assert len(read_journal(journal_path(output))[1]) == 3


# ---- what fails


def test_a_device_that_vanishes_costs_its_own_rows_only(output):
    trials = products(10)
    gone = Fake(trials, fail_at=frozenset(trial.key for trial in trials[4:]))
    data = Fake(products(5, tier=1, dtype="bf16"))
    outcome = run(output, gone, data)
    assert [row.dtype for row in outcome.profile.rows].count("fp32") == 4 and len(data.asked) == 5
    (said,) = outcome.failures
    assert "compute failed 3 times, and was given up; first at Gemm(m=68," in said and "CUDA error" in said
    assert outcome.profile.uncertain[0] == said and "and much more" not in said
    assert any(line.startswith("compute: 6 of 10 Gemm fp32") for line in outcome.profile.left_out)
    assert len(gone.asked) == 7


def test_one_operation_that_fails_does_not_take_the_next_ones_with_it(output):
    trials = products(6)
    bench = Fake(trials, fail_at=frozenset([trials[1].key]))
    outcome = run(output, bench)
    assert len(outcome.profile.rows) == 5 and bench.asked.count(trials[1].key) == 1
    assert len(outcome.failures) == 1 and "given up" not in outcome.failures[0]


def test_nothing_but_failures_is_an_error(output):
    trials = products(3)
    with pytest.raises(Exception, match=r"nothing could be measured\. compute failed 3 times"):
        run(output, Fake(trials, fail_at=frozenset(trial.key for trial in trials)))
    assert not output.exists()


class Full(Fake):
    """A disk without room: every row says so."""

    def measure(self, trials, request, until):
        yield from (Measurement.failed(trial, "data", "4 MB are needed, 1 MB is free") for trial in trials)


def test_nothing_but_rows_with_problems_is_an_error_that_names_them(output):
    with pytest.raises(TurbopumpError, match=r"nothing could be measured\. 3 rows: 4 MB are needed") as caught:
        run(output, Full(products(3)))
    assert caught.value.exit_code == 1 and not list(output.parent.iterdir())


# ---- arguments


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"budget_s": 0}, "budget_s: 0 given"),
        ({"budget_s": float("nan")}, "budget_s: nan given"),
        ({"only": ["compte"]}, "only: 'compte' given: use some of compute, memory"),
        ({"suite": "mlperf"}, "suite: 'mlperf' given: use one of generic, deepbench"),
        ({"threads": [4096]}, "threads: 4096 given, this process may use"),
        ({"threads": [0]}, "threads: 0 given"),
        ({"directory": "nowhere"}, "there is no directory nowhere"),
        ({"recipe": "nowhere.toml"}, "no recipe at nowhere.toml"),
    ],
)
def test_wrong_arguments_are_named_before_anything_starts(output, more, said):
    bench = Fake(products(1))
    with pytest.raises(UsageError) as caught:
        run(output, bench, **more)
    assert said in str(caught.value) and not bench.requests and not list(output.parent.iterdir())


def test_a_directory_as_output(output):
    with pytest.raises(UsageError, match=r"is a directory: give the file to write, e\.g\. .*machine\.json"):
        run(output.parent, Fake(products(1)))


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3600), ("1.5h", 5400), ("45", 45), (" 2 min ", 120)]
)
def test_durations(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-5m", "5 days", "h", "1e3s", "nan", "5m30s", "９" * 400])
def test_durations_that_are_none(text):
    with pytest.raises(UsageError, match=r"--budget: .* e\.g\. 30s, 5m or 1h"):
        parse_seconds(text, "--budget")


# ---- recipes


@pytest.fixture
def recipe(output):
    pack(iter(["the quick brown fox " * 50] * 4), "datasets/text")
    output.with_name("lm.toml").write_text(RECIPE)
    return output.parent


def test_the_operations_of_a_recipe_are_asked_for_once_each(recipe):
    ops = verb.recipe_ops("lm.toml")
    assert len(ops) == len(set(ops)) and any(isinstance(op, Gemm) for op in ops)
    assert {op.m for op in ops if isinstance(op, Gemm)} & {8 * 16}  # a batch of 8 windows of 16 tokens
    few = verb.recipe_ops("lm.toml", ["microbatch=2"])
    assert {op.m for op in few if isinstance(op, Gemm)} & {2 * 16}
    both = verb.recipe_ops("lm.toml", ["precision.compute='auto'"])
    assert {op.dtype for op in both if isinstance(op, Gemm)} == {"fp32", "bf16"}
    bench = Fake(products(1))
    run(recipe / "machine.json", bench, recipe="lm.toml")
    assert bench.requests[0].ops == ops
    assert load(recipe / "machine.json").request["recipe_ops"] == [op.key for op in ops]


def test_a_live_model_is_refused(recipe):
    with pytest.raises(UsageError, match=r"lm\.toml: the operations of a live model are not known"):
        verb.recipe_ops("lm.toml", ["model={kind='live', reference='a:b'}"])


# ---- the command line


@pytest.fixture
def fakes(monkeypatch):
    """The command measures these instead of the machine."""
    benches = {"compute": Fake(products(6) + products(2, route="mkldnn.matmul.fp32_precision=bf16"))}
    monkeypatch.setattr(verb, "_load_benches", lambda domains: benches)
    monkeypatch.setattr(verb, "_device", lambda asked: asked or "cpu")
    return benches


def test_the_command_prints_a_summary_that_fits_a_terminal(output, cli, fakes, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = cli("probe", "--budget", "5s")
    lines = said.out.splitlines()
    assert (said.code, said.err) == (0, "") and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert any(line.startswith("products     fp32") for line in lines)
    assert "written      machine.json; to look at: probe.html" in lines
    assert "measured 8 rows" in said.out and load(output).request["budget_s"] == 5
    again = cli("probe", "--budget", "1m")
    assert "of the rows that were there 8 were renewed" in again.out


def test_json_is_the_file_and_quiet_says_nothing(output, cli, fakes):
    said = cli("probe", "--json", "--output", "other.json")
    assert said.out.encode() == output.with_name("other.json").read_bytes()
    assert (cli("probe", "--quiet").out, cli("probe", "--quiet").err) == ("", "")


def test_options_reach_the_probe(output, cli, fakes):
    output.with_name("disk").mkdir()
    assert (
        cli("probe", "--only", "memory, compute", "--threads", "1", "--directory", "disk", "--budget", "2m").code == 0
    )
    request = load(output).request
    assert request["domains"] == ["compute", "memory"] and request["budget_s"] == 120
    assert request["directory"] == "disk" and request["threads"] == [1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "soon"], "--budget: 'soon' given, which is no positive number of s, m or h"),
        (["--only", "gpu"], "only: 'gpu' given: use some of compute, memory, host, comms, data"),
        (["--suite", "mlperf"], "--suite"),
        (["--threads", "two"], "--threads: 'two' given, which is no number"),
        (["--advice", "nowhere.toml"], "no recipe at nowhere.toml"),
        (["--for", "nowhere.toml"], "no recipe at nowhere.toml"),
        (["--published", "."], "no DeepBench tables in ."),
        (["microbatch=2"], "'microbatch=2' given, which is a setting of a recipe"),
        (["--directory", "nowhere"], "there is no directory nowhere"),
    ],
)
def test_wrong_use_of_the_command(output, cli, fakes, arguments, said):
    done = cli("probe", *arguments)
    assert done.code in (1, 2) and said in done.err and not done.out and not output.exists()


def test_a_domain_that_failed_is_an_error_after_everything_is_written(output, cli, fakes):
    bench = fakes["compute"]
    bench.fail_at = frozenset([bench.wanted[3].key])
    done = cli("probe")
    assert done.code == 1 and "compute failed 1 times; first at Gemm" in done.err and "is in machine.json" in done.err
    assert len(load(output).rows) == 7 and "written" in done.out


def test_interrupted_the_command_exits_with_130(output, cli, fakes):
    fakes["compute"].kill_at, fakes["compute"].signal_number = 2, signal.SIGINT
    done = cli("probe")
    assert done.code == 130 and "2 of 8 rows are in machine.json.partial.jsonl" in done.err


def test_advice_needs_a_machine_file_and_measures_nothing(recipe, cli, fakes):
    missing = cli("probe", "--advice", "lm.toml")
    assert missing.code == 2 and "no machine file at machine.json" in missing.err
    ops = [op for op in verb.recipe_ops("lm.toml") if isinstance(op, Gemm)]
    fakes["compute"].wanted = [replace(products(1)[0], op=op) for op in ops]
    assert cli("probe", "--for", "lm.toml", "--threads", "1").code == 0
    asked = len(fakes["compute"].asked)
    said = cli("probe", "--advice", "lm.toml")
    assert said.code == 0 and f"{len(ops)} measured" in said.out and "probe --for lm.toml measures them" in said.out
    assert len(fakes["compute"].asked) == asked
    assert json.loads(cli("probe", "--advice", "lm.toml", "--json").out)["workload"]


GEMM = "platform,precision,M,N,K,transA,transB,time_ms,tflops,source\nNV_X,fp32,64,{n},64,N,T,0.5,1,here\n"


def test_published_figures_stand_beside_ours(output, cli, fakes):
    op = deepbench.gemm(64, 32, 64, "N", "T")
    fakes["compute"].wanted = [replace(products(1)[0], op=op)]
    output.with_name("deepbench_gemm.csv").write_text(GEMM.format(n=32))
    said = cli("probe", "--suite", "deepbench", "--published", ".")
    assert said.code == 0 and "times as fast as this machine, median" in said.out
    assert "1 ms" in said.out and "500 µs" in said.out and "NV_X fp32" in said.out
    output.with_name("deepbench_gemm.csv").write_text(GEMM.format(n=33))
    assert "none of the published operations was measured here" in cli("probe", "--published", ".").out
    output.with_name("deepbench_gemm.csv").write_text("platform,M\nNV_X,1\n")
    broken = cli("probe", "--published", ".")
    assert broken.code == 2 and "deepbench_gemm.csv is not in the form of docs/probe.md" in broken.err


@pytest.mark.parametrize(
    ("option", "given"), [("--only", ""), ("--only", "compute,"), ("--threads", ","), ("--threads", "")]
)
def test_an_empty_part_of_a_list_is_no_default(output, cli, fakes, option, given):
    said = cli("probe", option, given)
    assert said.code == 2 and f"{option}: {given!r} given" in said.err and not fakes["compute"].requests


def test_a_device_that_is_not_here_is_refused(output, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bench = Fake(products(1))
    with pytest.raises(UsageError, match="'cuda' given, but PyTorch sees no CUDA device here: use cpu"):
        probe(output, domains={"compute": bench}, device="cuda")
    assert not bench.requests and not output.exists()


def test_importing_it_imports_no_torch():
    code = "import sys, turbopump.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- the page of the schema


@pytest.mark.parametrize(
    ("heading", "cls"),
    [
        ("The profile", MachineProfile), ("A row", Measurement), ("A device", DeviceSpec), ("A link", LinkSpec),
        ("A storage", StorageSpec), ("A curve", Curve),
    ],
)  # fmt: skip
def test_every_field_of_the_file_is_documented(heading, cls):
    page = (ROOT / "docs" / "machine-json.md").read_text()
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert documented == [field.name for field in fields(cls)]


# ---- this machine, really


@pytest.mark.slow
def test_a_short_probe_of_this_machine(output, cli):
    said = cli("probe", "--budget", "25s", "--threads", "1")
    assert said.code == 0, said.err
    profile = load(output)
    assert {row.domain for row in profile.rows} >= {"compute", "memory", "host", "comms", "data"}
    assert not oddities(profile)
    assert profile.storage and profile.links and profile.devices[0].flops_per_s
    assert "products" in said.out and "storage" in said.out and "collectives" in said.out
    assert sorted(path.name for path in output.parent.iterdir()) == ["machine.json", "probe.html"]
