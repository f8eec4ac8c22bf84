// Many byte ranges of files read at once, past the page cache. `direct_engines.py` calls this and holds the reference.
//
// A batch of ranges becomes requests: ranges of one file that touch or nearly touch are read together, each request is
// widened to the sectors that O_DIRECT asks for, and lies in the batch's memory at the page phase it has in the file.
// Batches wait in a queue that is emptied in the background, `depth` requests at a time across batches, so that the
// device never waits for the caller: by one thread through io_uring, or by a pool of threads with pread.
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kGap = 4096;           // ranges nearer than this are read together
constexpr int64_t kMaxMerged = 1 << 20;  // but not into more than this
constexpr int64_t kMaxRead = 1 << 30;    // of one system call; the rest follows
constexpr int64_t kHugePage = 2 << 20;
constexpr int kFileEnded = -1;           // in place of an errno
constexpr int kMaxRetries = 1000;        // of a request that the kernel has no room for (EAGAIN)
constexpr int64_t kSmall = 4096;         // up to here more threads than `kSmallThreads` only cost
constexpr int kSmallThreads = 16;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct File {
  int fd;
  int64_t sector;  // offsets and lengths must be multiples of it; 1 where the page cache is used
};

struct Batch;

struct Request {
  Batch* batch;
  int fd;
  int64_t sector, begin, needed_end, end;  // bytes of the file: whole sectors, and what of them was asked for
  int64_t done;                            // bytes read so far
  uint8_t* memory;
  size_t first, num_ranges;  // in `Batch::order`
  int retries;
};

struct Failure {
  int error;
  int64_t range, reached;  // number of the range as given; where in the file reading stopped
};

struct Batch {
  std::vector<int32_t> handles;
  std::vector<int64_t> offsets, lengths;
  std::vector<uint64_t> addresses;
  std::vector<int32_t> order;  // by file and offset
  std::vector<Request> requests;
  uint8_t* memory = nullptr;
  int64_t memory_bytes = 0;
  bool few_threads = false;
  size_t next = 0;       // first request that nobody has taken
  size_t remaining = 0;  // requests that have not ended
  Failure failure{};

  ~Batch() {
    if (memory) munmap(memory, memory_bytes);
  }

  int reserve(int64_t bytes) {
    if (bytes <= memory_bytes) return 0;
    if (memory) munmap(memory, memory_bytes);
    memory = nullptr;
    memory_bytes = 0;
    bytes = round_up(bytes + bytes / 8, kHugePage);
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return errno;
    madvise(mapped, bytes, MADV_HUGEPAGE);  // fewer segments a transfer: 1.1 x at 12 KB, 1.3 x at 110 KB
    madvise(mapped, bytes, MADV_DONTFORK);  // the device writes here: a forked child must not make it a copy
    memory = static_cast<uint8_t*>(mapped);
    memory_bytes = bytes;
    return 0;
  }

  void sort() {
    order.resize(offsets.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int32_t>(i);
    auto before = [&](int32_t a, int32_t b) {
      return handles[a] != handles[b] ? handles[a] < handles[b] : offsets[a] < offsets[b];
    };
    if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
  }

  // Makes the requests and gives them memory; returns 0 or an errno.
  int plan(const std::vector<File>& files) {
    sort();
    requests.clear();
    int32_t handle = -1;
    for (size_t at = 0; at < order.size(); at++) {
      const int32_t i = order[at];
      const File& file = files[handles[i]];
      const int64_t end = offsets[i] + lengths[i];
      if (handles[i] == handle && offsets[i] <= requests.back().needed_end + kGap &&
          std::max(end, requests.back().needed_end) - requests.back().begin <= kMaxMerged) {
        Request& last = requests.back();
        last.needed_end = std::max(last.needed_end, end);
        last.num_ranges++;
        continue;
      }
      handle = handles[i];
      const int64_t begin = offsets[i] / file.sector * file.sector;
      requests.push_back({this, file.fd, file.sector, begin, end, 0, 0, nullptr, at, 1, 0});
    }
    int64_t read_bytes = 0, total = 0;
    for (Request& request : requests) {
      request.end = request.begin + round_up(request.needed_end - request.begin, request.sector);
      read_bytes += request.end - request.begin;
      total = round_up(total, kPage) + request.begin % kPage + (request.end - request.begin);
    }
    if (int error = reserve(total)) return error;
    place();
    few_threads = read_bytes <= kSmall * static_cast<int64_t>(requests.size());
    next = 0;
    remaining = requests.size();
    failure = {0, -1, 0};
    return 0;
  }

  void place() {
    addresses.resize(order.size());
    int64_t position = 0;
    for (Request& request : requests) {
      position = round_up(position, kPage) + request.begin % kPage;
      request.memory = memory + position;
      position += request.end - request.begin;
      for (size_t at = request.first; at < request.first + request.num_ranges; at++)
        addresses[order[at]] = reinterpret_cast<uint64_t>(request.memory + (offsets[order[at]] - request.begin));
    }
  }

  void fail(const Request& request, int error) {
    if (failure.error) return;
    const int64_t reached = request.begin + request.done;
    for (size_t at = request.first; at < request.first + request.num_ranges; at++) {
      const int32_t i = order[at];
      if (offsets[i] + lengths[i] > reached) {
        failure = {error, i, reached};
        return;
      }
    }
    failure = {error, order[request.first], reached};
  }
};

// The kernel's `struct sched_attr`, which the C library of many systems does not declare.
struct SchedulingAttributes {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime_ns, deadline_ns, period_ns;
};

// Asks for short slices of a processor: this thread works for some 100 us at a time, and computing threads must not let
// it, and with it the disk, wait for the end of theirs (1.3 x the reads on two busy cores). Its share stays the same.
// Linux 6.12 and later hear it, earlier ones do not.
void ask_for_short_slices() {
  SchedulingAttributes attributes{};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0)) return;
  if (attributes.policy != 0) return;  // not the normal one: somebody has decided
  attributes.runtime_ns = 100'000;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

