"""Checkpoints on disk, without torch: what is there, whether it is whole, and how a new one is committed.

    checkpoints/step-00000100/
        rank<r>.safetensors   the tensors and pieces that rank r wrote
        index.json            run id, step, metrics, values; of each tensor the global shape, dtype and pieces
        manifest.json         sizes and XXH3-64 of every file, head and tensor; begins with a digest of its own bytes

A save is staged in `.step-00000100.<token>.partial`, made durable, verified, and becomes visible by one rename.
Other hidden names: `.replaced` (an older save of the same step, put back if the rename behind it never came),
`.trash` (being deleted). `<step>.rejected` is a checkpoint that a restore found damaged; it is never deleted.
XXH3 detects rot, not attackers. Protocol and measurements: reliability notes, sections 0-2.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from turbopump.core.config import CheckpointConfig
from turbopump.core.errors import CheckpointError, CorruptCheckpointError, UsageError
from turbopump.core.files import digest, explain_os_error, from_json, fsync_directory, to_json
from turbopump.core.tensor_file import FileDigests, Layout, damaged_tensors, hash_file, read_layout, read_tensor
from turbopump.core.units import human_bytes
from turbopump.core.version import VERSION

SCHEMA_VERSION = 1
INDEX, MANIFEST = "index.json", "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN_NAME = re.compile(r"\.(step-\d{8,})\.[0-9a-f]+\.(partial|replaced|trash)")
_RANK_NAME = re.compile(r"rank\d+\.safetensors")
_SEAL = re.compile(rb'\{"digest":"([0-9a-f]{16})",')


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: stored in `file` under `key`, `offsets` from the tensor's origin, of `shape`."""

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its global shape, its dtype (safetensors' name for it), its pieces."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class CheckpointInfo:
    """One line of a listing. `problem` says why the checkpoint cannot be used, where its index already tells."""

    path: Path
    step: int
    run_id: str = ""
    num_bytes: int = 0
    world_size: int = 0
    metrics: Mapping[str, float] | None = None
    saved_epoch_s: float = 0.0
    turbopump_version: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class StoredCheckpoint:
    """An opened checkpoint: index and manifest are verified, tensors are verified as they are read."""

    info: CheckpointInfo
    tensors: dict[str, StoredTensor]
    values: dict[str, Any]
    digests: dict[str, FileDigests]
    layouts: dict[str, Layout]

    def read_piece(self, piece: Piece, into: memoryview) -> None:
        """Fill the flat bytes `into` with a piece; raises `CorruptCheckpointError` naming file and tensor."""
        path = self.info.path / piece.file
        entry = self.layouts[piece.file].tensors[piece.key]
        with reading(path):
            read_tensor(path, piece.key, entry, into, self.digests[piece.file].tensors[piece.key])

    def check_files(self) -> None:
        """Compare sizes and heads of all tensor files with manifest and index, before memory is taken for tensors."""
        for file, expected in self.digests.items():
            self.layouts[file] = _checked_layout(self.info.path / file, expected)
        for name, tensor in self.tensors.items():
            for piece in tensor.pieces:
                entry = self.layouts[piece.file].tensors[piece.key]
                if (entry.dtype, entry.shape) != (tensor.dtype, piece.shape):
                    raise CorruptCheckpointError(
                        f"{self.info.path / piece.file}: tensor {name!r} has another shape or dtype than the index says"
                    )


# --- what is there ---------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that the name of a checkpoint directory says, or None for another name."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoint_paths(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of everything below `directory` that is named like a checkpoint, oldest step first."""
    if not directory.is_dir():
        return []
    return sorted((step, path) for path in directory.iterdir() if (step := step_of(path)) is not None)


def list_checkpoints(directory: Path) -> list[CheckpointInfo]:
    """Checkpoints below `directory`, oldest step first; index and manifest of each are checked, tensors are not."""
    infos = []
    for step, path in checkpoint_paths(directory):
        try:
            infos.append(open_checkpoint(path).info)
        except CheckpointError as error:
            infos.append(CheckpointInfo(path, step, problem=str(error)))
    return infos


def latest(directory: Path) -> Path | None:
    """The newest checkpoint whose index and manifest are whole, or None."""
    return next((info.path for info in reversed(list_checkpoints(directory)) if info.problem is None), None)


def find_checkpoint(reference: Path | str) -> Path:
    """The checkpoint that `RUN`, `RUN@STEP`, a checkpoints directory or a checkpoint's own path names.

    Raises `UsageError` with the steps that exist.
    """
    text, step_text = str(reference), ""
    if "@" in text and not Path(text).exists():
        text, _, step_text = text.rpartition("@")
    path = Path(text)
    if step_of(path) is not None or (path / MANIFEST).exists():
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = {info.step: info.path for info in list_checkpoints(directory) if info.problem is None}
    if not steps:
        raise UsageError(f"no checkpoint in {directory}: give a run directory that has one, or a checkpoint")
    if not step_text:
        return steps[max(steps)]
    if not step_text.isdecimal() or int(step_text) not in steps:
        raise UsageError(f"{text} has no checkpoint of step {step_text}: it has {', '.join(map(str, steps))}")
    return steps[int(step_text)]


# --- whether it is whole ---------------------------------------------------------------------------------------------


def open_checkpoint(path: Path, run_id: str | None = None) -> StoredCheckpoint:
    """Read and verify index and manifest; raises `CorruptCheckpointError`, or `CheckpointError` for another schema.

    They are bound to each other, to the step in the directory's name, and to `run_id` where one is given.
    """
    manifest = _parse_manifest(path / MANIFEST)
    index_data = _read(path / INDEX)
    with _well_formed(path / MANIFEST):
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {manifest['schema_version']}, this turbopump reads {SCHEMA_VERSION}: use "
                f"the version that wrote it ({manifest['turbopump_version']})"
            )
        digests = {
            name: FileDigests(f["num_bytes"], f["xxh3"], f["head_xxh3"], f["tensors"])
            for name, f in manifest["files"].items()
        }
        if digest(index_data) != manifest["index"]["xxh3"]:
            raise CorruptCheckpointError(f"{path / INDEX} differs from its checksum")
    with _well_formed(path / INDEX):
        index = from_json(index_data)
        tensors = {
            name: StoredTensor(tuple(t["shape"]), t["dtype"], tuple(_piece(p) for p in t["pieces"]))
            for name, t in index["tensors"].items()
        }
        num_bytes = sum(f.num_bytes for f in digests.values())
        info = CheckpointInfo(path, index["step"], index["run_id"], num_bytes, index["world_size"], index["metrics"],
                              index["saved_epoch_s"], index["turbopump_version"])  # fmt: skip
        for key in ("run_id", "step", "turbopump_version", "world_size"):
            if index[key] != manifest[key]:
                raise CorruptCheckpointError(f"{path}: index and manifest are of different saves ({key} differs)")
        _check_bindings(info, run_id)
        for name, tensor in tensors.items():
            _check_cover(path, name, tensor, digests)
        return StoredCheckpoint(info, tensors, index["values"], digests, {})


