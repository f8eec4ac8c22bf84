"""200 random schedules of ranks and restarts give the batches that a plain program, run once from the start, gives.

The reference below keeps lists and counters, goes through the run place by place, and shares with the product only the
keyed permutation, whole: `permute(arange(n))` of one epoch, bucket or block at a time.
"""

import random
from fractions import Fraction
from itertools import chain, pairwise

import numpy as np
import pytest

from turbopump.data.buckets import BucketOrder
from turbopump.data.mixture_buckets import MixtureBucketOrder
from turbopump.data.mixture_order import MIX_BLOCK, MixtureOrder
from turbopump.data.order import Order
from turbopump.data.permutation import mix64, mix_int, permute

GOLDEN = 0x9E3779B97F4A7C15
NUM_SCHEDULES = 200


def whole(n, seed, stream):
    return permute(np.arange(n), n, seed, stream).tolist()


def joined(lists):
    return list(chain.from_iterable(lists))


def wrapped(number):
    """A 64-bit number as int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def epoch_of(kind, n, seed, epoch, block_samples, window_blocks):
    """The samples of one epoch of one dataset, in a list."""
    if kind == "sequential":
        return list(range(n))
    if kind == "shuffle":
        return whole(n, seed, epoch)
    blocks = [list(range(first, min(first + block_samples, n))) for first in range(0, n, block_samples)]
    slots = [blocks[block] for block in whole(len(blocks), mix_int(seed + GOLDEN), epoch)]
    samples = []
    for number, first in enumerate(range(0, len(slots), window_blocks)):
        window = joined(slots[first : first + window_blocks])
        stream = wrapped(epoch * GOLDEN + number)
        samples += [window[k] for k in whole(len(window), seed, stream)]
    return samples


def endless(kind, n, seed, block_samples, window_blocks):
    epoch = 0
    while True:
        for index in epoch_of(kind, n, seed, epoch, block_samples, window_blocks):
            yield epoch, index
        epoch += 1


def shares(places, weights):
    """What each source has of the first `places`: lists are halved, the left half is rounded half up."""
    if len(weights) == 1 or not sum(weights):
        return [places] + [0] * (len(weights) - 1)
    middle = len(weights) // 2
    left = int(places * Fraction(sum(weights[:middle])) / sum(weights) + Fraction(1, 2))
    return shares(left, weights[:middle]) + shares(places - left, weights[middle:])


def mixed(sizes, schedule, batch, seed, kind, block_samples, window_blocks, num_steps):
    """All (epoch, index) of a mixture, one draw after the other."""
    streams = [
        endless(kind, size, mix_int(seed + number + 2), block_samples, window_blocks)
        for number, size in enumerate(sizes)
    ]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    ends = [start for start, _ in schedule[1:]] + [num_steps]
    draws = []
    for number, ((start, weights), end) in enumerate(zip(schedule, ends)):
        weights = [Fraction(str(weight)) for weight in weights]
        todo = (end - start) * batch
        block = 0
        while todo:
            before, after = (shares(k * MIX_BLOCK, weights) for k in (block, block + 1))
            cards = [s for s in range(len(sizes)) for _ in range(after[s] - before[s])]
            shuffled = [cards[k] for k in whole(MIX_BLOCK, mix_int(seed + 1), (block << 16) + number)]
            for source in shuffled[:todo]:
                epoch, index = next(streams[source])
                draws.append((epoch, index + offsets[source]))
            todo -= min(todo, MIX_BLOCK)
            block += 1
    return draws


def bucketed_mixture(draws, schedule, lengths, batch, seed, num_buckets, num_steps):
    """The same draws, window by window sorted by length, each window's batches shuffled."""
    starts = {start for start, _ in schedule} | set(range(0, num_steps + num_buckets, num_buckets))
    ordered = []
    for begin, end in pairwise(sorted(starts)):
        window = draws[begin * batch : end * batch]
        by_length = sorted(range(len(window)), key=lambda k: (lengths[window[k][1]], k))
        parts = [sorted(by_length[k : k + batch]) for k in range(0, len(window), batch)]
        places = whole(end - begin, mix_int(seed), begin)
        batches = sorted(zip(places, parts))
        ordered += [window[k] for _, part in batches for k in part]
    return ordered


