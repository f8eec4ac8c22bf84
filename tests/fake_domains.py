"""Domains that measure nothing: rows with the times a test wants, for `probe(..., domains=...)`."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from turbopump.compute.ops import Gemm
from turbopump.hardware.profile import Measurement, Request, Trial
from turbopump.hardware.timing import Timing


def products(count: int, tier: int = 0, *, first: int = 0, dtype: str = "fp32", route: str = "default") -> list[Trial]:
    return [Trial(Gemm(64 + n, 64, 64, dtype), route, tier=tier) for n in range(first, first + count)]


def row_of(trial: Trial, *, seconds: float = 1e-3, spread: float = 0.02, waited: float = 0.01,
           clock: str = "wall", **more) -> Measurement:  # fmt: skip
    timing = Timing(clock, 20, 3, seconds, seconds * (1 + spread / 2), seconds * (1 + spread), seconds, waited)
    return Measurement.of(trial, "compute", timing, library="fake 1.0", **more)


@dataclass
class Fake:
    """A bench: `noisy` says of a key how spread its 1st, 2nd ... row is; it raises at `fail_at`, dies at `kill_at`."""

    wanted: list[Trial]
    row_s: float = 0.0
    noisy: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 1e-3
    fail_at: frozenset[str] = frozenset()
    kill_at: int = 10**9
    signal_number: int = signal.SIGKILL
    asked: list[str] = field(default_factory=list)
    log: Path | None = None
    requests: list[Request] = field(default_factory=list)
    put_back: int = 0
    clock: str = "wall"
    looks_s: list[float] = field(default_factory=list)
    """Seconds of a key's 1st, 2nd ... row, where they differ."""

    def trials(self, request: Request) -> list[Trial]:
        self.requests.append(request)
        return self.wanted

    def measure(self, trials: Iterable[Trial], request: Request, until: float) -> Iterator[Measurement]:
        self.requests.append(request)
        try:
            for trial in trials:
                if time.monotonic() + self.row_s > until:
                    return
                if len(self.asked) >= self.kill_at:
                    os.kill(os.getpid(), self.signal_number)
                    time.sleep(5)
                self.asked.append(trial.key)
                if self.log is not None:
                    with self.log.open("a") as file:
                        file.write(trial.key + "\n")
                if trial.key in self.fail_at:
                    raise RuntimeError("CUDA error: device-side assert triggered\nand much more")
                time.sleep(self.row_s)
                spreads = self.noisy.get(trial.key, [0.02])
                spread = spreads[min(self.asked.count(trial.key), len(spreads)) - 1]
                looks_s = self.looks_s or [self.seconds]
                seconds = looks_s[min(self.asked.count(trial.key), len(looks_s)) - 1]
                yield row_of(trial, seconds=seconds, spread=spread, clock=self.clock)
        finally:
            self.put_back += 1
