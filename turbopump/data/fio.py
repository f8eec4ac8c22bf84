"""Reads measured by fio where it is installed: the measure of others beside ours (https://github.com/axboe/fio)."""

from __future__ import annotations

import os
import shutil
import subprocess

from turbopump.core.errors import ProfileError
from turbopump.core.files import from_json
from turbopump.data.scratch import ScratchFile

ROUTE = "fio io_uring O_DIRECT"


def installed() -> bool:
    return shutil.which("fio") is not None


def random_read_s(file: ScratchFile, num_bytes: int, depth: int, run_s: float) -> tuple[float, float | None]:
    """Seconds of one read and, where fio says it, the 99th percentile of their latency.

    Raises `ProfileError` where fio fails; `num_bytes` must be whole sectors.
    """
    command = [
        "fio", "--name=probe", f"--filename=/proc/{os.getpid()}/fd/{file.handle}", f"--size={file.num_bytes}",
        "--readonly", "--rw=randread", "--direct=1", "--ioengine=io_uring", f"--bs={num_bytes}", f"--iodepth={depth}",
        "--time_based", f"--runtime={max(1, round(1000 * run_s))}ms", "--output-format=json",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, timeout=30 + 10 * run_s, cwd=file.directory, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProfileError(f"fio does not run: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise ProfileError(f"fio failed ({done.returncode}): {said[0] if said else 'it says nothing'}")
    return parse(done.stdout)


def parse(output: bytes) -> tuple[float, float | None]:
    """Seconds of a read and the 99th percentile of its latency from the JSON of fio 3; raises `ProfileError`."""
    begin = output.find(b"{")  # warnings may stand before it
    try:
        (job,) = from_json(output[max(begin, 0) :])["jobs"]
        if job["error"]:
            raise ProfileError(f"fio failed with error {job['error']}")
        iops = float(job["read"]["iops"])
        percentiles = job["read"].get("clat_ns", {}).get("percentile", {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"the output of fio is not as expected ({error!r})") from error
    if not iops > 0:
        raise ProfileError("fio read nothing")
    p99_ns = percentiles.get("99.000000")
    return 1.0 / iops, None if p99_ns is None else float(p99_ns) / 1e9
