"""A user's script that forgot the guard."""

import launch_ranks as ranks

from turbopump.core.errors import TurbopumpError
from turbopump.launch.local import launch_local

try:
    launch_local(ranks.fail_everywhere, (), num_processes=2)
except TurbopumpError as error:
    print(f"error: {type(error).__name__}: {error}", flush=True)
