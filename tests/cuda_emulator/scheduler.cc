#include "scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "block_state.h"
#include "runtime_state.h"

namespace cuda_emulator {
namespace {

struct Schedule {
  Order order = Order::fixed;
  std::mt19937_64 generator;
};

Schedule schedule_from_environment() {
  Schedule schedule;
  const char* text = std::getenv("CUDA_EMULATOR_SCHEDULE");
  const std::string value = text ? text : "fixed";
  if (value == "fixed") return schedule;
  if (value == "reversed") {
    schedule.order = Order::reversed;
  } else if (value.rfind("random:", 0) == 0) {
    schedule.order = Order::random;
    schedule.generator.seed(std::strtoull(value.c_str() + 7, nullptr, 10));
  } else {
    throw std::invalid_argument("CUDA_EMULATOR_SCHEDULE: expected fixed, reversed or random:SEED, got " +
                                value);
  }
  return schedule;
}

Schedule& current_schedule() {
  static Schedule schedule = schedule_from_environment();
  return schedule;
}

std::string describe_waiting(const BlockState& block) {
  for (const Warp& warp : block.warps) {
    if (warp.collecting != 0) {
      const int lane = std::countr_zero(warp.collecting);
      const int index = static_cast<int>(&warp - block.warps.data());
      return describe(thread_at(index, lane)) + " waits in a warp collective at " +
             describe(warp.slots[lane].site);
    }
  }
  for (const Warp& warp : block.warps) {
    if (warp.at_barrier != 0) {
      const Thread& thread =
          thread_at(static_cast<int>(&warp - block.warps.data()), std::countr_zero(warp.at_barrier));
      return describe(thread) + " waits at __syncthreads at " + describe(thread.barrier_site);
    }
  }
  return "no thread waits";
}

// Marks a thread that returned from its kernel. True if others wait for it in vain.
bool leave_block(BlockState& block, const Thread& self) {
  Warp& warp = block.warps[self.warp];
  warp.exited |= 1u << self.lane;
  --block.live;
  if (block.arrived > 0) {
    record_failure("exited while " + describe_waiting(block));
    return true;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const LaneSlot& slot = warp.slots[lane];
    if ((warp.collecting >> lane & 1) && (slot.mask >> self.lane & 1)) {
      record_failure("exited while lane " + std::to_string(lane) + " waits for it in a warp collective at " +
                     describe(slot.site));
      return true;
    }
  }
  return false;
}

// Every fiber lives here for good: it runs the body once per block and hands over after each.
void fiber_entry() {
  BlockState& block = block_state();
  finish_first_switch(block.current->fiber.context, block.scheduler);
  for (;;) {
    Thread& self = *block.current;
    tsan_acquire(&block.begin_token);
    std::string exception;
    try {
      (*block.body)();
    } catch (const std::exception& error) {
      exception = std::string("exception in device code: ") + error.what();
    }
    // Outside the handler: a fiber abandoned inside one would leave the host thread's exception stack in use.
    if (!exception.empty()) {
      record_failure(exception);
      exception = std::string();
      abandon_block();
    }
    tsan_release(&block.end_token);

    if (leave_block(block, self)) abandon_block();
    switch_context(self.fiber.context, block.scheduler);
  }
}

void run_thread(BlockState& block, int warp, int lane) {
  block.warps[warp].ready &= ~(1u << lane);
  Thread& thread = thread_at(warp, lane);
  block.current = &thread;
  switch_context(block.scheduler, thread.fiber.context);
}

// One visit to every warp, and in it to every lane that is ready.
bool run_pass_in_order(BlockState& block, bool reversed) {
  bool progressed = false;
  const int warps = static_cast<int>(block.warps.size());
  for (int i = 0; i < warps && !block.failed; ++i) {
    const int warp = reversed ? warps - 1 - i : i;
    uint32_t lanes = block.warps[warp].ready;
    while (lanes != 0 && !block.failed) {
      const int lane = reversed ? kWarpSize - 1 - std::countl_zero(lanes) : std::countr_zero(lanes);
      lanes &= ~(1u << lane);
      progressed = true;
      run_thread(block, warp, lane);
    }
  }
  return progressed;
}

int random_set_bit(uint32_t bits, std::mt19937_64& generator) {
  for (int skip = static_cast<int>(generator() % std::popcount(bits)); skip > 0; --skip) bits &= bits - 1;
  return std::countr_zero(bits);
}

// Half of the passes favour one warp until it can go no further; the others step through single threads.
bool run_pass_at_random(BlockState& block, std::mt19937_64& generator) {
  std::vector<int> candidates;
  for (size_t warp = 0; warp < block.warps.size(); ++warp) {
    if (block.warps[warp].ready != 0) candidates.push_back(static_cast<int>(warp));
  }
  if (candidates.empty()) return false;
  const int warp = candidates[generator() % candidates.size()];
  const bool run_ahead = generator() % 2 == 0;
  do {
    run_thread(block, warp, random_set_bit(block.warps[warp].ready, generator));
  } while (run_ahead && block.warps[warp].ready != 0 && !block.failed);
  return true;
}

void reset_all_fibers(BlockState& block) {
  // ThreadSanitizer keeps a call stack per fiber that an abandoned one never unwinds: start with new ones,
  // and with all that the old ones did behind us.
  for (const auto& thread : block.threads) tsan_acquire(&thread->abandon_token);
  block.threads.clear();
}

void prepare_threads(BlockState& block) {
  const dim3 dims = block.shape.block;
  block.thread_count = static_cast<int>(dims.x * dims.y * dims.z);
  while (static_cast<int>(block.threads.size()) < block.thread_count) {
    auto thread = std::make_unique<Thread>();
    const int id = static_cast<int>(block.threads.size());
    thread->warp = id / kWarpSize;
    thread->lane = id % kWarpSize;
    thread->fiber.reset(fiber_entry);
    block.threads.push_back(std::move(thread));
  }
  for (int id = 0; id < block.thread_count; ++id) {
    const auto n = static_cast<unsigned>(id);
    block.threads[id]->index = uint3{n % dims.x, n / dims.x % dims.y, n / dims.x / dims.y};
  }
}

void run_block(BlockState& block) {
  const int warps = (block.thread_count + kWarpSize - 1) / kWarpSize;
  block.warps.resize(warps);
  for (int warp = 0; warp < warps; ++warp) {
    const int lanes = std::min(kWarpSize, block.thread_count - warp * kWarpSize);
    Warp& state = block.warps[warp];
    state.present = state.ready = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    state.exited = state.at_barrier = state.collecting = 0;
  }
  block.live = block.thread_count;
  block.arrived = block.predicate_count = 0;

  tsan_release(&block.begin_token);
  Schedule& schedule = current_schedule();
  while (block.live > 0 && !block.failed) {
    const bool progressed = schedule.order == Order::random
                                ? run_pass_at_random(block, schedule.generator)
                                : run_pass_in_order(block, schedule.order == Order::reversed);
    if (!progressed) {
      block.failed = true;
      block.failure = "deadlock: " + describe_waiting(block);
    }
  }
  tsan_acquire(&block.end_token);
}

}  // namespace

BlockState& block_state() {
  static BlockState state;
  return state;
}

void set_schedule(Order order, uint64_t seed) {
  current_schedule().order = order;
  current_schedule().generator.seed(seed);
}

uint3 thread_index() { return block_state().current->index; }
uint3 block_index() { return block_state().block_index; }
dim3 block_dim() { return block_state().shape.block; }
dim3 grid_dim() { return block_state().shape.grid; }
void* dynamic_shared_memory() { return block_state().dynamic_shared; }

Thread& thread_at(int warp, int lane) { return *block_state().threads[warp * kWarpSize + lane]; }

std::string describe(const Thread& thread) {
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  const uint3 b = block_state().block_index;
  return "thread " + triple(thread.index.x, thread.index.y, thread.index.z) + " of block " +
         triple(b.x, b.y, b.z);
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

void park(Thread& thread) {
  tsan_release(&thread.abandon_token);
  switch_context(thread.fiber.context, block_state().scheduler);
}

void record_failure(const std::string& what, const Site& site) {
  record_failure(what + " (" + describe(site) + ")");
}

void record_failure(const std::string& what) {
  BlockState& block = block_state();
  block.failed = true;
  block.failure = describe(*block.current) + ": " + what;
}

void abandon_block() {
  park(*block_state().current);
  std::abort();  // the scheduler never resumes a fiber of a failed block
}

// Whether a thread may join the barrier at which others wait already; records the failure where not.
static bool matches_waiting_threads(const BlockState& block, BarrierKind kind, const Site& site) {
  for (size_t warp = 0; warp < block.warps.size(); ++warp) {
    if (block.warps[warp].at_barrier == 0) continue;
    const Thread& first = thread_at(static_cast<int>(warp), std::countr_zero(block.warps[warp].at_barrier));
    const bool same_site = first.barrier_site.line() == site.line() &&
                           std::strcmp(first.barrier_site.file_name(), site.file_name()) == 0;
    if (same_site && kind == block.barrier_kind) return true;
    record_failure(
        "at another __syncthreads than " + describe(first) + ", which is at " + describe(first.barrier_site),
        site);
    return false;
  }
  return true;
}

int block_barrier(BarrierKind kind, int predicate, const Site& site) {
  BlockState& block = block_state();
  Thread& self = *block.current;
  Warp& warp = block.warps[self.warp];
  if (block.live != block.thread_count) {
    record_failure("at __syncthreads, which other threads exited without", site);
    abandon_block();
  }
  if (block.arrived > 0 && !matches_waiting_threads(block, kind, site)) abandon_block();
  block.barrier_kind = kind;
  self.barrier_site = site;
  block.predicate_count += predicate != 0;
  char* token = &block.barrier_tokens[block.barrier_generation % 2];
  tsan_release(token);
  if (++block.arrived < block.thread_count) {
    warp.at_barrier |= 1u << self.lane;
    park(self);
  } else {
    block.barrier_result = kind == BarrierKind::any   ? block.predicate_count > 0
                           : kind == BarrierKind::all ? block.predicate_count == block.thread_count
                                                      : block.predicate_count;
    for (Warp& other : block.warps) {
      other.ready |= other.at_barrier;
      other.at_barrier = 0;
    }
    block.arrived = block.predicate_count = 0;
    ++block.barrier_generation;
    // The last to arrive yields too; otherwise it would always be the first to pass.
    warp.ready |= 1u << self.lane;
    park(self);
  }
  tsan_acquire(token);
  return block.barrier_result;
}

void run_grid(const LaunchShape& shape, const std::function<void()>& body) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  check_launch(shape);

  BlockState& block = block_state();
  block.shape = shape;
  block.body = &body;
  block.failed = false;
  adopt_current_stack(block.scheduler);
  prepare_threads(block);

  DynamicSharedMemory memory(shape.dynamic_shared_bytes);
  block.dynamic_shared = memory.data();
  for (unsigned z = 0; z < shape.grid.z; ++z) {
    for (unsigned y = 0; y < shape.grid.y; ++y) {
      for (unsigned x = 0; x < shape.grid.x; ++x) {
        block.block_index = uint3{x, y, z};
        memory.fill();
        run_block(block);
        if (!block.failed && !memory.intact()) {
          block.failed = true;
          block.failure = "a thread of block (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
                          std::to_string(z) + ") wrote past the end of dynamic shared memory";
        }
        if (block.failed) {
          reset_all_fibers(block);
          throw DeviceError(std::string(shape.name) + ": " + block.failure);
        }
      }
    }
  }
}

}  // namespace cuda_emulator
