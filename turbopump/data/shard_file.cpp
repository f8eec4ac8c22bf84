// A shard to the disk: one pass over its bytes that takes the checksums of blocks, the digest of the file, and writes.
// The Python reference is shard_file.py.
//
// One call without the GIL for a whole shard: a thread that comes back to Python between small steps waits each time for
// the thread that reads the input, up to the 5 ms it may hold the lock (measured; docs/log.md). Each step is hashed while
// it is in the cache, and its write-back is begun soon, so that the disk works beside the hashing. Writes end at multiples
// of 8 MiB of the file: it then lies in the page cache in large pieces, which a map of it reads up to 20 % faster.

#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <arrow/vendored/xxhash/xxhash.h> // comes with pyarrow

namespace {

constexpr int64_t kStep = 1 << 18;  // hashed at once
constexpr int64_t kWrite = 1 << 23; // written at once
constexpr int kSpans = 64;          // of memory in one write

// Appends to a file; `error` is that of the first write that failed.
struct File {
    int handle;
    int error = 0;
    int64_t size = 0, written = 0, begun = 0; // bytes taken, in the page cache, on their way to the disk
    iovec spans[kSpans];
    int used = 0;

    explicit File(int handle) : handle(handle) {}

    void append(const uint8_t* from, int64_t bytes) {
        while (bytes > 0 && !error) {
            const int64_t room = kWrite - size % kWrite, take = bytes < room ? bytes : room;
            iovec* last = used ? &spans[used - 1] : nullptr;
            if (last && (const uint8_t*)last->iov_base + last->iov_len == from) last->iov_len += (size_t)take;
            else spans[used++] = {(void*)from, (size_t)take};
            from += take, bytes -= take, size += take;
            if (take == room || used == kSpans) flush();
        }
    }

    void flush() {
        for (iovec* next = spans; written < size && !error;) {
            ssize_t done = writev(handle, next, (int)(spans + used - next));
            if (done < 0) {
                if (errno != EINTR) error = errno;
                continue;
            }
            for (written += done; done > 0;) {
                const ssize_t part = done < (ssize_t)next->iov_len ? done : (ssize_t)next->iov_len;
                next->iov_base = (uint8_t*)next->iov_base + part, next->iov_len -= (size_t)part, done -= part;
                if (next->iov_len == 0) ++next;
            }
        }
        used = 0;
#ifdef SYNC_FILE_RANGE_WRITE
        if (!error) sync_file_range(handle, begun, written - begun, SYNC_FILE_RANGE_WRITE); // a hint
        begun = written;
#endif
    }
};

} // namespace

extern "C" {

// Append `parts` pieces of memory to a new file. `block_bytes` [parts]: the checksum of each such block of a piece goes
// to the next place of `sums`; 0: none. `digest`: XXH3-64 of all. Returns 0, or the error's number.
int64_t tp_write(int64_t file, int64_t parts, const uint8_t* const* base, const int64_t* bytes,
                 const int64_t* block_bytes, uint64_t* sums, uint64_t* digest) {
    XXH3_state_t whole;
    XXH3_64bits_reset(&whole);
    File to((int)file);
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t block = block_bytes[part];
        const int64_t step = block > 0 ? (kStep + block - 1) / block * block : kStep;
        for (int64_t at = 0; at < bytes[part] && !to.error; at += step) {
            const uint8_t* from = base[part] + at;
            const int64_t size = bytes[part] - at < step ? bytes[part] - at : step;
            for (int64_t i = 0; block > 0 && i < size; i += block)
                *sums++ = XXH3_64bits(from + i, (size_t)(size - i < block ? size - i : block));
            XXH3_64bits_update(&whole, from, (size_t)size);
            to.append(from, size);
        }
    }
    if (!to.error) to.flush();
    *digest = XXH3_64bits_digest(&whole);
    return to.error;
}
}