def bucketed(lengths, batch, seed, num_buckets, num_steps):
    """All (epoch, index) of batches by length, epoch by epoch, in lists."""
    n = len(lengths)
    by_length = sorted(range(n), key=lambda k: (lengths[k], k))
    cuts = [number * n // num_buckets for number in range(num_buckets + 1)]
    buckets = [by_length[a:b] for a, b in pairwise(cuts) if b > a]
    seeds = [mix_int(seed + number + 1) for number in range(4)]
    draws = []
    epoch = 0
    while len(draws) < num_steps * batch:
        batches, pools = [], []
        for number, bucket in enumerate(buckets):
            samples = [bucket[k] for k in whole(len(bucket), seeds[1], (epoch << 16) + number)]
            full = len(samples) // batch
            batches.append([samples[k * batch : (k + 1) * batch] for k in range(full)])
            pools.append(samples[full * batch :])
        head = min(-len(draws) % batch, n)
        rest = (n - head) % batch
        if head + rest > sum(map(len, pools)):
            owners = [number for number, mine in enumerate(batches) for _ in mine]
            owner = owners[hashed(epoch, seeds[2]) % len(owners)]
            pools[owner] = batches[owner].pop() + pools[owner]
        pool = joined(pools)
        if pool:
            turn = hashed(epoch, seeds[3]) % len(pool)
            pool = pool[turn:] + pool[:turn]
        edge = len(pool) - head - rest
        everything = joined(batches) + [pool[k : k + batch] for k in range(0, edge, batch)]
        draws += [(epoch, index) for index in pool[edge : edge + head]]
        for number in whole(len(everything), seeds[0], epoch):
            draws += [(epoch, index) for index in everything[number]]
        draws += [(epoch, index) for index in pool[edge + head :]]
        epoch += 1
    return draws


def hashed(epoch, seed):
    return int(mix64(np.array([epoch], np.uint64) + np.uint64(seed))[0])


def random_case(rng):
    """A way to make an order anew, and all its draws by the reference."""
    batch, seed, num_steps = rng.randint(1, 30), rng.randint(0, 1 << 40), rng.randint(1, 60)
    kind = rng.choice(["shuffle", "blocks", "sequential", "mixture", "bucketed", "bucketed mixture"])
    blocks = {"block_samples": rng.randint(1, 30), "window_blocks": rng.randint(1, 6)}
    if kind == "bucketed":
        lengths = [rng.randint(0, 50) for _ in range(rng.randint(1, 400))]
        num_buckets = rng.randint(1, 12)
        draws = bucketed(lengths, batch, seed, num_buckets, num_steps)
        return lambda: BucketOrder(np.array(lengths), batch, seed=seed, num_buckets=num_buckets), draws, num_steps
    if "mixture" in kind:
        sizes = [rng.randint(1, 400) for _ in range(rng.randint(1, 5))]
        starts = [0, *sorted(rng.sample(range(1, num_steps), min(num_steps - 1, rng.randint(0, 3))))]
        schedule = [(start, [rng.randint(0, 99) / 100 for _ in sizes[1:]] + [0.01]) for start in starts]
        inner = rng.choice(["shuffle", "blocks", "sequential"])
        num_buckets = rng.randint(1, 12)
        draws = mixed(sizes, schedule, batch, seed, inner, *blocks.values(), num_steps + num_buckets)

        def make():
            return MixtureOrder(sizes, schedule, batch, seed=seed, order=inner, **blocks)

        if kind == "mixture":
            return make, draws, num_steps
        lengths = [rng.choice([rng.randint(0, 50), rng.randint(0, 1 << 40)]) for _ in range(sum(sizes))]
        parts = np.split(np.array(lengths), np.cumsum(sizes)[:-1])
        draws = bucketed_mixture(draws, schedule, lengths, batch, seed, num_buckets, num_steps)
        return lambda: MixtureBucketOrder(make(), parts, seed=seed, num_buckets=num_buckets), draws, num_steps
    n = rng.choice([rng.randint(1, 10), rng.randint(20, 500), 1 << rng.randint(5, 9), (1 << rng.randint(5, 9)) + 1])
    stream = endless(kind, n, seed, *blocks.values())
    draws = [next(stream) for _ in range(batch * num_steps)]
    return lambda: Order(n, batch, order=kind, seed=seed, **blocks), draws, num_steps


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_no_batch_differs_after_any_restart_on_any_number_of_ranks(part):
    differing = compared = 0
    for number in range(part, NUM_SCHEDULES, 10):
        rng = random.Random(number)
        make, draws, num_steps = random_case(rng)
        step = 0
        while step < num_steps:  # each turn is a run that was started anew, on another number of ranks
            stop = rng.randint(step + 1, num_steps)
            world_size = rng.randint(1, 7)
            ranks = [make() for _ in range(world_size)]
            for k in rng.sample(range(step, stop), stop - step) if rng.random() < 0.3 else range(step, stop):
                size = ranks[0].global_batch
                cuts = [rank * size // world_size for rank in range(world_size + 1)]  # uneven where it does not divide
                parts = [np.stack(order.step_ids(k))[:, a:b] for order, a, b in zip(ranks, cuts, cuts[1:])]
                batch = [tuple(pair) for pair in np.concatenate(parts, axis=1).T.tolist()]
                differing += batch != draws[k * size : (k + 1) * size]
                compared += 1
            step = stop
    assert differing == 0
    assert compared > 100
