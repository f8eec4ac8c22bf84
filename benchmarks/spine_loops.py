"""One training job in four loops: `train`, hand-written, Lightning, Accelerate; and the turns they take.

Every contestant is its own, native run: started once, in a thread, and held after a step until its next turn. Only one
runs at any moment, so that blocks of a few steps alternate within one process and no block holds a start-up. A block
counts CPU time of the contestant's thread: what it leaves to helper threads (Lightning's TensorBoard writer) is not
charged. glibc is told to serve all threads from one heap, as it serves a main thread.

Same for all: model and loss (ours), torch's fused AdamW, clipping at norm 1, dtype, batch shape. In the others' favour:
no schedule, and batches that lie ready in memory, where `train` reads them from its packed dataset.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turbopump.core.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LaunchConfig,
    LoggingConfig,
    PrecisionConfig,
)
from turbopump.data.sources import TokensConfig, TokensSource
from turbopump.models.transformer import model as transformer
from turbopump.models.transformer.config import TransformerConfig
from turbopump.train import train
from turbopump.training.forward_backward import autocast

PEERS = Path(__file__).parent / ".peers"
PEER_VERSIONS = ("lightning==2.6.6", "lightning-utilities==0.15.3", "torchmetrics==1.9.0", "accelerate==1.15.0")
MANY = 10**9  # steps: a contestant is stopped, it does not end
CLIP_NORM, LR = 1.0, 3e-4
ONE_HEAP = (-8, 1)  # M_ARENA_MAX of glibc's mallopt

AfterStep = Callable[..., None]
Contestant = Callable[[AfterStep], object]


@dataclass(frozen=True)
class Job:
    """What every contestant trains: a transformer on windows of `dataset`, `batch` of them a step."""

    model: TransformerConfig
    dataset: Path
    seq_len: int
    batch: int
    compute: str

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return transformer.build(self.model)

    def batches(self, number: int = 64) -> list[Tensor]:
        """The first batches of the dataset, int64 [B, T + 1] each."""
        source = TokensSource(TokensConfig(path=str(self.dataset), seq_len=self.seq_len), "train")
        first = range(0, min(number * self.batch, len(source) - self.batch + 1), self.batch)
        return [torch.from_numpy(source.__getitems__(list(range(i, i + self.batch)))) for i in first]


# ---- turns


class _Enough(Exception):
    """Ends a contestant from inside its own loop."""


class Turns:
    """Contestants that run one at a time, a number of steps each.

    A contestant is a function that trains and calls what it is given after each step; it must not return by itself.
    `cpu_s` is the CPU time of all their steps so far: the clock for `harness.alternating_blocks`.
    """

    def __init__(self, contestants: Mapping[str, Contestant]) -> None:
        self.cpu_s = 0.0
        self._runners = {name: _Runner(name, run) for name, run in contestants.items()}

    @property
    def names(self) -> list[str]:
        return list(self._runners)

    def take(self, name: str, steps: int) -> None:
        """Let one contestant make `steps` steps (its first turn holds its start-up too). Raises what it raised."""
        self.cpu_s += self._runners[name].take(steps)

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        for runner in self._runners.values():
            runner.end()


class _Runner:
    def __init__(self, name: str, run: Contestant) -> None:
        self._run = run
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._begin_s, self._elapsed_s = 0, 0.0, 0.0
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def take(self, steps: int) -> float:
        self._left = steps
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._elapsed_s

    def end(self) -> None:
        self._over = True
        self._go.release()
        self._thread.join()

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._over:
                torch.set_num_threads(1)
                self._begin_s = time.thread_time()
                self._run(self._after_step)
                raise RuntimeError(f"{self._thread.name} ended by itself")
        except _Enough:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def _after_step(self, *_: object) -> None:
        self._left -= 1
        if self._left:
            return
        self._elapsed_s = time.thread_time() - self._begin_s
        self._done.release()
        self._go.acquire()
        if self._over:
            raise _Enough
        self._begin_s = time.thread_time()


def one_heap() -> None:
    """Threads allocate as a main thread does; without glibc nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(*ONE_HEAP)


