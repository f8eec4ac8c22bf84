"""Vocabulary files of `tiktoken` (`FILE.tiktoken`: the base64 of a token, a space and its rank on each line) as the
`tokenizer.json` of the `tokenizers` library, so that a dataset holds one kind of file and needs no further package.

tiktoken merges the neighbours whose *joined* bytes have the lowest rank, the library the pair that stands first in a
list. Every pair of tokens that joins to a token, ordered by that token's rank, gives the same ids: inside a token's
bytes merges happen in one order until it is whole, whatever stands around it, so only one of its pairs ever meets.
Words that are tokens themselves are taken whole by both (`ignore_merges`). A test compares the ids.

The file has neither the pattern that cuts text into words nor special tokens; the published encodings are known by the
SHA-256 of their files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from turbopump.core.errors import CorruptDataError, UsageError
from turbopump.core.files import to_json

SUFFIX = ".tiktoken"
END_OF_TEXT = "<|endoftext|>"
MAX_RANK = 1 << 24  # the largest published vocabularies hold 2^18 tokens

# The patterns of tiktoken 0.14 (`tiktoken_ext/openai_public.py`) as Oniguruma reads them, which the library cuts by:
# `$` is there the end of a line, `\z` that of the text, and `{1,3}+` no possessive repeat but a repeat of a repeat.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Encoding:
    """A published encoding: its pattern, the SHA-256 of its file, and its special tokens."""

    pattern: str
    sha256: str
    special: Mapping[str, int]


ENCODINGS: dict[str, Encoding] = {
    "r50k_base": Encoding(
        _GPT2, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", {END_OF_TEXT: 50256}
    ),
    "p50k_base": Encoding(
        _GPT2, "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", {END_OF_TEXT: 50256}
    ),
    "cl100k_base": Encoding(
        _CL100K, "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276},
    ),
    "o200k_base": Encoding(
        _O200K, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}  # fmt: skip


def tokenizer_json(data: bytes, path: str, name: str, pattern: str | None) -> bytes:
    """The `tokenizer.json` of a vocabulary file's content `data`; `name` is that of the file without its suffix.

    `pattern` is the name of an encoding or a regular expression (Oniguruma's syntax). It may be left out for a
    published file. Any other file's text ends with the first id after its ranks. Raises `UsageError` where the pattern
    is not known, `CorruptDataError` naming the line that is no token and rank.
    """
    ranks = read_ranks(data, path)
    sha256 = hashlib.sha256(data).hexdigest()
    published = next((known for known in ENCODINGS.values() if known.sha256 == sha256), None)
    if pattern is not None:
        words = ENCODINGS[pattern].pattern if pattern in ENCODINGS else _checked(pattern)
    elif published is not None:
        words = published.pattern
    else:
        raise UsageError(_no_pattern(path, name, sha256))
    special = published.special if published is not None else {END_OF_TEXT: max(ranks.values()) + 1}
    return _as_json(ranks, words, special)


def read_ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Tokens and ranks; raises `CorruptDataError` naming the line that is none, comes twice, or a byte without one."""
    ranks: dict[bytes, int] = {}
    lines_by_rank: dict[int, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        where = f"{path} line {number}"
        token, rank = _token_and_rank(line, where)
        if token in ranks:
            raise CorruptDataError(f"{where}: the token {token!r} has rank {ranks[token]} already: get the file again")
        if rank in lines_by_rank:
            raise CorruptDataError(
                f"{where}: the rank {rank} is that of line {lines_by_rank[rank]} already: get the file again"
            )
        ranks[token] = rank
        lines_by_rank[rank] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CorruptDataError(
            f"{path} has no token for the byte {missing[0]:#04x} ({len(missing)} of 256 are missing), which any text "
            f"may need: get the file again"
        )
    return ranks


def _token_and_rank(line: bytes, where: str) -> tuple[bytes, int]:
    encoded, _, rank = line.partition(b" ")
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise CorruptDataError(f"{where} does not begin with base64 ({error}): get the file again") from error
    if not token or not rank.isdigit() or len(rank) > 8 or int(rank) >= MAX_RANK:
        raise CorruptDataError(
            f"{where} is not the base64 of a token, a space and its rank below {MAX_RANK}: get the file again"
        )
    return token, int(rank)


def _checked(pattern: str) -> str:
    """Refuses what Oniguruma reads otherwise than tiktoken's own engine: it would give other ids without a word."""
    if re.search(r"\}\+|(?<!\\)\$", pattern):
        raise UsageError(
            f"the pattern {pattern!r} would be read otherwise than by tiktoken: write {{1,3}} for {{1,3}}+, \\z for $"
        )
    return pattern


def _no_pattern(path: str, name: str, sha256: str) -> str:
    known = ", ".join(ENCODINGS)
    if name in ENCODINGS:
        return (
            f"{path} is not the published {name} (its SHA-256 is {sha256}, not {ENCODINGS[name].sha256}): get the file "
            f"again, or where it is a vocabulary of your own, name its pattern: --tokenizer-pattern {name}"
        )
    return (
        f"{path} is none of the published files ({known}), so that the pattern that cuts text into words is not known: "
        f"give --tokenizer-pattern, one of these names or a regular expression"
    )


def _as_json(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]) -> bytes:
    shown = str.maketrans({byte: char for byte, char in enumerate(_byte_chars())})
    named = {token: token.decode("latin-1").translate(shown) for token in ranks}
    clash = next((name for name in special if name in named.values()), None)
    if clash is not None:
        raise UsageError(f"the vocabulary holds the text {clash} as a token, which is to end texts: it must not be one")
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [[named[left], named[right]] for left, right in cuts if left in named and right in named]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return to_json({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for name, i in special.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {**{named[token]: rank for token, rank in ranks.items()}, **special}, "merges": merges,
        },
    })  # fmt: skip


def _byte_chars() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
