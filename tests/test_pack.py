"""`pack`: same input same bytes, all or nothing, typed errors."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.processes import PATIENCE_S, group_gone
from turbopump.core.errors import DatasetError, UsageError
from turbopump.data import corpus
from turbopump.data.describe import describe_dataset
from turbopump.data.format import concatenated, open_dataset, verify_dataset
from turbopump.data.order import held_out
from turbopump.data.sources import ARRAYS, TOKENS, ArraysConfig, TokensConfig
from turbopump.pack import PackProgress, pack


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for i in range(60):
        place = root / f"part{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02d}.txt").write_text(f"document {i}: größe {i * i}\n" * (1 + i * 7), encoding="utf-8")
    (root / "notes.md").write_text("# not text\n")
    (root / ".hidden").write_bytes(b"\xff")
    return root


def stream(path, split):
    return concatenated(open_dataset(path).data(split))


def documents(path, split):
    return bytes(stream(path, split)).decode().split("\0")[:-1]


def all_bytes(path):
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def test_every_document_is_in_one_split_whole_and_in_order(folder, tmp_path):
    manifest = pack(folder, tmp_path / "d", include=["*.txt"], validation=0.2)
    files = sorted(folder.rglob("*.txt"), key=lambda p: p.relative_to(folder).as_posix())
    texts = [file.read_text(encoding="utf-8") for file in files]
    train, held = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "validation")
    assert 3 <= len(held) <= 25 and len(train) + len(held) == 60
    assert train == [text for text in texts if text in set(train)] and set(train) | set(held) == set(texts)
    assert manifest.splits["train"].source_bytes == sum(len(text.encode()) for text in train)
    assert manifest.splits["train"].documents == len(train) and manifest.sources == ("texts",)
    assert manifest.rows == sum(len(text.encode()) + 1 for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_same_bytes_whatever_the_number_of_processes(folder, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("turbopump.pack.PARTITION_BYTES", (5000, 5000))
    packed = [
        pack(folder, tmp_path / f"d{n}", tokenizer=tokenizer, vocab_size=300, include=["*.txt"], num_processes=n)
        for n in (1, 2, 3)
    ]
    assert len({manifest.digest for manifest in packed}) == 1
    assert all_bytes(tmp_path / "d1") == all_bytes(tmp_path / "d2") == all_bytes(tmp_path / "d3")
    verify_dataset(tmp_path / "d2")


def test_long_files_are_cut_between_lines_and_few_files_hold_out_their_ends(tmp_path, monkeypatch):
    text = "".join(f"line {i} é\n" for i in range(5000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "flat.txt").write_text("ü火" * 9000, encoding="utf-8")
    whole = pack([tmp_path / "long.txt", tmp_path / "flat.txt"], tmp_path / "d", validation=0.1)
    monkeypatch.setattr(corpus, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(corpus, "CUT_SEARCH_BYTES", 100)
    assert pack([tmp_path / "long.txt", tmp_path / "flat.txt"], tmp_path / "e", validation=0.1).digest == whole.digest
    train, held = documents(tmp_path / "e", "train"), documents(tmp_path / "e", "validation")
    assert [a + b for a, b in zip(train, held, strict=True)] == [text, "ü火" * 9000]
    assert train[0].endswith("\n") and 0.08 < len(held[0]) / len(text) < 0.12


def test_bpe_is_trained_on_training_text_only(tmp_path):
    texts = ["zqzqzqzq " * 50 if corpus.is_held_out(str(i), 0.5) else "abababab " * 50 for i in range(60)]
    pack(iter(texts), tmp_path / "d", tokenizer="bpe", vocab_size=300, validation=0.5)
    source = TOKENS.open(TokensConfig(path=str(tmp_path / "d"), seq_len=16), "train")
    assert len(source.encode("zqzqzqzq")) == 8 and len(source.encode("abababab")) == 1


def test_bpe_reads_back(tmp_path):
    texts = [f"the pump turns {i} times\n" * 30 for i in range(200)]
    pack(iter(texts), tmp_path / "d", tokenizer="bpe", vocab_size=320, validation=0.1)
    source = TOKENS.open(TokensConfig(path=str(tmp_path / "d"), seq_len=16), "validation")
    assert source.vocab_size <= 320 and source.bytes_per_token > 3
    decoded = source.decode(stream(tmp_path / "d", "validation"))
    held = [text for i, text in enumerate(texts) if corpus.is_held_out(str(i), 0.1)]
    assert decoded == "".join(text + "<|document|>" for text in held) and held
    described = describe_dataset(tmp_path / "d")
    assert described["tokenizer"]["kind"] == "bpe" and described["splits"]["train"]["documents"] == 200 - len(held)
    assert sum(count for _, count in described["splits"]["train"]["document_sizes"]) == 200 - len(held)
    assert described["splits"]["train"]["sample"].startswith("the pump turns ")


def test_arrays_from_files_and_samples_from_python(tmp_path):
    x, y = np.random.default_rng(0).random((300, 4), np.float32), np.arange(300) % 7
    np.savez(tmp_path / "a.npz", x=x, y=y)
    a = pack(tmp_path / "a.npz", tmp_path / "a", validation=0.1)
    b = pack(((x[i], y[i]) for i in range(300)), tmp_path / "b", validation=0.1)
    c = pack({"x": x, "y": y}, tmp_path / "c", validation=0.1)
    d = pack([(x[i], y[i]) for i in range(300)], tmp_path / "d", validation=0.1)
    assert a.splits == b.splits == c.splits == d.splits and a.rows == 300
    source = ARRAYS.open(ArraysConfig(path=str(tmp_path / "b")), "train")
    kept = x[~held_out(np.arange(300), 0.1)]
    assert np.array_equal(source.__getitems__(np.arange(len(source)))[0], kept)
    np.save(tmp_path / "x.npy", x)
    assert pack(tmp_path / "x.npy", tmp_path / "e", validation=0).splits["train"].rows == 300


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.txt", UsageError, "no file or folder 'nowhere.txt'"),
        ("*.nothing", UsageError, r"no files in \*.nothing"),
        (["stdlib", "x.txt"], UsageError, "`stdlib` is packed alone"),
        (iter([]), UsageError, "the source holds no record"),
        (iter(["", ""]), UsageError, "the source holds no text"),
        (iter([b"fine", b"\xff\xfe"]), DatasetError, "record 1 is not UTF-8"),
        (iter(["fine", "\ud800"]), DatasetError, "record 1 is not UTF-8"),
        (iter(["fine", 3]), DatasetError, "record 1 is of type int"),
        (iter([(np.zeros(2), 1), (np.zeros((3, 1)), 1)]), DatasetError, "sample 1"),
        ((np.zeros(2), np.zeros(3)), DatasetError, "different numbers of rows"),
        (np.array([None, 1]), DatasetError, "x"),
        (3, UsageError, "cannot pack a int"),
    ],
)
def test_bad_sources_are_typed_errors_and_leave_nothing(tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        pack(source, tmp_path / "d")
    assert not os.listdir(tmp_path)


def test_bad_files_are_named(folder, tmp_path):
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UsageError, match=r"notes.md is text and .*picture.png is image.*--include"):
        pack(folder, tmp_path / "d")
    (folder / "picture.png").rename(folder / "picture.txt")
    with pytest.raises(DatasetError, match=r"picture.txt is not UTF-8 text \(byte 0\).*--include"):
        pack(folder, tmp_path / "d")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DatasetError, match=r"x.npz"):
        pack(tmp_path / "x.npz", tmp_path / "d")
    with pytest.raises(DatasetError, match=r"x.npy"):
        np.save(tmp_path / "x.npy", np.array([{}], object))
        pack(tmp_path / "x.npy", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_file_that_changes_while_it_is_packed_is_named(folder, tmp_path):
    def grow(progress: PackProgress) -> None:
        with (folder / "part2" / "59.txt").open("a") as file:
            file.write("more")

    with pytest.raises(DatasetError, match=r"59.txt changed while it was packed"):
        pack(folder, tmp_path / "d", tokenizer="bpe", vocab_size=300, progress=grow)


def test_wrong_options_are_usage_errors(folder, tmp_path):
    for options in ({"validation": 1.0}, {"num_processes": 0}, {"tokenizer": "words"}):
        with pytest.raises(UsageError):
            pack(folder, tmp_path / "d", **options)
    with pytest.raises(UsageError, match=r"vocab_size \(100\) must be at least 257"):
        pack(folder, tmp_path / "d", tokenizer="bpe", vocab_size=100)
    pack(folder, tmp_path / "d")
    with pytest.raises(UsageError, match="--overwrite"):
        pack(folder, tmp_path / "d")
    before = pack(folder, tmp_path / "d", overwrite=True).digest
    assert pack(folder, tmp_path / "d", overwrite=True).digest == before


def test_the_destination_inside_the_source_is_not_packed(folder):
    first = pack(folder, folder / "packed").digest
    assert pack(folder, folder / "packed", overwrite=True).digest == first


def test_progress_reaches_the_end(folder, tmp_path):
    seen: list[PackProgress] = []
    pack(folder, tmp_path / "d", tokenizer="bpe", vocab_size=300, progress=seen.append)
    assert seen[0].phase == "training the tokenizer" and seen[-1].phase == "packing"
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0 and seen[-1].left_s == 0


SCRIPT = textwrap.dedent("""
    import sys, time
    from turbopump.pack import pack
    def texts():
        for i in range(10**9):
            yield "some text to pack, line after line\\n" * 2000
    def progress(p):
        if p.done_bytes > 4e6: print("going", flush=True); time.sleep(0.05)
    import turbopump.pack as p
    p.PARTITION_BYTES = (1 << 20, 1 << 20)
    pack(texts(), sys.argv[1], num_processes=2, progress=progress)
