"""What the launcher makes of the state of its ranks, from three sources that cannot lie together.

The operating system tells how a process ended (`waitid`, without reaping it: the agent does that), the rank's own
JSON file what it has to say, the signal handler what the user wants. Nothing here waits.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from turbopump.core.errors import Interrupted, RankError, TurbopumpError, UsageError
from turbopump.launch.outcome import Outcome
from turbopump.launch.worker import Job

SETTLE_S = 2.0
"""Time the other ranks have, after the first failure, to say what they saw before they are killed."""


@dataclass(frozen=True)
class Death:
    """The end of a process: by signal number, or by exit code."""

    rank: int
    by_signal: bool
    number: int

    def __str__(self) -> str:
        if not self.by_signal:
            return f"ended with exit code {self.number} before its work was done"
        name = signal.Signals(self.number).name if self.number in set(signal.Signals) else f"signal {self.number}"
        reason = {
            signal.SIGKILL: " (kill -9)",
            signal.SIGSEGV: " (a crash in compiled code)",
            signal.SIGABRT: " (compiled code gave up)",
            signal.SIGBUS: " (often a full /dev/shm)",
        }.get(signal.Signals(self.number) if self.number in set(signal.Signals) else signal.SIGCONT, "")
        return f"was killed by {name}{reason}"


class Watch:
    """State of the ranks of one launch. `pids` is set by the agent, by local rank, once they are spawned."""

    def __init__(self, job: Job, num_processes: int, timeout_s: float) -> None:
        self.job = job
        self.pids: dict[int, int] = {}
        self._ranks = range(num_processes)
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._deaths: list[Death] = []  # in the order in which they were seen
        self._first_failure: float | None = None
        self._ended_by_us: set[int] = set()
        self._stop: int = 0
        self._forwarded = False
        self._killed = False
        self._too_late: list[int] = []
        self._log_start = {rank: _size(job.log(rank)) for rank in self._ranks}
        self._oom_kills = oom_kills()

    def request_stop(self, number: int) -> None:
        """Called by the signal handler: the first request is passed on at the next poll, the second kills at once."""
        if self._stop:
            self._killed = True
            self._kill(self._ranks)
        else:
            self._stop = number

    def is_over(self) -> bool:
        """Whether all ranks are done, or all are dead; ends those that must not go on. Called at every poll."""
        self._collect_deaths()
        self._pass_stop_on()
        dead = {death.rank for death in self._deaths}
        outcomes = self.outcomes()
        failed = [rank for rank in dead if not _ended_well(outcomes[rank])]
        failed += [rank for rank, outcome in outcomes.items() if outcome is not None and outcome.kind == "failed"]
        if failed and self._first_failure is None:
            self._first_failure = time.monotonic()
        if len(dead) < len(self._ranks):
            if self._first_failure is not None and time.monotonic() - self._first_failure > SETTLE_S:
                self._kill(set(self._ranks) - dead)
            elif not failed and time.monotonic() > self._deadline and not self._too_late:
                self._too_late = [rank for rank in self._ranks if not self.job.started(rank).exists()]
                self._deadline = float("inf")
                if self._too_late:
                    self._kill(self._ranks)
        if self._first_failure is None and all(_ended_well(outcome) for outcome in outcomes.values()):
            return True
        return len(dead) == len(self._ranks)

    def outcomes(self) -> dict[int, Outcome | None]:
        return {rank: Outcome.read(self.job.outcome(rank)) for rank in self._ranks}

    def verdict(self) -> None:
        """Return where all ranks are done, whatever their exit codes; else raise what there is to say."""
        outcomes = self.outcomes()
        if all(outcome is not None and outcome.kind == "done" for outcome in outcomes.values()):
            return
        if self._killed:
            name = signal.Signals(self._stop).name
            raise Interrupted(f"killed at once by a second signal after {name}; the last checkpoint stands", self._stop)
        if all(_ended_well(outcome) for outcome in outcomes.values()):
            rank = next(rank for rank in self._ranks if outcomes[rank].kind == "interrupted")  # type: ignore[union-attr]
            raise outcomes[rank].to_error(rank, self.job.log(rank))  # type: ignore[union-attr]
        if self._stop and len(self._ended_by_us) == len(self._ranks):
            raise Interrupted(f"stopped by {signal.Signals(self._stop).name} before the ranks had started", self._stop)
        raise self._cause(outcomes)

    def _cause(self, outcomes: dict[int, Outcome | None]) -> TurbopumpError:
        """The failure that the others followed from: a death, else the first error that is a rank's own."""
        if self._too_late:
            ranks = ", ".join(map(str, self._too_late))
            return RankError(f"rank {ranks} did not start within launch.timeout_s ({self._timeout_s:g} s): raise it")
        silent = [d for d in self._deaths if outcomes[d.rank] is None and d.rank not in self._ended_by_us]
        if silent:
            return self._explain(silent[0])
        told = [(o.rank_of_cause, o.at_s, r) for r, o in outcomes.items() if o is not None and o.kind == "failed"]
        if not told:
            return RankError("all ranks were ended before their work was done")
        rank = min(told)[2]
        outcome = outcomes[rank]
        assert outcome is not None
        return outcome.to_error(rank, self.job.log(rank))

    def _explain(self, death: Death) -> TurbopumpError:
        rank, log = death.rank, self.job.log(death.rank)
        if not self.job.started(rank).exists():
            if not death.by_signal and death.number == UsageError.exit_code:
                return UsageError('put the call that starts the run under `if __name__ == "__main__":`, or use '
                                  "launch.num_processes=1: every process imports the script")  # fmt: skip
            return RankError(f"rank {rank} could not start: it {death}; what it wrote is above")
        text = f"rank {rank} {death}"
        if death.by_signal and death.number == signal.SIGKILL and oom_kills() > self._oom_kills:
            text = f"rank {rank} was killed by the kernel for want of memory: reduce microbatch or num_processes"
        lines = last_lines(log, self._log_start[rank])
        return RankError(f"{text}{': ' + lines if lines else ''}; its output: {log}")

    def _collect_deaths(self) -> None:
        seen = {death.rank for death in self._deaths}
        for rank, pid in self.pids.items():
            if rank in seen:
                continue
            try:
                info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped by someone else: how it ended is lost
                self._deaths.append(Death(rank, False, 255))
                continue
            if info is not None:
                self._deaths.append(Death(rank, info.si_code != os.CLD_EXITED, info.si_status))

    def _pass_stop_on(self) -> None:
        if self._killed:
            self._kill(self._ranks)  # again: a rank may have been spawned since
        if not self._stop or self._forwarded or not self.pids:
            return
        self._forwarded = True
        if not all(self.job.started(rank).exists() for rank in self._ranks):
            self._kill(self._ranks)  # nothing has been computed yet
            return
        dead = {death.rank for death in self._deaths}
        for rank, pid in self.pids.items():
            if rank not in dead:
                os.kill(pid, self._stop)

    def _kill(self, ranks: range | set[int]) -> None:
        dead = {death.rank for death in self._deaths}
        for rank in ranks:
            if rank in self.pids and rank not in dead:
                self._ended_by_us.add(rank)
                try:
                    os.kill(self.pids[rank], signal.SIGKILL)
                except ProcessLookupError:
                    continue


def _ended_well(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.kind in ("done", "interrupted")


def last_lines(log: Path, start: int) -> str:
    """What a rank said last in its log after byte `start`: the fault and its place after a crash, else a line."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, _size(log) - 65536))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    faults = [index for index, line in enumerate(lines) if line.startswith("Fatal Python error:")]
    if faults:
        place = next((line for line in lines[faults[-1] :] if line.startswith("File ")), "")
        return f"{lines[faults[-1]]}{' at ' + place if place else ''}"
    return lines[-1] if lines else ""


def oom_kills() -> int:
    """Processes the kernel has killed for want of memory, on this host and in this control group."""
    total = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            words = [line.split() for line in Path(path).read_text().splitlines()]
        except OSError:
            continue
        total += sum(int(word[1]) for word in words if word[0] == "oom_kill")
    return total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
