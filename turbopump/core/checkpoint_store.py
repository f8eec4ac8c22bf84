"""Checkpoints on disk, read without torch: what is there, and whether it is whole.

    checkpoints/step-00000100/
        rank<r>.safetensors   the tensors and pieces that rank r wrote
        index.json            run id, step, metrics, values; of each tensor the global shape, dtype and pieces
        manifest.json         sizes and XXH3-64 of every file, head and tensor; begins with a digest of its own bytes

Every byte is covered by a digest, and all files are bound to each other, to the step and to the run, so that a
flipped bit, a short, missing, swapped or older file is found before it is used. XXH3 detects rot, not attackers.
How these directories come to be: checkpoint_commit.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbopump.core.errors import CheckpointError, CorruptCheckpointError, UsageError
from turbopump.core.files import digest, from_json
from turbopump.core.tensor_file import FileDigests, Layout, damaged_tensors, hash_file, read_layout, read_tensor

SCHEMA_VERSION = 1
INDEX, MANIFEST = "index.json", "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
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
def reading(path: Path) -> Iterator[None]:
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
def _well_formed(path: Path) -> Iterator[None]:
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
