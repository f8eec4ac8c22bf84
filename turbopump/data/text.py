"""Text to token ids and back: `bytes` (256 ids), byte-level BPE trained with the `tokenizers` library, files of others.

BPE splits text into words by `WORD_PATTERN`, then merges inside a word, so the ids of a word never depend on what
stands around it. `encode_documents` therefore splits with Python's `re`, asks `tokenizers` once for each *distinct*
word and gathers the rest with numpy: 5 times faster than the library's own batch encoding of the standard library's
sources on two cores, with the same ids (a test compares them). The pattern names ASCII classes only, so that both
regular-expression engines read it alike; every other character counts as a letter. A document ends with `separator`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from turbopump.core.errors import CorruptDataError, UsageError
from turbopump.core.files import digest, to_json
from turbopump.data import tiktoken_ranks
from turbopump.data.manifest import TokenizerEntry

TOKENIZER_NAME = "tokenizer.json"
SEPARATOR = "<|document|>"
TOKENIZER_FILES = (".json", tiktoken_ranks.SUFFIX)
MIN_VOCAB_SIZE = 257
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|document|>", "[SEP]")
MAX_CACHED_WORDS = 1 << 20

_SPACE = r"[\t\n\x0b\x0c\r ]"
_LETTER = r"[^\x00-@\[-`{-\x7f]"  # ASCII letters and everything that is not ASCII
_MARK = r"[\x00-\x08\x0e-\x1f!-/:-@\[-`{-\x7f]"  # punctuation and control characters
# In this order: a word, digits, marks, each with the one space before it; white space up to the last before a word;
# other white space. This is how GPT-2 cuts (Radford et al. 2019), in ASCII classes. A pattern that joins a word with
# the mark before it and keeps whole indentations packs 3.6 bytes into a token against 3.3, but is learned worse: 1.93
# bits per byte against 1.83 after 250 steps of the demo, one seed (docs/log.md).
WORD_PATTERN = rf" ?{_LETTER}+| ?[0-9]+| ?{_MARK}+|{_SPACE}+(?![^\t\n\x0b\x0c\r ])|{_SPACE}+"
_find_words = re.compile(WORD_PATTERN).findall


class Tokenizer(Protocol):
    """What packs and reads text. `separator` is the id that ends each document."""

    kind: str
    vocab_size: int
    separator: int
    dtype: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int64 [T], without a separator."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids one after the other (`dtype` [T]) and the number of each text's ids (int64 [len(texts)])."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def dumps(self) -> bytes:
        """The content of `tokenizer.json`."""
        ...


class ByteTokenizer:
    """The UTF-8 bytes themselves. A document ends with byte 0, which text does not hold."""

    kind = "bytes"
    vocab_size = 256
    separator = 0
    dtype = "uint8"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, parts), np.int64, count=len(parts))
        return np.frombuffer(b"".join(parts), np.uint8), lengths

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", "replace")

    def dumps(self) -> bytes:
        return to_json({"kind": "bytes", "vocab_size": 256, "separator": 0}, indent=True)


class BpeTokenizer:
    """Byte-level BPE; `data` is a `tokenizer.json` that the `tokenizers` library reads on its own, too."""

    kind = "bpe"
    separator = 0

    def __init__(self, data: bytes) -> None:
        import tokenizers

        self._data = data
        self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        self._tokenizer.encode_special_tokens = True  # a separator spelled out in a text is text
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        self._clear()

    def _clear(self) -> None:
        self._words = _WordNumbers()
        self._ids = np.empty(0, np.int64)
        self._begins = np.zeros(1, np.int64)  # word w has the ids [begins[w], begins[w + 1])

    def encode(self, text: str) -> np.ndarray:
        return self.encode_documents([text])[0].astype(np.int64)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if len(self._words) > MAX_CACHED_WORDS:
            self._clear()
        number_of = self._words.__getitem__
        numbers = []
        for text in texts:
            words = _find_words(text)
            numbers.append(np.fromiter(map(number_of, words), np.int64, count=len(words)))
        self._learn_new_words()
        every = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        counts = self._begins[every + 1] - self._begins[every]
        ends = np.cumsum(counts)
        first = np.repeat(self._begins[every] - (ends - counts), counts)
        ids = self._ids[first + np.arange(len(first))].astype(self.dtype)
        bounds = np.cumsum([0, *map(len, numbers)])
        totals = np.concatenate([[0], ends])[bounds]
        return ids, np.diff(totals)

    def _learn_new_words(self) -> None:
        new = self._words.take_new()
        if not new:
            return
        encoded = [item.ids for item in self._tokenizer.encode_batch_fast(new, add_special_tokens=False)]
        lengths = np.fromiter(map(len, encoded), np.int64, count=len(encoded))
        flat = np.fromiter((i for ids in encoded for i in ids), np.int64, count=int(lengths.sum()))
        self._begins = np.concatenate([self._begins, self._begins[-1] + np.cumsum(lengths)])
        self._ids = np.concatenate([self._ids, flat])

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def dumps(self) -> bytes:
        return self._data


class FileTokenizer:
    """Somebody else's `tokenizer.json`, which the `tokenizers` library reads and applies; a document ends with its
    end-of-text token. Raises `UsageError` where it has none."""

    kind = "tokenizers"

    def __init__(self, data: bytes) -> None:
        import tokenizers

        self._data = data
        self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        ids = [i for i in map(self._tokenizer.token_to_id, END_OF_TEXT) if i is not None]
        if not ids:
            raise UsageError(f"the tokenizer has no token that ends a text (one of {', '.join(END_OF_TEXT)}): add one")
        self.separator: int = ids[0]
        self.vocab_size = max(self.vocab_size, self.separator + 1)
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, text: str) -> np.ndarray:
        return self.encode_documents([text])[0].astype(np.int64)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [item.ids for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        counts = np.fromiter(map(len, encoded), np.int64, count=len(encoded))
        flat = np.fromiter((i for ids in encoded for i in ids), np.int64, count=int(counts.sum()))
        if len(flat) and int(flat.max()) >= self.vocab_size:
            raise UsageError(f"the tokenizer gives the id {int(flat.max())}, beyond its own {self.vocab_size} tokens")
        return flat.astype(self.dtype), counts

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def dumps(self) -> bytes:
        return self._data


def read_tokenizer(path: Path, pattern: str | None = None) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, or in a vocabulary file of tiktoken, whose words `pattern` cuts.

    Raises `UsageError` where there is none or the pattern is not known or none, `CorruptDataError` for a bad file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"no tokenizer file {path} ({error.strerror}): give bytes, bpe, none, a .json or a .tiktoken file"
        ) from error
    if path.suffix != tiktoken_ranks.SUFFIX:
        return from_data(FileTokenizer.kind, data, str(path))
    made = tiktoken_ranks.tokenizer_json(data, str(path), path.stem, pattern)
    try:
        return from_data(TiktokenTokenizer.kind, made, str(path))
    except CorruptDataError as error:
        if pattern is None:
            raise
        raise UsageError(f"the pattern {pattern!r} is no regular expression ({error.__cause__}): mend it") from error


class TiktokenTokenizer(FileTokenizer):
    """A `tokenizer.json` made of a vocabulary of tiktoken (`tiktoken_ranks.py`): the ids of its `encode_ordinary`."""

    kind = "tiktoken"

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._tokenizer.encode_special_tokens = True  # an end of text spelled out in a text is text
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())  # ids between the special ones may be unused
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"


class _WordNumbers(dict[str, int]):
    """Numbers words in the order they are met, and remembers which are new."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self._new.append(word)
        return number

    def take_new(self) -> list[str]:
        new, self._new = self._new, []
        return new


