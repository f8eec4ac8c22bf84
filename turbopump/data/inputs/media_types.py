"""Which file names are encoded images and audio."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus")


def media_of_suffix(name: str) -> Literal["", "image", "audio"]:
    """`image`, `audio` or nothing, by the suffix of `name` (`.jpg` alone is one, too)."""
    suffix = (PurePath(f"x{name}") if name.startswith(".") else PurePath(name)).suffix.lower()
    return "image" if suffix in IMAGES else "audio" if suffix in AUDIO else ""
