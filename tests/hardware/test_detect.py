"""What is said of this machine, against the operating system's own words."""

import os
import subprocess
import sys
import time
from pathlib import Path

from turbopump.hardware import detect


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= detect.num_cores() <= len(os.sched_getaffinity(0)) <= (os.cpu_count() or 1)
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    one += "from turbopump.hardware.detect import num_cores; print(num_cores())"
    done = subprocess.run([sys.executable, "-c", one], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_memory() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert detect.memory_bytes() == total
    assert 0 < detect.available_bytes() <= total
    before = detect.resident_bytes()
    held = bytearray(os.urandom(1 << 20) * 64)
    assert detect.resident_bytes() - before > len(held) // 2


def test_a_process_knows_its_age() -> None:
    first = detect.process_age_s()
    time.sleep(0.05)
    assert 0 <= first < detect.process_age_s()


def test_the_description_is_plain_values() -> None:
    import json

    described = detect.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["cpu"] and described["num_cores"] == detect.num_cores()
    assert set(described["cpu_features"]) <= set(Path("/proc/cpuinfo").read_text().split())


def test_caches_as_the_kernel_says_them(tmp_path) -> None:
    for number, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1024K"), ("3", "Unified", "32M")]
    ):
        index = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{number}"
        index.mkdir(parents=True)
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(f"{value}\n")
    assert detect.cache_bytes(tmp_path) == {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}
    assert detect.cache_bytes(tmp_path / "nowhere") == {}
