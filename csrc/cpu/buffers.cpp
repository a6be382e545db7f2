#include "buffers.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <new>
#include <vector>

#include "checks.h"

namespace slime_fused::cpu {
namespace {

struct Mapping {
  void* data = nullptr;
  int64_t bytes = 0;
};

void unmap(const Mapping& mapping) { munmap(mapping.data, static_cast<size_t>(mapping.bytes)); }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Large pages begin at multiples of their size: so do mappings, or both ends would be made of small ones.
constexpr int64_t kHugePage = 2 << 20;

Mapping map(int64_t bytes) {
  const int64_t room = bytes + kHugePage;
  void* const start =
      mmap(nullptr, static_cast<size_t>(room), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(start);
  const int64_t before =
      round_up(reinterpret_cast<int64_t>(begin), kHugePage) - reinterpret_cast<int64_t>(begin);
  if (before > 0) munmap(begin, static_cast<size_t>(before));
  if (before < kHugePage) munmap(begin + before + bytes, static_cast<size_t>(kHugePage - before));
#if defined(MADV_HUGEPAGE)
  // Advice: nothing is lost where it fails.
  madvise(begin + before, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return {begin + before, bytes};
}

// Of a step at 2048 rows x 32000 columns in bfloat16 or float32 everything fits.
std::atomic<int64_t> g_limit{int64_t{256} << 20};

// Idle mappings, oldest first. A mapping is either in here or owned by one Scratch, never both.
class Cache {
 public:
  // The smallest idle mapping that holds `bytes` and not much more, as a residual that waits for backward
  // keeps all of it. Where none does, all of them are given back first: what does not serve this call must
  // not add to its peak.
  Mapping take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const bool fits = it->bytes >= bytes && it->bytes - bytes <= bytes / 4;
      if (fits && (best == idle_.end() || it->bytes <= best->bytes)) best = it;
    }
    if (best == idle_.end()) {
      trim(0);
      return {};
    }
    const Mapping found = *best;
    idle_.erase(best);
    return found;
  }

  // The newest stays, as the next call is most like the last one.
  void leave(const Mapping& mapping) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(mapping);
    trim(g_limit.load());
  }

  void trim_to(int64_t most) {
    const std::lock_guard<std::mutex> lock(mutex_);
    trim(most);
  }

  int64_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return total();
  }

 private:
  int64_t total() const {
    int64_t sum = 0;
    for (const Mapping& mapping : idle_) sum += mapping.bytes;
    return sum;
  }

  // Gives the oldest back until the rest takes `most` bytes at most.
  void trim(int64_t most) {
    while (total() > most) {
      unmap(idle_.front());
      idle_.erase(idle_.begin());
    }
  }

  std::mutex mutex_;  // guards idle_
  std::vector<Mapping> idle_;
};

// Never deleted: a tensor may outlive the interpreter's last steps.
std::atomic<Cache*> g_cache{nullptr};

// A forked child's copy of the mutex may be locked for good. What was idle stays shared with the parent.
void replace_cache_in_child() { g_cache.store(nullptr); }

Cache& cache() {
  static const int registered = pthread_atfork(nullptr, nullptr, replace_cache_in_child);
  static_cast<void>(registered);
  Cache* existing = g_cache.load();
  if (existing != nullptr) return *existing;
  auto* created = new Cache;
  if (g_cache.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

Scratch::Scratch(int64_t bytes) : bytes_(bytes) {
  check_at_least(bytes, 1, "bytes");
  Mapping mapping = cache().take(bytes);
  if (mapping.data == nullptr) mapping = map(round_up(bytes, sysconf(_SC_PAGESIZE)));
  data_ = mapping.data;
  capacity_ = mapping.bytes;
}

Scratch::~Scratch() {
  const Mapping mapping{data_, capacity_};
  try {
    cache().leave(mapping);
  } catch (const std::bad_alloc&) {  // before anything was kept
    unmap(mapping);
  }
}

void set_cache_limit(int64_t bytes) {
  check_at_least(bytes, 0, "max_bytes");
  g_limit.store(bytes);
  cache().trim_to(bytes);
}

int64_t cache_limit() { return g_limit.load(); }

int64_t cached_bytes() { return cache().bytes(); }

void empty_cache() { cache().trim_to(0); }

}  // namespace slime_fused::cpu