enum class Progress { kEnded, kAgain };

// The queue of batches, the threads that empty it, and the caller's side.
class Reader {
 public:
  explicit Reader(int depth) : depth_(depth) {}
  virtual ~Reader() = default;

  // Starts the threads; returns 0 or an errno.
  virtual int start() = 0;
  virtual void abandon() {}

  void stop() {
    cancel();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void set_file(int32_t handle, int fd, int64_t sector) {
    if (files_.size() <= static_cast<size_t>(handle)) files_.resize(handle + 1);
    files_[handle] = {fd, sector};
  }

  int submit(int64_t n, const int32_t* handles, const int64_t* offsets, const int64_t* lengths) {
    std::unique_ptr<Batch> batch;
    if (free_.empty()) {
      batch = std::make_unique<Batch>();
    } else {
      batch = std::move(free_.back());
      free_.pop_back();
    }
    batch->handles.assign(handles, handles + n);
    batch->offsets.assign(offsets, offsets + n);
    batch->lengths.assign(lengths, lengths + n);
    if (int error = batch->plan(files_)) return error;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (broken_) return broken_;
      if (!batch->requests.empty()) queue_.push_back(batch.get());
      pending_.push_back(std::move(batch));
    }
    work_.notify_all();
    return 0;
  }

  // 0: the oldest batch has been read and is the current one; 1: not yet; 2: it failed.
  int collect(int timeout_ms, uint64_t* addresses, int64_t* failure) {
    std::unique_lock<std::mutex> lock(mutex_);
    Batch& batch = *pending_.front();
    auto ended = [&] { return batch.remaining == 0; };
    if (!ended_.wait_for(lock, std::chrono::milliseconds(timeout_ms), ended)) return 1;
    if (current_) free_.push_back(std::move(current_));
    current_ = std::move(pending_.front());
    pending_.pop_front();
    if (batch.failure.error) {
      failure[0] = batch.failure.error;
      failure[1] = batch.failure.range;
      failure[2] = batch.failure.reached;
      return 2;
    }
    std::copy(batch.addresses.begin(), batch.addresses.end(), addresses);
    return 0;
  }