# ---- the peers' packages


def install_peers() -> str:
    """Put Lightning and Accelerate beside the environment, without touching it; why not, where that fails.

    Everything else they need is there already: installed without dependencies, they cannot bring another torch.
    """
    stamp = PEERS / ("-".join(PEER_VERSIONS) + ".installed")
    if not stamp.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(PEERS), "--no-deps", "--upgrade"]
        done = subprocess.run([*command, *PEER_VERSIONS], capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        stamp.touch()
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))  # last: it shadows nothing
    importlib.invalidate_caches()
    return ""


# ---- the contestants


def turbopump_loop(job: Job, directory: Path) -> Contestant:
    """`train` as it comes: spans, metrics and progress lines on disk, schedule, guards; checkpoints off."""
    config = Config(
        model=job.model,
        data=TokensConfig(path=str(job.dataset), seq_len=job.seq_len),
        num_steps=MANY,
        global_batch=job.batch,
        precision=PrecisionConfig(compute=job.compute),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(at_start=False),
        checkpoint=CheckpointConfig(every_s=0.0),
        logging=LoggingConfig(limit_s=0.0),
        launch=LaunchConfig(num_processes=1, threads=1, device="cpu"),
    )
    return lambda after_step: train(config, run=directory / "turbopump", hooks=[after_step])


def hand_written_loop(job: Job) -> Contestant:
    """What one would write in a notebook; it does not even look at the loss."""

    def run(after_step: AfterStep) -> None:
        model = job.build()
        optimizer = _adamw(model)
        context = autocast(torch.device("cpu"), job.compute)
        for batch in itertools.cycle(job.batches()):
            with context:
                loss = transformer.loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after_step()

    return run


def accelerate_loop(job: Job) -> Contestant:
    """Accelerate's documented loop; the list of batches is not even wrapped in its loader."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(after_step: AfterStep) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # it is global, and there are several jobs
        accelerator = Accelerator(mixed_precision="bf16" if job.compute == "bf16" else "no", cpu=True)
        model = job.build()
        model, optimizer = accelerator.prepare(model, _adamw(model))
        for batch in itertools.cycle(job.batches()):
            loss = transformer.loss(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            after_step()

    return run


def lightning_loop(job: Job, directory: Path, *, defaults: bool) -> Contestant:
    """Lightning's Trainer: with its default logger, progress bar and `self.log` of the loss, or without all three.

    It refuses to clip for a fused optimizer in bf16: the module clips by itself.
    """
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.build()

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss = transformer.loss(self.model, batch)
            if defaults:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return _adamw(self.model)

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)

    def run(after_step: AfterStep) -> None:
        class Stamp(pl.Callback):
            def on_train_batch_end(self, *_: Any, **__: Any) -> None:
                after_step()

        off: dict[str, Any] = {} if defaults else {"logger": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            accelerator="cpu", precision="bf16-mixed" if job.compute == "bf16" else "32-true", max_steps=MANY,
            default_root_dir=directory / "lightning", enable_checkpointing=False, callbacks=[Stamp()], **off,
        )  # fmt: skip
        trainer.fit(Module(), _Endless(job.batches()))

    return run


class _Endless:
    """The batches over and over, as one epoch."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.cycle(self._batches)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def contestants(job: Job, directory: Path) -> dict[str, Contestant]:
    """All loops that can run here, by name; peers that are not installed are left out."""
    warnings.filterwarnings("ignore")  # Lightning's advice about loaders and loggers
    found = {"turbopump": turbopump_loop(job, directory), "hand-written": hand_written_loop(job)}
    for name, make in (
        ("lightning, defaults", lambda: lightning_loop(job, directory, defaults=True)),
        ("lightning, logger and bar off", lambda: lightning_loop(job, directory, defaults=False)),
        ("accelerate", lambda: accelerate_loop(job)),
    ):
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: absent ({error})", file=sys.stderr)
    return found
