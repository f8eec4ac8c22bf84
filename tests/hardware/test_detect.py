"""What is said of this machine, against the operating system's own words."""

import gc
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from turbopump.hardware import detect
from turbopump.hardware.gpus import Gpu


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
    gc.collect()  # nothing large may go between the two looks
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


def test_the_fingerprint_is_of_the_hardware_and_stable() -> None:
    here = detect.fingerprint()
    assert re.fullmatch(r"[0-9a-f]{16}", here) and detect.fingerprint() == here
    again = "from turbopump.hardware.detect import fingerprint; print(fingerprint())"
    environment = {**os.environ, "HOSTNAME": "elsewhere", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", again], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == here


def test_the_fingerprint_knows_what_changes_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h100, t4 = Gpu("NVIDIA H100 80GB HBM3", 1 << 36, "550"), Gpu("Tesla T4")
    bare = detect.fingerprint([])
    assert detect.fingerprint([h100, t4]) == detect.fingerprint([t4, Gpu(h100.name, 1 << 36, "580")])  # order, driver
    seen = {bare, detect.fingerprint([h100]), detect.fingerprint([h100, h100]), detect.fingerprint([t4])}
    monkeypatch.setattr("platform.node", lambda: "another-host")
    monkeypatch.setattr("platform.release", lambda: "9.9.9")
    whole = detect.memory_bytes()
    monkeypatch.setattr(detect, "memory_bytes", lambda: round(whole / 2**30) * 2**30 + (1 << 20))
    assert detect.fingerprint([]) == bare
    for name, value in (("num_cores", 96), ("cpu_name", "Another"), ("cpu_features", []), ("memory_bytes", 1 << 42)):
        with monkeypatch.context() as patch:
            patch.setattr(detect, name, lambda value=value: value)
            seen.add(detect.fingerprint([]))
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654"),
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", "intel-xeon-platinum-8480"),
        ("AMD EPYC", "amd-epyc"),
        ("../../etc/passwd", "etc-passwd"),
        ("处理器", "cpu"),
        ("x" * 39 + " yyy", "x" * 39),
    ],
)
def test_the_machine_s_name_fits_a_file_name(cpu: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "cpu_name", lambda: cpu)
    assert detect.machine_name() == f"{name}-{detect.num_cores()}c"


def test_versions_are_known_without_importing_anything() -> None:
    code = (
        "import sys\nfrom turbopump.hardware import detect\nfound = detect.software_versions()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\nprint(found['python'], found['numpy'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [platform.python_version(), version("numpy")]
    assert all(detect.software_versions().values())


def test_two_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(
        detect, "_line", lambda path, **more: "0,2" if "cpu0" in str(path) or "cpu2" in str(path) else "1,3"
    )
    monkeypatch.setattr(detect, "num_cores", lambda: 4)
    assert detect.num_physical_cores() == 2
    monkeypatch.setattr(detect, "_line", lambda path, **more: "")  # hidden: each counts
    assert detect.num_physical_cores() == 4
    monkeypatch.setattr(detect, "num_cores", lambda: 1)  # a limit of the control group
    assert detect.num_physical_cores() == 1


def test_settings_of_the_system(tmp_path: Path) -> None:
    contents = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "proc/sys/net/ipv4/tcp_congestion_control": "bbr\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/fs/cgroup/cpu.max": "200000 100000\n",
        "proc/1/cgroup": "0::/kubepods/besteffort/pod1\n",
        "sys/devices/system/node/node0/x": "",
        "sys/devices/system/node/node1/x": "",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert detect.settings(tmp_path) == {
        "kernel": platform.release(), "governor": "powersave", "tcp_congestion_control": "bbr",
        "transparent_huge_pages": "madvise", "cgroup_cpu_max": "200000 100000", "numa_nodes": 2,
        "container": "kubepods",
    }  # fmt: skip
    (tmp_path / ".dockerenv").touch()
    assert detect.settings(tmp_path)["container"] == "docker"
    assert detect.settings(tmp_path / "nothing") == {"kernel": platform.release()}
    assert set(detect.settings()) >= {"kernel"}


def test_contention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "num_cores", lambda: 2)
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/loadavg").write_text("3.00 2.00 1.00 2/300 1234\n")
    (tmp_path / "proc/pressure/cpu").write_text("some avg10=12.50 avg60=1.68 avg300=1.19 total=405\nfull avg10=0.00\n")
    (tmp_path / "proc/stat").write_text("cpu  50 0 20 20 0 0 0 10 7 0\ncpu0 1 2 3\n")
    assert detect.contention(tmp_path) == {"load_per_core": 1.5, "cpu_pressure": 0.125, "cpu_stolen": 0.1}
    (tmp_path / "proc/pressure/cpu").write_text("")
    assert "cpu_pressure" not in detect.contention(tmp_path)
    assert detect.contention(tmp_path / "nothing") == {}
    assert all(0 <= value < 1e4 for value in detect.contention().values())


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
