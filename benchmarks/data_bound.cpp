// The best compiled gather of records: nothing but the copies, starts and lengths known beforehand. A bound to compare
// with, and no reader: it checks nothing. One call gathers many batches, so that no caller's language is in the figure.

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

typedef uint8_t Vector __attribute__((vector_size(32), aligned(1), may_alias));

constexpr int64_t kAhead = 8;        // records
constexpr int64_t kPrefetchLines = 4;  // of each, 64 bytes a line
constexpr uintptr_t kPage = 4096;

enum Copy { kMemcpy = 0, kMemcpyPrefetch = 1, kVectorPrefetch = 2 };

inline void prefetch(const uint8_t *start, int64_t length) {
    for (int64_t line = 0; line < kPrefetchLines && line * 64 < length; ++line) __builtin_prefetch(start + line * 64);
}

// An explicit loop: memcpy takes `rep movsb` for long copies, several times slower at some page phases.
inline void copy_vectors(uint8_t *to, const uint8_t *from, int64_t length) {
    if (length < 32) {
        std::memcpy(to, from, length);
        return;
    }
    int64_t at = 0;
    for (; at + 128 <= length; at += 128) {
        const Vector a = *reinterpret_cast<const Vector *>(from + at), b = *reinterpret_cast<const Vector *>(from + at + 32);
        const Vector c = *reinterpret_cast<const Vector *>(from + at + 64), d = *reinterpret_cast<const Vector *>(from + at + 96);
        *reinterpret_cast<Vector *>(to + at) = a;
        *reinterpret_cast<Vector *>(to + at + 32) = b;
        *reinterpret_cast<Vector *>(to + at + 64) = c;
        *reinterpret_cast<Vector *>(to + at + 96) = d;
    }
    for (; at + 32 <= length; at += 32)
        *reinterpret_cast<Vector *>(to + at) = *reinterpret_cast<const Vector *>(from + at);
    const int64_t last = length - 32;  // overlaps what is there already
    *reinterpret_cast<Vector *>(to + last) = *reinterpret_cast<const Vector *>(from + last);
}

template <Copy kCopy>
void gather(const uint8_t *values, const int64_t *starts, const int64_t *lengths, int64_t count, uint8_t *to) {
    for (int64_t i = 0; i < count; ++i) {
        if (kCopy != kMemcpy && i + kAhead < count) prefetch(values + starts[i + kAhead], lengths[i + kAhead]);
        if (kCopy == kVectorPrefetch)
            copy_vectors(to, values + starts[i], lengths[i]);
        else
            std::memcpy(to, values + starts[i], lengths[i]);
        to += lengths[i];
    }
}

using Gather = void (*)(const uint8_t *, const int64_t *, const int64_t *, int64_t, uint8_t *);
constexpr Gather kGathers[] = {gather<kMemcpy>, gather<kMemcpyPrefetch>, gather<kVectorPrefetch>};

}  // namespace

// Gather `batches` batches of `batch` records one after another, each to `to`; to == nullptr: to a fresh block of
// `capacity` bytes for every batch, `offset` bytes past a page. Returns 0, or 1 where memory is short.
extern "C" int gather_batches(int copy, const uint8_t *values, const int64_t *starts, const int64_t *lengths,
                              int64_t batches, int64_t batch, uint8_t *to, int64_t capacity, int64_t offset) {
    const Gather run = kGathers[copy];
    for (int64_t b = 0; b < batches; ++b) {
        if (to != nullptr) {
            run(values, starts + b * batch, lengths + b * batch, batch, to);
            continue;
        }
        const uintptr_t block = reinterpret_cast<uintptr_t>(std::malloc(capacity + offset + kPage));
        if (block == 0) return 1;
        const uintptr_t page = (block + kPage - 1) / kPage * kPage;
        uint8_t *fresh = reinterpret_cast<uint8_t *>(page + offset);
        run(values, starts + b * batch, lengths + b * batch, batch, fresh);
        asm volatile("" : : "r"(fresh) : "memory");  // the copies are wanted although nobody reads them
        std::free(reinterpret_cast<void *>(block));
    }
    return 0;
}

// The same for records whose places are not known beforehand: their two offsets are read first, all of a batch, then the
// values are copied as by kVectorPrefetch. To a reused destination.
extern "C" void gather_by_offsets(const uint8_t *values, const int64_t *offsets, const int64_t *ids, int64_t batches,
                                  int64_t batch, int64_t *starts, int64_t *lengths, uint8_t *to) {
    constexpr int64_t kOffsetsAhead = 24;
    for (int64_t b = 0; b < batches; ++b, ids += batch) {
        for (int64_t i = 0; i < kOffsetsAhead && i < batch; ++i) __builtin_prefetch(offsets + ids[i]);
        for (int64_t i = 0; i < batch; ++i) {
            if (i + kOffsetsAhead < batch) __builtin_prefetch(offsets + ids[i + kOffsetsAhead]);
            starts[i] = offsets[ids[i]];
            lengths[i] = offsets[ids[i] + 1] - starts[i];
        }
        gather<kVectorPrefetch>(values, starts, lengths, batch, to);
    }
}