def verify_checkpoint(path: Path, run_id: str | None = None) -> list[str]:
    """Check every byte of a checkpoint; one line for each problem, naming file and tensor; empty if it is whole."""
    try:
        stored = open_checkpoint(path, run_id)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, expected in stored.digests.items():
        file = path / name
        try:
            with reading(file):
                layout = _checked_layout(file, expected)
                damaged = damaged_tensors(file, layout, expected.tensors)
                problems += [f"{file}: tensor {tensor!r} differs from its checksum" for tensor in damaged]
                if not damaged and hash_file(file) != expected.xxh3:
                    problems.append(f"{file} differs from its checksum")
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def tensor_digests(path: Path) -> dict[str, list[str]]:
    """The stored checksums of each tensor's pieces: equal lists mean equal bits, without reading a tensor."""
    stored = open_checkpoint(path)
    return {
        name: [stored.digests[piece.file].tensors[piece.key] for piece in tensor.pieces]
        for name, tensor in stored.tensors.items()
    }


@contextmanager
def reading(path: Path) -> Any:
    """Turns the operating system's errors while reading into those of checkpoints."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptCheckpointError(f"{error.filename or path} is missing") from error
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or path} may not be read: check its permissions") from error
    except OSError as error:
        raise CorruptCheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _read(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


@contextmanager
def _well_formed(path: Path) -> Any:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} is not as turbopump writes it ({error!r})") from error


def _parse_manifest(path: Path) -> dict[str, Any]:
    data = _read(path)
    seal = _SEAL.match(data)
    if seal is None or digest(memoryview(data)[seal.end() :]).encode() != seal[1]:
        raise CorruptCheckpointError(f"{path} differs from its own digest")
    with _well_formed(path):
        return dict(from_json(data))


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON bytes of `content` that begin with the digest of all bytes behind it."""
    body = to_json(content)[1:]
    return b'{"digest":"' + digest(body).encode() + b'",' + body


