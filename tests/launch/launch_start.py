"""A launcher process for tests that must signal or kill it: `python launch_start.py FUNCTION FOLDER`.

With "starting" for FUNCTION its ranks never get further than the import of this script, and say so.
"""

import os
import sys
import time
from pathlib import Path

import launch_ranks as ranks

from turbopump.core.errors import TurbopumpError
from turbopump.launch.local import launch_local

if __name__ == "__mp_main__" and sys.argv[1] == "starting":
    (Path(sys.argv[2]) / f"starting{os.getpid()}").touch()
    time.sleep(1000)

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    try:
        launch_local(getattr(ranks, sys.argv[1], ranks.forever), (folder,), num_processes=2, log_dir=folder)
    except TurbopumpError as error:
        print(f"error: {type(error).__name__}: {error}", flush=True)
        sys.exit(error.exit_code)