def train_bpe(texts: Sequence[str], vocab_size: int, *, max_bytes: int = 8_000_000, seed: int = 0) -> BpeTokenizer:
    """A BPE tokenizer of at most `vocab_size` ids, trained on a sample of `texts` of about `max_bytes`.

    The sample is a function of `seed` and the texts' order alone, and so is the result. Raises `UsageError` for a
    vocabulary too small for 256 bytes and the separator. Algorithm: Sennrich, Haddow, Birch 2016, on bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(f"vocab_size ({vocab_size}) must be at least {MIN_VOCAB_SIZE}: 256 bytes and a separator")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts, max_bytes, seed), trainer=trainer)
    return BpeTokenizer(tokenizer.to_str(pretty=False).encode())


def _sample(texts: Sequence[str], max_bytes: int, seed: int) -> list[str]:
    chosen, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(texts)):
        if total >= max_bytes:
            break
        text = texts[int(index)][: max_bytes - total]
        chosen.append(text)
        total += len(text.encode())
    return chosen


def tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(tokenizer.kind, tokenizer.vocab_size, TOKENIZER_NAME, digest(tokenizer.dumps()))


def from_data(kind: str, data: bytes, name: str = TOKENIZER_NAME) -> Tokenizer:
    """The tokenizer whose file `name` holds `data`; raises `CorruptDataError` where that is none."""
    if kind == "bytes":
        return ByteTokenizer()
    known = {made.kind: made for made in (BpeTokenizer, FileTokenizer, TiktokenTokenizer)}
    if kind in known:
        try:
            return known[kind](data)
        except UsageError:
            raise
        except BaseException as error:  # the library's own have no other type; its panics are not even an `Exception`
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CorruptDataError(f"{name} is no tokenizer ({error}): pack the dataset again") from error
    raise UsageError(f"no tokenizer kind {kind!r} (known: bytes, {', '.join(known)})")
