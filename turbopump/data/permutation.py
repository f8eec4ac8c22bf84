"""A keyed permutation of [0, n) in O(1) memory for any n up to 2^62: place -> sample, and back.

A generalised Feistel network (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 4) over pairs
(high, low) of Z_a x Z_b with a * b > n: each round adds to one half, modulo its side, a hash of the other, which can
be taken away again whatever the hash is: a bijection of [0, a * b). Results outside [0, n) walk on along their cycle,
which always comes back inside. With a near the square root of n, a * b exceeds n by at most a, so next to nothing has
to walk at any n; with a power of two as the domain, half of all results would at n = 2^k + 1.
Six rounds: three already pass the uniformity checks that a true shuffle passes. Not a cipher.
permutation.cpp does it; the reference in NumPy takes twice as long, four times for an n and a stream each.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import numpy as np

from turbopump.data import native

ROUNDS = 6
MAX_N = 1 << 62  # sides stay below 2^32, so that hash * side fits 64 bits
_MIN_SIDE = 5
_CHUNK = 1 << 14  # elements turned at once: their four arrays of 128 KiB stay in the second-level cache
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_U = np.uint64

Ints = int | np.ndarray
Words = np.uint64 | np.ndarray  # uint64: one for all elements, or one each


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


def permute(places: np.ndarray, n: Ints, seed: Ints, stream: Ints) -> np.ndarray:
    """The sample at each of `places` (int64 [m], each in [0, n)), int64 [m].

    A bijection of [0, n) for each (seed, stream). `n` (1 to 2^62), `seed` and `stream` (any 64-bit numbers; a stream is
    an epoch, say) are one for all, or int64 or uint64 [m].
    """
    return _all_turned(places, n, seed, stream, backward=False)


def unpermute(samples: np.ndarray, n: Ints, seed: Ints, stream: Ints) -> np.ndarray:
    """The place of each of `samples`: the inverse of `permute`."""
    return _all_turned(samples, n, seed, stream, backward=True)


def _all_turned(numbers: np.ndarray, n: Ints, seed: Ints, stream: Ints, backward: bool) -> np.ndarray:
    if isinstance(n, int) and n <= 1:
        return np.zeros(len(numbers), np.int64)
    turn = _compiled()
    return (turn_by_reference if turn is None else turn)(numbers, n, seed, stream, backward)


@cache
def _compiled() -> Callable[[np.ndarray, Ints, Ints, Ints, bool], np.ndarray] | None:
    """permutation.cpp, where it can be compiled."""
    library = native.load("permutation")
    if library is None:
        return None
    turn_in_place, pointer, word = library.turn_in_place, ctypes.c_void_p, ctypes.c_int64
    turn_in_place.argtypes = [pointer, word, pointer, word, pointer, word, pointer, word, ctypes.c_int]
    turn_in_place.restype = None

    def turn(numbers: np.ndarray, n: Ints, seed: Ints, stream: Ints, backward: bool) -> np.ndarray:
        out = numbers.astype(np.uint64, order="C")
        settings = [_row_of_words(value, len(out)) for value in (n, seed, stream)]
        each = [part for row in settings for part in (row.ctypes.data, int(len(row) > 1))]
        turn_in_place(out.ctypes.data, len(out), *each, backward)
        return out.view(np.int64)

    return turn


def _row_of_words(value: Ints, count: int) -> np.ndarray:
    """Contiguous uint64 [1] or [count]: compiled code reads as far as it is told."""
    if isinstance(value, int):
        return np.array([value & _MASK], np.uint64)
    if value.shape != (count,):
        raise ValueError(f"an array of shape {value.shape} for {count} numbers")
    return np.ascontiguousarray(value).view(np.uint64) if value.dtype.itemsize == 8 else value.astype(np.uint64)


def turn_by_reference(numbers: np.ndarray, n: Ints, seed: Ints, stream: Ints, backward: bool) -> np.ndarray:
    """`permute`, or `unpermute` where `backward`, in NumPy."""
    out = numbers.astype(np.uint64)
    keys, sides = _keys(seed, stream), _sides(n)
    limits = _U(n) if isinstance(n, int) else n.astype(np.uint64)
    for first in range(0, len(out), _CHUNK):
        part = slice(first, first + _CHUNK)
        _walk(out[part], _of(limits, part), (_of(sides[0], part), _of(sides[1], part)), _of(keys, part), backward)
    return out.view(np.int64)


def _of(value: Words, rows: slice | np.ndarray) -> Words:
    return value[rows] if isinstance(value, np.ndarray) else value


def _walk(x: np.ndarray, limit: Words, sides: tuple[Words, Words], key: Words, backward: bool) -> None:
    """Turn `x` in place until all lie below `limit`."""
    turn = _turned_back if backward else _turned
    x[:] = turn(x, *sides, key)
    outside = np.flatnonzero(x >= limit)
    while len(outside):
        walked = turn(x[outside], _of(sides[0], outside), _of(sides[1], outside), _of(key, outside))
        x[outside] = walked
        outside = outside[walked >= _of(limit, outside)]


def _keys(seed: Ints, stream: Ints) -> Words:
    """What the hash of round 0 starts from; later rounds add a constant."""
    if isinstance(seed, int) and isinstance(stream, int):
        return _U(mix_int(stream + mix_int(seed)))
    start = _U(mix_int(seed)) if isinstance(seed, int) else mix64(seed.astype(np.uint64))
    return mix64(np.add(_U(stream & _MASK) if isinstance(stream, int) else stream.astype(np.uint64), start))


def _sides(n: Ints) -> tuple[Words, Words]:
    """a and b of the domain: a = floor(sqrt(n)) + 1, b = floor(n / a) + 1, so a * b > n whatever sqrt rounds to.

    Neither is below `_MIN_SIDE`: on 2 x 2, six rounds favour some places by 7 %; on 5 x 5 by less than 0.5 %.
    """
    if isinstance(n, int):
        a = max(int(math.sqrt(n)) + 1, _MIN_SIDE)
        return _U(a), _U(max(n // a + 1, _MIN_SIDE))
    sides = np.maximum(np.sqrt(n.astype(np.float64)).astype(np.int64) + 1, _MIN_SIDE)
    return sides.astype(np.uint64), np.maximum(n // sides + 1, _MIN_SIDE).astype(np.uint64)


def _turned(x: np.ndarray, a: Words, b: Words, key: Words) -> np.ndarray:
    high = x // b
    low = x - high * b
    hashed, spare = np.empty_like(x), np.empty_like(x)
    for number in range(ROUNDS):
        half, other, side = (high, low, a) if number % 2 == 0 else (low, high, b)
        _hash_below(other, _round_key(key, number), side, hashed, spare)
        half += hashed
        np.subtract(half, side, out=hashed)
        np.minimum(half, hashed, out=half)  # below zero is near 2^64: the smaller of the two is the remainder
    high *= b
    high += low
    return high


def _turned_back(x: np.ndarray, a: Words, b: Words, key: Words) -> np.ndarray:
    high = x // b
    low = x - high * b
    hashed, spare = np.empty_like(x), np.empty_like(x)
    for number in reversed(range(ROUNDS)):
        half, other, side = (high, low, a) if number % 2 == 0 else (low, high, b)
        _hash_below(other, _round_key(key, number), side, hashed, spare)
        half -= hashed
        np.add(half, side, out=hashed)
        np.minimum(half, hashed, out=half)
    return high * b + low


def _round_key(key: Words, number: int) -> Words:
    constant = (number + 1) * _GOLDEN & _MASK
    # Python's integers for one key: numpy warns when a single uint64 wraps
    return key + _U(constant) if isinstance(key, np.ndarray) else _U((int(key) + constant) & _MASK)


def _hash_below(x: np.ndarray, key: Words, side: Words, out: np.ndarray, spare: np.ndarray) -> None:
    """A hash of `x + key` in [0, side), into `out`: 32 good bits times `side`, shifted down (Lemire 2019)."""
    np.add(x, key, out=out)
    out *= _U(_GOLDEN)
    np.right_shift(out, _U(29), out=spare)
    out ^= spare
    out *= _U(0xBF58476D1CE4E5B9)
    out >>= _U(32)
    out *= side
    out >>= _U(32)
