"""Datasets as Hugging Face's `save_to_disk` leaves them: `state.json` names the Arrow streams of one split,
`dataset_dict.json` the folders of several. Its splits stay splits. The features' own note gives media and class names.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from turbopump.core.errors import DatasetError
from turbopump.core.files import from_json
from turbopump.data.inputs.arrow import ArrowInput, arrow_input
from turbopump.data.inputs.files import InputFile, input_file
from turbopump.data.inputs.protocol import Selection

STATE, DICT = "state.json", "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    return (path / STATE).is_file() or (path / DICT).is_file()


def huggingface_input(root: Path, selection: Selection) -> ArrowInput:
    """Raises `DatasetError` where a file that the folder's own index names is missing, or none is named."""
    splits: dict[str, str] = {}
    files: list[InputFile] = []
    if (root / DICT).is_file():
        names = _object(root / DICT).get("splits")
        if not isinstance(names, list) or not names:
            raise DatasetError(f"{root / DICT} names no splits: save the dataset again")
        folders = {_plain_name(name, root / DICT): name for name in names}
    else:
        folders = {"": ""}
    for folder, split in folders.items():
        for file in _data_files(root / folder, folder):
            files.append(file)
            splits[file.name] = split
    return arrow_input(tuple(files), selection, name="huggingface", splits=splits)


def _data_files(folder: Path, prefix: str) -> list[InputFile]:
    entries = _object(folder / STATE).get("_data_files")
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise DatasetError(f"{folder / STATE} names no data files: save the dataset again")
    names = [_plain_name(entry.get("filename"), folder / STATE) for entry in entries]
    return [input_file(folder / name, str(PurePosixPath(prefix, name))) for name in names]


def _object(path: Path) -> dict[str, Any]:
    try:
        table = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {path}: {error}; save the dataset again") from error
    if not isinstance(table, dict):
        raise DatasetError(f"{path} is no JSON object: save the dataset again")
    return table


def _plain_name(name: Any, where: Path) -> str:
    if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
        raise DatasetError(f"{where} names {name!r}, which is no file of its own folder: save the dataset again")
    return name
