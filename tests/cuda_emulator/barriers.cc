// The barriers of a block and of a cluster, and the shared memory that a cluster's blocks see of each other.
#include <bit>
#include <cstring>

#include "block_state.h"

namespace cuda_emulator {
namespace {

// Whether a thread may join the barrier at which others wait already; records the failure where not.
bool matches_waiting_threads(const BlockState& block, BarrierKind kind, const Site& site) {
  for (size_t warp = 0; warp < block.warps.size(); ++warp) {
    const uint32_t waiting = block.warps[warp].at_barrier;
    if (waiting == 0) continue;
    const Thread& first = thread_at(block, static_cast<int>(warp), std::countr_zero(waiting));
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

// Lets everybody through once every thread of the cluster that has not exited is there.
void complete_cluster_barrier(LaunchState& launch) {
  int live = 0;
  for (const BlockState& block : launch.blocks) live += block.live;
  if (launch.arrived_at_cluster < live) return;
  for (BlockState& block : launch.blocks) {
    for (Warp& warp : block.warps) {
      warp.ready |= warp.at_cluster;
      warp.at_cluster = 0;
    }
  }
  launch.arrived_at_cluster = 0;
  ++launch.cluster_generation;
}

// The barrier's instructions are `.aligned`: a warp executes them as one.
void require_whole_warp(const Site& site) {
  warp_collective(WarpOp::align, live_lanes(), 0, 0, kWarpSize, site);
}

}  // namespace

int block_barrier(BarrierKind kind, int predicate, const Site& site) {
  Thread& self = *launch_state().current;
  BlockState& block = *self.block;
  const int thread_count = launch_state().block_threads;
  Warp& warp = block.warps[self.warp];
  if (block.live != thread_count) {
    record_failure("at __syncthreads, which other threads exited without", site);
    abandon_block();
  }
  if (block.arrived > 0 && !matches_waiting_threads(block, kind, site)) abandon_block();
  block.barrier_kind = kind;
  self.barrier_site = site;
  block.predicate_count += predicate != 0;
  char* token = &block.barrier_tokens[block.barrier_generation % 2];
  tsan_release(token);
  if (++block.arrived < thread_count) {
    warp.at_barrier |= 1u << self.lane;
    park(self);
  } else {
    block.barrier_result = kind == BarrierKind::any   ? block.predicate_count > 0
                           : kind == BarrierKind::all ? block.predicate_count == thread_count
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

void cluster_arrive(const Site& site) {
  require_whole_warp(site);
  LaunchState& launch = launch_state();
  Thread& self = *launch.current;
  if (self.arrived_at_cluster) {
    record_failure("arrives at a barrier of the cluster twice without waiting", site);
    abandon_block();
  }
  self.arrived_at_cluster = true;
  self.cluster_generation = launch.cluster_generation;
  tsan_release(&launch.cluster_tokens[launch.cluster_generation % 2]);
  ++launch.arrived_at_cluster;
  complete_cluster_barrier(launch);
  // Others may go first.
  self.block->warps[self.warp].ready |= 1u << self.lane;
  park(self);
}

void cluster_wait(const Site& site) {
  require_whole_warp(site);
  LaunchState& launch = launch_state();
  Thread& self = *launch.current;
  if (!self.arrived_at_cluster) {
    record_failure("waits for a barrier of the cluster without having arrived", site);
    abandon_block();
  }
  self.barrier_site = site;
  if (self.cluster_generation == launch.cluster_generation) {
    self.block->warps[self.warp].at_cluster |= 1u << self.lane;
    park(self);
  }
  self.arrived_at_cluster = false;
  self.knows_cluster = true;
  tsan_acquire(&launch.cluster_tokens[self.cluster_generation % 2]);
}

bool leave_cluster(Thread& thread) {
  LaunchState& launch = launch_state();
  const BlockState& block = *thread.block;
  if (block.live == 0 && block.was_written && block.write_generation == launch.cluster_generation) {
    record_failure("the block ends with no barrier after the last write of another to its shared memory");
    return false;
  }
  if (thread.arrived_at_cluster && thread.cluster_generation == launch.cluster_generation) {
    --launch.arrived_at_cluster;
  }
  if (launch.arrived_at_cluster > 0) complete_cluster_barrier(launch);
  return true;
}

void* address_in_block(void* mine, size_t bytes, int rank, const Site& site) {
  LaunchState& launch = launch_state();
  const auto refuse = [&](const std::string& what) {
    record_failure("distributed shared memory: " + what, site);
    abandon_block();
  };
  const BlockState& own = current_block();
  const auto offset = static_cast<char*>(mine) - own.dynamic_shared;
  const auto size = static_cast<std::ptrdiff_t>(launch.shape.dynamic_shared_bytes);
  if (offset < 0 || offset + static_cast<std::ptrdiff_t>(bytes) > size) {
    refuse("the address is not in this block's dynamic shared memory");
  }
  const int blocks = static_cast<int>(launch.blocks.size());
  if (rank < 0 || rank >= blocks) {
    refuse("block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks));
  }
  BlockState& target = launch.blocks[rank];
  if (&target != &own) {
    if (!launch.current->knows_cluster) {
      refuse("no barrier has told this thread that block " + std::to_string(rank) +
             " of the cluster has begun");
    }
    if (target.live == 0) refuse("block " + std::to_string(rank) + " of the cluster has exited");
  }
  return target.dynamic_shared + offset;
}

void* shared_of_block(void* mine, size_t bytes, int rank, const Site& site) {
  void* const address = address_in_block(mine, bytes, rank, site);
  BlockState& target = launch_state().blocks[rank];
  if (&target != &current_block()) {
    target.was_written = true;
    target.write_generation = launch_state().cluster_generation;
  }
  return address;
}

}  // namespace cuda_emulator
