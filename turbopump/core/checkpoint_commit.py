"""How a checkpoint comes to be, and goes, without torch: staged, sealed, committed by one rename, pruned.

A save is staged in `.step-00000100.<token>.partial`, its files are made durable and read back, index and manifest are
added, and one rename makes it visible; the parent's fsync makes it stay. At any moment a crash leaves the checkpoints
before or those after. Other hidden names: `.replaced` (an older save of the same step, put back if the rename behind
it never came) and `.trash` (being deleted); the next attempt clears all three. `step-00000100.rejected` is a
checkpoint that a restore found damaged; it is never deleted here. Reading them: checkpoint_store.py.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from turbopump.core.checkpoint_store import (
    INDEX,
    MANIFEST,
    SCHEMA_VERSION,
    CheckpointInfo,
    list_checkpoints,
    open_checkpoint,
    step_name,
)
from turbopump.core.config import CheckpointConfig
from turbopump.core.errors import CheckpointError
from turbopump.core.files import digest, explain_os_error, fsync_directory, to_json
from turbopump.core.tensor_file import FileDigests
from turbopump.core.units import human_bytes
from turbopump.core.version import VERSION

_HIDDEN_NAME = re.compile(r"\.(step-\d{8,})\.[0-9a-f]+\.(partial|replaced|trash)")


@contextmanager
def writing(path: Path, step: int, needed_bytes: int) -> Iterator[None]:
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


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON bytes of `content` that begin with the digest of all bytes behind it."""
    body = to_json(content)[1:]
    return b'{"digest":"' + digest(body).encode() + b'",' + body


def _hidden(path: Path, token: str, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{token}.{suffix}")


def _write_durable(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
