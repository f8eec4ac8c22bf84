// Batches of records out of mapped shards: find, check on first read, copy. The Python reference is gather.py.
//
// Every entry point works on a whole batch without the GIL. What makes the rate (measured, 2 cores AMD Zen; docs/log.md):
// all of a group of records are found before one is copied, and prefetched ahead of it; memcpy only where source and
// destination lie alike in their lines, since it is up to five times slower elsewhere; a block of values is hashed once,
// when it is first read, and remembered in one bit. A file cut short under its map (SIGBUS) is an error code.

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <sys/mman.h>

#define XXH_INLINE_ALL
#include <arrow/vendored/xxhash/xxhash.h> // comes with pyarrow

// What of Python's stable interface is needed to be called with arrays as they are: asking an array for its address from
// Python costs more than gathering 100 records of 100 bytes.
extern "C" {
struct PyObject;
struct Buffer { // Py_buffer
    void* data;
    PyObject* owner;
    intptr_t bytes, item_bytes;
    int readonly, num_dims;
    char* format;
    intptr_t *shape, *strides, *suboffsets;
    void* internal;
};
int PyObject_GetBuffer(PyObject*, Buffer*, int);
void PyBuffer_Release(Buffer*);
void* PyEval_SaveThread(void);
void PyEval_RestoreThread(void*);
void PyErr_Clear(void);
struct MethodDef { // PyMethodDef
    const char* name;
    PyObject* (*function)(PyObject* self, PyObject* const* arguments, intptr_t count);
    int flags;
    const char* doc;
};
PyObject* PyCFunction_NewEx(MethodDef*, PyObject* self, PyObject* module);
PyObject* PyLong_FromVoidPtr(void*);
PyObject* PyLong_FromLongLong(long long);
void* PyLong_AsVoidPtr(PyObject*);
long long PyLong_AsLongLong(PyObject*);
void Py_DecRef(PyObject*);
}

