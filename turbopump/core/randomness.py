"""Randomness is a function of a place in the run, never a state that is carried along.

Every random number comes from a generator seeded by `seed_of(seed, "purpose", ...)`: in the data the place is (epoch,
sample index), in the model (step, rank, microbatch). So nothing depends on call order, worker count or resumes.
"""

from __future__ import annotations

from turbopump.core.files import digest


def seed_of(seed: int, *place: int | str) -> int:
    """A 63-bit seed for a place, e.g. `seed_of(0, "model", step, rank, microbatch)`; XXH3-64 of its text."""
    text = ":".join((str(seed), *map(str, place)))
    return int(digest(text.encode()), 16) >> 1
