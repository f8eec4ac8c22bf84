"""A launcher process for tests that must signal or kill it: `python launch_start.py FUNCTION FOLDER`."""

import sys
from pathlib import Path

import launch_ranks as ranks

from turbopump.core.errors import TurbopumpError
from turbopump.launch.local import launch_local

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    try:
        launch_local(getattr(ranks, sys.argv[1]), (folder,), num_processes=2, log_dir=folder)
    except TurbopumpError as error:
        print(f"error: {type(error).__name__}: {error}", flush=True)
        sys.exit(error.exit_code)