namespace {

constexpr int64_t kAhead = 8;

enum Status : int64_t { kOk, kUnmapped, kOutOfRange, kMismatch, kCutShort, kTooSmall, kBadOffsets };

// One buffer (the values or the offsets of a field) of all shards of a split. Laid out as gather.py's `_Store`.
struct Store {
    int64_t shards;
    int64_t block_bytes;
    const int64_t* bounds;       // rows before each shard, [shards + 1]
    const uint8_t* const* base;  // the buffer in memory, null where it is not mapped yet
    const int64_t* bytes;        // of the buffer
    const uint64_t* const* sums; // a checksum for each block
    uint64_t* const* known;      // a bit for each block that was found good
    int64_t* unknown;            // blocks not yet found good
    int64_t* unsure;             // [1]: shards with such blocks; at 0 nothing is left to map or to check
    const uint8_t* hints;        // 1: ask the kernel for what is not known yet before copying (cold pages)
};

struct Result {
    int64_t status, place, shard, block;
};

struct Quick { // a store, the bytes of its rows or numbers, and the values that it holds the offsets of, if it does
    const Store* store;
    int64_t row_bytes;
    const Store* values;
};

// ---- copies ----------------------------------------------------------------------------------------------------------

typedef uint8_t Half __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint8_t Quarter __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int64_t kLong = 4096; // from here on memcpy is 1.08 times as fast where lines are alike, else 0.8 or much less

__attribute__((always_inline)) inline void copy(uint8_t* to, const uint8_t* from, int64_t n) {
    if (n >= 64 && n <= 128) { // no loop: its ends overlap
        const Half a = *(const Half*)from, b = *(const Half*)(from + 32);
        const Half c = *(const Half*)(from + n - 64), d = *(const Half*)(from + n - 32);
        *(Half*)to = a, *(Half*)(to + 32) = b, *(Half*)(to + n - 64) = c, *(Half*)(to + n - 32) = d;
        return;
    }
    if (n >= kLong) {
        if (((uintptr_t)to - (uintptr_t)from) % 64 == 0) {
            std::memcpy(to, from, (size_t)n);
            return;
        }
    }
    if (n >= 32) {
        int64_t i = 0;
        for (; i + 128 <= n; i += 128) {
            const Half a = *(const Half*)(from + i), b = *(const Half*)(from + i + 32);
            const Half c = *(const Half*)(from + i + 64), d = *(const Half*)(from + i + 96);
            *(Half*)(to + i) = a, *(Half*)(to + i + 32) = b, *(Half*)(to + i + 64) = c, *(Half*)(to + i + 96) = d;
        }
        for (; i + 32 <= n; i += 32) *(Half*)(to + i) = *(const Half*)(from + i);
        *(Half*)(to + n - 32) = *(const Half*)(from + n - 32); // overlaps what is there already
    } else if (n >= 16) {
        *(Quarter*)to = *(const Quarter*)from;
        *(Quarter*)(to + n - 16) = *(const Quarter*)(from + n - 16);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    }
}

template <typename From, typename To> void widen(uint8_t* to, const uint8_t* from, int64_t items) {
    auto* out = (To*)to;
    for (int64_t i = 0; i < items; ++i) {
        From value;
        std::memcpy(&value, from + i * sizeof(From), sizeof(From));
        out[i] = (To)value;
    }
}

enum Wide : int64_t { kAsStored, kFromUnsigned, kFromSigned };

// Copies `items` numbers, and makes int64 of them where `wide` says of what. Returns bytes written.
int64_t copy_items(uint8_t* to, const uint8_t* from, int64_t items, int64_t item_bytes, int64_t wide) {
    if (wide == kAsStored || item_bytes == 8) {
        copy(to, from, items * item_bytes);
        return items * item_bytes;
    }
    if (wide == kFromUnsigned) {
        if (item_bytes == 1) widen<uint8_t, int64_t>(to, from, items);
        if (item_bytes == 2) widen<uint16_t, int64_t>(to, from, items);
        if (item_bytes == 4) widen<uint32_t, int64_t>(to, from, items);
    } else {
        if (item_bytes == 1) widen<int8_t, int64_t>(to, from, items);
        if (item_bytes == 2) widen<int16_t, int64_t>(to, from, items);
        if (item_bytes == 4) widen<int32_t, int64_t>(to, from, items);
    }
    return items * 8;
}

inline uint64_t xxh3(const uint8_t* in, int64_t n) { return XXH3_64bits(in, (size_t)n); }

// ---- a file that was cut short under its map ---------------------------------------------------------------------------

thread_local sigjmp_buf* landing = nullptr;
struct sigaction before;

void on_bus_error(int number, siginfo_t* info, void* context) {
    if (landing != nullptr) siglongjmp(*landing, 1);
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else {
        signal(number, SIG_DFL);
        raise(number);
    }
}

// Out of line: beside a `sigsetjmp` the compiler keeps nothing in registers.
template <typename Work> __attribute__((noinline)) void apart(Work work) { work(); }

template <typename Work> void guarded(Result* result, Work work) {
    sigjmp_buf here;
    landing = &here;
    if (sigsetjmp(here, 0) == 0) {
        apart(work);
    } else {
        result->status = kCutShort; // place and shard were noted before the bytes were touched
    }
    landing = nullptr;
}

// ---- finding and checking ----------------------------------------------------------------------------------------------

// The shard of row `row` (0 <= row < bounds[shards]): shards are nearly alike, so a guess is right or next to it.
inline int64_t shard_of(const Store* s, int64_t row, double per_row) {
    int64_t shard = (int64_t)((double)row * per_row);
    if (shard >= s->shards) shard = s->shards - 1;
    while (__builtin_expect(row < s->bounds[shard], 0)) --shard;
    while (__builtin_expect(row >= s->bounds[shard + 1], 0)) ++shard;
    return shard;
}

// Of all shards but the last, which is shorter: a guess that is wrong for every tenth row costs 5 % at 100 bytes.
inline double shards_per_row(const Store* s) {
    const int64_t full = s->shards - 1;
    return full > 0 && s->bounds[full] ? (double)full / (double)s->bounds[full] : 0;
}

inline bool is_known(const Store* s, int64_t shard, int64_t block) {
    return (__atomic_load_n(&s->known[shard][block >> 6], __ATOMIC_RELAXED) >> (block & 63)) & 1;
}

inline void set_known(const Store* s, int64_t shard, int64_t block) {
    const uint64_t bit = 1ull << (block & 63);
    if (!(__atomic_fetch_or(&s->known[shard][block >> 6], bit, __ATOMIC_RELAXED) & bit))
        if (__atomic_fetch_sub(&s->unknown[shard], 1, __ATOMIC_RELAXED) == 1) __atomic_fetch_sub(s->unsure, 1, __ATOMIC_RELAXED);
}

inline bool fail(Result* r, int64_t status, int64_t place, int64_t shard, int64_t block) {
    *r = {status, place, shard, block};
    return false;
}

// Checks the blocks that hold bytes [begin, end) of the buffer unless they are known to be good.
bool check(const Store* s, int64_t shard, int64_t begin, int64_t end, Result* r) {
    if (__atomic_load_n(&s->unknown[shard], __ATOMIC_RELAXED) == 0 || begin == end) return true;
    const int64_t last = (end - 1) / s->block_bytes;
    for (int64_t block = begin / s->block_bytes; block <= last; ++block) {
        if (is_known(s, shard, block)) continue;
        const int64_t at = block * s->block_bytes;
        const int64_t size = s->bytes[shard] - at < s->block_bytes ? s->bytes[shard] - at : s->block_bytes;
        if (xxh3(s->base[shard] + at, size) != s->sums[shard][block]) return fail(r, kMismatch, r->place, shard, block);
        set_known(s, shard, block);
    }
    return true;
}

inline bool all_known(const Store* s) { return __atomic_load_n(s->unsure, __ATOMIC_RELAXED) == 0; }

// Bytes of a buffer, all in one shard.
struct Span {
    const uint8_t* from;
    int64_t bytes, shard;
};

bool check(const Store* s, const Span& span, Result* r) {
    const int64_t begin = span.from - s->base[span.shard];
    return check(s, span.shard, begin, begin + span.bytes, r);
}

void hint(const Store* s, const Span& span) {
    const int64_t shard = span.shard, begin = span.from - s->base[shard], end = begin + span.bytes;
    if (__atomic_load_n(&s->unknown[shard], __ATOMIC_RELAXED) == 0 || begin == end) return;
    const int64_t first = begin / s->block_bytes, last = (end - 1) / s->block_bytes;
    if (is_known(s, shard, first) && is_known(s, shard, last)) return; // nearly always: all between, too
    const int64_t stop = (last + 1) * s->block_bytes < s->bytes[shard] ? (last + 1) * s->block_bytes : s->bytes[shard];
    const auto from = (uintptr_t)(s->base[shard] + first * s->block_bytes) & ~(uintptr_t)4095;
    madvise((void*)from, (uintptr_t)(s->base[shard] + stop) - from, MADV_WILLNEED);
}

inline void prefetch(const uint8_t* p, int64_t n) {
    __builtin_prefetch(p);
    __builtin_prefetch(p + (n > 64 ? 64 : 0)); // no branch: lengths may be at random
}

// Where pages may be cold: ask for all of them before the first is touched.
template <typename Find> bool ask_for(const Store* s, int64_t n, Find find) {
    bool any = false;
    for (int64_t shard = 0; shard < s->shards && !any; ++shard) any = s->hints[shard] && s->unknown[shard];
    for (int64_t i = 0; any && i < n; ++i) {
        Span span;
        if (!find(i, span)) return false;
        if (s->hints[span.shard]) hint(s, span);
    }
    return true;
}

// Records are copied in groups: all of a group are found before the first of it is touched.
constexpr int64_t kGroup = 256;

// Where rows of `row_bytes` lie.
struct Finder {
    const Store* s;
    int64_t row_bytes, rows;
    double per_row;

