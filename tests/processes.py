"""What tests see of processes, their own and others': any of them may end while one looks, and machines may be slow.

`wait_until` and `all_gone` wait for an event with a limit that only a hang reaches (`PATIENCE_S`); `held` is what this
process holds, so that `held() - before` is what something left behind, whatever other tests began or ended meanwhile.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

PATIENCE_S = 300.0


def wait_until(condition: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
    """Until `condition()` is true; an `AssertionError` that names `what` where it never is."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {limit_s:g} s"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process runs. One that ended counts as gone, also where its parent (or init) has not noticed yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def all_gone(pids: Iterable[int], limit_s: float = PATIENCE_S) -> bool:
    """Whether all these processes end within the limit."""
    pids, end = list(pids), time.monotonic() + limit_s
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def group_gone(group: int) -> bool:
    """Whether all processes of this process group end within the limit."""
    members = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                members.append(pid)
    return all_gone(members)


def held() -> set[tuple[str, object]]:
    """Child processes, threads and open files of this process, after what is garbage was collected."""
    gc.collect()
    found: set[tuple[str, object]] = {("process", child) for child in psutil.Process().children()}
    found |= {("thread", thread) for thread in threading.enumerate()}
    found |= {("task", task) for task in os.listdir("/proc/self/task")}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(("file", (descriptor, os.readlink(f"/proc/self/fd/{descriptor}"))))
        except FileNotFoundError:  # the listing's own
            continue
    return found


def nothing_left(before: set[tuple[str, object]]) -> bool:
    """Whether all that came after `before` goes: the kernel lists a thread that was joined for a moment longer."""
    end = time.monotonic() + 60
    while (more := held() - before) and time.monotonic() < end:
        time.sleep(0.01)
    return not more
