"""Encoded images and audio as arrays, in memory: where a sample is decoded, not where it is packed.

Images by Pillow (extra `image`). Audio: PCM in WAV by the standard library, all else by libsndfile (extra `audio`).
"""

from __future__ import annotations

import io
import wave

import numpy as np

from turbopump.core.errors import MissingDependencyError, SampleError

MAX_PIXELS = 1 << 28  # 16384 x 16384: a small file may claim any size
_FULL_SCALE = {1: 1 << 7, 2: 1 << 15, 3: 1 << 23, 4: 1 << 31}


def decode_image(data: bytes) -> np.ndarray:
    """Pixels uint8 [H, W, C]: 1 channel where the image is grey, 4 where it has transparency, else 3 (RGB).

    The orientation that a camera noted is applied. Raises `SampleError` where `data` is no whole image, and
    `MissingDependencyError` without Pillow.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError("pillow", "image", "decoding images") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SampleError(
                    f"an image of {image.width} x {image.height} pixels is larger than {MAX_PIXELS} pixels"
                )
            transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            grey = image.mode in ("L", "1", "I;16", "I;16B", "I", "F")
            if image.mode.startswith(("I", "F")):
                pixels = _eight_bits(np.asarray(image))
            else:
                upright = ImageOps.exif_transpose(image)
                pixels = np.asarray(upright.convert("RGBA" if transparent else "L" if grey else "RGB"))
    except SampleError:
        raise
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ZeroDivisionError, ...
        raise SampleError(f"{len(data)} bytes cannot be decoded as an image: {error}; replace the file") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _eight_bits(wide: np.ndarray) -> np.ndarray:
    """Pixels of 16 bits as the 8 high ones; of other wide ones no scale is known."""
    if wide.dtype.kind not in "iu" or wide.min() < 0 or wide.max() >= 1 << 16:
        raise SampleError(
            "its pixels are floats or wider than 16 bits, which have no scale: convert it to 8 or 16 bits"
        )
    return (wide >> 8).astype(np.uint8)


def decode_audio(data: bytes) -> tuple[np.ndarray, int]:
    """Samples float32 [T, channels] in [-1, 1] and the sample rate in Hz.

    Raises `SampleError` where `data` is no whole sound, and `MissingDependencyError` without soundfile for
    anything but PCM in WAV.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        decoded = _decode_pcm(data)
        if decoded is not None:
            return decoded
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: a wheel without libsndfile, and none in the system
        raise MissingDependencyError("soundfile", "audio", "decoding audio other than PCM in WAV") from error
    try:
        samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, ValueError, TypeError, MemoryError, OSError) as error:
        raise SampleError(f"{len(data)} bytes cannot be decoded as audio: {error}; replace the file") from error
    if not len(samples):
        raise SampleError(f"{len(data)} bytes hold no audio samples: replace the file")
    return samples, int(rate_hz)


def _decode_pcm(data: bytes) -> tuple[np.ndarray, int] | None:
    """PCM of 8 to 32 bits; None for other encodings."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, count, rate_hz = (
                file.getsampwidth(), file.getnchannels(), file.getnframes(), file.getframerate()
            )  # fmt: skip
            raw = file.readframes(count)
    except wave.Error as error:
        if "unknown format" in str(error):
            return None
        raise SampleError(f"{len(data)} bytes cannot be decoded as WAV: {error}; replace the file") from error
    except (EOFError, RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise SampleError(f"{len(data)} bytes are a WAV cut short or damaged {error}; replace the file") from error
    if not count or len(raw) != count * width * channels or not rate_hz or width not in _FULL_SCALE:
        raise SampleError(
            f"{len(data)} bytes hold {len(raw)} of the {count} frames that a WAV header states: replace it"
        )
    return (_integers(raw, width) / np.float32(_FULL_SCALE[width])).astype(np.float32).reshape(count, channels), rate_hz


def _integers(raw: bytes, width: int) -> np.ndarray:
    if width == 1:
        return np.frombuffer(raw, np.uint8).astype(np.int16) - 128
    if width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] >> 8
    return np.frombuffer(raw, f"<i{width}")
