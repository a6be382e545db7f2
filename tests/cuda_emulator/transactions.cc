// Transaction barriers: mbarriers on which the threads of a block wait for bytes that other blocks of its
// cluster store, used for one phase each.
#include <algorithm>

#include "block_state.h"

namespace cuda_emulator {
namespace {

[[noreturn]] void refuse(const std::string& what, const Site& site) {
  record_failure("transaction barrier: " + what, site);
  abandon_block();
}

TransactionBarrier* find(BlockState& block, const void* address) {
  const auto found = std::ranges::find(block.transactions, address, &TransactionBarrier::address);
  return found == block.transactions.end() ? nullptr : &*found;
}

bool is_complete(const TransactionBarrier& barrier) { return barrier.stored == barrier.expected; }

}  // namespace

void transactions_begin(void* barrier, int64_t bytes, const Site& site) {
  BlockState& block = current_block();
  address_in_block(barrier, 8, block.rank, site);
  if (find(block, barrier) != nullptr) refuse("begun twice", site);
  block.transactions.push_back({barrier, bytes});
}

void* transaction_target(void* mine, size_t bytes, int rank, const Site& site) {
  return address_in_block(mine, bytes, rank, site);
}

void transaction_stored(void* barrier, size_t bytes, int rank, const Site& site) {
  void* const address = address_in_block(barrier, 8, rank, site);
  BlockState& target = launch_state().blocks[rank];
  TransactionBarrier* const found = find(target, address);
  if (found == nullptr) refuse("that of block " + std::to_string(rank) + " has not begun", site);
  found->stored += static_cast<int64_t>(bytes);
  if (found->stored > found->expected) {
    refuse("block " + std::to_string(rank) + " expects " + std::to_string(found->expected) +
               " bytes, and got " + std::to_string(found->stored),
           site);
  }
  tsan_release(address);
  if (!is_complete(*found)) return;
  for (Warp& warp : target.warps) {
    warp.ready |= warp.at_transactions;
    warp.at_transactions = 0;
  }
}

void transactions_wait(void* barrier, const Site& site) {
  Thread& self = *launch_state().current;
  BlockState& block = *self.block;
  if (find(block, barrier) == nullptr) refuse("waited for before it began", site);
  self.barrier_site = site;
  while (!is_complete(*find(block, barrier))) {
    block.warps[self.warp].at_transactions |= 1u << self.lane;
    park(self);
  }
  find(block, barrier)->was_waited_for = true;
  tsan_acquire(barrier);
}

bool leave_transactions(const BlockState& block) {
  const auto is_pending = [](const TransactionBarrier& barrier) { return !barrier.was_waited_for; };
  if (block.live > 0 || std::ranges::none_of(block.transactions, is_pending)) return true;
  record_failure("the block ends and no thread has waited for what others store in its shared memory");
  return false;
}

}  // namespace cuda_emulator
