"""Vocabularies of tiktoken: the ids of its `encode_ordinary`, and typed errors for files that are none."""

import base64
import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core.errors import CorruptDataError, UsageError
from turbopump.data import text, tiktoken_ranks
from turbopump.data.describe import describe_dataset
from turbopump.data.format import concatenated, open_dataset
from turbopump.data.tiktoken_ranks import ENCODINGS, END_OF_TEXT, Encoding
from turbopump.pack import pack

TRICKY = [
    "", " ", "\n", "  \n\n \t ", "a  b\r\n\r\n  c   ", "x\u00a0\u2028 y\x85z", "it's IT'S I'LL we'vE d'ſ 'ſt 'K",
    "1234567 ٣٤٥٦ ½²Ⅷ", "火箭发动机 ロケット 엔진 ไทย عربى हिन्दी", "e\u0301\u0301 ÅÅ ǅǆ ʰʰ",
    "\U0001f680\u200d\U0001f9d1!!?/\r\n/x", "<|endoftext|> <|fim_prefix|>", "\x00\x01\x7f\ufeff\U0010ffff",
    "def f(x):\n\treturn  {x: [1, 2.5e-3]}  # größe\n\n\n", "    four\n     five", "hello_World camelCaseHTTPServer",
]  # fmt: skip


