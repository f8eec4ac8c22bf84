"""Checkpoints of a run: saved while training goes on, verified when read, never half there.

`save` copies this rank's share of the state into a host buffer that is already the image of its file (that copy is
all that training waits for), and a thread writes, verifies and commits it. All ranks take part in every save and
learn its outcome together: `poll`, once a step, raises on all of them at the same step if it failed on any.
`restore` takes the newest checkpoint of which every byte it reads is as written, and says what it passed over.
Format: core/checkpoint_store.py. Commit: core/checkpoint_commit.py. Beside this file: which rank writes what
(_shards), what ranks tell each other (_ranks), reading without a run (_reading).
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from turbopump.core import checkpoint_commit as committing
from turbopump.core import checkpoint_store as store
from turbopump.core.config import CheckpointConfig
from turbopump.core.errors import CheckpointError, CorruptCheckpointError
from turbopump.core.files import digest, from_json, to_json
from turbopump.core.tensor_file import (
    PAGE_BYTES,
    FileDigests,
    Layout,
    image_bytes,
    plan_layout,
    read_back,
    write_image,
)
from turbopump.core.version import VERSION
from turbopump.training.checkpoint_ranks import Ranks, Vote
from turbopump.training.checkpoint_reading import RANK_KEY, read_checkpoint, read_weights
from turbopump.training.checkpoint_shards import (
    DTYPES,
    Box,
    differences,
    flat_bytes,
    local_data,
    plan_boxes,
    read_full,
    read_like,
)

__all__ = ["Checkpoints", "SavedCheckpoint", "latest", "list_checkpoints", "read_checkpoint", "read_weights"]

latest, list_checkpoints = store.latest, store.list_checkpoints
_INDEX_SLACK_BYTES = 1 << 20  # room on the disk for index and manifest, besides 1 KiB a tensor


class CheckpointState(Protocol):
    """What can be checkpointed. Plain tensors are equal on all ranks; values are, too, and fit into JSON."""

    step: int

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]: ...
    def checkpoint_values(self) -> dict[str, Any]: ...
    def load_checkpoint(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class SavedCheckpoint:
    """A finished save. `num_bytes` over all ranks; `stall_s` is what training waited on this rank, `write_s` and
    `cpu_s` are the writer thread's seconds from start to commit and on a core."""

    step: int
    path: Path
    num_bytes: int
    stall_s: float
    write_s: float
    cpu_s: float

    @property
    def bytes(self) -> int:
        return self.num_bytes


@dataclass(frozen=True)
class _Share:
    """What this rank writes: the boxes, and the bytes of the file they make."""

    boxes: dict[str, Box]
    layout: Layout


@dataclass(frozen=True)
class _Job:
    step: int
    share: _Share
    image: memoryview
    values: Any
    metrics: dict[str, float] | None


class _Flight:
    """One save under way in its thread."""

    def __init__(self, job: _Job, write: Callable[[_Job], store.CheckpointInfo]) -> None:
        self.step, self.stall_s = job.step, 0.0
        self.write_s = self.cpu_s = 0.0
        self.info: store.CheckpointInfo | None = None
        self.error: BaseException | None = None
        self._job, self._write = job, write
        # A daemon: a second Ctrl-C need not wait for the disk; what it leaves is a staging directory.
        self.thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        begin = time.perf_counter()
        try:
            self.info = self._write(self._job)
        except BaseException as error:  # raised again, on the main thread, by `_land`
            self.error = error
        self.write_s, self.cpu_s = time.perf_counter() - begin, time.thread_time()