  // Drops what has not been collected; returns when no more is written to its memory.
  void cancel() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (auto& batch : pending_) {
      batch->remaining -= batch->requests.size() - batch->next;
      batch->next = batch->requests.size();
    }
    queue_.clear();
    for (auto& batch : pending_) {
      ended_.wait(lock, [&] { return batch->remaining == 0; });
      free_.push_back(std::move(batch));
    }
    pending_.clear();
  }

 protected:
  // The next request, or null; with `mutex_` held.
  Request* take() {
    if (queue_.empty()) return nullptr;
    Batch& batch = *queue_.front();
    Request* request = &batch.requests[batch.next++];
    if (batch.next == batch.requests.size()) queue_.pop_front();
    return request;
  }

  // Nothing can be read any more, now or later; what is in flight may still be written, so its memory is never reused.
  void break_down(int error) {
    std::lock_guard<std::mutex> lock(mutex_);
    broken_ = error;
    queue_.clear();
    for (auto& batch : pending_) {
      if (batch->remaining == 0) continue;
      batch->fail(batch->requests.front(), error);
      batch->next = batch->requests.size();
      batch->remaining = 0;
      batch->memory = nullptr;
      batch->memory_bytes = 0;
    }
    ended_.notify_all();
  }

  // What the result of a read (bytes, or a negative errno) means for its request.
  Progress advance(Request& request, int64_t result) {
    if (result == -EINTR || (result == -EAGAIN && request.retries++ < kMaxRetries)) return Progress::kAgain;
    int error = 0;
    if (result < 0) {
      error = static_cast<int>(-result);
    } else {
      request.done += result;
      if (request.begin + request.done < request.needed_end) {
        // a direct read that ends within a sector has met the end of the file, and could not go on from there
        if (result > 0 && request.done % request.sector == 0) return Progress::kAgain;
        error = kFileEnded;
      }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (error) request.batch->fail(request, error);
    if (--request.batch->remaining == 0) ended_.notify_all();
    return Progress::kEnded;
  }

  static int64_t missing(const Request& request) {
    return std::min(request.end - request.begin - request.done, kMaxRead);
  }

  // Threads that no signal of the process disturbs: Python's handlers belong to its own threads.
  template <typename Run>
  void spawn(Run run) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      threads_.emplace_back([run] {
        ask_for_short_slices();
        run();
      });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  const int depth_;
  std::mutex mutex_;  // guards the queue, `next` and `remaining` of batches, and `stopping_`
  std::condition_variable work_, ended_;
  std::deque<Batch*> queue_;  // those with requests that nobody has taken
  bool stopping_ = false;
  int broken_ = 0;
  std::vector<std::thread> threads_;

 private:
  std::vector<File> files_;
  std::deque<std::unique_ptr<Batch>> pending_;  // in the order of `submit`
  std::vector<std::unique_ptr<Batch>> free_;
  std::unique_ptr<Batch> current_;  // what the caller reads from
};

class Threads final : public Reader {
 public:
  using Reader::Reader;

  int start() override {
    for (int i = 0; i < depth_; i++) spawn([this] { run(); });
    return 0;
  }

 private:
  bool ready() const {
    if (stopping_) return true;
    if (queue_.empty()) return false;
    return active_ < kSmallThreads || !queue_.front()->few_threads;
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return ready(); });
      if (stopping_) return;
      Request* request = take();
      if (!queue_.empty() && queue_.front() != request->batch) work_.notify_all();  // the next batch may want more
      active_++;
      lock.unlock();
      int64_t result;
      do {
        result = pread(request->fd, request->memory + request->done, missing(*request), request->begin + request->done);
        if (result < 0) result = -errno;
      } while (advance(*request, result) == Progress::kAgain);
      lock.lock();
      active_--;
    }
  }

  int active_ = 0;
};

class Uring final : public Reader {
 public:
  using Reader::Reader;

  ~Uring() override {
    if (sqes_) munmap(sqes_, sqes_bytes_);
    if (ring_) munmap(ring_, ring_bytes_);
    if (fd_ >= 0) close(fd_);
  }

