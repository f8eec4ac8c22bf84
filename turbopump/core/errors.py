"""Every error a user can cause or meet, in one tree.

A message says what was given, what is allowed and what to do, in one or two lines. The command line prints it
without a traceback (`--debug` shows one) and exits with `exit_code`: 2 for wrong usage, 1 for a failure.
"""

from __future__ import annotations

from collections.abc import Sequence


class TurbopumpError(Exception):
    """Base of all errors meant for the user."""

    exit_code = 1


class UsageError(TurbopumpError):
    """The command, recipe or arguments are wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more problems of a recipe, all found at once; each names its dotted path."""

    def __init__(self, problems: Sequence[str], where: str = "recipe") -> None:
        self.problems = tuple(problems)
        self.where = where
        head = f"{where}: {len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str]]:
        return type(self), (self.problems, self.where)  # processes hand errors to each other


class MissingDependencyError(UsageError):
    """An optional package is needed; the message names the install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'turbopump[{extra}]'")
        self._given = (package, extra, purpose)

    def __reduce__(self) -> tuple[type[MissingDependencyError], tuple[str, str, str]]:
        return type(self), self._given


class CatalogError(UsageError):
    """A file of devices, links or efficiency curves does not hold, or what was asked for is in none."""


class PlanError(UsageError):
    """There is no plan: sizes that do not divide, a model that fits nowhere, a plan that cannot be followed here."""


class ProfileError(UsageError):
    """A machine file is missing, damaged, of another schema or of another machine."""


class NoisyProfileError(TurbopumpError):
    """What was measured is noisier than the machine file that is there, and did not replace it."""


class ResumeError(UsageError):
    """The run directory holds a run of another configuration."""


class DatasetError(TurbopumpError):
    """A dataset is missing, of another schema, or does not fit the model."""


class CorruptDataError(DatasetError):
    """Stored bytes differ from their checksum; names file, block or row."""


class RemoteError(DatasetError):
    """An object store did not give what was asked; names the object, the range, the answer and the number of tries."""


class CacheError(DatasetError):
    """The local cache of a remote dataset cannot be made or used; names its directory."""


class SampleError(DatasetError):
    """A sample cannot be read or transformed; names dataset and index."""


class RunDirectoryError(TurbopumpError):
    """The run directory cannot be written, or another process is using it."""


class CheckpointError(TurbopumpError):
    """A checkpoint could not be written or none could be read."""


class CorruptCheckpointError(CheckpointError):
    """Stored bytes of a checkpoint differ from their checksum; names file and tensor."""


class NonFiniteError(TurbopumpError):
    """The loss or gradient became NaN or infinite; names the step and the record ids of its batch."""


class OutOfMemoryError(TurbopumpError):
    """The model, or a step of it, does not fit in memory; says what to reduce."""


class RankError(TurbopumpError):
    """A process of the run died; says which and why."""


class Interrupted(TurbopumpError):
    """The run was stopped by a signal after its step was finished and its state was written."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.exit_code - 128)