class Checkpoints:
    """The checkpoints of one run. Every method is called by every rank, in the same order.

    `directory` belongs to this process group alone (the run directory is locked): staging directories of dead
    attempts are removed. `group` names the ranks (None: all). `timeout_s` bounds the wait for another rank. `warn`
    gets one line whenever something was passed over. Raises `CheckpointError` where the directory cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        run_id: str,
        rank: int = 0,
        world_size: int = 1,
        group: Any = None,
        timeout_s: float = 600.0,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.directory, self.config, self.run_id = Path(directory), config, run_id
        self._warn = warn or (lambda message: warnings.warn(message, stacklevel=3))
        self._ranks = Ranks(rank, world_size, group, timeout_s)  # of the main thread
        self._writers = Ranks(rank, world_size, group, timeout_s)  # of the writer thread
        self._all_done = Vote(self._ranks)
        self._time_is_due = Vote(self._ranks, any_rank=True)
        self._flight: _Flight | None = None
        self._landed: list[SavedCheckpoint] = []
        self._last_step: int | None = None
        self._last_s: float | None = None
        self._share: tuple[str, _Share] | None = None
        self._image = torch.empty(0, dtype=torch.uint8)
        if rank == 0:
            with committing.writing(self.directory, 0, 0):
                self.directory.mkdir(parents=True, exist_ok=True)
                committing.clear_abandoned(self.directory)

    # --- when and what -----------------------------------------------------------------------------------------------

    def due(self, step: int, now_s: float) -> bool:
        """Whether a save is due after `step` at `now_s` (seconds since any fixed moment; rank 0's clock decides).

        Called by every rank after every step; true on all or none. With several ranks a save that is due by time is
        seen one step late.
        """
        if self._last_s is None:
            self._last_s = now_s
        late = bool(self.config.every_s) and now_s - self._last_s >= self.config.every_s
        by_time = bool(self.config.every_s) and self._time_is_due.cast(late and self._ranks.rank == 0)
        by_step = bool(self.config.every) and step % self.config.every == 0
        if step == self._last_step or not (by_step or by_time):
            return False
        self._time_is_due.withdraw()
        self._last_s = now_s
        return True

    def save(self, state: CheckpointState, *, metrics: Mapping[str, float] | None = None, wait: bool = False) -> None:
        """Copy the state now, write it while training goes on (or at once: `wait`, or not `config.asynchronous`).

        A save still under way is waited for first. A step saved already is saved again only with `metrics`.
        Raises `CheckpointError` on all ranks if this or the last save failed.
        """
        begin = time.perf_counter()
        if metrics is not None or state.step != self._last_step:
            self._land()
            job = self._snapshot(state, metrics)
            self._flight = _Flight(job, self._write)
            self._flight.stall_s = time.perf_counter() - begin
            self._last_step = state.step
        if wait or not self.config.asynchronous:
            flight = self._flight
            if flight is not None:
                flight.thread.join()
                flight.stall_s = time.perf_counter() - begin
            self._land()

    def poll(self) -> list[SavedCheckpoint]:
        """Saves finished since the last call; called by every rank once a step; does not wait for a save.

        Raises `CheckpointError` on all ranks, at the same call, if a save failed on any of them.
        """
        if self._flight is not None and self._all_done.cast(not self._flight.thread.is_alive()):
            self._land()
        landed, self._landed = self._landed, []
        return landed

    def wait(self) -> list[SavedCheckpoint]:
        """Wait for the save under way; otherwise as `poll`."""
        self._land()
        landed, self._landed = self._landed, []
        return landed

    def close(self) -> None:
        """Wait for the save under way and release the host buffer; raises `CheckpointError` if the save failed."""
        try:
            self._land()
            self._time_is_due.withdraw()
        finally:
            self._share, self._image = None, torch.empty(0, dtype=torch.uint8)

    def _land(self) -> None:
        flight = self._flight
        if flight is None:
            return
        flight.thread.join()
        self._all_done.withdraw()
        self._flight = None
        if flight.error is not None:
            self._last_step = None
            if isinstance(flight.error, CheckpointError):
                raise flight.error
            raise CheckpointError(f"checkpoint of step {flight.step}: {flight.error!r}") from flight.error
        assert flight.info is not None
        self._landed.append(SavedCheckpoint(flight.step, flight.info.path, flight.info.num_bytes, flight.stall_s,
                                            flight.write_s, flight.cpu_s))  # fmt: skip

    # --- saving ------------------------------------------------------------------------------------------------------

    def _snapshot(self, state: CheckpointState, metrics: Mapping[str, float] | None) -> _Job:
        tensors = state.checkpoint_tensors()
        share = self._prepare(tensors)
        for name, entry in share.layout.tensors.items():
            if entry.begin == entry.end:
                continue
            part = self._image[entry.begin : entry.end].view(DTYPES[entry.dtype]).view(entry.shape)
            part.copy_(local_data(tensors[name]), non_blocking=True)
        if self._image.is_pinned():
            torch.cuda.synchronize()
        values = state.checkpoint_values()
        check_json_able(values)
        plain = {key: float(value) for key, value in metrics.items()} if metrics is not None else None
        return _Job(state.step, share, flat_bytes(self._image), from_json(to_json(values)), plain)

    def _prepare(self, tensors: Mapping[str, torch.Tensor]) -> _Share:
        """This rank's share, and a host buffer for it, both kept while the tensors stay of the same kinds."""
        kinds = [(name, str(t.dtype), tuple(t.shape), str(getattr(t, "placements", ""))) for name, t in tensors.items()]
        signature = digest(to_json(kinds))
        if self._share is not None and self._share[0] == signature:
            return self._share[1]
        boxes = plan_boxes(tensors, self._ranks.rank, self._ranks.world_size)
        metadata = {"format": "pt", "turbopump_version": VERSION, "run_id": self.run_id,
                    RANK_KEY: f"{self._ranks.rank} of {self._ranks.world_size}"}  # fmt: skip
        layout = plan_layout({name: (box.dtype, box.shape) for name, box in boxes.items()}, metadata)
        self._image = _page_aligned(image_bytes(layout), pinned=any(t.is_cuda for t in tensors.values()))
        self._image[: len(layout.head)] = torch.frombuffer(bytearray(layout.head), dtype=torch.uint8)
        share = _Share(boxes, layout)
        self._share = (signature, share)
        return share

    def _write(self, job: _Job) -> store.CheckpointInfo:
        """In the writer thread of every rank: stage, write and verify, commit, prune; messages between each."""
        with suppress(OSError):  # training's own threads go first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        leader, file_name = self._ranks.rank == 0, f"rank{self._ranks.rank}.safetensors"
        plans = self._writers.gather({"step": job.step, "tensors": self._share[0] if self._share else "",
                                      "bytes": job.share.layout.num_bytes, "boxes": len(job.share.boxes)})  # fmt: skip
        if len({(plan["step"], plan["tensors"]) for plan in plans}) > 1:
            raise CheckpointError(f"checkpoint of step {job.step}: the ranks hold states of different steps or tensors")
        needed_bytes = sum(plan["bytes"] + 1024 * plan["boxes"] for plan in plans) + _INDEX_SLACK_BYTES

        def stage() -> str:
            return committing.stage(self.directory, job.step, needed_bytes).name

        staging = self.directory / self._writers.attempt(stage if leader else None)[0]

        def write() -> dict[str, Any]:
            with committing.writing(staging, job.step, needed_bytes):
                digests = write_image(staging / file_name, job.share.layout, job.image)
                read_back(staging / file_name, digests.xxh3)
            return {"digests": asdict(digests), "boxes": {name: asdict(box) for name, box in job.share.boxes.items()}}

        try:
            reports = self._writers.attempt(write)

            def commit() -> dict[str, Any]:
                with committing.writing(self.directory, job.step, needed_bytes):
                    info = committing.commit(staging, self._index(job, reports), _digests(reports))
                committing.prune(self.directory, self.config, self._warn)
                return {"path": str(info.path), "num_bytes": info.num_bytes}

            committed = self._writers.attempt(commit if leader else None)[0]
        except CheckpointError:
            if leader:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        return store.CheckpointInfo(Path(committed["path"]), job.step, num_bytes=committed["num_bytes"])

    def _index(self, job: _Job, reports: list[dict[str, Any]]) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for rank, report in enumerate(reports):
            for name, box in report["boxes"].items():
                tensor = tensors.setdefault(name, {"shape": box["global_shape"], "dtype": box["dtype"], "pieces": []})
                tensor["pieces"].append({"file": f"rank{rank}.safetensors", "key": name, "offsets": box["offsets"],
                                         "shape": box["shape"]})  # fmt: skip
        return {"run_id": self.run_id, "step": job.step, "world_size": self._ranks.world_size, "metrics": job.metrics,
                "values": job.values, "tensors": dict(sorted(tensors.items()))}  # fmt: skip

    # --- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, state: CheckpointState) -> int | None:
        """Load the newest whole checkpoint into `state`; its step, or None where the run has none yet.

        Damaged ones are set aside with a warning. Raises `CheckpointError` if there are some and none is whole, or if
        the state is of other tensors than the checkpoint's.
        """
        leader = self._ranks.rank == 0
        found = self._ranks.attempt(lambda: [step for step, _ in store.checkpoint_paths(self.directory)])[0]
        templates = state.checkpoint_tensors()
        skipped: list[tuple[int, str]] = []
        step = None
        for step in reversed(found):
            loaded: list[Any] = []
            path = self.directory / store.step_name(step)
            try:
                self._ranks.attempt(lambda: loaded.append(self._read(path, templates)))  # noqa: B023
            except CorruptCheckpointError as error:
                skipped.append((step, str(error)))
                continue
            state.load_checkpoint(*loaded[0])
            break
        else:
            if found:
                reasons = "\n".join(f"  {reason}" for _, reason in skipped)
                raise CheckpointError(f"none of the {len(found)} checkpoints in {self.directory} is whole: start anew "
                                      f"under another name, or bring back a copy\n{reasons}")  # fmt: skip
        for bad, reason in skipped if leader else ():
            place = self.directory / store.step_name(bad)
            with suppress(OSError):
                place = committing.set_aside(place)
            self._warn(f"the checkpoint of step {bad} was passed over ({reason}); it is kept as {place}. Going on from "
                       f"step {step}: the {bad - (step or 0)} steps between are done again")  # fmt: skip
        self._last_step = step
        self._ranks.gather(None)  # nobody saves before what is damaged is out of the way
        self._prepare(state.checkpoint_tensors())  # takes the memory for the first save now, while starting up
        return step

    def _read(self, path: Path, templates: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict]:
        stored = store.open_checkpoint(path, self.run_id)
        stored.check_files()
        if wrong := differences(stored.tensors, templates):
            more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise CheckpointError(f"{path} does not fit this model and optimizer:\n  " + "\n  ".join(wrong[:10]) + more)
        tensors = {
            name: read_like(stored, name, templates[name]) if name in templates else read_full(stored, name)
            for name in stored.tensors
        }
        return tensors, stored.values


def check_json_able(value: Any, where: str = "values") -> None:
    """Raise `CheckpointError` for what JSON would not give back as it was; tuples come back as lists."""
    if value is None or isinstance(value, (bool, str)):
        return
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return
    if isinstance(value, float) and math.isfinite(value):
        return
    if isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            check_json_able(item, f"{where}[{position}]")
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            check_json_able(item, f"{where}.{key}")
    else:
        raise CheckpointError(
            f"{where} ({value!r:.80}) cannot be kept in a checkpoint: values are finite numbers of 64 bits, strings, "
            "booleans, None, and lists and dicts (with string keys) of them"
        )


def _digests(reports: list[dict[str, Any]]) -> dict[str, FileDigests]:
    return {f"rank{rank}.safetensors": FileDigests(**report["digests"]) for rank, report in enumerate(reports)}


def _page_aligned(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Host memory that starts on a page, as direct writes need it, all of it touched."""
    memory = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
    begin = -memory.data_ptr() % PAGE_BYTES
    return memory[begin : begin + num_bytes].zero_()
