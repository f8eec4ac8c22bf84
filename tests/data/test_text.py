"""Tokenizers: text comes back, and the fast path gives the library's own ids."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core.errors import CorruptDataError, UsageError
from turbopump.data.format import Dataset
from turbopump.data.manifest import Field, Manifest, TokenizerEntry
from turbopump.data.reading import LocalFiles
from turbopump.data.text import ByteTokenizer, _find_words, tokenizer_entry, train_bpe

TEXTS = [
    'def pump(speed, *, limit=1024):\n    """Turn."""\n    for _ in range(10):\n        return speed + limit\n' * 5,
    "class Rocket(Engine):\n\n    def __init__(self):\n\tself.stage = 2  # größe, 火箭\n\n\n" * 5,
    "The quick brown fox didn't jump over 1234567 lazy dogs...  \r\n\r\n<|document|> -- twice!\n" * 5,
]
CODE_LIKE = st.text(
    alphabet=st.one_of(
        st.sampled_from("ab Z_09 \n\t\r\x0b\x0c  .,:()'\"é火\x00\x7f\xa0\u2028"), st.characters(codec="utf-8")
    )
)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 400)


@given(text=CODE_LIKE)
@settings(max_examples=300, deadline=None)
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@given(text=CODE_LIKE)
@settings(max_examples=600, deadline=None)
def test_bpe_gives_the_ids_of_the_library_and_text_comes_back(bpe, text):
    library = tokenizers.Tokenizer.from_str(bpe.dumps().decode())
    library.encode_special_tokens = True
    ids = bpe.encode(text)
    assert "".join(_find_words(text)) == text
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert bpe.decode(ids) == text
    assert bpe.separator not in ids.tolist()


def test_documents_together_are_documents_one_by_one(bpe):
    ids, lengths = bpe.encode_documents([*TEXTS, "", TEXTS[0]])
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for part, text in zip(parts, [*TEXTS, "", TEXTS[0]], strict=True):
        assert bpe.decode(part) == text
    assert ids.dtype == np.uint16 and len(parts[3]) == 0
    assert bpe.encode_documents([])[0].size == 0


def test_training_is_a_function_of_texts_and_seed(bpe):
    assert train_bpe(TEXTS, 400).dumps() == bpe.dumps()
    assert bpe.vocab_size <= 400
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UsageError, match=r"vocab_size \(100\) must be at least 257"):
        train_bpe(TEXTS, 100)


def test_a_damaged_tokenizer_is_found(tmp_path, bpe):
    entry = tokenizer_entry(bpe)
    manifest = Manifest("tokens", 1, (Field("tokens", "uint16"),), {}, TokenizerEntry(**vars(entry)))
    (tmp_path / "tokenizer.json").write_bytes(bpe.dumps())
    loaded = Dataset(tmp_path, LocalFiles(tmp_path), manifest).tokenizer()
    assert loaded.encode(TEXTS[1]).tolist() == bpe.encode(TEXTS[1]).tolist()
    (tmp_path / "tokenizer.json").write_bytes(bpe.dumps()[:-1] + b" ")
    with pytest.raises(CorruptDataError, match="differs from its checksum"):
        Dataset(tmp_path, LocalFiles(tmp_path), manifest).tokenizer()
