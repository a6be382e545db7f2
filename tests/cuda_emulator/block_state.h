// The scheduler's bookkeeping for the block that is running; shared by scheduler.cc and warp.cc only.
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

struct Thread {
  Fiber fiber;
  uint3 index{};
  int warp = 0;
  int lane = 0;
  Site barrier_site;       // where it waits, while it waits at the block barrier
  char abandon_token = 0;  // for ThreadSanitizer: acquired only by a host that gives the block up
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
  uint32_t at_barrier = 0;  // parked at the block barrier
  uint32_t collecting = 0;  // parked in a warp collective
  std::array<LaneSlot, kWarpSize> slots;
  char sync_tokens[kWarpSize][2] = {};  // for ThreadSanitizer, per lane; used in turn (see barrier_tokens)
  uint32_t sync_turn = 0;               // which of its two tokens each lane uses next
};

struct BlockState {
  Context scheduler;
  std::vector<std::unique_ptr<Thread>> threads;  // grows to the largest block seen, and is kept
  std::vector<Warp> warps;
  int thread_count = 0;
  int live = 0;
  Thread* current = nullptr;
  const std::function<void()>* body = nullptr;
  LaunchShape shape;
  uint3 block_index{};

  int arrived = 0;  // threads at the block barrier
  int predicate_count = 0;
  BarrierKind barrier_kind = BarrierKind::plain;
  int barrier_result = 0;

  bool failed = false;
  std::string failure;

  char* dynamic_shared = nullptr;
  // ThreadSanitizer orders accesses through these addresses. Barriers alternate between two: a thread that is
  // already at the next barrier must not order its accesses before those of one still leaving this barrier.
  char barrier_tokens[2] = {};
  unsigned barrier_generation = 0;
  char begin_token = 0, end_token = 0;
};

BlockState& block_state();

// Switches to the scheduler until this thread's ready bit is set again.
void park(Thread& thread);

std::string describe(const Thread& thread);
std::string describe(const Site& site);
Thread& thread_at(int warp, int lane);

}  // namespace cuda_emulator
