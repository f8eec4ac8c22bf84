// The keyed permutation of permutation.py, which is its reference and says what it computes: six rounds of a Feistel
// network over Z_a x Z_b, walked on until the result lies below n. n, seed and stream are one for all (step 0) or one
// each (step 1); what follows of them is computed anew only where they change. Elements are turned LANES at a time, as
// the rounds of one wait for each other.

#include <cmath>
#include <cstdint>

namespace {

using Word = uint64_t;
constexpr int LANES = 8, ROUNDS = 6;
constexpr Word GOLDEN = 0x9E3779B97F4A7C15, MIN_SIDE = 5;

Word mix64(Word x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

struct Network {
    Word n, seed, stream, a, b, key;

    Network(Word n, Word seed, Word stream) : n(n), seed(seed), stream(stream) {
        const Word root = static_cast<Word>(std::sqrt(static_cast<double>(n))) + 1;
        a = root < MIN_SIDE ? MIN_SIDE : root;
        b = n / a + 1 < MIN_SIDE ? MIN_SIDE : n / a + 1;
        key = mix64(stream + mix64(seed));
    }
};

inline Word hash_below(Word x, Word key, Word side) {
    x = (x + key) * GOLDEN;
    x = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9;
    return ((x >> 32) * side) >> 32;
}

inline Word smaller(Word x, Word y) { return x < y ? x : y; }

template <bool BACKWARD>
inline void round_of(int number, Word &half, Word other, Word side, Word key) {
    const Word hashed = hash_below(other, key + (number + 1) * GOLDEN, side);
    if (BACKWARD) {
        half -= hashed;
        half = smaller(half, half + side);  // below zero is near 2^64: the smaller of the two is the remainder
    } else {
        half += hashed;
        half = smaller(half, half - side);
    }
}

// One pass through the network of each of COUNT elements.
template <bool BACKWARD, int COUNT>
inline void turn(Word *x, const Word *a, const Word *b, const Word *key) {
    Word high[COUNT], low[COUNT];
    for (int i = 0; i < COUNT; i++) {
        high[i] = x[i] / b[i];
        low[i] = x[i] - high[i] * b[i];
    }
    for (int k = 0; k < ROUNDS; k++) {
        const int number = BACKWARD ? ROUNDS - 1 - k : k;
        if (number % 2 == 0)
            for (int i = 0; i < COUNT; i++) round_of<BACKWARD>(number, high[i], low[i], a[i], key[i]);
        else
            for (int i = 0; i < COUNT; i++) round_of<BACKWARD>(number, low[i], high[i], b[i], key[i]);
    }
    for (int i = 0; i < COUNT; i++) x[i] = high[i] * b[i] + low[i];
}

template <bool BACKWARD>
void turn_all(Word *x, int64_t count, const Word *n, int64_t n_step, const Word *seed, int64_t seed_step,
              const Word *stream, int64_t stream_step) {
    if (count == 0) return;
    Network now(n[0], seed[0], stream[0]);
    Word lane[LANES], a[LANES], b[LANES], key[LANES], limit[LANES];
    for (int64_t first = 0; first < count; first += LANES) {
        const int used = static_cast<int>(smaller(LANES, count - first));
        for (int i = 0; i < LANES; i++) {
            const int64_t at = first + (i < used ? i : 0);  // lanes beyond the end repeat the first
            const Word its_n = n[at * n_step], its_seed = seed[at * seed_step], its_stream = stream[at * stream_step];
            if (its_n != now.n || its_seed != now.seed || its_stream != now.stream)
                now = Network(its_n, its_seed, its_stream);
            lane[i] = x[at], a[i] = now.a, b[i] = now.b, key[i] = now.key, limit[i] = now.n;
        }
        turn<BACKWARD, LANES>(lane, a, b, key);
        for (int i = 0; i < used; i++) {
            if (limit[i] == 1) lane[i] = 0;  // what walking would come to in 25 steps or so
            while (lane[i] >= limit[i]) turn<BACKWARD, 1>(&lane[i], &a[i], &b[i], &key[i]);
            x[first + i] = lane[i];
        }
    }
}

}  // namespace

extern "C" void turn_in_place(Word *x, int64_t count, const Word *n, int64_t n_step, const Word *seed,
                              int64_t seed_step, const Word *stream, int64_t stream_step, int backward) {
    (backward ? turn_all<true> : turn_all<false>)(x, count, n, n_step, seed, seed_step, stream, stream_step);
}