""")


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_pack_leaves_no_dataset_and_no_process(tmp_path, signal_number):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "d")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "going\n"
    left = [name for name in os.listdir(tmp_path)]
    assert len(left) == 1 and left[0].startswith(".d.") and any((tmp_path / left[0]).glob("*.arrow"))
    process.send_signal(signal_number)
    process.communicate(timeout=PATIENCE_S)
    assert not (tmp_path / "d").exists()
    assert group_gone(process.pid)
    pack(iter(["text\n" * 99]), tmp_path / "d")  # goes through, and clears away what was left
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.slow
def test_a_full_disk_is_a_typed_error_that_leaves_nothing(tmp_path):
    script = textwrap.dedent("""
        import resource, signal, sys, os
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a file may not grow: the nearest to a full disk
        from turbopump.core.errors import DatasetError
        from turbopump.pack import pack
        try:
            pack(iter(["x" * 100_000]), sys.argv[1])
        except DatasetError as error:
            print(error)
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "d")]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "cannot write" in out.stdout and str(tmp_path / "d") in out.stdout, out.stderr
    assert not os.listdir(tmp_path)


def test_the_standard_library_is_there(tmp_path):
    files = corpus.stdlib_files()
    keys = [file.key for file in files]
    assert "argparse.py" in keys and len(keys) > 100 and not any("site-packages" in key for key in keys)
    assert keys == [file.key for file in corpus.stdlib_files()]
    texts = corpus.find_files([files[0].path])
    assert texts[0].key == files[0].path.name


