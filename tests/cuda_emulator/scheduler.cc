#include "scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>

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

// What keeps a thread of these blocks from going on; "" if none waits.
std::string describe_waiting(const BlockState& block) {
  for (int index = 0; index < static_cast<int>(block.warps.size()); ++index) {
    const Warp& warp = block.warps[index];
    if (warp.collecting != 0) {
      const int lane = std::countr_zero(warp.collecting);
      return describe(thread_at(block, index, lane)) + " waits in a warp collective at " +
             describe(warp.slots[lane].site);
    }
  }
  for (int index = 0; index < static_cast<int>(block.warps.size()); ++index) {
    const Warp& warp = block.warps[index];
    const uint32_t waiting = warp.at_barrier | warp.at_cluster | warp.at_transactions;
    if (waiting != 0) {
      const Thread& thread = thread_at(block, index, std::countr_zero(waiting));
      return describe(thread) + " waits at " +
             (warp.at_barrier != 0   ? "__syncthreads"
              : warp.at_cluster != 0 ? "a barrier of the cluster"
                                     : "a transaction barrier") +
             " at " + describe(thread.barrier_site);
    }
  }
  return "";
}

std::string describe_waiting(const LaunchState& launch) {
  for (const BlockState& block : launch.blocks) {
    const std::string found = describe_waiting(block);
    if (!found.empty()) return found;
  }
  return "no thread waits";
}

// Marks a thread that returned from its kernel. True if others wait for it in vain.
bool leave_block(Thread& self) {
  BlockState& block = *self.block;
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
  return !leave_transactions(block) || !leave_cluster(self);
}

// Every fiber lives here for good: it runs the body once per block and hands over after each.
void fiber_entry() {
  LaunchState& launch = launch_state();
  finish_first_switch(launch.current->fiber.context, launch.scheduler);
  for (;;) {
    Thread& self = *launch.current;
    tsan_acquire(&launch.begin_token);
    std::string exception;
    try {
      (*launch.body)();
    } catch (const std::exception& error) {
      exception = std::string("exception in device code: ") + error.what();
    }
    // Outside the handler: a fiber abandoned inside one would leave the host thread's exception stack in use.
    if (!exception.empty()) {
      record_failure(exception);
      exception = std::string();
      abandon_block();
    }
    tsan_release(&launch.end_token);

    if (leave_block(self)) abandon_block();
    switch_context(self.fiber.context, launch.scheduler);
  }
}

void run_thread(LaunchState& launch, BlockState& block, int warp, int lane) {
  block.warps[warp].ready &= ~(1u << lane);
  Thread& thread = thread_at(block, warp, lane);
  launch.current = &thread;
  switch_context(launch.scheduler, thread.fiber.context);
}

// One visit to every warp, and in it to every lane that is ready.
bool run_pass_in_order(LaunchState& launch, bool reversed) {
  bool progressed = false;
  const int warps = static_cast<int>(launch.blocks[0].warps.size());
  const int total = warps * static_cast<int>(launch.blocks.size());
  for (int i = 0; i < total && !launch.failed; ++i) {
    const int place = reversed ? total - 1 - i : i;
    BlockState& block = launch.blocks[place / warps];
    const int warp = place % warps;
    uint32_t lanes = block.warps[warp].ready;
    while (lanes != 0 && !launch.failed) {
      const int lane = reversed ? kWarpSize - 1 - std::countl_zero(lanes) : std::countr_zero(lanes);
      lanes &= ~(1u << lane);
      progressed = true;
      run_thread(launch, block, warp, lane);
    }
  }
  return progressed;
}

int random_set_bit(uint32_t bits, std::mt19937_64& generator) {
  for (int skip = static_cast<int>(generator() % std::popcount(bits)); skip > 0; --skip) bits &= bits - 1;
  return std::countr_zero(bits);
}

// Half of the passes favour one warp until it can go no further; the others step through single threads.
bool run_pass_at_random(LaunchState& launch, std::mt19937_64& generator) {
  std::vector<std::pair<BlockState*, int>> candidates;
  for (BlockState& block : launch.blocks) {
    for (size_t warp = 0; warp < block.warps.size(); ++warp) {
      if (block.warps[warp].ready != 0) candidates.emplace_back(&block, static_cast<int>(warp));
    }
  }
  if (candidates.empty()) return false;
  const auto [block, warp] = candidates[generator() % candidates.size()];
  const bool run_ahead = generator() % 2 == 0;
  do {
    run_thread(launch, *block, warp, random_set_bit(block->warps[warp].ready, generator));
  } while (run_ahead && block->warps[warp].ready != 0 && !launch.failed);
  return true;
}

void reset_all_fibers(LaunchState& launch) {
  // ThreadSanitizer keeps a call stack per fiber that an abandoned one never unwinds: start with new ones,
  // and with all that the old ones did behind us.
  for (const auto& thread : launch.threads) tsan_acquire(&thread->abandon_token);
  launch.threads.clear();
}

