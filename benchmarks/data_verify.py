"""How fast `verify` checks a dataset, over a plain read of the same bytes from memory.

`python -m benchmarks.data_verify [--quick]` prints the figures; `measure_verify` gives the ratio to the benchmark
`data`, whose target is `data.verify_rate`. Both work on the same shards in turns: verify_dataset as it stands, and the
sum over all bytes of the files as 64-bit numbers, by NumPy. Shards lie in memory (/dev/shm) where there is such a
place, so that no disk takes part. The plain read maps the files each time, as any process that opens them must; the
sum over maps whose pages it has touched before is shown beside it.
"""

from __future__ import annotations

import argparse
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Ratio, alternating_blocks, ratio_with_interval
from turbopump.data.format import open_dataset, verify_dataset
from turbopump.data.manifest import Field
from turbopump.data.ragged import Ragged, offsets_of
from turbopump.data.writer import DatasetWriter

RECORD_BYTES = 12_288


@dataclass(frozen=True)
class VerifyResult:
    """`ratio` is the rate of verify over that of the plain read, in pairs of blocks; CPU time of one thread.

    `touched_bytes_per_s` is the plain read again, of maps whose pages were touched before.
    """

    num_bytes: int
    verify_bytes_per_s: float
    read_bytes_per_s: float
    touched_bytes_per_s: float
    ratio: Ratio


def measure_verify(quick: bool) -> VerifyResult:
    with _dataset((128 if quick else 512) << 20) as path:
        num_bytes = verify_dataset(path)
        touched = mapped(path)
        contestants = {
            "verify": lambda: verify_dataset(path),
            "read": lambda: total(mapped(path)),
            "touched": lambda: total(touched),
        }
        times = alternating_blocks(contestants, blocks=7 if quick else 30)
    rates = {name: num_bytes / float(np.median(seconds)) for name, seconds in times.items()}
    ratio = ratio_with_interval(times["read"], times["verify"])
    return VerifyResult(num_bytes, rates["verify"], rates["read"], rates["touched"], ratio)


def mapped(path: Path) -> list[np.ndarray]:
    """The bytes of all shards as uint64."""
    found = []
    for split in open_dataset(path).manifest.splits.values():
        for shard in split.shards:
            with (path / shard.file).open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            found.append(np.frombuffer(memory, np.uint64, shard.bytes // 8))
    return found


def total(parts: list[np.ndarray]) -> int:
    return sum(int(part.sum()) for part in parts)


@contextmanager
def _dataset(num_bytes: int) -> Iterator[Path]:
    """Half fixed rows and half byte strings of varied length, random bytes."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as directory:
        path = Path(directory) / "verify"
        random = np.random.default_rng(0)
        fields = [Field("x", "uint8", (RECORD_BYTES // 2,)), Field("blob", "uint8", (), "bytes")]
        with DatasetWriter(path, kind="arrays", fields=fields) as writer:
            for _ in range(max(num_bytes >> 25, 1)):
                rows = (1 << 25) // RECORD_BYTES
                lengths = random.integers(0, RECORD_BYTES, rows)
                x = np.frombuffer(random.bytes(rows * RECORD_BYTES // 2), np.uint8).reshape(rows, -1)
                blob = np.frombuffer(random.bytes(int(lengths.sum())), np.uint8)
                writer.append("train", [x, Ragged(blob, offsets_of(lengths), "bytes")])
            writer.finish()
        yield path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_verify")
    parser.add_argument("--quick", action="store_true", help="fewer bytes and blocks")
    found = measure_verify(parser.parse_args().quick)
    print(f"{found.num_bytes / 1e6:.0f} MB")
    print(f"verify {found.verify_bytes_per_s / 1e9:.2f} GB/s of CPU time")
    print(f"plain read {found.read_bytes_per_s / 1e9:.2f} GB/s")
    print(f"plain read of touched maps {found.touched_bytes_per_s / 1e9:.2f} GB/s")
    print(f"ratio {found.ratio.value:.3f} [{found.ratio.low:.3f}, {found.ratio.high:.3f}], {found.ratio.runs} blocks")


if __name__ == "__main__":
    main()
