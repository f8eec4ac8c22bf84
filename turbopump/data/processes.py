"""What every helper process of ours does first: leave signals to its parent, and end with it."""

from __future__ import annotations

import os
import signal
import threading
import time

CHECK_EVERY_S = 0.5


def become_helper(parent_pid: int, *, sigterm_ends: bool = False) -> None:
    """Call in a forked process. Ctrl-C and SIGTERM are the parent's to handle: it stops its helpers when it is ready.

    If the parent is killed outright, this process ends within a second; queues alone would keep it waiting for ever,
    since each helper holds both ends of them. `sigterm_ends`: for a parent that ends its helpers by SIGTERM, as a
    `ProcessPoolExecutor` does where one of them was killed, maybe with the lock of their queue in its hands.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if sigterm_ends else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent_pid,), daemon=True).start()


def _end_with(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(CHECK_EVERY_S)
    os._exit(1)
