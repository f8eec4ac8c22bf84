"""The order of samples: which (epoch, index) stands at each place of a run, as a pure function of the step.

`permute` is a bijection of [0, n) keyed by (seed, epoch): an unbalanced Feistel network on the next power of two with
cycle walking, so it needs O(1) memory for any n. Six rounds: three already pass the uniformity checks that a true
shuffle passes. A step takes `global_batch` consecutive places of the endless stream of epochs; where an epoch ends
inside a batch the next one begins there, so each sample is seen exactly once an epoch, whatever the batch size.
Nothing here knows ranks, workers or earlier calls.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

ROUNDS = 6
_BLOCK_PLACES = 1 << 14  # places computed at once: numpy's cost per call is then below a microsecond a step
_MASK = (1 << 64) - 1
_U = np.uint64


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64, wrapping."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


def mix_int(x: int) -> int:
    """`mix64` of one Python integer."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def sample_key(seed: int, epoch: int, index: int) -> int:
    """The 64-bit seed of everything random in one sample of one epoch."""
    return mix_int(mix_int(mix_int(seed + 0x9E3779B97F4A7C15) + epoch + 0x9E3779B97F4A7C15) + index)


def held_out(rows: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Bool per row number: whether its hash puts it in the `fraction` that is held out."""
    hashed = mix64(rows.astype(np.uint64) + _U(mix_int(seed + 1)))
    return (hashed >> _U(11)).astype(np.float64) * 2.0**-53 < fraction


def permute(places: np.ndarray, n: int, seed: int, epoch: int | np.ndarray) -> np.ndarray:
    """The sample at each of `places` (int64 [m], each in [0, n)) of an epoch; `epoch` is one, or int64 [m].

    A bijection of [0, n) for each (seed, epoch): Feistel rounds as in Black and Rogaway, Ciphers with Arbitrary
    Finite Domains (2002), section 4.
    """
    if n <= 1:
        return np.zeros_like(places)
    bits = max(2, (n - 1).bit_length())
    keys = _keys(seed, np.atleast_1d(np.asarray(epoch, dtype=np.int64)))
    x = _feistel(places.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(x >= _U(n))
    while len(outside):  # on average less than one more turn an element
        walked = _feistel(x[outside], bits, keys if keys.shape[1] == 1 else keys[:, outside])
        x[outside] = walked
        outside = outside[walked >= _U(n)]
    return x.astype(np.int64)


def _keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """Round keys, uint64 [ROUNDS, len(epochs)]."""
    base = mix64(epochs.astype(np.uint64) + _U(mix_int(seed)))
    return np.stack([mix64(base + _U((r + 1) * 0x9E3779B97F4A7C15 & _MASK)) for r in range(ROUNDS)])


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    low_bits, high_bits = _U(bits // 2), _U(bits - bits // 2)
    low_mask, high_mask = _U((1 << int(low_bits)) - 1), _U((1 << int(high_bits)) - 1)
    left, right = x >> low_bits, x & low_mask
    for r in range(ROUNDS):
        if r % 2 == 0:
            left = (left ^ _round(right, keys[r])) & high_mask
        else:
            right = (right ^ _round(left, keys[r])) & low_mask
    return (left << low_bits) | right


def _round(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    x = (x ^ key) * _U(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U(29))) * _U(0xBF58476D1CE4E5B9)
    return x ^ (x >> _U(32))


class Order:
    """The global batch of each step. Holds only the block of steps last asked for."""

    def __init__(
        self,
        n: int,
        global_batch: int,
        *,
        order: Literal["shuffle", "sequential"] = "shuffle",
        seed: int = 0,
        block_places: int = _BLOCK_PLACES,
    ) -> None:
        self.n = n
        self.global_batch = global_batch
        self.order = order
        self.seed = seed
        self._block_steps = max(1, block_places // global_batch)
        self._block = -1
        self._epochs = self._indices = np.empty((0, global_batch), np.int64)

    def step_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample indices of step `step` (from 0), each int64 [global_batch]; do not write to them."""
        block, row = divmod(step, self._block_steps)
        if block != self._block:
            self._compute(block)
        return self._epochs[row], self._indices[row]

    def _compute(self, block: int) -> None:
        count = self._block_steps * self.global_batch
        first = block * count
        # Python integers: step * global_batch may pass 2**63 long before the run does anything wrong
        epoch, place = divmod(first, self.n)
        places = place + np.arange(count, dtype=np.int64)
        turns = places // self.n
        epochs, places = epoch + turns, places - turns * self.n
        if self.order == "shuffle":
            same = epochs[0] == epochs[-1]
            indices = permute(places, self.n, self.seed, int(epochs[0]) if same else epochs)
        else:
            indices = places
        self._epochs = epochs.reshape(self._block_steps, self.global_batch)
        self._indices = indices.reshape(self._block_steps, self.global_batch)
        self._block = block


def step_ids(
    step: int, *, n: int, global_batch: int, order: Literal["shuffle", "sequential"] = "shuffle", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and sample indices of one step (from 0), each int64 [global_batch]: a pure function of its arguments."""
    return Order(n, global_batch, order=order, seed=seed, block_places=1).step_ids(step)