def _piece(value: Mapping[str, Any]) -> Piece:
    return Piece(value["file"], value["key"], tuple(value["offsets"]), tuple(value["shape"]))


def _check_bindings(info: CheckpointInfo, run_id: str | None) -> None:
    named = step_of(info.path)
    if named is not None and named != info.step:
        raise CorruptCheckpointError(f"{info.path} holds step {info.step}: it was copied or renamed")
    if run_id is not None and info.run_id != run_id:
        raise CorruptCheckpointError(f"{info.path} belongs to another run ({info.run_id}, not {run_id})")


def _check_cover(path: Path, name: str, tensor: StoredTensor, digests: Mapping[str, FileDigests]) -> None:
    covered = 0
    for piece in tensor.pieces:
        if _RANK_NAME.fullmatch(piece.file) is None or piece.key not in digests[piece.file].tensors:
            raise CorruptCheckpointError(f"{path / INDEX}: tensor {name!r} has a piece that no file holds")
        if not len(piece.offsets) == len(piece.shape) == len(tensor.shape):
            raise CorruptCheckpointError(f"{path / INDEX}: tensor {name!r} has a piece of another rank")
        if any(not 0 <= o <= o + s <= g for o, s, g in zip(piece.offsets, piece.shape, tensor.shape)):
            raise CorruptCheckpointError(f"{path / INDEX}: tensor {name!r} has a piece outside its shape")
        covered += math.prod(piece.shape)
    if covered != math.prod(tensor.shape):
        raise CorruptCheckpointError(f"{path / INDEX}: the pieces of tensor {name!r} do not cover it")


def _checked_layout(path: Path, expected: FileDigests) -> Layout:
    with reading(path):
        size = path.stat().st_size
        if size != expected.num_bytes:
            raise CorruptCheckpointError(f"{path} has {size} bytes, {expected.num_bytes} were written")
        layout = read_layout(path)
    if digest(layout.head) != expected.head_xxh3 or set(layout.tensors) != set(expected.tensors):
        raise CorruptCheckpointError(f"{path}: its header differs from its checksum")
    return layout


# --- how a new one is committed --------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path, step: int, needed_bytes: int) -> Any:
    """Turns the operating system's errors while writing into `CheckpointError`; names needed and free bytes."""
    try:
        yield
    except OSError as error:
        free = ""
        with suppress(OSError):
            left = human_bytes(shutil.disk_usage(path).free)
            free = f" (needed {human_bytes(needed_bytes)}, free {left})"
        place = Path(error.filename) if isinstance(error.filename, str) else path
        raise CheckpointError(f"checkpoint of step {step}: {explain_os_error(error, place)}{free}") from error


def clear_abandoned(directory: Path) -> list[str]:
    """Remove what dead attempts left, put back what one was about to replace; returns the names; raises `OSError`.

    Only for the process that holds the run directory: a living attempt's staging directory looks the same.
    """
    names = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        match = _HIDDEN_NAME.fullmatch(path.name)
        if match is None:
            continue
        names.append(path.name)
        if match[2] == "replaced" and not (directory / match[1]).exists():
            path.rename(directory / match[1])
            fsync_directory(directory)
        else:
            shutil.rmtree(path)
    return names


