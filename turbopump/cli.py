"""The command line: verbs with their options; each calls the function of its name. Imports no torch."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from turbopump.core.errors import MissingDependencyError, TurbopumpError, UsageError
from turbopump.core.files import to_json
from turbopump.core.units import human_bytes, human_seconds, parse_seconds, printable
from turbopump.core.version import VERSION

if TYPE_CHECKING:
    from turbopump.hardware.measuring import ProbeProgress
    from turbopump.pack import PackProgress
    from turbopump.probe import Outcome

app = App(
    name="turbopump",
    version=VERSION,
    help="Train deep-learning models near the limit of the hardware, and account for every second.",
    help_format="plaintext",
    help_epilogue="Add --debug to any command for the traceback of an error. `turbopump VERB --help` shows examples.",
    result_action="return_value",
)

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]


@app.command
def probe(
    *overrides: str,
    budget: str = "5m",
    only: str | None = None,
    suite: Literal["generic", "deepbench"] = "generic",
    recipe: Annotated[Path | None, Parameter(name="--for")] = None,
    advice: Path | None = None,
    published: Path | None = None,
    output: Path = Path("machine.json"),
    threads: str | None = None,
    directory: Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    overwrite: Flag = False,
    json: Flag = False,
    quiet: Flag = False,
) -> None:
    """What this machine can do, per operation and library: machine.json, and probe.html to look at.

    Examples:

        turbopump probe
        turbopump probe --budget 30s --only compute,comms
        turbopump probe --for recipes/lm-stdlib.toml
        turbopump probe --advice recipes/lm-stdlib.toml
        turbopump probe --suite deepbench --published tables/ --budget 1h

    Parameters
    ----------
    overrides
        Settings that replace those of the recipe of --for or --advice: microbatch=8
    budget
        Time to spend: 30s, 5m, 1h. What it has no room for is listed.
    only
        Domains, e.g. compute,comms, of compute, memory, host, comms and data; default all.
    suite
        generic, or deepbench: the operations of Baidu's benchmark.
    recipe
        Measure the operations of this recipe first.
    advice
        Measure nothing: which route each operation of this recipe should take, by the rows of --output.
    published
        A directory of DeepBench's published tables (docs/probe.md): prints our times beside them.
    output
        The machine file: extended and refreshed if it is there.
    threads
        Threads of one process, e.g. 2,1; default what train would use, and 1.
    directory
        Where storage is measured; default that of --output.
    device
        cpu or cuda; default cuda where PyTorch sees one.
    overwrite
        Let noisy rows replace good ones, and the file of another machine be replaced.
    json
        Print machine.json.
    quiet
        Print nothing.
    """
    from turbopump import probe as verb
    from turbopump.reporting.published import beside
    from turbopump.reporting.published import read as read_published

    columns = shutil.get_terminal_size().columns
    if advice is not None:
        from turbopump.compute.advice import format_advice

        found = verb.advise(advice, output, overrides)
        print(to_json(found, indent=True).decode().rstrip() if json else format_advice(found, str(advice), columns))
        return
    tables = read_published(published) if published is not None else []  # before minutes of measuring
    if overrides and recipe is None:
        raise UsageError(f"{overrides[0]!r} given, which is a setting of a recipe: name one with --for or --advice")
    outcomes: list[Outcome] = []
    line = _ProbeLine(quiet or json)
    try:
        profile = verb.probe(
            output, budget_s=parse_seconds(budget, "--budget"), only=_parts(only, "--only"), suite=suite, recipe=recipe,
            overrides=overrides, threads=[_count(text, "--threads") for text in _parts(threads, "--threads")],
            directory=directory, device=device, overwrite=overwrite, progress=line, finished=outcomes.append,
        )  # fmt: skip
    finally:
        line.clear()
    if json:
        print(to_json(profile, indent=True).decode().rstrip())
    elif not quiet:
        print(verb.format_outcome(outcomes[0], columns))
    if tables and not json:
        print(beside(profile, tables, min(columns, 100)))
    if failures := outcomes[0].failures:
        raise TurbopumpError(f"{'; '.join(failures)}. What could be measured is in {output}")


def _parts(given: str | None, option: str) -> list[str]:
    """The parts of an option given as `a,b`; none where it was not given."""
    parts = [part.strip() for part in given.split(",")] if given is not None else []
    if not all(parts):
        raise UsageError(f"{option}: {given!r} given, where a part is empty: give names or numbers, as in a,b")
    return parts


def _count(text: str, option: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{option}: {text!r} given, which is no number: e.g. {option} 2,1")
    return int(text)


class _ProbeLine:
    """Progress of probe: one line rewritten on a terminal, a plain line every few seconds elsewhere."""

    PLAIN_EVERY_S = 10.0

    def __init__(self, quiet: bool) -> None:
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._quiet = quiet
        self._shown_s = -self.PLAIN_EVERY_S
        self._dirty = False

    def __call__(self, progress: ProbeProgress) -> None:
        if self._quiet or progress.elapsed_s - self._shown_s < (0.1 if self._terminal else self.PLAIN_EVERY_S):
            return
        self._shown_s = progress.elapsed_s
        text = f"{progress.done}/{progress.total}  {human_seconds(progress.left_s)} left  {progress.doing}"
        if not self._terminal:
            print(text, flush=True)
            return
        columns = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:columns]}", end="", flush=True)
        self._dirty = True

    def clear(self) -> None:
        if self._dirty:
            print("\r\x1b[K", end="", flush=True)


@app.command
def train(
    recipe: Path,
    /,
    *overrides: str,
    run: Path | None = None,
    start_from: Annotated[str | None, Parameter(name="--from")] = None,
    plan: Path | None = None,
    model: str | None = None,
    dataset: str | None = None,
    evaluation_dataset: str | None = None,
    loss: str | None = None,
    dry_run: Flag = False,
    verify_resume: Flag = False,
    quiet: Flag = False,
) -> None:
    """Train a recipe; go on where it stopped if its run directory exists.

    Examples:

        turbopump train recipes/lm-stdlib.toml
        turbopump train recipes/lm-stdlib.toml num_steps=500 name=shorter
        turbopump train recipes/lm-stdlib.toml --dry-run
        turbopump train recipes/convnet-digits.toml launch.num_processes=2
        turbopump train recipes/lm-stdlib.toml name=tuned --from runs/demo@400
        turbopump train recipes/lm-stdlib.toml --plan plan.toml
        turbopump train my.toml --model mine:build --dataset mine:data --loss mine:loss

    Parameters
    ----------
    recipe
        A TOML file; ready ones are in recipes/, all settings in docs/recipe.md.
    overrides
        Settings that replace the recipe's, by dotted path: optimizer.lr=1e-3
    run
        The run directory; default runs/<name>.
    start_from
        Start a new run from the weights of RUN, RUN@STEP, a checkpoint or a safetensors file.
    plan
        Follow this plan.toml (turbopump plan RECIPE --output plan.toml): microbatch, precision, recompute, processes.
    model
        module:function that returns a torch module, in place of the recipe's [model].
    dataset
        module:function that returns a map-style dataset, in place of the recipe's [data].
    evaluation_dataset
        module:function that returns a held-out dataset for a live --dataset.
    loss
        module:function: loss(model, batch) -> mean over the batch, for a live --model.
    dry_run
        Print the resolved configuration, sizes, FLOPs and a memory estimate; train nothing.
    verify_resume
        Prove that this recipe resumes exactly: kill it, resume it, compare bit by bit.
    quiet
        Print nothing while training.
    """
    from turbopump import train as verb

    live = {"model": model, "dataset": dataset, "evaluation_dataset": evaluation_dataset, "loss": loss}
    if plan is not None and (dry_run or verify_resume):
        raise UsageError("--plan is for training: leave --dry-run and --verify-resume out, or the plan")
    if dry_run:
        print(verb.dry_run(recipe, overrides=overrides, live=live))
    elif verify_resume:
        verb.verify_resume(recipe, overrides=overrides, live=live)
    else:
        verb.train_from_command_line(
            recipe, overrides=overrides, live=live, run=run, start_from=start_from, quiet=quiet, plan=plan
        )


@app.command
def evaluate(
    run: Path,
    /,
    *,
    step: int | None = None,
    split: str | None = None,
    max_samples: int = 0,
    sample: str | None = None,
    num_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    model: str | None = None,
    dataset: str | None = None,
    evaluation_dataset: str | None = None,
    loss: str | None = None,
    json: Flag = False,
) -> None:
    """Metrics of a run or checkpoint on held-out data; samples of a language model.

    Examples:

        turbopump evaluate runs/demo
        turbopump evaluate runs/demo --step 400 --split train --max-samples 500
        turbopump evaluate runs/demo --sample "def main(" --num-tokens 300

    Parameters
    ----------
    run
        A run directory.
    step
        The checkpoint of this step; default the best by evaluation loss, or else the newest.
    split
        The split to evaluate; default the recipe's evaluation.split.
    max_samples
        Samples to read at most; 0 reads all.
    sample
        Write on from this text instead of evaluating.
    num_tokens
        Tokens to write.
    temperature
        0 takes the likeliest token; higher is bolder.
    top_k
        Draw among this many likeliest tokens; 0 among all.
    seed
        Seed of the draw.
    model
        module:function that returns the module, for a run that was trained with --model.
    dataset
        module:function that returns the training data, for a run that was trained with --dataset.
    evaluation_dataset
        module:function that returns the held-out data.
    loss
        module:function of the loss, for a run that was trained with --loss.
    json
        Print JSON.
    """
    from turbopump import evaluate as verb

    if sample is not None:
        text = verb.sample(run, prompt=sample, step=step, num_tokens=num_tokens, temperature=temperature, top_k=top_k,
                           seed=seed)  # fmt: skip
        print(printable(text))
        return
    live = {"model": model, "dataset": dataset, "evaluation_dataset": evaluation_dataset, "loss": loss}
    result = verb.evaluate(run, step=step, split=split, max_samples=max_samples, live=live)
    print(verb.format_result(result, as_json=json))


@app.command
def plan(
    recipe: Path | None = None,
    /,
    *overrides: str,
    on: str | None = None,
    device: str | None = None,
    count: int | None = None,
    link: str | None = None,
    devices_per_node: int | None = None,
    fix: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = (),
    seq_len: int = 0,
    global_batch: int = 0,
    steps: int | None = None,
    tokens: float | None = None,
    price: float | None = None,
    output: Path | None = None,
    validate: Path | None = None,
    frozen: Flag = False,
    calibrate: Annotated[tuple[Path, ...], Parameter(negative=(), consume_multiple=True)] = (),
    json: Flag = False,
) -> None:
    """How to train a model on a machine, how long it takes, what it costs, and how sure that is.

    Examples:

        turbopump plan recipes/lm-stdlib.toml
        turbopump plan recipes/lm-stdlib.toml --on machine.json --output plan.toml
        turbopump plan config.json --device h100-sxm --count 1024 --link infiniband-ndr --tokens 1e12
        turbopump plan config.json --device h100-sxm --count 64 --fix tp=4 recompute=none,selective
        turbopump plan workload.json --device a100-80gb-sxm --count 8 --global-batch 256
        turbopump plan --calibrate runs/demo runs/other
        turbopump plan --validate published/ --frozen

    Parameters
    ----------
    recipe
        A recipe, a Hugging Face config.json, or the workload.json of a traced module.
    overrides
        Settings that replace the recipe's: microbatch=8
    on
        A machine file of probe, or a device of the catalog; default machine.json.
    device
        A device of the catalog, e.g. h100-sxm, or of a file of your own: FILE.toml:ENTRY
    count
        How many devices; on the processors of a host, how many processes.
    link
        What joins the hosts: a link of the catalog, or of a file; default infiniband-ndr.
    devices_per_node
        Devices of a host; default 8.
    fix
        Hold a choice, or some values of it: tp=4 recompute=none,full. Known: pp, dp_replicate, dp_shard, cp, tp, ep,
        microbatch, virtual_stages, sync_every, recompute, schedule, synchronisation, dtype.
    seq_len
        Tokens of a sequence, for a config.json; default 4096.
    global_batch
        Samples of a step, for a config.json or workload.json.
    steps
        Steps to the end; default the recipe's.
    tokens
        Tokens (or what the model counts) to the end, e.g. 1e12.
    price
        Dollars for an hour of one device; default the catalog's.
    output
        Write plan.toml here, for train --plan, and its page beside it.
    validate
        Plan nothing: predict every published table of this folder and compare; --output writes a page.
    frozen
        Predict them with the calibration that ships, instead of every group of rows without itself.
    calibrate
        Plan nothing: refine the machine file of --on by these runs of this machine.
    json
        Print JSON: every alternative and the landscape of the search too.
    """
    from turbopump import plan as verb

    if validate is not None or calibrate:
        if recipe is not None or (validate is not None and calibrate):
            raise UsageError("a recipe, --validate and --calibrate are three things: give one of them")
        print(verb.validate(validate, frozen=frozen, page=output, as_json=json) if validate is not None
              else verb.calibrate(calibrate, on, as_json=json))  # fmt: skip
        return
    if recipe is None:
        raise UsageError("plan needs a recipe, a config.json or a workload.json: turbopump plan recipes/lm-stdlib.toml")
    if frozen:
        raise UsageError("--frozen is for --validate: leave it out")
    said = verb.plan_from_command_line(
        recipe, overrides, output=output, as_json=json, columns=shutil.get_terminal_size().columns, on=on,
        device=device, count=count, link=link, devices_per_node=devices_per_node, fix=fix, seq_len=seq_len,
        global_batch=global_batch, steps=steps, tokens=tokens, usd_per_hour=price,
    )  # fmt: skip
    print(said)


@app.command
def pack(
    *paths: str,
    tokenizer: str | None = None,
    tokenizer_pattern: str | None = None,
    vocab_size: int = 4096,
    validation: float | None = None,
    include: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = (),
    format: str | None = None,
    text_field: str | None = None,
    columns: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = (),
    key: str | None = None,
    nulls: Literal["error", "drop"] = "error",
    num_processes: int = 0,
    shard_bytes: int = 1 << 26,
    overwrite: Flag = False,
) -> None:
    """Pack files of any kind into a sharded, checksummed, random-access dataset: SOURCE... DEST

    Examples:

        turbopump pack stdlib datasets/stdlib --tokenizer bpe --vocab-size 4096
        turbopump pack my_texts/ more/*.md datasets/mine --include "*.md" "*.txt"
        turbopump pack crawl/*.jsonl datasets/crawl --text-field text --tokenizer bpe
        turbopump pack table.parquet datasets/table --columns id features --key id
        turbopump pack photos/ datasets/photos

    Parameters
    ----------
    paths
        Sources (files, folders and patterns of one format: text, JSONL, CSV, Parquet, Arrow, WebDataset, audio,
        images, Hugging Face, MDS, .npy/.npz; or `stdlib`: the Python standard library's own sources), then the
        directory to write.
    tokenizer
        bytes (256 tokens; what text gets by itself), bpe (byte-level sub-words, trained on the training split), a
        tokenizer.json of the tokenizers library, a .tiktoken file, or none: text stays text, a row a document.
    tokenizer_pattern
        What cuts text into words for a .tiktoken file: r50k_base, p50k_base, cl100k_base, o200k_base or a regular
        expression. The published files are known by their content and need none.
    vocab_size
        Tokens of a bpe vocabulary.
    validation
        Share held out (0.05), chosen by a hash: of the column --key, of the file's name, or of the row's place. None
        may be given where the source has splits: folders train, val (valid, validation) and test, or Hugging Face's.
    include
        Files to take from folders, e.g. "*.md"; default all.
    format
        What the sources are, where it cannot be seen: text, jsonl, csv, tsv, parquet, arrow, webdataset, audio,
        image, huggingface, mds, arrays.
    text_field
        The column of a table that is its text: it is packed as tokens.
    columns
        The columns of a table to keep; default all. A member of a nested object by its path, e.g. meta.lang.
    key
        The column whose hash decides what is held out.
    nulls
        What becomes of a row with a null: error, or drop, which counts them as skipped.
    num_processes
        Processes that read and write; 0 takes one per core. The result is the same for any number.
    shard_bytes
        Size of a shard, and memory of a process for each split.
    overwrite
        Replace DEST if it exists.
    """
    from turbopump.pack import pack as verb

    if len(paths) < 2:
        raise UsageError("pack needs a source and a destination: turbopump pack stdlib datasets/stdlib")
    *sources, destination = paths
    begin = time.monotonic()
    manifest = verb(
        sources, destination, tokenizer=tokenizer, tokenizer_pattern=tokenizer_pattern, vocab_size=vocab_size,
        validation=validation, include=include, format=format, text_field=text_field, columns=columns, key=key,
        nulls=nulls, num_processes=num_processes or None, shard_bytes=shard_bytes, overwrite=overwrite,
        progress=_PackLine(),
    )  # fmt: skip
    splits = ", ".join(f"{name} {split.rows:,}" for name, split in manifest.splits.items())
    left_out = "documents" if manifest.kind == "tokens" else "rows"
    skipped = f", {manifest.skipped:,} {left_out} skipped" if manifest.skipped else ""
    unit = "tokens" if manifest.kind == "tokens" else "rows"
    print(f"packed {manifest.rows:,} {unit} ({splits}{skipped}), {human_bytes(manifest.bytes)}, into {destination} in "
          f"{human_seconds(time.monotonic() - begin)}; next: turbopump inspect {destination}")  # fmt: skip


class _PackLine:
    """Progress of pack: one line rewritten on a terminal, a plain line every few seconds elsewhere."""

    PLAIN_EVERY_S = 5.0

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._shown_s = 0.0

    def __call__(self, progress: PackProgress) -> None:
        if progress.elapsed_s - self._shown_s < (0.2 if self._terminal else self.PLAIN_EVERY_S):
            return
        self._shown_s = progress.elapsed_s
        left = f", {human_seconds(progress.left_s)} left" if progress.left_s is not None else ""
        total = f" of {human_bytes(progress.total_bytes)}" if progress.total_bytes else ""
        text = (
            f"{progress.phase}: {human_bytes(progress.done_bytes)}{total}, {human_bytes(progress.bytes_per_s)}/s{left}"
        )
        print(f"\r\x1b[K{text}" if self._terminal else text, end="" if self._terminal else "\n", flush=True)
        if self._terminal and progress.done_bytes == progress.total_bytes:
            print("\r\x1b[K", end="", flush=True)


@app.command
def report(*runs: Path, output: Path | None = None, json: Flag = False) -> None:
    """Where every second of a run went, what limits it, and what to change first: report.html and report.json.

    Examples:

        turbopump report runs/demo
        turbopump report runs/a runs/b --output comparison.html

    Parameters
    ----------
    runs
        One run directory, or several to compare.
    output
        The page to write; default report.html in the (first) run directory.
    json
        Print report.json instead of a summary.
    """
    from turbopump.report import report_from_command_line

    if not runs:
        raise UsageError("report needs a run directory: turbopump report runs/demo")
    print(report_from_command_line(runs, output=output, as_json=json))


@app.command
def inspect(
    path: str,
    /,
    *overrides: str,
    verify: Flag = False,
    json: Flag = False,
    export: Literal["parquet"] | None = None,
    to: Path | None = None,
) -> None:
    """What an artefact is: a run, checkpoint, dataset (also at an address), recipe or weights file.

    Examples:

        turbopump inspect runs/demo
        turbopump inspect datasets/stdlib --verify
        turbopump inspect s3://bucket/stdlib
        turbopump inspect s3://bucket/stdlib endpoint=http://127.0.0.1:9000 options.region=us-east-1
        turbopump inspect gs://bucket/stdlib anonymous=true
        turbopump inspect datasets/images --export parquet --to images-parquet
        turbopump inspect runs/demo/checkpoints/step-00000400

    Parameters
    ----------
    path
        The artefact.
    overrides
        How an address is reached: settings of [data.remote], e.g. endpoint=... (docs/remote.md). Credentials come from
        the environment.
    verify
        Check every checksum.
    json
        Print JSON.
    export
        parquet: write a dataset back as a file a split, which any tool reads, instead of describing it.
    to
        The folder that --export writes; default PATH.parquet.
    """
    from turbopump import inspect as verb

    if to is not None and export is None:
        raise UsageError(f"--to {to} given, which says where --export writes: add --export parquet")
    if export is not None:
        for file in verb.export(path, to, remote=verb.remote_of(path, overrides)):
            print(file)
        return
    remote = verb.remote_of(path, overrides)
    print(verb.inspect_from_command_line(path, verify=verify, as_json=json, remote=remote))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 128 + n for a signal."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        app(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        verb = f" {tokens[0]}" if tokens and tokens[0] in VERBS else ""
        return _fail(f"{error}\nsee: turbopump{verb} --help", UsageError.exit_code)
    except BrokenPipeError:
        return _nobody_reads()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except SystemExit as stop:  # a user's own module may call it, with a text too
        return stop.code if isinstance(stop.code, int) else _fail(str(stop.code), 1) if stop.code else 0
    except TurbopumpError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":  # plan, report and inspect do without it
            missing = MissingDependencyError("torch", "train", f"turbopump {tokens[0]}")
            return _fail(str(missing), missing.exit_code)
        return _fail(_unexpected(error), 1)
    return 0


VERBS = ("probe", "plan", "pack", "train", "evaluate", "report", "inspect")


def _fail(message: str, exit_code: int) -> int:
    """Say on stderr why the command ended."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError):
        print(f"error: {printable(message)}", file=sys.stderr)
    return exit_code


def _unexpected(error: Exception) -> str:
    """One line for an exception that no type of ours explains: a defect here, or the user's own module."""
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"unexpected {what}; run again with --debug for the traceback"


def _nobody_reads() -> int:
    """The reader of our output went away (`turbopump inspect ... | head`): as a filter does, end without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
    return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
