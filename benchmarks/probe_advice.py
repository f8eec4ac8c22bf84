"""Does the advice hold? A recipe's real training steps with the advised routes switched on, beside PyTorch's defaults.

The recipe's operations are measured (as `probe --for RECIPE` does), `advise` says what to change, and what it says is
done to a copy of the model: switches are set, `torch.compile` is called. Both copies train from the same weights on the
same synthetic batches of the recipe's shape, at full fp32, in alternating blocks of one step on one thread, by the
CPU clock of that thread; `benchmarks.probe` prints predicted and measured gain.

Same results means: losses and gradient norms of the first steps differ by no more than rounding does. How much that
is, a third copy says: the defaults again, from weights moved by one unit in the last place.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import alternating_blocks, ratio_with_interval
from turbopump.compute import bench, compiled, routes
from turbopump.compute.advice import Advice, advise, format_advice
from turbopump.core.workload import Workload
from turbopump.hardware.profile import SCHEMA, MachineProfile, Request
from turbopump.models.convnet import model as convnet
from turbopump.models.convnet.config import KIND as CONVNET
from turbopump.models.transformer import model as transformer
from turbopump.models.transformer.config import KIND as TRANSFORMER

RECIPES = Path(__file__).parents[1] / "recipes"
ONEDNN, INDUCTOR = "mkldnn.matmul.fp32_precision=bf16", "inductor"
SWITCHED = ("default", ONEDNN, INDUCTOR)
"""Routes that this benchmark can switch on for a whole model; the others need other code in the model."""
ROUNDING = 4.0  # times what one unit in the last place of the weights changes


@dataclass(frozen=True)
class Subject:
    """A recipe's model and batches."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batch: Callable[[torch.Generator], Any]
    workload: Workload
    lr: float


@dataclass(frozen=True)
class AdviceGain:
    """Step time by PyTorch's defaults over that by the advice: median of paired blocks, its 95 % interval."""

    value: float
    low: float
    high: float
    runs: int
    details: dict[str, Any] = field(default_factory=dict)
    """Of the subject: `predicted` gain and its band, step times, changes, differences of losses and norms."""

    @property
    def same_results(self) -> bool:
        """Whether losses and gradient norms differ by rounding only."""
        found = self.details
        return all(found[f"{what}_difference"] <= ROUNDING * found[f"{what}_rounding"] for what in ("loss", "norm"))


def language_model(samples: int | None = None) -> Subject:
    """recipes/lm-stdlib.toml on tokens drawn by Zipf's law."""
    recipe = tomllib.loads((RECIPES / "lm-stdlib.toml").read_text())
    config, length = TRANSFORMER.config(**recipe["model"]), recipe["data"]["seq_len"]
    samples = samples or recipe["global_batch"]

    def batch(generator: torch.Generator) -> Tensor:
        uniform = torch.rand(samples, length + 1, generator=generator)
        return (uniform * torch.tensor(float(config.vocab_size)).log()).exp().long().clamp_(1, config.vocab_size) - 1

    work = TRANSFORMER.workload(config, samples, {"seq_len": length}, "fp32")
    return Subject("lm-stdlib", lambda: transformer.build(config), transformer.loss, batch, work,
                   recipe["optimizer"]["lr"])  # fmt: skip


def image_model() -> Subject:
    """recipes/convnet-digits.toml on noise of the digits' shape."""
    recipe = tomllib.loads((RECIPES / "convnet-digits.toml").read_text())
    config, samples = (
        CONVNET.config(**{**recipe["model"], "blocks": tuple(recipe["model"]["blocks"])}),
        recipe["global_batch"],
    )

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = torch.rand(samples, config.in_channels, 8, 8, generator=generator)
        return images, torch.randint(0, config.num_classes, (samples,), generator=generator)

    shape = {"channels": config.in_channels, "height": 8, "width": 8}
    work = CONVNET.workload(config, samples, shape, "fp32")
    return Subject(
        "convnet-digits", lambda: convnet.build(config), convnet.loss, batch, work, recipe["optimizer"]["lr"]
    )


def advice_gain(quick: bool) -> AdviceGain:
    """The gain of the recipe lm-stdlib; `quick` takes a quarter of its batch and fewer blocks."""
    return gain_of(language_model(4 if quick else None), blocks=6 if quick else 16, row_s=0.03 if quick else 0.15)


