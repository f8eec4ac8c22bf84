"""The built-in sources keep the contract."""

import pickle
import sys
import wave

import numpy as np
import pytest
from PIL import Image

from turbopump.core import plugins
from turbopump.core.errors import DatasetError, MissingDependencyError, SampleError, UsageError
from turbopump.data.digits import DigitsConfig
from turbopump.data.manifest import Field
from turbopump.data.sources import ARRAYS, DIGITS, TOKENS, TONES, ArraysConfig, TokensConfig
from turbopump.data.text import ByteTokenizer, tokenizer_entry
from turbopump.data.tones import TonesConfig, tones_shape
from turbopump.data.writer import DatasetWriter
from turbopump.pack import pack


def write_tokens(path, tokens, shard_bytes):
    with DatasetWriter(path, kind="tokens", fields=[Field("tokens", "uint8")], shard_bytes=shard_bytes) as writer:
        writer.append("train", [tokens], source_bytes=2 * len(tokens))
        writer.add_file("tokenizer.json", ByteTokenizer().dumps())
        writer.finish(tokenizer=tokenizer_entry(ByteTokenizer()))
    return TOKENS.open(TokensConfig(path=str(path), seq_len=7), "train")


@pytest.mark.slow
@pytest.mark.parametrize("shard_bytes", [3, 10, 17, 64, 10_000])
def test_windows_over_any_shards(tmp_path, shard_bytes):
    tokens = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    source = write_tokens(tmp_path / "d", tokens, shard_bytes)
    assert len(source) == 999 // 7 and source.bytes_per_token == 2.0
    order = np.random.default_rng(1).permutation(len(source))
    batch = source.__getitems__(order)
    assert batch.dtype == np.int64 and batch.shape == (len(source), 8)
    for row, index in zip(batch, order, strict=True):
        assert np.array_equal(row, tokens[index * 7 : index * 7 + 8])
    assert np.array_equal(source[3], tokens[21:29])
    for bad in (-1, len(source)):
        with pytest.raises(IndexError):
            source[bad]
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.__getitems__(order), batch)


def test_tokens_name_what_does_not_fit(tmp_path):
    source = write_tokens(tmp_path / "d", np.zeros(20, np.uint8), 64)
    assert source.decode(source.encode("pump")) == "pump"
    with pytest.raises(DatasetError, match="20 tokens, too few for one window of seq_len"):
        TOKENS.open(TokensConfig(path=str(tmp_path / "d"), seq_len=20), "train")
    with pytest.raises(DatasetError, match=r"no split 'test' \(it has: train\)"):
        TOKENS.open(TokensConfig(path=str(tmp_path / "d")), "test")
    with pytest.raises(DatasetError, match="holds tokens, not arrays"):
        ARRAYS.open(ArraysConfig(path=str(tmp_path / "d")), "train")
    with pytest.raises(DatasetError, match="turbopump pack"):
        TOKENS.open(TokensConfig(path=str(tmp_path / "none")), "train")


def test_arrays_come_back_over_shards(tmp_path):
    x = np.random.default_rng(0).random((500, 3, 4, 4), np.float32)
    y = np.arange(500)
    pack((x, y), tmp_path / "d", validation=0.2)
    seen = {}
    for split in ("train", "validation"):
        source = ARRAYS.open(ArraysConfig(path=str(tmp_path / "d")), split)
        xs, ys = source.__getitems__(np.arange(len(source))[::-1])
        seen |= {int(label): image for image, label in zip(xs, ys, strict=True)}
        assert np.array_equal(source[0][0], xs[-1])
    assert sorted(seen) == list(range(500))
    assert all(np.array_equal(seen[i], x[i]) for i in range(500))
    assert ARRAYS.shape(ArraysConfig(path=str(tmp_path / "d"))) == {"channels": 3, "height": 4, "width": 4}


def test_digits_split_and_shift():
    train, held = (DIGITS.open(DigitsConfig(), split) for split in ("train", "validation"))
    assert (len(train), len(held)) == (1437, 360)
    image, label = train[0]
    assert image.shape == (1, 8, 8) and image.dtype == np.float32 and image.min() == -1 and image.max() <= 1
    images, labels = train.__getitems__(np.arange(5))
    assert np.array_equal(images[0], image) and labels[0] == label
    moved = DIGITS.open(DigitsConfig(shift=2), "train")
    assert moved.randomness == "seeded" and DIGITS.open(DigitsConfig(shift=2), "validation").randomness == "none"
    np.random.seed(0)
    variants = {moved[0][0].tobytes() for _ in range(200)}
    assert 10 < len(variants) <= 25
    with pytest.raises(UsageError, match="no split 'test'"):
        DIGITS.open(DigitsConfig(), "test")


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"scikit-learn.*turbopump\[digits\]"):
        DIGITS.open(DigitsConfig(), "train")


