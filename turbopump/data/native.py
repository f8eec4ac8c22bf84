"""The C++ files beside this one, compiled when first needed and kept: `load("gather")` is `gather.cpp`.

Headers of pyarrow (xxHash) are on the include path. It takes one compiler run of a few seconds for each processor and
source; the result is kept in the user's cache directory, put there by rename. Where no compiler is at hand the caller
takes its Python reference, and a warning says so once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from turbopump.core.files import digest
from turbopump.hardware.detect import cpu_name

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The library made of `<name>.cpp`, or None (with a warning) where it cannot be compiled here."""
    source = Path(__file__).with_name(f"{name}.cpp")
    key = digest("\0".join([source.read_text(), *FLAGS, cpu_name()]).encode())
    for directory in (_cache_directory(), Path(tempfile.gettempdir()) / f"turbopump-{os.getuid()}"):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if directory.stat().st_uid != os.getuid():
                continue  # a library that somebody else could have put there is not loaded
            library = directory / f"{name}-{key}.so"
            if not library.exists():
                _compile(source, library)
            return ctypes.CDLL(str(library))
        except _NoCompilerError as error:
            warnings.warn(f"{error}: {name} goes on in Python, several times slower", RuntimeWarning, stacklevel=2)
            return None
        except OSError:
            continue  # a directory that cannot be written or executed from
    warnings.warn(f"no directory to keep the compiled {name}: it goes on in Python", RuntimeWarning, stacklevel=2)
    return None


class _NoCompilerError(Exception):
    pass


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbopump"


def _compile(source: Path, library: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise _NoCompilerError("no C++ compiler (c++, g++, clang++) on PATH; on Debian: apt install g++")
    pyarrow = importlib.util.find_spec("pyarrow")
    include = [f"-I{Path(pyarrow.origin).parent / 'include'}"] if pyarrow is not None and pyarrow.origin else []
    handle, staging = tempfile.mkstemp(prefix=f".{library.name}.", dir=library.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *include, str(source), "-o", staging]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _NoCompilerError(f"{compiler} does not compile {source.name} ({_first_line(done.stderr)})")
        os.replace(staging, library)
    finally:
        Path(staging).unlink(missing_ok=True)


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if "error" in line), "no message")[:200]
