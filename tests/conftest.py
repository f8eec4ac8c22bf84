"""What all tests share: reproducible Hypothesis examples, no deadlines (shared machines), one thread of torch."""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "turbopump", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("turbopump")