    Finder(const Store* s, int64_t row_bytes)
        : s(s), row_bytes(row_bytes), rows(s->bounds[s->shards]), per_row(shards_per_row(s)) {}

    // Up to `count` rows from `row` on, as many as are in its shard; false with a Result where they are not there.
    bool operator()(int64_t place, int64_t row, int64_t count, Span& span, Result* r) const {
        if (row < 0 || row >= rows || count > rows - row) return fail(r, kOutOfRange, place, 0, 0);
        const int64_t shard = shard_of(s, row, per_row), left = s->bounds[shard + 1] - row;
        if (__builtin_expect(s->base[shard] == nullptr, 0)) return fail(r, kUnmapped, place, shard, 0);
        span = {s->base[shard] + (row - s->bounds[shard]) * row_bytes, (left < count ? left : count) * row_bytes, shard};
        return true;
    }
};

// Copies the spans of a group by `put(place, span)`, each prefetched some spans ahead, and checked if need be.
template <typename Put>
bool copy_group(const Store* s, int64_t first, int64_t n, const Span* spans, bool known, Result* r, Put put) {
    const int64_t ahead = n && spans[0].bytes <= 512 ? 24 : kAhead;
    for (int64_t i = 0; i < ahead && i < n; ++i) prefetch(spans[i].from, spans[i].bytes);
    for (int64_t i = 0; i < n; ++i) {
        if (i + ahead < n) prefetch(spans[i + ahead].from, spans[i + ahead].bytes);
        r->place = first + i; // where a bus error would be
        r->shard = spans[i].shard;
        if (!known && !check(s, spans[i], r)) return false;
        if (!put(first + i, spans[i])) return false;
    }
    return true;
}

// Copies n spans, found by `find(i, span)`.
template <typename Find, typename Put> void copy_spans(const Store* s, int64_t n, int64_t ask, Result* r, Find find, Put put) {
    const bool known = all_known(s);
    if (ask && !known && !ask_for(s, n, find)) return;
    Span spans[kGroup];
    for (int64_t first = 0; first < n; first += kGroup) {
        const int64_t count = n - first < kGroup ? n - first : kGroup;
        for (int64_t i = 0; i < count; ++i)
            if (!find(first + i, spans[i])) return;
        if (!copy_group(s, first, count, spans, known, r, put)) return;
    }
}

void rows(const Store* s, int64_t n, const int64_t* index, int64_t row_bytes, int64_t ask, uint8_t* out, Result* r) {
    r->status = kOk;
    const Finder finder(s, row_bytes);
    guarded(r, [=] {
        auto find = [=](int64_t i, Span& span) { return finder(i, index[i], 1, span, r); };
        copy_spans(s, n, ask, r, find, [=](int64_t i, const Span& span) {
            copy(out + i * row_bytes, span.from, row_bytes);
            return true;
        });
    });
}

// Windows of `items` numbers from number `start[i]` of the stream on, over shards: [n, items], as int64 by `wide`.
void windows(const Store* s, int64_t n, const int64_t* start, int64_t items, int64_t item_bytes, int64_t wide,
             int64_t ask, uint8_t* out, Result* r) {
    r->status = kOk;
    const Finder finder(s, item_bytes);
    const int64_t out_bytes = items * (wide ? 8 : item_bytes);
    guarded(r, [=] {
        auto find = [=](int64_t i, Span& span) { return finder(i, start[i], items, span, r); };
        copy_spans(s, n, ask, r, find, [=](int64_t i, Span span) {
            uint8_t* to = out + i * out_bytes;
            to += copy_items(to, span.from, span.bytes / item_bytes, item_bytes, wide);
            for (int64_t left = items * item_bytes - span.bytes; left; left -= span.bytes) { // over the shards that follow
                const int64_t shard = r->shard = span.shard + 1;
                if (s->base[shard] == nullptr) return fail(r, kUnmapped, i, shard, 0);
                const int64_t size = (s->bounds[shard + 1] - s->bounds[shard]) * item_bytes;
                span = {s->base[shard], size < left ? size : left, shard};
                if (!check(s, span, r)) return false;
                to += copy_items(to, span.from, span.bytes / item_bytes, item_bytes, wide);
            }
            return true;
        });
    });
}

// Rows of different lengths: `out_offsets` int64 [n + 1] in elements of `item_bytes`, then the values to `out`, which
// has room for `capacity` elements; kTooSmall (with the number needed in `block`) where that is not enough.
void ragged(const Store* o, const Store* v, int64_t n, const int64_t* index, int64_t item_bytes, int64_t ask,
            int64_t* out_offsets, uint8_t* out, int64_t capacity, Result* r) {
    r->status = kOk;
    const Finder finder(o, 8);
    const bool ends_known = all_known(o), known = all_known(v);
    auto find_ends = [=](int64_t i, Span& ends) { // a row's two offsets
        if (!finder(i, index[i], 1, ends, r)) return false;
        ends.bytes = 16;
        return true;
    };
    auto find_values = [=](int64_t i, const Span& ends, Span& span) {
        const int64_t shard = r->shard = ends.shard;
        r->place = i;
        if (!ends_known && !check(o, ends, r)) return false;
        int64_t begin, end, end_byte; // in bytes; a division takes as long as the copy
        std::memcpy(&begin, ends.from, 8);
        std::memcpy(&end, ends.from + 8, 8);
        if (begin < 0 || end < begin || __builtin_mul_overflow(end, item_bytes, &end_byte) || end_byte > v->bytes[shard])
            return fail(r, kBadOffsets, i, shard, 0);
        if (v->base[shard] == nullptr) return fail(r, kUnmapped, i, shard, 0);
        out_offsets[i + 1] = out_offsets[i] + (end - begin);
        span = {v->base[shard] + begin * item_bytes, (end - begin) * item_bytes, shard};
        return true;
    };
    guarded(r, [=] {
        out_offsets[0] = 0;
        auto find = [=](int64_t i, Span& span) {
            Span ends;
            return find_ends(i, ends) && find_values(i, ends, span);
        };
        if (ask && !(ends_known && known) && !(ask_for(o, n, find_ends) && ask_for(v, n, find))) return;
        Span ends[kGroup], spans[kGroup];
        for (int64_t first = 0; first < n; first += kGroup) {
            const int64_t count = n - first < kGroup ? n - first : kGroup;
            for (int64_t i = 0; i < count; ++i) {
                if (!find_ends(first + i, ends[i])) return;
                __builtin_prefetch(ends[i].from);
            }
            for (int64_t i = 0; i < count; ++i)
                if (!find_values(first + i, ends[i], spans[i])) return;
            if (out_offsets[first + count] > capacity) continue; // go on counting
            auto put = [=](int64_t i, const Span& span) {
                copy(out + out_offsets[i] * item_bytes, span.from, span.bytes);
                return true;
            };
            if (!copy_group(v, first, count, spans, known, r, put)) return;
        }
        if (out_offsets[n] > capacity) fail(r, kTooSmall, 0, 0, out_offsets[n]);
    });
}

constexpr int kSimple = 0, kWritable = 1;

// An array as Python hands it over; `failed` (with Python's error set) where it is no contiguous buffer.
struct Array {
    Buffer buffer;
    bool failed;

