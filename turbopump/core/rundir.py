"""The run directory: every name in it, in one place; what ran before; who holds it now."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from turbopump.core.errors import RunDirectoryError, UsageError
from turbopump.core.files import explain_os_error, read_json_lines


@dataclass(frozen=True)
class RunDir:
    """Names below `runs/<name>/`. Nothing is made until `create`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.toml"

    @property
    def choices(self) -> Path:
        return self.path / "choices.toml"

    @property
    def prediction(self) -> Path:
        """What `train` expected of the run before its first step, where it knew the machine."""
        return self.path / "prediction.json"

    @property
    def env(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def evaluation(self) -> Path:
        """The last result of the verb `evaluate`."""
        return self.path / "evaluation.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    def spans(self, rank: int = 0) -> Path:
        return self.path / "spans" / f"rank{rank}.jsonl"

    def all_spans(self) -> list[Path]:
        return sorted((self.path / "spans").glob("rank[0-9]*.jsonl"), key=lambda p: int(p.stem.removeprefix("rank")))

    @property
    def exists(self) -> bool:
        return self.config.exists()

    def num_attempts(self) -> int:
        return sum(1 for record in read_json_lines(self.spans(0)) if record.get("type") == "attempt")

    def create(self) -> None:
        """Make the directory and prove that it can be written; raises `RunDirectoryError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable.{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise RunDirectoryError(explain_os_error(error, self.path)) from error

    def lock(self) -> IO[str]:
        """Hold the directory for one process (advisory `flock`, freed by the kernel however the process ends)."""
        path = self.path / ".lock"
        try:
            file = path.open("a+")
        except OSError as error:
            raise RunDirectoryError(explain_os_error(error, path)) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                file.close()
                raise RunDirectoryError(f"{path} cannot be locked ({error.strerror}): use a local disk") from error
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise RunDirectoryError(
                f"{self.path} is in use by {owner}: wait for it, stop it, or choose another name"
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        return file

    def remove(self) -> None:
        shutil.rmtree(self.path)


def open_run(path: Path | str) -> RunDir:
    """An existing run directory; raises `UsageError` where there is none."""
    run = RunDir(Path(path))
    if not run.exists:
        raise UsageError(f"{path} is not a run directory (no config.toml in it): give the directory that train wrote")
    return run
