// A shard to the disk: one pass over its bytes that takes the checksums of blocks, the digest of the file, and writes.
// The Python reference is shard_file.py.
//
// One call without the GIL for a whole shard: a thread that comes back to Python between small steps waits each time for
// the thread that reads the input, up to the 5 ms it may hold the lock (measured; docs/log.md). Each step is hashed and
// written while it is in the cache, and its write-back is begun, so that the disk works beside the hashing.

#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <arrow/vendored/xxhash/xxhash.h> // comes with pyarrow

namespace {

constexpr int64_t kStep = 1 << 18;      // hashed and written while in the cache
constexpr int64_t kWriteBack = 1 << 22; // brought to the disk at once

int write_all(int file, const uint8_t* from, int64_t bytes) {
    while (bytes > 0) {
        const ssize_t done = write(file, from, (size_t)bytes);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        from += done, bytes -= done;
    }
    return 0;
}

} // namespace

extern "C" {

// Append `parts` pieces of memory to a new file. `block_bytes` [parts]: the checksum of each such block of a piece goes
// to the next place of `sums`; 0: none. `digest`: XXH3-64 of all. Returns 0, or the error's number.
int64_t tp_write(int64_t file, int64_t parts, const uint8_t* const* base, const int64_t* bytes,
                 const int64_t* block_bytes, uint64_t* sums, uint64_t* digest) {
    XXH3_state_t whole;
    XXH3_64bits_reset(&whole);
    int64_t written = 0, begun = 0;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t block = block_bytes[part];
        const int64_t step = block > 0 ? (kStep + block - 1) / block * block : kStep;
        for (int64_t at = 0; at < bytes[part]; at += step) {
            const uint8_t* from = base[part] + at;
            const int64_t size = bytes[part] - at < step ? bytes[part] - at : step;
            for (int64_t i = 0; block > 0 && i < size; i += block)
                *sums++ = XXH3_64bits(from + i, (size_t)(size - i < block ? size - i : block));
            XXH3_64bits_update(&whole, from, (size_t)size);
            if (const int error = write_all((int)file, from, size)) return error;
            written += size;
#ifdef SYNC_FILE_RANGE_WRITE
            if (written - begun >= kWriteBack) { // a hint: a file system without it goes on as before
                sync_file_range((int)file, begun, written - begun, SYNC_FILE_RANGE_WRITE);
                begun = written;
            }
#endif
        }
    }
#ifdef SYNC_FILE_RANGE_WRITE
    if (written > begun) sync_file_range((int)file, begun, written - begun, SYNC_FILE_RANGE_WRITE);
#endif
    *digest = XXH3_64bits_digest(&whole);
    return 0;
}
}