@pytest.mark.slow
def test_packing_needs_no_torch(folder, tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from turbopump.pack import pack\nfrom turbopump.data.describe import describe_dataset\n"
        f"pack({str(folder)!r}, {str(tmp_path / 'd')!r}, tokenizer='bpe', vocab_size=300)\n"
        f"describe_dataset({str(tmp_path / 'd')!r})\nimport turbopump.data.sources"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_tokenizer_of_somebody_else(folder, tmp_path):
    pack(folder, tmp_path / "own", tokenizer="bpe", vocab_size=300, include=["*.txt"])
    file = tmp_path / "tokenizer.json"
    file.write_bytes((tmp_path / "own" / "tokenizer.json").read_bytes())
    given = pack(folder, tmp_path / "d", tokenizer=str(file), include=["*.txt"])
    assert given.tokenizer is not None and given.tokenizer.kind == "tokenizers"
    assert stream(tmp_path / "d", "train").tolist() == stream(tmp_path / "own", "train").tolist()
    source = TOKENS.open(TokensConfig(path=str(tmp_path / "d"), seq_len=16), "train")
    assert source.decode(source.encode("document 7: größe")) == "document 7: größe"
    file.write_text("{}")
    with pytest.raises(DatasetError, match=r"tokenizer.json is no tokenizer"):
        pack(folder, tmp_path / "e", tokenizer=str(file), include=["*.txt"])
    with pytest.raises(UsageError, match=r"no tokenizer file .*none.json"):
        pack(folder, tmp_path / "e", tokenizer=str(tmp_path / "none.json"), include=["*.txt"])