def test_tones_are_a_function_of_seed_split_and_index():
    config = TonesConfig(train_samples=50, validation_samples=10)
    first, second = TONES.open(config, "train"), TONES.open(config, "train")
    other, held = TONES.open(TonesConfig(seed=1), "train"), TONES.open(config, "validation")
    second[7]
    assert np.array_equal(first[3]["features"], second[3]["features"])
    assert not np.array_equal(first[3]["features"][:, :20], other[3]["features"][:, :20])
    assert not np.array_equal(first[3]["features"][:, :20], held[3]["features"][:, :20])


def test_tones_collate_pads_and_fits_the_shape():
    config = TonesConfig()
    source = TONES.open(config, "train")
    samples = [source[i] for i in range(64)]
    batch = source.collate(samples)
    shape = tones_shape(config)
    assert batch["features_BFT"].dtype == np.float32 and batch["labels_BL"].dtype == np.int64
    assert batch["features_BFT"].shape[1] == shape["frequencies"]
    assert len(set(batch["lengths_B"].tolist())) > 20
    assert batch["lengths_B"].max() == batch["features_BFT"].shape[2] <= shape["frames"]
    assert batch["label_lengths_B"].max() <= shape["labels"] and batch["label_lengths_B"].min() >= config.min_labels
    for i, sample in enumerate(samples):
        frames, labels = batch["lengths_B"][i], batch["label_lengths_B"][i]
        assert np.array_equal(batch["features_BFT"][i, :, :frames], sample["features"])
        assert not batch["features_BFT"][i, :, frames:].any() and not batch["labels_BL"][i, labels:].any()
        assert batch["labels_BL"][i, :labels].min() >= 1


def test_a_tone_has_its_own_pitch():
    config = TonesConfig(num_tones=4, min_labels=1, max_labels=1, noise=0.0)
    source = TONES.open(config, "train")
    bins = {}
    for i in range(40):
        sample = source[i]
        bins.setdefault(int(sample["labels"][0]), set()).add(int(sample["features"].sum(1).argmax()))
    assert sorted(bins) == [1, 2, 3, 4]
    assert max(max(b) - min(b) for b in bins.values()) <= 1 and len(set.union(*bins.values())) >= 4


def test_recipes_find_the_kinds():
    assert {"tokens", "digits", "tones", "arrays"} <= set(plugins.names("turbopump.sources"))
    assert plugins.find("turbopump.sources", "tones").config is TonesConfig
    assert TonesConfig(min_labels=9).problems()


def test_images_and_audio_are_decoded_where_they_are_read(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (4, 5 + i // 4, 3), np.uint8) for i in range(8)]
    folder = tmp_path / "photos"
    for i, image in enumerate(pixels):
        place = folder / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    manifest = pack(folder, tmp_path / "d", validation=0)
    assert [(item.name, item.media) for item in manifest.fields] == [("image", "image"), ("label", "")]
    assert dict(manifest.labels) == {"label": ("cat", "dog")}
    source = ARRAYS.open(ArraysConfig(path=str(tmp_path / "d")), "train")
    order = [1, 3, 5, 7, 0, 2, 4, 6]  # by folder, then by name
    images, labels = source.__getitems__(range(8))
    assert all(np.array_equal(image, pixels[i]) for image, i in zip(images, order, strict=True))
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and source.__getitems__([0, 1])[0].shape == (2, 4, 5, 3)
    raw = ARRAYS.open(ArraysConfig(path=str(tmp_path / "d"), decode=False), "train")
    assert raw[0][0] == (folder / "cat" / "1.png").read_bytes()

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.arange(100, dtype="<i2").tobytes())
    (tmp_path / "sounds").mkdir()
    (tmp_path / "a.wav").rename(tmp_path / "sounds" / "a.wav")
    (tmp_path / "sounds" / "b.wav").write_bytes(b"RIFF broken")
    pack(tmp_path / "sounds", tmp_path / "s", validation=0)
    sounds = ARRAYS.open(ArraysConfig(path=str(tmp_path / "s")), "train")
    (samples, rates), *_ = (sounds.__getitems__([0]),)
    assert samples.shape == (1, 100, 1) and rates.tolist() == [8000]
    with pytest.raises(SampleError, match=r"'audio' of arrays .*, row 1 of .*train-00000.arrow"):
        sounds.__getitems__([0, 1])
