"""How one rank ended, as the rank itself tells it: a small JSON file, written before the process ends.

The launcher raises the error of the first rank that failed for a reason of its own as the same type, with the same
message and exit code. A rank that leaves no such file died (signal, exit code): that is told by the operating system.
"""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turbopump.core import errors
from turbopump.core.errors import Interrupted, RankError, TurbopumpError
from turbopump.core.files import from_json, to_json


@dataclass(frozen=True)
class Outcome:
    """`kind`: "done", "interrupted" (stopped by a signal, state written) or "failed"."""

    kind: str
    error: str = ""  # the nearest class of core.errors, or the name of a foreign exception
    message: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    traceback: str = ""
    at_s: float = 0.0

    @property
    def rank_of_cause(self) -> int:
        """0 where the reason is this rank's own, 2 where it only noticed that another one is gone."""
        if self.error == RankError.__name__:
            return 2
        return 0 if _known(self.error) else 1

    def write(self, path: Path) -> None:
        staging = path.with_suffix(".partial")
        staging.write_bytes(to_json(asdict(self)))
        os.replace(staging, path)

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        try:
            return cls(**from_json(path.read_bytes()))
        except FileNotFoundError:
            return None

    @classmethod
    def of_error(cls, error: BaseException) -> Outcome:
        text = "".join(traceback.format_exception(error))
        if isinstance(error, TurbopumpError):
            kind = "interrupted" if isinstance(error, Interrupted) else "failed"
            known = next(c for c in type(error).__mro__ if _known(c.__name__) is c)
            return cls(kind, known.__name__, str(error), _plain(vars(error)), error.exit_code, text, time.time())
        last_line = traceback.format_exception_only(error)[-1].strip()
        return cls("failed", type(error).__name__, last_line, {}, 1, text, time.time())

    def to_error(self, rank: int, log: Path) -> TurbopumpError:
        """The error to raise in the launcher: the same type and message, or `RankError` for a foreign exception."""
        cls = _known(self.error)
        if cls is not None:
            error: TurbopumpError = cls.__new__(cls, self.message)  # constructors differ; the message is complete
            error.args = (self.message,)
            vars(error).update(self.attributes)
        else:
            error = RankError(f"rank {rank} failed: {self.message}; its output and traceback: {log}")
        error.add_note(f"raised on rank {rank}:\n{self.traceback}")
        return error


def _known(name: str) -> type[TurbopumpError] | None:
    cls = getattr(errors, name, None)
    return cls if isinstance(cls, type) and issubclass(cls, TurbopumpError) else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    def is_plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(is_plain(item) for item in value)
        return value is None or isinstance(value, (bool, int, float, str))

    return {key: value for key, value in values.items() if is_plain(value) and not key.startswith("_")}
