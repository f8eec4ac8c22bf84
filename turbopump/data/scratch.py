"""Files that a measurement of storage needs, and that nothing leaves behind: no exception, no full disk, no `kill -9`.

A `ScratchFile` has no name: it is made with O_TMPFILE, or unlinked as soon as it is open where a file system does not
know that; the kernel frees it with its last descriptor. A `ScratchDirectory` must have names, since the writer of
checkpoints does; a small process that outlives its owner removes it. What is left even so (a host that lost power)
carries the owner's host and process in its name, and `sweep` removes it if that process is no more.

Cold: pages are dropped with POSIX_FADV_DONTNEED, which needs no permission, and `mincore` says whether they went.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from turbopump.core.errors import RunDirectoryError
from turbopump.core.files import digest, explain_os_error

PREFIX = ".turbopump-probe-"
PAGE_BYTES = mmap.PAGESIZE
BLOCK_BYTES = 4 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of files (ulimit -f)
_REAPER = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
_libc = ctypes.CDLL(None, use_errno=True)


def _owner() -> str:
    """This host and process, as they stand in names: another host's processes cannot be looked up from here."""
    return f"{digest(platform.node().encode())[:8]}-{os.getpid()}"


def sweep(directory: Path) -> list[str]:
    """Remove what dead probes of this host left in `directory`; returns the names. Living ones keep theirs."""
    removed = []
    for path in directory.glob(f"{PREFIX}*"):
        host, _, rest = path.name.removeprefix(PREFIX).partition("-")
        pid = rest.partition("-")[0]
        if not _owner().startswith(f"{host}-") or not pid.isdecimal() or _alive(int(pid)):
            continue
        with suppress(OSError):  # another probe may be removing it too
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path.name)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class ScratchFile:
    """An open file without a name in `directory`, read and written through `handle`; a context manager.

    Raises `RunDirectoryError` where no file can be made there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.num_bytes = directory, 0
        try:
            self.handle = _open_nameless(directory)
        except OSError as error:
            raise RunDirectoryError(f"storage cannot be measured: {_explain(error, directory)}") from error

    def fill(self, num_bytes: int, go_on: Callable[[], bool] = lambda: True) -> None:
        """Append random bytes (a device may compress, a file system skip zeros) up to `num_bytes`, durably.

        Whole blocks of 4 MiB, as long as `go_on` says so. Raises `OSError`, and then gives the space back.
        """
        random = np.random.Generator(np.random.SFC64())
        try:
            while self.num_bytes < num_bytes and go_on():
                write_all(self.handle, random.bytes(min(BLOCK_BYTES, num_bytes - self.num_bytes)))
                self.num_bytes = os.lseek(self.handle, 0, os.SEEK_CUR)
                if self.num_bytes % (4 * BLOCK_BYTES) == 0:
                    os.fdatasync(self.handle)  # so that `go_on` sees how fast the device takes it
            os.fsync(self.handle)
        except OSError:
            self.clear()
            raise

    def clear(self) -> None:
        """Give the space back."""
        os.ftruncate(self.handle, 0)
        os.lseek(self.handle, 0, os.SEEK_SET)
        self.num_bytes = 0

    def open_again(self, flags: int) -> int:
        """Another descriptor of the same file, to be closed by the caller; raises `OSError` for flags not taken."""
        return os.open(f"/proc/self/fd/{self.handle}", flags)

    def drop(self) -> float | None:
        """Take the file out of the page cache; the share that stayed (0 is cold), None where it cannot be known."""
        share: float | None = None
        for wait_s in (0.0, 0.01, 0.05):  # pages still on their way into the cache cannot be dropped
            time.sleep(wait_s)
            os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_DONTNEED)
            share = self.resident_share()
            if share is None or share < 0.01 or share > 0.99:  # the last: a file system that lies in memory
                break
        return share

    def warm(self) -> float | None:
        """Read the file into the page cache; the share that is there (1 is all), None where it cannot be known."""
        share = self.resident_share()
        if share is None or share < 0.999:
            os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_NORMAL)
            buffer = memoryview(bytearray(BLOCK_BYTES))
            for offset in range(0, self.num_bytes, BLOCK_BYTES):
                os.preadv(self.handle, [buffer], offset)
            share = self.resident_share()
        return share

    def resident_share(self) -> float | None:
        """Share of the file's pages in the page cache, by mincore(2); None where the kernel does not tell."""
        if not self.num_bytes:
            return 0.0
        pages = np.zeros(-(-self.num_bytes // PAGE_BYTES), np.uint8)
        with mmap.mmap(self.handle, self.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(self.num_bytes)
            failed = _libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data))
            del view  # a mapping with views on it cannot be closed
        return None if failed else float((pages & 1).mean())

    def close(self) -> None:
        os.close(self.handle)

    def __enter__(self) -> ScratchFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write all of `data`; a nearly full disk takes a part of it and refuses the rest: `OSError`."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _open_nameless(directory: Path) -> int:
    with suppress(OSError):  # EOPNOTSUPP, or EISDIR from older ones; what is really wrong shows below
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    path = directory / f"{PREFIX}{_owner()}-{secrets.token_hex(4)}"
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        path.unlink()
    except BaseException:
        os.close(handle)
        raise
    return handle


def _explain(error: OSError, directory: Path) -> str:
    if error.errno == errno.ENOENT:
        return f"{directory} does not exist: make it, or choose another directory"
    if error.errno == errno.ENOTDIR:
        return f"{directory} is not a directory: choose a directory"
    return explain_os_error(error, directory)


class ScratchDirectory:
    """A directory of its own in `directory`, removed with all in it at the end, also after `kill -9`.

    Raises `RunDirectoryError` where none can be made there.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory.resolve() / f"{PREFIX}{_owner()}-{secrets.token_hex(4)}"
        self._reaper: subprocess.Popen[bytes] | None = None
        try:
            self.path.mkdir()
        except OSError as error:
            raise RunDirectoryError(f"storage cannot be measured: {_explain(error, directory)}") from error
        with suppress(OSError):  # without it the next probe sweeps
            # it reads until this process is no more; in a session of its own, so that no signal to us stops it too
            self._reaper = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _REAPER, str(self.path)], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
            )  # fmt: skip

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._reaper is not None:
            with suppress(OSError):
                self._reaper.communicate()


def memory_behind(directory: Path) -> str:
    """What may answer a cold read from memory, as far as the mount table and the device's name tell; else empty."""
    kind, device = mounted(directory)
    if kind in ("tmpfs", "ramfs"):
        return f"{directory} lies in memory ({kind}): there is no cold read"
    if kind.startswith(("nfs", "cifs", "smb", "9p", "fuse", "virtiofs", "lustre", "ceph", "gpfs", "beegfs")):
        return f"{directory} is a file system of another machine ({kind}), whose memory cannot be emptied from here"
    if re.fullmatch(r"(vd|xvd)[a-z]+\d*", device):
        return f"{device} is a virtual disk, whose host may answer from its memory: cold is cold in this system only"
    return ""


def mounted(directory: Path) -> tuple[str, str]:
    """Kind of the file system that holds `directory`, and the name of its device, by the mount table of Linux."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "", ""
    best = ("", "", "")
    for line in lines:
        before, _, after = line.partition(" - ")
        point, (kind, source, *_) = before.split()[4].replace("\\040", " "), after.split()
        inside = directory == Path(point) or Path(point) in directory.parents
        if inside and len(point) >= len(best[0]):  # a later mount on the same place hides the earlier
            best = (point, kind, Path(source).name)
    return best[1], best[2]