// Fibers for one cluster, and what is the same for every cluster of the launch.
void prepare_cluster(LaunchState& launch) {
  const dim3 dims = launch.shape.block;
  launch.block_threads = static_cast<int>(dims.x * dims.y * dims.z);
  launch.blocks.resize(launch.shape.cluster);
  const size_t total = launch.blocks.size() * static_cast<size_t>(launch.block_threads);
  while (launch.threads.size() < total) {
    auto thread = std::make_unique<Thread>();
    thread->fiber.reset(fiber_entry);
    launch.threads.push_back(std::move(thread));
  }
  for (size_t place = 0; place < total; ++place) {
    Thread& thread = *launch.threads[place];
    const auto rank = static_cast<int>(place) / launch.block_threads;
    const auto id = static_cast<int>(place) % launch.block_threads;
    const auto n = static_cast<unsigned>(id);
    BlockState& block = launch.blocks[rank];
    block.rank = rank;
    block.first_thread = rank * launch.block_threads;
    thread.block = &block;
    thread.warp = id / kWarpSize;
    thread.lane = id % kWarpSize;
    thread.index = uint3{n % dims.x, n / dims.x % dims.y, n / dims.x / dims.y};
  }
}

void begin_block(BlockState& block, int threads) {
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  block.warps.resize(warps);
  for (int warp = 0; warp < warps; ++warp) {
    const int lanes = std::min(kWarpSize, threads - warp * kWarpSize);
    Warp& state = block.warps[warp];
    state.present = state.ready = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    state.exited = state.at_barrier = state.at_cluster = state.at_transactions = state.collecting = 0;
  }
  block.live = threads;
  block.arrived = block.predicate_count = 0;
  block.was_written = false;
  block.transactions.clear();
}

// Runs the blocks of one cluster together.
void run_cluster(LaunchState& launch) {
  for (BlockState& block : launch.blocks) begin_block(block, launch.block_threads);
  for (const auto& thread : launch.threads) thread->arrived_at_cluster = thread->knows_cluster = false;
  launch.arrived_at_cluster = 0;
  const auto is_live = [](const BlockState& block) { return block.live > 0; };

  tsan_release(&launch.begin_token);
  Schedule& schedule = current_schedule();
  while (std::ranges::any_of(launch.blocks, is_live) && !launch.failed) {
    const bool progressed = schedule.order == Order::random
                                ? run_pass_at_random(launch, schedule.generator)
                                : run_pass_in_order(launch, schedule.order == Order::reversed);
    if (!progressed) {
      launch.failed = true;
      launch.failure = "deadlock: " + describe_waiting(launch);
    }
  }
  tsan_acquire(&launch.end_token);
}

void fail(LaunchState& launch) {
  reset_all_fibers(launch);
  throw DeviceError(std::string(launch.shape.name) + ": " + launch.failure);
}

}  // namespace

LaunchState& launch_state() {
  static LaunchState state;
  return state;
}

BlockState& current_block() { return *launch_state().current->block; }

void set_schedule(Order order, uint64_t seed) {
  current_schedule().order = order;
  current_schedule().generator.seed(seed);
}

uint3 thread_index() { return launch_state().current->index; }
uint3 block_index() { return current_block().index; }
dim3 block_dim() { return launch_state().shape.block; }
dim3 grid_dim() { return launch_state().shape.grid; }
int cluster_rank() { return current_block().rank; }
int cluster_size() { return static_cast<int>(launch_state().shape.cluster); }
void* dynamic_shared_memory() { return current_block().dynamic_shared; }

Thread& thread_at(const BlockState& block, int warp, int lane) {
  return *launch_state().threads[block.first_thread + warp * kWarpSize + lane];
}

std::string describe(const Thread& thread) {
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  const uint3 b = thread.block->index;
  return "thread " + triple(thread.index.x, thread.index.y, thread.index.z) + " of block " +
         triple(b.x, b.y, b.z);
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

void park(Thread& thread) {
  tsan_release(&thread.abandon_token);
  switch_context(thread.fiber.context, launch_state().scheduler);
}

void record_failure(const std::string& what, const Site& site) {
  record_failure(what + " (" + describe(site) + ")");
}

void record_failure(const std::string& what) {
  LaunchState& launch = launch_state();
  launch.failed = true;
  launch.failure = describe(*launch.current) + ": " + what;
}

void abandon_block() {
  park(*launch_state().current);
  std::abort();  // the scheduler never resumes a fiber of a failed launch
}

void run_grid(const LaunchShape& shape, const std::function<void()>& body) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  check_launch(shape);

  LaunchState& launch = launch_state();
  launch.shape = shape;
  launch.body = &body;
  launch.failed = false;
  adopt_current_stack(launch.scheduler);
  prepare_cluster(launch);

  std::deque<DynamicSharedMemory> memories;
  for (BlockState& block : launch.blocks) {
    block.dynamic_shared = memories.emplace_back(shape.dynamic_shared_bytes).data();
  }
  for (unsigned z = 0; z < shape.grid.z; ++z) {
    for (unsigned y = 0; y < shape.grid.y; ++y) {
      for (unsigned x = 0; x < shape.grid.x; x += shape.cluster) {
        for (BlockState& block : launch.blocks) {
          block.index = uint3{x + static_cast<unsigned>(block.rank), y, z};
          memories[block.rank].fill();
        }
        run_cluster(launch);
        if (launch.failed) fail(launch);
        for (const BlockState& block : launch.blocks) {
          if (memories[block.rank].intact()) continue;
          launch.failure = "a thread of block (" + std::to_string(block.index.x) + ", " + std::to_string(y) +
                           ", " + std::to_string(z) + ") wrote past the end of dynamic shared memory";
          fail(launch);
        }
      }
    }
  }
}

}  // namespace cuda_emulator
