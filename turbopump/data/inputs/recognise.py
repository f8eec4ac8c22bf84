"""Which input a source is: by what the folder holds, by suffixes, and where those say nothing, by the first bytes.

Files of one kind make one input; a folder's descriptions of media count with the media. Mixed kinds are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.inputs.arrays import arrays_input
from turbopump.data.inputs.arrow import MAGIC, PARQUET_MAGIC, arrow_input, parquet_input
from turbopump.data.inputs.delimited import delimited_input
from turbopump.data.inputs.files import InputFile, codec_of, find, suffix_of
from turbopump.data.inputs.folders import METADATA, TRANSCRIPTS, media_input
from turbopump.data.inputs.huggingface import huggingface_input, is_saved_dataset
from turbopump.data.inputs.jsonl import jsonl_input
from turbopump.data.inputs.mds import is_mds, mds_input
from turbopump.data.inputs.media_types import media_of_suffix
from turbopump.data.inputs.protocol import Dropped, FileInput, Input, Selection
from turbopump.data.inputs.splits import splits_by_folder
from turbopump.data.inputs.text import text_input
from turbopump.data.inputs.webdataset import webdataset_input

FORMATS = (
    "text",
    "jsonl",
    "csv",
    "tsv",
    "parquet",
    "arrow",
    "webdataset",
    "audio",
    "image",
    "huggingface",
    "mds",
    "arrays",
)
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".arrows": "arrow", ".tar": "webdataset",
    ".tgz": "webdataset", ".npy": "arrays", ".npz": "arrays",
}  # fmt: skip
_FOLDERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Selection], Input]]] = {
    "huggingface": (is_saved_dataset, huggingface_input),
    "mds": (is_mds, mds_input),
}


def open_input(
    sources: Sequence[str],
    *,
    include: Sequence[str] = (),
    format: str | None = None,
    text_field: str | None = None,
    key: str | None = None,
    columns: Sequence[str] = (),
    drop_nulls: bool = False,
    exclude: Path | None = None,
) -> Input:
    """The input made of files, folders and globs. `format` is one of `FORMATS`, found out where it is None; `include`
    are patterns on the names of a folder's files; `key` is the column whose hash decides the split; `columns` those
    to keep; `text_field` the one column of text that is wanted, instead of `columns`; `drop_nulls` leaves out rows with
    a null in them; `exclude` a folder that is not entered.

    Raises `UsageError` for sources that are missing or of several kinds and unknown columns, `DatasetError` for files
    that hold no record or cannot be read.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"no format {format!r} (known: {', '.join(FORMATS)})")
    if text_field is not None and columns:
        raise UsageError(
            f"text_field ({text_field}) and columns ({', '.join(columns)}) both say what to keep: give one"
        )
    wanted = (text_field,) if text_field is not None else tuple(columns)
    selection = Selection(wanted, key, Dropped() if drop_nulls else None)
    made = _open(list(map(str, sources)), include, format, selection, exclude)
    if text_field is not None and made.fields[0].kind != "text":
        raise DatasetError(f"column {text_field!r} holds no text but {made.fields[0].kind}: name one that does")
    return made


def _open(
    sources: list[str], include: Sequence[str], format: str | None, selection: Selection, exclude: Path | None
) -> Input:
    for kind, (is_kind, opener) in _FOLDERS.items():
        matches = [source for source in sources if Path(source).is_dir() and is_kind(Path(source))]
        if format == kind and not matches:
            raise UsageError(f"{', '.join(sources)} is no {kind} dataset: its index is not in that folder")
        if matches and format in (None, kind):
            if len(sources) > 1:
                raise UsageError(f"{matches[0]} is a {kind} dataset, which is packed alone: give one source")
            return opener(Path(sources[0]), selection)
    files = find(sources, include, exclude)
    return _of_files(files, format or _kind_of_all(files), selection)


def _of_files(files: tuple[InputFile, ...], kind: str, selection: Selection) -> Input:
    described = kind in ("image", "audio")
    splits = splits_by_folder(file.name for file in files if not described or media_of_suffix(file.name) == kind)
    made = _made(files, kind, selection, splits)
    made.splits = splits
    return made


def _made(files: tuple[InputFile, ...], kind: str, selection: Selection, splits: Mapping[str, str]) -> FileInput:
    if kind == "text":
        selection.check(["text"], "a text file")
        return text_input(files)
    if kind in ("image", "audio"):
        if not any(media_of_suffix(file.name) == kind for file in files):
            raise UsageError(f"no {kind} files among {len(files)} files: give a folder that holds some")
        return media_input(files, kind, selection, in_splits=bool(splits))  # type: ignore[arg-type]
    if kind in ("csv", "tsv"):
        return delimited_input(files, selection, delimiter="\t" if kind == "tsv" else ",")
    openers: dict[str, Callable[[tuple[InputFile, ...], Selection], FileInput]] = {
        "jsonl": jsonl_input, "parquet": parquet_input, "arrow": arrow_input, "webdataset": webdataset_input,
        "arrays": arrays_input,
    }  # fmt: skip
    return openers[kind](files, selection)


def _kind_of_all(files: tuple[InputFile, ...]) -> str:
    """The one kind of all files; descriptions beside media are of the media's kind."""
    media = {media_of_suffix(file.name) for file in files} - {""}
    kinds: dict[str, str] = {}
    for file in files:
        if media and _describes_media(file):
            continue
        kinds.setdefault(kind_of(file), file.path)
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        raise UsageError(f"{one} is {first} and {other} is {second}: pack one kind at a time, by patterns or --include")
    return next(iter(kinds))


def _describes_media(file: InputFile) -> bool:
    name = PurePosixPath(file.name)
    return name.name in METADATA or file.name.endswith(TRANSCRIPTS) or name.suffix == ".txt"


def kind_of(file: InputFile) -> str:
    """The kind of one file: its suffix, else its first bytes; everything else is text."""
    media = media_of_suffix(file.name)
    if media:
        return media
    kind = _SUFFIXES.get(suffix_of(file.name))
    if kind is not None:
        return kind
    if codec_of(file.name) is None:
        try:
            with open(file.path, "rb") as stream:
                head = stream.read(264)
        except OSError as error:
            raise DatasetError(f"cannot read {file.path}: {error.strerror or error}") from error
        if head.startswith(MAGIC):
            return "arrow"
        if head.startswith(PARQUET_MAGIC):
            return "parquet"
        if head[257:262] == b"ustar":
            return "webdataset"
    return "text"
