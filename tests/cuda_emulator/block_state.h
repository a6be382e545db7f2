// The bookkeeping of the blocks that are running: those of one cluster, a single block in most launches.
// Shared by scheduler.cc, barriers.cc and warp.cc only.
#pragma once

#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "scheduler.h"

namespace cuda_emulator {

constexpr int kWarpSize = 32;

struct BlockState;

struct Thread {
  Fiber fiber;
  BlockState* block = nullptr;
  uint3 index{};
  int warp = 0;
  int lane = 0;
  Site barrier_site;                // where it waits, while it waits at a barrier of the block or the cluster
  bool arrived_at_cluster = false;  // between the two halves of a barrier of the cluster
  unsigned cluster_generation = 0;  // the barrier it arrived at
  bool knows_cluster = false;       // has passed a barrier of the cluster, so that all its blocks have begun
  char abandon_token = 0;           // for ThreadSanitizer: acquired only by a host that gives the launch up
};

struct LaneSlot {
  WarpOp op = WarpOp::sync;
  uint32_t mask = 0;
  uint64_t value = 0;
  int parameter = 0;
  int width = kWarpSize;
  uint64_t result = 0;
  Site site;
};

// One bit per lane in every mask.
struct Warp {
  uint32_t present = 0;  // lanes the block has (the last warp may be partial)
  uint32_t ready = 0;    // may run
  uint32_t exited = 0;
  uint32_t at_barrier = 0;       // parked at the block barrier
  uint32_t at_cluster = 0;       // parked at the cluster barrier
  uint32_t at_transactions = 0;  // parked at a transaction barrier
  uint32_t collecting = 0;       // parked in a warp collective
  std::array<LaneSlot, kWarpSize> slots;
  char sync_tokens[kWarpSize][2] = {};  // for ThreadSanitizer, per lane; used in turn (see barrier_tokens)
  uint32_t sync_turn = 0;               // which of its two tokens each lane uses next
};

struct TransactionBarrier {
  const void* address = nullptr;
  int64_t expected = 0;  // bytes
  int64_t stored = 0;
  bool was_waited_for = false;
};

struct BlockState {
  uint3 index{};
  int rank = 0;          // in its cluster
  int first_thread = 0;  // where its threads begin among those of the cluster
  std::vector<Warp> warps;
  int live = 0;
  bool was_written = false;       // by another block of the cluster, when that was at barrier
  unsigned write_generation = 0;  // number write_generation
  char* dynamic_shared = nullptr;
  std::vector<TransactionBarrier> transactions;

  int arrived = 0;  // threads at the block barrier
  int predicate_count = 0;
  BarrierKind barrier_kind = BarrierKind::plain;
  int barrier_result = 0;
  // ThreadSanitizer orders accesses through these addresses. Barriers alternate between two: a thread that is
  // already at the next barrier must not order its accesses before those of one still leaving this barrier.
  char barrier_tokens[2] = {};
  unsigned barrier_generation = 0;
};

struct LaunchState {
  Context scheduler;
  std::vector<std::unique_ptr<Thread>> threads;  // grows to the largest cluster seen, and is kept
  std::vector<BlockState> blocks;                // of the running cluster
  Thread* current = nullptr;
  const std::function<void()>* body = nullptr;
  LaunchShape shape;
  int block_threads = 0;

  int arrived_at_cluster = 0;  // threads that have not exited, at the barrier of the cluster
  char cluster_tokens[2] = {};
  unsigned cluster_generation = 0;

  bool failed = false;
  std::string failure;
  char begin_token = 0, end_token = 0;
};

LaunchState& launch_state();
BlockState& current_block();

// Switches to the scheduler until this thread's ready bit is set again.
void park(Thread& thread);

// To be called when a thread has exited: the barrier of the cluster no longer waits for it. Records a failure
// and returns false if another block may still write to the memory of this one, which has ended.
bool leave_cluster(Thread& thread);

// The same for a block whose memory others may still store to by transactions.
bool leave_transactions(const BlockState& block);

// Where a variable of this block lies in block `rank`; ends the launch where that block does not run.
void* address_in_block(void* mine, size_t bytes, int rank, const Site& site);

std::string describe(const Thread& thread);
std::string describe(const Site& site);
Thread& thread_at(const BlockState& block, int warp, int lane);

}  // namespace cuda_emulator
