// Barriers, shuffles, votes and reductions under their CUDA names.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

inline void __syncthreads(cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::block_barrier(cuda_emulator::BarrierKind::plain, 0, site);
}
inline int __syncthreads_or(int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::block_barrier(cuda_emulator::BarrierKind::any, predicate, site);
}
inline int __syncthreads_and(int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::block_barrier(cuda_emulator::BarrierKind::all, predicate, site);
}
inline int __syncthreads_count(int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::block_barrier(cuda_emulator::BarrierKind::count, predicate, site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::warp_collective(cuda_emulator::WarpOp::sync, mask, 0, 0, warpSize, site);
}

namespace cuda_emulator {

// st.async: stores to the shared variable of block `rank` that has the address of `mine` here, and tells that
// block's barrier.
template <typename T>
void store_async(T* mine, const T& value, int rank, void* barrier, const Site& site) {
  *static_cast<T*>(transaction_target(mine, sizeof(T), rank, site)) = value;
  transaction_stored(barrier, sizeof(T), rank, site);
}

}  // namespace cuda_emulator

inline unsigned __activemask() { return cuda_emulator::live_lanes(); }

namespace cuda_emulator {

template <typename T>
T shuffle(WarpOp op, unsigned mask, T value, int parameter, int width, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(op, mask, bits, parameter, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T reduce(WarpOp op, unsigned mask, T value, const Site& site) {
  return static_cast<T>(warp_collective(op, mask, static_cast<uint32_t>(value), 0, warpSize, site));
}

}  // namespace cuda_emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::shuffle(cuda_emulator::WarpOp::shuffle_index, mask, value, lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::shuffle(cuda_emulator::WarpOp::shuffle_up, mask, value, static_cast<int>(delta),
                                width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::shuffle(cuda_emulator::WarpOp::shuffle_down, mask, value, static_cast<int>(delta),
                                width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::shuffle(cuda_emulator::WarpOp::shuffle_xor, mask, value, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return static_cast<unsigned>(
      cuda_emulator::warp_collective(cuda_emulator::WarpOp::ballot, mask, predicate != 0, 0, warpSize, site));
}
inline int __any_sync(unsigned mask, int predicate,
                      cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(
      cuda_emulator::warp_collective(cuda_emulator::WarpOp::match_any, mask, bits, 0, warpSize, site));
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::WarpOp::reduce_add, mask, value, site);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  constexpr auto op = std::is_signed_v<T> ? cuda_emulator::WarpOp::reduce_min_signed
                                          : cuda_emulator::WarpOp::reduce_min_unsigned;
  return cuda_emulator::reduce(op, mask, value, site);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  constexpr auto op = std::is_signed_v<T> ? cuda_emulator::WarpOp::reduce_max_signed
                                          : cuda_emulator::WarpOp::reduce_max_unsigned;
  return cuda_emulator::reduce(op, mask, value, site);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::WarpOp::reduce_and, mask, value, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::WarpOp::reduce_or, mask, value, site);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value,
                                  cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::WarpOp::reduce_xor, mask, value, site);
}
