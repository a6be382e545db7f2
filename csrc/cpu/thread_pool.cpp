#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace slime_fused::cpu {
namespace {

using Body = std::function<void(int64_t, int64_t)>;

// Python asks for torch.get_num_threads(); the bound only guards against a nonsense argument.
constexpr int kMaxThreads = 256;

struct Job {
  const Body* body = nullptr;
  int64_t total = 0;
  int parts = 0;
};

class ThreadPool {
 public:
  // False if another caller holds the pool, or the system gives no thread: the caller then does the work
  // itself.
  bool try_run(const Job& job) {
    const std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock()) return false;
    try {
      while (workers_ < job.parts - 1) {
        std::thread(&ThreadPool::work, this, workers_ + 1, generation_).detach();
        ++workers_;
      }
    } catch (const std::system_error&) {
      return false;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      pending_ = job.parts - 1;
      error_ = nullptr;
      ++generation_;
    }
    start_.notify_all();
    run_part(job, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return true;
  }

 private:
  void run_part(const Job& job, int part) {
    try {
      (*job.body)(job.total* part / job.parts, job.total * (part + 1) / job.parts);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  // A worker that joins late starts from the generation of its creation, so it never sees a finished job.
  void work(int part, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      const Job job = job_;
      if (part >= job.parts) continue;
      lock.unlock();
      run_part(job, part);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;  // held for a whole call
  int workers_ = 0;     // guarded by callers_
  std::mutex mutex_;    // guards everything below
  std::condition_variable start_, done_;
  uint64_t generation_ = 0;  // written under both mutexes
  Job job_;
  int pending_ = 0;
  std::exception_ptr error_;
};

// Never deleted: its threads may still wait in it while the process exits.
std::atomic<ThreadPool*> g_pool{nullptr};

// A forked child has none of the threads, and its copies of the mutexes may be locked for good.
void forget_pool_in_child() { g_pool.store(nullptr); }

ThreadPool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  static_cast<void>(registered);
  ThreadPool* existing = g_pool.load();
  if (existing != nullptr) return *existing;
  auto* created = new ThreadPool;
  if (g_pool.compare_exchange_strong(existing, created)) return *created;
  delete created;  // another thread was first; this one has no threads yet
  return *existing;
}

}  // namespace

void parallel_for(int64_t total, int64_t min_part, int num_threads, const Body& body) {
  if (total <= 0) return;
  const int64_t most_parts = (total + std::max<int64_t>(min_part, 1) - 1) / std::max<int64_t>(min_part, 1);
  const Job job{&body, total, static_cast<int>(std::min<int64_t>({most_parts, num_threads, kMaxThreads}))};
  if (job.parts > 1 && pool().try_run(job)) return;
  body(0, total);
}

}  // namespace slime_fused::cpu
