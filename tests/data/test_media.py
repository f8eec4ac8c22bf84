"""Decoding images and audio: pixels and samples as written, and typed errors for everything else."""

import contextlib
import io
import struct
import sys
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from turbopump.core.errors import MissingDependencyError, SampleError
from turbopump.data.media import decode_audio, decode_image


def image_bytes(pixels, form="PNG", mode=None, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels, mode).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_pixels_come_back(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    decoded = decode_image(image_bytes(pixels))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, pixels.reshape(5, 7, -1))


def test_other_modes():
    wide = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
    assert np.array_equal(decode_image(image_bytes(wide))[..., 0], wide >> 8)
    jpeg = image_bytes(np.full((8, 8, 3), 200, np.uint8), "JPEG")
    assert decode_image(jpeg).shape == (8, 8, 3) and abs(int(decode_image(jpeg)[0, 0, 0]) - 200) < 4
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_image(image_bytes(np.zeros((4, 8, 3), np.uint8), "JPEG", exif=exif)).shape == (8, 4, 3)


def wav_bytes(samples, width=2, rate_hz=8000):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())
    return stream.getvalue()


def test_pcm_of_every_width():
    values = np.array([[0, -1], [0.5, 0.25], [-0.5, 0.75]], np.float32)
    eight = wav_bytes(((values * 128) + 128).clip(0, 255).astype(np.uint8), 1)
    sixteen = wav_bytes((values * 2**15).astype("<i2"), 2)
    thirty_two = wav_bytes((values.astype(np.float64) * 2**31).astype("<i4"), 4)
    wide = (values.astype(np.float64) * 2**23).astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3]
    twenty_four = wav_bytes(wide.reshape(3, 6), 3)
    twenty_four = twenty_four[:22] + struct.pack("<H", 2) + twenty_four[24:]
    twenty_four = twenty_four[:32] + struct.pack("<H", 6) + twenty_four[34:]
    for data in (eight, sixteen, twenty_four, thirty_two):
        samples, rate_hz = decode_audio(data)
        assert samples.dtype == np.float32 and rate_hz == 8000
        assert np.array_equal(samples, values)


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3", "WAV"])
def test_other_audio(form):
    soundfile = pytest.importorskip("soundfile")
    tone = (0.5 * np.sin(np.arange(16000) / 20)).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, tone, 16000, format=form, **({"subtype": "FLOAT"} if form == "WAV" else {}))
    samples, rate_hz = decode_audio(stream.getvalue())
    assert rate_hz == 16000 and samples.shape[1] == 1
    assert abs(float(np.sqrt((samples**2).mean())) - 0.5 / np.sqrt(2)) < 0.02
    if form in ("FLAC", "WAV"):
        assert np.abs(samples[:, 0] - tone).max() < 1e-4


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingDependencyError, match=r"turbopump\[audio\]"):
        decode_audio(b"fLaC" + bytes(100))
    assert len(decode_audio(wav_bytes(np.zeros((9, 1), np.int16)))[0]) == 9
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"turbopump\[image\]"):
        decode_image(b"")


@pytest.mark.parametrize("data", [b"", b"junk" * 100, image_bytes(np.zeros((64, 64, 3), np.uint8))[:-30]])
def test_what_is_no_image(data):
    with pytest.raises(SampleError, match="image"):
        decode_image(data)


@pytest.mark.parametrize("data", [b"", b"junk" * 100, wav_bytes(np.zeros((99, 1), np.int16))[:-30]])
def test_what_is_no_audio(data):
    with pytest.raises(SampleError, match="replace"):
        decode_audio(data)


@settings(max_examples=150)
@given(data=st.data())
def test_flipped_bytes_give_typed_errors_only(data):
    rng = np.random.default_rng(0)
    content, decode = data.draw(
        st.sampled_from(
            [
                (wav_bytes(rng.integers(-99, 99, (50, 2)).astype("<i2")), decode_audio),
                (image_bytes(rng.integers(0, 256, (9, 9, 3), np.uint8)), decode_image),
                (image_bytes(rng.integers(0, 256, (9, 9, 3), np.uint8), "JPEG"), decode_image),
            ]
        )
    )
    flipped = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        flipped[data.draw(st.integers(0, min(60, len(content) - 1)))] ^= data.draw(st.integers(1, 255))
    kept = data.draw(st.sampled_from([len(content), len(content) - 9]))
    with contextlib.suppress(SampleError, MissingDependencyError):
        decode(bytes(flipped[:kept]))