def lines_of(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture(scope="module")
def ranks():
    """A vocabulary trained on the tricky texts, as bytes and ranks."""
    made = json.loads(text.train_bpe([t * 20 for t in TRICKY], 700).dumps())["model"]["vocab"]
    byte_of = {char: byte for byte, char in enumerate(tiktoken_ranks._byte_chars())}
    names = [name for name in sorted(made, key=made.__getitem__) if name != text.SEPARATOR]
    return {bytes(byte_of[char] for char in name): rank for rank, name in enumerate(names)}


@pytest.fixture
def file(tmp_path, ranks):
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(lines_of(ranks))
    return path


WRITTEN = st.text(
    alphabet=st.one_of(st.sampled_from("aAsStT '\n\r\t019é火\u0301\u00a0.!/<|"), st.characters(codec="utf-8"))
)


@pytest.mark.parametrize("name", ENCODINGS)
def test_ids_are_those_of_tiktoken(file, ranks, monkeypatch, name):
    tiktoken = pytest.importorskip("tiktoken", reason="the extra `test` installs it")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    theirs = getattr(public, name)()
    assert theirs["special_tokens"] == ENCODINGS[name].special
    reference = tiktoken.Encoding(
        name, pat_str=theirs["pat_str"], mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )
    mine = text.read_tokenizer(file, name)
    assert mine.vocab_size == reference.n_vocab == mine.separator + 1

    @given(written=WRITTEN)
    @settings(max_examples=400, deadline=None)
    def same(written):
        assert mine.encode(written).tolist() == reference.encode_ordinary(written)
        assert mine.decode(mine.encode(written)) == written

    same()
    for one in TRICKY:
        assert mine.encode(one).tolist() == reference.encode_ordinary(one)
    ids, counts = mine.encode_documents(TRICKY)
    assert [ids.tolist() for ids in np.split(ids, np.cumsum(counts)[:-1])] == reference.encode_ordinary_batch(TRICKY)


def merged(word, ranks):
    """tiktoken's algorithm: the whole word, else the leftmost neighbours of the lowest joined rank, again and again."""
    parts = [word] if word in ranks else [word[i : i + 1] for i in range(len(word))]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(
    tokens=st.lists(st.text(alphabet="abc", min_size=2, max_size=6), unique=True, max_size=40),
    order=st.randoms(use_true_random=False),
    words=st.lists(st.text(alphabet="abc", max_size=14), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_any_order_of_any_tokens_merges_as_tiktoken_does(tokens, order, words):
    """Also of vocabularies that no training gives: tokens without parts, longer ones before shorter ones."""
    every = [bytes([i]) for i in range(256)] + [token.encode() for token in tokens]
    order.shuffle(every)
    ranks = {token: rank for rank, token in enumerate(every)}
    mine = text.from_data("tiktoken", tiktoken_ranks.tokenizer_json(lines_of(ranks), "f", "f", r"[a-c]+|[^a-c]+"))
    written = " ".join(words)
    assert mine.encode(written).tolist() == [
        i for w in re.findall(r"[a-c]+|[^a-c]+", written) for i in merged(w.encode(), ranks)
    ]


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_vocabulary_or_a_typed_error(data):
    with pytest.raises(CorruptDataError, match=r"^f "):
        tiktoken_ranks.read_ranks(data, "f")


def test_cut_anywhere_it_is_refused_or_misses_nothing_before_the_cut(ranks):
    whole = lines_of(ranks)
    for cut in range(0, len(whole), 97):
        try:
            found = tiktoken_ranks.read_ranks(whole[:cut], "f")
        except CorruptDataError:
            continue
        assert len(found) >= 256 and set(list(found)[:-1]) <= set(ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, b"YWJj"], "line 401 is not the base64 of a token, a space and its rank"),
        (lambda lines: [*lines, b"YW*j 5000"], "line 401 does not begin with base64"),
        (lambda lines: [*lines, b"YWJjZGVm 5"], "line 401: the rank 5 is that of line 6 already"),
        (lambda lines: [*lines, lines[7].split()[0] + b" 5000"], "line 401: the token .* has rank 7 already"),
        (lambda lines: [*lines, b"YWJjZGVm -5"], "line 401 is not"),
        (lambda lines: [*lines, b"YWJjZGVm 99999999999"], "line 401 is not"),
        (lambda lines: [*lines, b" 5000"], "line 401 is not"),
        (lambda lines: lines[200:], "has no token for the byte 0x"),
        (lambda lines: [], "256 of 256 are missing"),
        (lambda lines: [b"\xff\xfe\x00"], "line 1 does not begin with base64"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(file, change, message):
    lines = file.read_bytes().splitlines()[:399]
    lines = change([*lines, b"cXF4eHF4 399"])
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(CorruptDataError, match=rf"mine\.tiktoken.*{message}"):
        text.read_tokenizer(file, "cl100k_base")


def test_a_pattern_must_be_known(file, ranks, monkeypatch):
    with pytest.raises(UsageError, match=r"mine\.tiktoken is none of the published .* --tokenizer-pattern"):
        text.read_tokenizer(file)
    renamed = file.rename(file.with_name("cl100k_base.tiktoken"))
    with pytest.raises(UsageError, match=r"is not the published cl100k_base .* --tokenizer-pattern cl100k_base"):
        text.read_tokenizer(renamed)
    with pytest.raises(UsageError, match="is no regular expression"):
        text.read_tokenizer(renamed, "(unclosed")
    for other in (r"\p{N}{1,3}+|.", r"\s++$|."):
        with pytest.raises(UsageError, match="read otherwise than by tiktoken"):
            text.read_tokenizer(renamed, other)
    assert text.read_tokenizer(renamed, r"\w+|\W").encode("a b").tolist() == [ranks[b"a"], ranks[b" "], ranks[b"b"]]


def test_a_published_file_is_known_by_its_content(file, ranks, monkeypatch):
    special = {END_OF_TEXT: len(ranks) + 3, "<|more|>": len(ranks) + 9}
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(ENCODINGS, "cl100k_base", Encoding(ENCODINGS["cl100k_base"].pattern, sha256, special))
    made = text.read_tokenizer(file)
    assert (made.separator, made.vocab_size) == (len(ranks) + 3, len(ranks) + 10)
    assert made.decode([made.separator]) == END_OF_TEXT
    assert made.separator not in made.encode(f"a {END_OF_TEXT} b").tolist()  # spelled out, it is text


def test_a_dataset_holds_its_tokenizer(file, tmp_path, monkeypatch):
    monkeypatch.setattr("turbopump.pack.PARTITION_BYTES", (200, 200))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_bytes((TRICKY[i % len(TRICKY)] + f"document {i}").encode())
    options = {"tokenizer": str(file), "tokenizer_pattern": "o200k_base", "validation": 0.0}
    manifest = pack(folder, tmp_path / "one", **options)
    pack(folder, tmp_path / "many", **options, num_processes=2)
    for name in sorted(path.name for path in (tmp_path / "one").iterdir()):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    dataset = open_dataset(tmp_path / "one")
    stored = text.from_data(manifest.tokenizer.kind, (tmp_path / "one" / "tokenizer.json").read_bytes())
    written = stored.decode(concatenated(dataset.data("train"))).split(END_OF_TEXT)
    assert f"{TRICKY[12]}document 12" in written and describe_dataset(tmp_path / "one")
    with pytest.raises(UsageError, match=r"tokenizer_pattern .* of a \.tiktoken file alone"):
        pack(folder, tmp_path / "x", tokenizer_pattern="o200k_base")