    Array(PyObject* object, int flags) : failed(PyObject_GetBuffer(object, &buffer, flags) != 0) {}
    ~Array() {
        if (!failed) PyBuffer_Release(&buffer);
    }
    template <typename T> T* data() const { return (T*)buffer.data; }
    int64_t bytes() const { return buffer.bytes; }
};

template <typename Work> void without_gil(Work work) {
    void* thread = PyEval_SaveThread();
    work();
    PyEval_RestoreThread(thread);
}

// `work(indices, count, out)` without the GIL on an array of int64 and on memory of at least `out_bytes(count)`. Returns
// 0; 1 with Python's error set where one is no contiguous buffer; 2 where `out` is too small.
template <typename Room, typename Work> int64_t with_buffers(PyObject* index, PyObject* out, Room out_bytes, Work work) {
    const Array ids(index, kSimple);
    if (ids.failed) return 1;
    const Array to(out, kWritable);
    if (to.failed) return 1;
    const int64_t count = ids.bytes() / 8;
    if (out_bytes(count) > to.bytes()) return 2;
    without_gil([&] { work(ids.data<const int64_t>(), count, to.data<uint8_t>()); });
    return 0;
}

// ---- the quick way: the same as functions of Python's own kind, since a call by ctypes takes as long as 20 rows of 100
// bytes. They return 0, or anything else where the long way has something to tell.

int64_t quick_rows(const Quick* q, PyObject* const* given, Result* r) {
    auto room = [&](int64_t n) { return n * q->row_bytes; };
    return with_buffers(given[0], given[1], room, [&](const int64_t* ids, int64_t n, uint8_t* to) {
        rows(q->store, n, ids, q->row_bytes, 1, to, r);
    });
}

int64_t quick_windows(const Quick* q, PyObject* const* given, Result* r) {
    const int64_t items = PyLong_AsLongLong(given[0]), wide = PyLong_AsLongLong(given[1]);
    if (items < 0 || wide < 0) return 1; // -1 with an error: no number
    auto room = [&](int64_t n) { return n * items * (wide ? 8 : q->row_bytes); };
    return with_buffers(given[2], given[3], room, [&](const int64_t* ids, int64_t n, uint8_t* to) {
        windows(q->store, n, ids, items, q->row_bytes, wide, 1, to, r);
    });
}

int64_t quick_ragged(const Quick* q, PyObject* const* given, Result* r) {
    const Array ids(given[0], kSimple), offsets(given[1], kWritable), to(given[2], kWritable);
    if (ids.failed || offsets.failed || to.failed) return 1;
    if (offsets.bytes() < ids.bytes() + 8) return 2;
    without_gil([&] {
        ragged(q->store, q->values, ids.bytes() / 8, ids.data<const int64_t>(), q->row_bytes, 1, offsets.data<int64_t>(),
               to.data<uint8_t>(), to.bytes() / q->row_bytes, r);
    });
    return 0;
}

template <int64_t (*read)(const Quick*, PyObject* const*, Result*), int arguments>
PyObject* called(PyObject* self, PyObject* const* given, intptr_t count) {
    Result r = {kOk, 0, 0, 0};
    const int64_t failed = count == arguments ? read((const Quick*)PyLong_AsVoidPtr(self), given, &r) : 1;
    if (failed == 1) PyErr_Clear();
    return PyLong_FromLongLong(failed | r.status);
}

constexpr int kFastCall = 0x80; // METH_FASTCALL
MethodDef kQuick[] = {{"rows", called<quick_rows, 2>, kFastCall, nullptr},
                      {"windows", called<quick_windows, 4>, kFastCall, nullptr},
                      {"ragged", called<quick_ragged, 3>, kFastCall, nullptr}};

} // namespace