def stage(directory: Path, step: int, needed_bytes: int) -> Path:
    """A new staging directory; raises `CheckpointError` before a byte is written if the disk has no room."""
    staging = directory / f".{step_name(step)}.{secrets.token_hex(4)}.partial"
    with writing(directory, step, needed_bytes):
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if needed_bytes > free:
            raise CheckpointError(
                f"checkpoint of step {step}: {directory} has {human_bytes(free)} free, {human_bytes(needed_bytes)} are "
                "needed: free some space, or keep fewer checkpoints (checkpoint.keep_last, keep_every)"
            )
        staging.mkdir()
    return staging


def commit(staging: Path, index: Mapping[str, Any], digests: Mapping[str, FileDigests]) -> CheckpointInfo:
    """Seal a staged checkpoint whose rank files are durable and verified, and make it visible by one rename.

    `index` holds run_id, step, world_size, metrics, values and tensors. Raises `OSError` or `CheckpointError`.
    """
    shared = {"schema_version": SCHEMA_VERSION, "turbopump_version": VERSION}
    shared |= {key: index[key] for key in ("run_id", "step", "world_size")}
    index_data = to_json({**shared, **index, "saved_epoch_s": time.time()}, indent=True)
    token = staging.name.split(".")[2]
    manifest = {
        **shared,
        "token": token,
        "index": {"num_bytes": len(index_data), "xxh3": digest(index_data)},
        "files": {name: asdict(d) for name, d in sorted(digests.items())},
    }
    _write_durable(staging / INDEX, index_data)
    _write_durable(staging / MANIFEST, _sealed(manifest))
    fsync_directory(staging)
    info = open_checkpoint(staging, index["run_id"]).info
    final = staging.parent / step_name(index["step"])
    replaced = _hidden(final, token, "replaced")
    if final.exists():
        final.rename(replaced)
    staging.rename(final)
    fsync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return replace(info, path=final)


def remove(path: Path) -> None:
    """Delete a checkpoint so that a crash leaves it whole or gone; raises `OSError`."""
    trash = _hidden(path, secrets.token_hex(4), "trash")
    path.rename(trash)
    shutil.rmtree(trash)


def set_aside(path: Path) -> Path:
    """Take a damaged checkpoint out of the listing, for people to look at; its new place. Raises `OSError`."""
    for suffix in ("rejected", *(f"rejected-{n}" for n in range(2, 1000))):
        target = path.with_name(f"{path.name}.{suffix}")
        if not target.exists():
            return path.rename(target)
    return path


def steps_to_keep(infos: Iterable[CheckpointInfo], config: CheckpointConfig) -> set[int]:
    """Steps that the retention settings keep: the newest, the multiples, the lowest finite loss (newest of equals)."""
    infos = list(infos)
    steps = sorted(info.step for info in infos)
    keep = set(steps[-config.keep_last :])
    if config.keep_every:
        keep |= {step for step in steps if step % config.keep_every == 0}
    losses = {info.step: info.metrics["loss"] for info in infos if info.metrics and "loss" in info.metrics}
    finite = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if config.keep_best and finite:
        keep.add(min(finite, key=lambda step: (finite[step], -step)))
    return keep


def prune(directory: Path, config: CheckpointConfig, warn: Callable[[str], None]) -> None:
    """Delete whole checkpoints that the settings do not keep; one that cannot be deleted is warned about."""
    infos = [info for info in list_checkpoints(directory) if info.problem is None]
    keep = steps_to_keep(infos, config)
    for info in infos:
        if info.step in keep:
            continue
        try:
            remove(info.path)
        except OSError as error:
            warn(f"old checkpoint {info.path} could not be deleted and keeps its space: {error.strerror or error}")


def _hidden(path: Path, token: str, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{token}.{suffix}")


def _write_durable(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