  int start() override {
    // the thread that reads makes the ring: the kernel spares locks where only its maker uses it
    int error = -1;
    spawn([this, &error] {
      const int result = set_up();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        error = result;
      }
      ended_.notify_all();
      if (!result) run();
    });
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, [&] { return error >= 0; });
    return error;
  }

  void abandon() override { close(fd_); }

 private:
  int set_up() {
    io_uring_params params{};
    // from Linux 6.1, 5.19, 5.1 on: completions are worked off when this thread asks, not by interrupting it
    for (unsigned flags : {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_COOP_TASKRUN, 0U}) {
      params = {};
      params.flags = flags;
      fd_ = static_cast<int>(syscall(SYS_io_uring_setup, depth_, &params));
      if (fd_ >= 0 || errno != EINVAL) break;
    }
    if (fd_ < 0) return errno;
    const unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS;  // the latter came with IORING_OP_READ
    if ((params.features & needed) != needed) return ENOSYS;
    ring_bytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                           params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    ring_ = static_cast<uint8_t*>(map(ring_bytes_, IORING_OFF_SQ_RING));
    sqes_ = static_cast<io_uring_sqe*>(map(sqes_bytes_, IORING_OFF_SQES));
    if (!ring_ || !sqes_) return ENOMEM;
    auto word = [this](unsigned offset) { return reinterpret_cast<unsigned*>(ring_ + offset); };
    sq_tail_ = word(params.sq_off.tail);
    sq_mask_ = *word(params.sq_off.ring_mask);
    cq_head_ = word(params.cq_off.head);
    cq_tail_ = word(params.cq_off.tail);
    cq_mask_ = *word(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(ring_ + params.cq_off.cqes);
    for (unsigned i = 0; i < params.sq_entries; i++) word(params.sq_off.array)[i] = i;
    return 0;
  }

  void* map(size_t bytes, uint64_t offset) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
    return mapped == MAP_FAILED ? nullptr : mapped;
  }

  void run() {
    for (;;) {
      const bool more = fill();
      if (in_flight_ == 0) return;  // stopping
      // a quarter at a time while there is more to issue: the device stays busy, and this thread wakes up seldom
      const unsigned wait = std::max(1U, (more ? static_cast<unsigned>(depth_) : in_flight_) / 4);
      const long entered = syscall(SYS_io_uring_enter, fd_, to_submit_, wait, IORING_ENTER_GETEVENTS, nullptr, 0);
      if (entered >= 0) {
        to_submit_ -= static_cast<unsigned>(entered);
      } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
        return break_down(errno);
      }
      reap();
    }
  }

  // Puts requests into the ring until `depth` are in flight; true where there are more. Waits where there is nothing
  // to do at all; with none in flight afterwards the reader is being stopped.
  bool fill() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (in_flight_ == 0) work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    while (in_flight_ < static_cast<unsigned>(depth_) && !queue_.empty()) prepare(take());
    return !queue_.empty();
  }

  void prepare(Request* request) {
    io_uring_sqe& sqe = sqes_[*sq_tail_ & sq_mask_];
    std::memset(&sqe, 0, sizeof sqe);
    sqe.opcode = IORING_OP_READ;
    sqe.fd = request->fd;
    sqe.off = request->begin + request->done;
    sqe.addr = reinterpret_cast<uint64_t>(request->memory + request->done);
    sqe.len = static_cast<unsigned>(missing(*request));
    sqe.user_data = reinterpret_cast<uint64_t>(request);
    __atomic_store_n(sq_tail_, *sq_tail_ + 1, __ATOMIC_RELEASE);
    to_submit_++;
    in_flight_++;
  }

  void reap() {
    unsigned head = *cq_head_;
    for (const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); head != tail; head++) {
      const io_uring_cqe cqe = cqes_[head & cq_mask_];
      Request* request = reinterpret_cast<Request*>(cqe.user_data);
      __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
      in_flight_--;
      if (advance(*request, cqe.res) == Progress::kAgain) prepare(request);
    }
  }

  int fd_ = -1;
  uint8_t* ring_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  io_uring_cqe* cqes_ = nullptr;
  size_t ring_bytes_ = 0, sqes_bytes_ = 0;
  unsigned *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0, to_submit_ = 0, in_flight_ = 0;
};

}  // namespace

extern "C" {

// Returns null where it cannot be started, with the errno in `error`.
void* direct_start(int with_io_uring, int depth, int* error) {
  std::unique_ptr<Reader> reader;
  if (with_io_uring) reader = std::make_unique<Uring>(depth);
  else reader = std::make_unique<Threads>(depth);
  try {
    *error = reader->start();
  } catch (const std::exception&) {
    *error = EAGAIN;  // no thread to be had
  }
  if (*error) {
    reader->stop();
    return nullptr;
  }
  return reader.release();
}

void direct_set_file(void* reader, int32_t handle, int fd, int64_t sector) {
  static_cast<Reader*>(reader)->set_file(handle, fd, sector);
}

int direct_submit(void* reader, int64_t n, const int32_t* handles, const int64_t* offsets, const int64_t* lengths) {
  try {
    return static_cast<Reader*>(reader)->submit(n, handles, offsets, lengths);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}

int direct_collect(void* reader, int timeout_ms, uint64_t* addresses, int64_t* failure) {
  return static_cast<Reader*>(reader)->collect(timeout_ms, addresses, failure);
}

void direct_cancel(void* reader) { static_cast<Reader*>(reader)->cancel(); }

void direct_stop(void* reader) {
  static_cast<Reader*>(reader)->stop();
  delete static_cast<Reader*>(reader);
}

// In a forked child the threads are gone and locks may be held for ever: only the ring's descriptor is given back.
void direct_abandon(void* reader) { static_cast<Reader*>(reader)->abandon(); }
}
