// Warp collectives: the last lane to arrive computes every lane's result, so a lane that runs on cannot
// overwrite an operand that another has yet to read.
#include <bit>
#include <cstring>

#include "block_state.h"

namespace cuda_emulator {
namespace {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::sync:
      return "__syncwarp";
    case WarpOp::align:
      return "a barrier of the cluster";
    case WarpOp::shuffle_index:
      return "__shfl_sync";
    case WarpOp::shuffle_up:
      return "__shfl_up_sync";
    case WarpOp::shuffle_down:
      return "__shfl_down_sync";
    case WarpOp::shuffle_xor:
      return "__shfl_xor_sync";
    case WarpOp::ballot:
      return "a warp vote";
    case WarpOp::match_any:
      return "__match_any_sync";
    default:
      return "a warp reduction";
  }
}

// The lane a shuffle reads from, as the PTX manual defines it: out of the segment means the lane itself.
int source_lane(const LaneSlot& slot, int lane) {
  const int segment = lane & ~(slot.width - 1);
  const int end = segment + slot.width;
  switch (slot.op) {
    case WarpOp::shuffle_index:
      return segment + (slot.parameter & (slot.width - 1));
    case WarpOp::shuffle_up:
      return lane - slot.parameter >= segment ? lane - slot.parameter : lane;
    case WarpOp::shuffle_down:
      return lane + slot.parameter < end ? lane + slot.parameter : lane;
    default:
      return (lane ^ slot.parameter) < end ? lane ^ slot.parameter : lane;
  }
}

uint32_t combine(WarpOp op, uint32_t a, uint32_t b) {
  const auto signed_a = static_cast<int32_t>(a), signed_b = static_cast<int32_t>(b);
  switch (op) {
    case WarpOp::reduce_add:
      return a + b;
    case WarpOp::reduce_min_unsigned:
      return a < b ? a : b;
    case WarpOp::reduce_max_unsigned:
      return a > b ? a : b;
    case WarpOp::reduce_min_signed:
      return signed_a < signed_b ? a : b;
    case WarpOp::reduce_max_signed:
      return signed_a > signed_b ? a : b;
    case WarpOp::reduce_and:
      return a & b;
    case WarpOp::reduce_or:
      return a | b;
    default:
      return a ^ b;
  }
}

void compute_shuffle(Warp& warp, uint32_t mask, const Site& site) {
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    const int source = source_lane(warp.slots[lane], lane);
    if (!(mask >> source & 1)) {
      record_failure("lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
                         ", which is not in the shuffle's mask",
                     site);
      abandon_block();
    }
    warp.slots[lane].result = warp.slots[source].value;
  }
}

void compute_same_for_all(Warp& warp, WarpOp op, uint32_t mask) {
  uint64_t result = 0;
  if (op == WarpOp::sync || op == WarpOp::align || op == WarpOp::ballot) {
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      if (warp.slots[lane].value != 0) result |= uint64_t{1} << lane;
    }
  } else {
    uint32_t lanes = mask;
    auto sum = static_cast<uint32_t>(warp.slots[std::countr_zero(lanes)].value);
    while ((lanes &= lanes - 1) != 0) {
      sum = combine(op, sum, static_cast<uint32_t>(warp.slots[std::countr_zero(lanes)].value));
    }
    result = sum;
  }
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1)
    warp.slots[std::countr_zero(lanes)].result = result;
}

void compute_matches(Warp& warp, uint32_t mask) {
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    LaneSlot& slot = warp.slots[std::countr_zero(lanes)];
    slot.result = 0;
    for (uint32_t others = mask; others != 0; others &= others - 1) {
      const int other = std::countr_zero(others);
      if (warp.slots[other].value == slot.value) slot.result |= uint64_t{1} << other;
    }
  }
}

void compute(Warp& warp, WarpOp op, uint32_t mask, const Site& site) {
  switch (op) {
    case WarpOp::shuffle_index:
    case WarpOp::shuffle_up:
    case WarpOp::shuffle_down:
    case WarpOp::shuffle_xor:
      return compute_shuffle(warp, mask, site);
    case WarpOp::match_any:
      return compute_matches(warp, mask);
    default:
      return compute_same_for_all(warp, op, mask);
  }
}

// Whether this lane may join; records the failure where not.
bool check_mask(const Thread& self, const Warp& warp, WarpOp op, uint32_t mask, const Site& site) {
  const auto fail = [&](const std::string& what) {
    record_failure(name_of(op) + what, site);
    return false;
  };
  if (!(mask >> self.lane & 1)) return fail(": the calling lane is not in its own mask");
  if (const uint32_t absent = mask & ~warp.present) {
    return fail(": lane " + std::to_string(std::countr_zero(absent)) +
                " of the mask does not exist in this block");
  }
  if (const uint32_t gone = mask & warp.exited) {
    return fail(": lane " + std::to_string(std::countr_zero(gone)) + " of the mask has exited");
  }
  if (const uint32_t parked = mask & (warp.at_barrier | warp.at_cluster)) {
    const Thread& other = thread_at(*self.block, self.warp, std::countr_zero(parked));
    return fail(": the mask names " + describe(other) + ", which waits at a barrier at " +
                describe(other.barrier_site));
  }
  for (uint32_t lanes = mask & warp.collecting; lanes != 0; lanes &= lanes - 1) {
    const LaneSlot& other = warp.slots[std::countr_zero(lanes)];
    if (other.op != op || other.mask != mask) {
      return fail(": lane " + std::to_string(std::countr_zero(lanes)) + " of the mask waits in " +
                  name_of(other.op) + " with another mask or operation at " + describe(other.site));
    }
  }
  return true;
}

}  // namespace

uint32_t live_lanes() {
  const Warp& warp = current_block().warps[launch_state().current->warp];
  return warp.present & ~warp.exited;
}

uint64_t warp_collective(WarpOp op, uint32_t mask, uint64_t value, int parameter, int width,
                         const Site& site) {
  Thread& self = *launch_state().current;
  Warp& warp = self.block->warps[self.warp];
  const uint32_t own_bit = 1u << self.lane;
  if (!check_mask(self, warp, op, mask, site)) abandon_block();

  if (op == WarpOp::sync) {  // its value tells the others which of this lane's tokens to acquire
    value = warp.sync_turn >> self.lane & 1;
    warp.sync_turn ^= own_bit;
    tsan_release(&warp.sync_tokens[self.lane][value]);
  }
  LaneSlot& slot = warp.slots[self.lane];
  slot.op = op;
  slot.mask = mask;
  slot.value = value;
  slot.parameter = parameter;
  slot.width = width;
  slot.site = site;

  warp.collecting |= own_bit;
  if ((warp.collecting & mask) == mask) {
    compute(warp, op, mask, site);
    warp.collecting &= ~mask;
    warp.ready |= mask;
  }
  park(self);  // also the last to arrive: it must not always be the first to go on

  if (op == WarpOp::sync) {
    const uint64_t turns = slot.result;
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      tsan_acquire(&warp.sync_tokens[lane][turns >> lane & 1]);
    }
  }
  return slot.result;
}

}  // namespace cuda_emulator
