"""Splits by the names of folders, as ImageNet and many others lie on disk: `train/...`, `val/...`, `test/...`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from turbopump.core.errors import UsageError

FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
VALIDATION = 0.05  # the share held out where neither the user nor the source says one


def splits_by_folder(names: Iterable[str]) -> dict[str, str]:
    """The split of each file (names relative to the source) by the first folder it lies in.

    All or nothing: empty unless every file lies in such a folder, and there is training data and another split. Warns
    where it fails for single files only.
    """
    splits = {name: FOLDERS.get(name.partition("/")[0], "") if "/" in name else "" for name in names}
    found = set(splits.values())
    if "train" not in found or not found - {"train", ""}:
        return {}
    if "" in found:
        outside = next(name for name, split in splits.items() if not split)
        warnings.warn(
            f"{outside} lies in none of the folders {', '.join(FOLDERS)}, other files do: they are not taken as splits",
            stacklevel=2,
        )
        return {}
    return splits


def held_out_share(validation: float | None, splits: Iterable[str]) -> float:
    """The share to hold out; raises `UsageError` where one is given and the source has `splits` of its own."""
    if validation is not None and (names := sorted(set(splits))):
        raise UsageError(
            f"validation ({validation}) has no effect on a source with its own splits ({', '.join(names)}): leave it "
            f"out, or pack the folder of one split to split it anew"
        )
    return VALIDATION if validation is None else validation