extern "C" {

void tp_start() {
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGBUS, &action, &before);
}

// Rows `index` of fixed size: [n, row_bytes] to `out`; `index` and `out` are arrays (see `with_buffers`).
int64_t tp_rows(const Store* s, int64_t row_bytes, int64_t ask, Result* r, PyObject* index, PyObject* out) {
    auto room = [&](int64_t n) { return n * row_bytes; };
    return with_buffers(index, out, room, [&](const int64_t* ids, int64_t n, uint8_t* to) { rows(s, n, ids, row_bytes, ask, to, r); });
}

// Windows from number `start[i]` of the stream on (see `windows`).
int64_t tp_windows(const Store* s, int64_t item_bytes, int64_t ask, Result* r, int64_t items, int64_t wide, PyObject* start,
                   PyObject* out) {
    auto room = [&](int64_t n) { return n * items * (wide ? 8 : item_bytes); };
    return with_buffers(start, out, room, [&](const int64_t* ids, int64_t n, uint8_t* to) {
        windows(s, n, ids, items, item_bytes, wide, ask, to, r);
    });
}

// Rows of different lengths (see `ragged`).
void tp_ragged(const Store* o, const Store* v, int64_t n, const int64_t* index, int64_t item_bytes, int64_t ask,
               int64_t* out_offsets, uint8_t* out, int64_t capacity, Result* r) {
    ragged(o, v, n, index, item_bytes, ask, out_offsets, out, capacity, r);
}