def gain_of(subject: Subject, *, blocks: int, row_s: float, steps_per_block: int = 1) -> AdviceGain:
    """Measure the subject's operations, follow the advice, compare."""
    if (found := torch.backends.mkldnn.matmul.fp32_precision) not in ("none", "ieee"):  # type: ignore[attr-defined]
        raise RuntimeError(f"this process multiplies fp32 by {found!r}, so its default is not PyTorch's")
    with _one_thread():
        advice = measured_advice(subject.workload, row_s)
        applied = tuple(c.route for c in advice.together if c.route in SWITCHED)
        with ExitStack() as stack:
            if INDUCTOR in applied:
                stack.enter_context(compiled.ROUTES[0].setting())
            default, advised = Trainer(subject), Trainer(subject, applied)
            seconds = alternating_blocks(
                {"default": lambda: default.steps(steps_per_block), "advised": lambda: advised.steps(steps_per_block)},
                blocks=blocks,
            )
            moved = Trainer(subject, moved=True)
            moved.steps(min(len(default.losses), 8))
    ratio = ratio_with_interval(seconds["default"], seconds["advised"])
    return AdviceGain(ratio.value, ratio.low, ratio.high, ratio.runs, {
        "subject": subject.name, "changes": applied, **_predicted(advice, applied),
        "default_s": sorted(seconds["default"])[blocks // 2] / steps_per_block,
        "advised_s": sorted(seconds["advised"])[blocks // 2] / steps_per_block,
        "advice": format_advice(advice, f"recipes/{subject.name}.toml"),
        **_differences(default, advised, moved),
    })  # fmt: skip


def measured_advice(workload: Workload, row_s: float) -> Advice:
    """Advice from rows of exactly the workload's operations, by the routes that can be switched on."""
    ops = tuple(dict.fromkeys((*(op for op, _ in workload.ops()), *workload.optimizer_ops)))
    request = Request(ops=ops, row_s=row_s, domains=("compute",))
    wanted = set(ops)
    trials = [t for t in bench.trials(request) if t.op in wanted and t.route in SWITCHED]
    rows = tuple(bench.measure(trials, request, until=time.monotonic() + 600.0))
    profile = MachineProfile(SCHEMA, "benchmarks", "", "this machine", "measured", "", {}, {}, (), rows=rows)
    return advise(profile, workload, threads=1)


class Trainer:
    """One copy of the model in training; remembers losses and gradient norms."""

    def __init__(self, subject: Subject, applied: tuple[str, ...] = (), *, moved: bool = False) -> None:
        torch.manual_seed(0)
        self.model = subject.build()
        if moved:
            _move_by_one_unit(self.model)
        self.run: Any = torch.compile(self.model) if INDUCTOR in applied else self.model
        self.subject, self.applied = subject, applied
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=subject.lr / 10, fused=True)
        self.generator = torch.Generator().manual_seed(1)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def steps(self, count: int) -> None:
        with self._setting():
            for _ in range(count):
                loss = self.subject.loss(self.run, self.subject.batch(self.generator))
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.losses.append(float(loss.detach()))
                self.norms.append(float(norm))

    def _setting(self) -> AbstractContextManager[object]:
        if ONEDNN not in self.applied:
            return nullcontext()
        product = next(op for op, _ in self.subject.workload.ops() if type(op).__name__ == "Gemm")
        route = routes.find(product, "cpu", ONEDNN)
        assert route is not None
        return route.setting()


@torch.no_grad()
def _move_by_one_unit(model: nn.Module) -> None:
    """Every weight to the next larger or smaller fp32 number, by turns of a fixed coin."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        coin = torch.rand(parameter.shape, generator=generator) < 0.5
        inf = torch.full_like(parameter, float("inf"))
        parameter.copy_(
            torch.where(parameter == 0, parameter, torch.nextafter(parameter, torch.where(coin, inf, -inf)))
        )


def _differences(default: Trainer, advised: Trainer, moved: Trainer) -> dict[str, float]:
    """Largest relative differences over the steps that all three took."""
    steps = min(len(t.losses) for t in (default, advised, moved))

    def largest(ours: list[float], theirs: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(ours[:steps], theirs[:steps]))

    return {
        "steps_compared": steps,
        "loss_difference": largest(advised.losses, default.losses),
        "loss_rounding": largest(moved.losses, default.losses),
        "norm_difference": largest(advised.norms, default.norms),
        "norm_rounding": largest(moved.norms, default.norms),
    }


def _predicted(advice: Advice, applied: tuple[str, ...]) -> dict[str, Any]:
    """The gain that the applied changes should bring, by the rows, as a ratio of step times."""
    kept = [c for c in advice.together if c.route in applied]
    saved_s = sum(c.saved_s for c in kept)
    half = sum(e.noise_s**2 for c in kept for e in c.effects) ** 0.5
    step_s = advice.step_s
    return {
        "operations_s": step_s,
        "predicted": step_s / (step_s - saved_s),
        "predicted_band": (step_s / (step_s - saved_s + half), step_s / (step_s - saved_s - half)),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