// A function of Python's own kind for the `kind` of `kQuick`, bound to `quick`, which must outlive it.
PyObject* tp_quick(int64_t kind, void* quick) {
    PyObject* self = PyLong_FromVoidPtr(quick);
    PyObject* made = self ? PyCFunction_NewEx(&kQuick[kind], self, nullptr) : nullptr;
    if (self) Py_DecRef(self);
    return made;
}

// Ranges that a reader has fetched: range i lies at `at[i]`, begins with block `first[i]` of shard `shard[i]`, and holds
// `bytes[i]` of it. All blocks are checked, then [skip[i], skip[i] + take[i]) of it is copied to `out` + `to[i]`.
void tp_fetched(const Store* s, int64_t n, const uint8_t* const* at, const int64_t* shard, const int64_t* first,
                const int64_t* bytes, const int64_t* skip, const int64_t* take, const int64_t* to, int64_t item_bytes,
                int64_t wide, uint8_t* out, Result* r) {
    r->status = kOk;
    for (int64_t i = 0; i < n; ++i) {
        if (i + 2 < n) prefetch(at[i + 2], bytes[i + 2]);
        for (int64_t begin = 0; begin < bytes[i]; begin += s->block_bytes) {
            const int64_t size = bytes[i] - begin < s->block_bytes ? bytes[i] - begin : s->block_bytes;
            const int64_t block = first[i] + begin / s->block_bytes;
            if (xxh3(at[i] + begin, size) != s->sums[shard[i]][block]) {
                fail(r, kMismatch, i, shard[i], block);
                return;
            }
        }
        copy_items(out + to[i], at[i] + skip[i], take[i] / item_bytes, item_bytes, wide);
    }
}

// Checks blocks [first, last) of one shard; the first bad one in `block`.
void tp_check(const Store* s, int64_t shard, int64_t first, int64_t last, Result* r) {
    *r = {kOk, 0, shard, 0};
    const int64_t end = last * s->block_bytes < s->bytes[shard] ? last * s->block_bytes : s->bytes[shard];
    guarded(r, [=] { check(s, shard, first * s->block_bytes, end, r); });
}

// The checksum of each block.
void tp_sums(const uint8_t* base, int64_t bytes, int64_t block_bytes, uint64_t* out) {
    for (int64_t at = 0, block = 0; at < bytes; at += block_bytes, ++block) {
        const int64_t size = bytes - at < block_bytes ? bytes - at : block_bytes;
        out[block] = xxh3(base + at, size);
    }
}
}
