// Small kernels, most with one bug each, by which tests/test_cuda_emulator.py judges the emulator.
//
// Usage: planted_bugs NAME. Exit status 0: the kernel's result is right; 1: it is wrong; 2: the launch ended
// with a DeviceError, whose message is printed. A sanitizer that finds something exits with a status of its
// own.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "cuda_emulator.h"
#include "planted_bugs.h"

namespace {

constexpr int kThreads = 128;
constexpr unsigned kFullWarp = 0xffffffffu;

// ---- correct kernels
// ---------------------------------------------------------------------------------------------

// Sum of the block's thread indices, over and over in the same shared array.
template <bool kBarrierBeforeReuse>
__global__ void repeated_block_sum(int* out, int rounds) {
  __shared__ int partial[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int total = 0;
  for (int round = 0; round < rounds; ++round) {
    int sum = static_cast<int>(threadIdx.x) + round;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
    if (kBarrierBeforeReuse) __syncthreads();
  }
  out[threadIdx.x] = total;
}

template <bool kSync>
__global__ void exchange_with_neighbour(int* out) {
  SF_DYNAMIC_SMEM(int, shared);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kSync) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

template <bool kAtomic>
__global__ void count_threads(int* out) {
  if (kAtomic) {
    atomicAdd(out, 1);
  } else {
    *out += 1;
  }
}

__global__ void votes_and_shuffles(int* out) {
  const int lane = threadIdx.x % 32;
  int right = __shfl_down_sync(kFullWarp, lane, 3) == (lane + 3 < 32 ? lane + 3 : lane);
  right += __shfl_up_sync(kFullWarp, lane, 3) == (lane >= 3 ? lane - 3 : lane);
  right += __shfl_sync(kFullWarp, lane, 5, 8) == (lane / 8 * 8 + 5);
  right += __shfl_xor_sync(kFullWarp, static_cast<double>(lane), 7) == (lane ^ 7);
  right += __ballot_sync(kFullWarp, lane < 4) == 0xfu;
  right += __any_sync(kFullWarp, lane == 31) == 1;
  right += __all_sync(kFullWarp, lane < 31) == 0;
  right += __reduce_max_sync(kFullWarp, -lane) == 0;
  right += __match_any_sync(kFullWarp, lane / 16) == (lane < 16 ? 0xffffu : 0xffff0000u);
  right += __syncthreads_count(lane == 0) == kThreads / 32;
  right += __syncthreads_or(threadIdx.x == 77) == 1;
  right += __syncthreads_and(threadIdx.x != 77) == 0;
  // The halves of a warp may run collectives of their own.
  if (lane < 16) {
    right += __shfl_xor_sync(0xffffu, lane, 1) == (lane ^ 1);
  } else {
    right += __reduce_add_sync(0xffff0000u, 1) == 16;
  }
  out[threadIdx.x] = right;
}

__global__ void bf16_round_trip(float* out, const __nv_bfloat162* in) {
  const float2 both = __bfloat1622float2(__hadd2(in[threadIdx.x], in[threadIdx.x]));
  out[threadIdx.x] = both.x + both.y + __half2float(__float2half_rn(0.5f));
}

// ---- planted bugs
// ------------------------------------------------------------------------------------------------

__global__ void missing_barrier_after_write(int* out) {
  SF_DYNAMIC_SMEM(int, shared);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + kThreads / 2) % kThreads];
}

// Lanes meet in the shuffle, but a shuffle orders no memory.
__global__ void shuffle_for_syncwarp(int* out) {
  SF_DYNAMIC_SMEM(int, shared);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  const int zero = __shfl_sync(kFullWarp, 0, 0);
  out[threadIdx.x] = shared[threadIdx.x ^ 1] + zero;
}

__global__ void past_global(int* out) {
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (threadIdx.x == kThreads - 1) out[threadIdx.x + 1] = 0;
}

__global__ void past_static_shared(int* out) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x + 1] = static_cast<int>(threadIdx.x) + 1;
  __syncthreads();
  out[threadIdx.x] = threadIdx.x == 0 ? 0 : shared[threadIdx.x];
}

__global__ void write_past_dynamic_shared(int* out) {
  SF_DYNAMIC_SMEM(int, shared);
  shared[threadIdx.x + 1] = 0;
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

__global__ void read_past_dynamic_shared(int* out) {
  SF_DYNAMIC_SMEM(int, shared);
  const int found = shared[threadIdx.x + 1];  // -1: the bytes that fill the array, and those behind it
  out[threadIdx.x] = static_cast<int>(threadIdx.x) + found + 1;
}

__global__ void misaligned_vector(float* out, const float* in) {
  const float4 four = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + 1);
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

__global__ void uninitialised_dynamic_shared(float* out) {
  SF_DYNAMIC_SMEM(float, shared);
  if (threadIdx.x != 5) shared[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void barrier_in_branch(int* out) {
  if (threadIdx.x < 64) __syncthreads();
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

__global__ void barrier_in_both_branches(int* out) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

__global__ void exit_before_barrier(int* out) {
  if (threadIdx.x == 9) return;
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

__global__ void lane_missing_from_shuffle(int* out) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 != 7) value = __shfl_sync(kFullWarp, value, 0);
  __syncthreads();
  out[threadIdx.x] = value;
}

__global__ void shuffle_outside_mask(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}

__global__ void different_masks(int* out) {
  const unsigned mask = threadIdx.x % 2 == 0 ? kFullWarp : 0xaaaaaaaau;
  out[threadIdx.x] = __any_sync(mask, 1);
}

__global__ void failed_assertion(int* out) {
  assert(threadIdx.x != 50);
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

__global__ void trapped(int* out) {
  if (blockIdx.x == 1 && threadIdx.x == 3) __trap();
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

// ---- launches
// ----------------------------------------------------------------------------------------------------

constexpr size_t kSharedInts = kThreads * sizeof(int);

// Runs a kernel whose thread t is to leave t in out[t].
template <class Kernel>
bool leaves_own_index(Kernel kernel, int grid, size_t shared_bytes) {
  const auto out = std::make_unique<int[]>(kThreads);
  SF_LAUNCH(kernel, grid, kThreads, shared_bytes, nullptr, out.get());
  for (int t = 0; t < kThreads; ++t) {
    if (out[t] != t) return false;
  }
  return true;
}

template <class Kernel>
bool leaves_neighbour(Kernel kernel, int distance) {
  const auto out = std::make_unique<int[]>(kThreads);
  SF_LAUNCH(kernel, 1, kThreads, kSharedInts, nullptr, out.get());
  for (int t = 0; t < kThreads; ++t) {
    if (out[t] != (t ^ distance)) return false;
  }
  return true;
}

template <bool kBarrierBeforeReuse>
bool run_repeated_block_sum() {
  constexpr int kRounds = 3;
  const auto out = std::make_unique<int[]>(kThreads);
  SF_LAUNCH(repeated_block_sum<kBarrierBeforeReuse>, 2, kThreads, 0, nullptr, out.get(), kRounds);
  constexpr int kExpected = kRounds * kThreads * (kThreads - 1) / 2 + kThreads * kRounds * (kRounds - 1) / 2;
  for (int t = 0; t < kThreads; ++t) {
    if (out[t] != kExpected) return false;
  }
  return true;
}

template <bool kAtomic>
bool run_count_threads() {
  int count = 0;
  SF_LAUNCH(count_threads<kAtomic>, 2, kThreads, 0, nullptr, &count);
  return count == 2 * kThreads;
}

// More dynamic shared memory than a kernel gets that did not ask for it.
bool run_shared_without_opting_in() { return leaves_own_index(failed_assertion, 1, 64 * 1024); }

bool run_votes_and_shuffles() {
  int out[kThreads];
  SF_LAUNCH(votes_and_shuffles, 1, kThreads, 0, nullptr, out);
  for (int right : out) {
    if (right != 13) return false;
  }
  return true;
}

bool run_bf16_round_trip() {
  __nv_bfloat162 in[kThreads];
  float out[kThreads];
  for (int t = 0; t < kThreads; ++t) in[t] = __floats2bfloat162_rn(static_cast<float>(t), 1.0f);
  SF_LAUNCH(bf16_round_trip, 1, kThreads, 0, nullptr, out, in);
  for (int t = 0; t < kThreads; ++t) {
    if (out[t] != 2.0f * static_cast<float>(t) + 2.5f) return false;
  }
  return true;
}

bool run_misaligned_vector() {
  alignas(16) float in[4 * kThreads + 4] = {};
  float out[kThreads];
  SF_LAUNCH(misaligned_vector, 1, kThreads, 0, nullptr, out, in);
  return out[0] == 0.0f;
}

bool run_uninitialised_dynamic_shared() {
  float out[kThreads];
  SF_LAUNCH(uninitialised_dynamic_shared, 1, kThreads, kThreads * sizeof(float), nullptr, out);
  for (float value : out) {
    if (!(value == 1.0f)) return false;
  }
  return true;
}

bool run_empty_grid() { return leaves_own_index(failed_assertion, 0, 0); }

const Cases kCases = {
    {"block_sum", run_repeated_block_sum<true>},
    {"syncwarp", [] { return leaves_neighbour(exchange_with_neighbour<true>, 1); }},
    {"atomic_count", run_count_threads<true>},
    {"votes_and_shuffles", run_votes_and_shuffles},
    {"bf16", run_bf16_round_trip},
    {"missing_barrier_after_write",
     [] { return leaves_neighbour(missing_barrier_after_write, kThreads / 2); }},
    {"missing_barrier_before_reuse", run_repeated_block_sum<false>},
    {"missing_syncwarp", [] { return leaves_neighbour(exchange_with_neighbour<false>, 1); }},
    {"shuffle_for_syncwarp", [] { return leaves_neighbour(shuffle_for_syncwarp, 1); }},
    {"non_atomic_count", run_count_threads<false>},
    {"past_global", [] { return leaves_own_index(past_global, 1, 0); }},
    {"past_static_shared", [] { return leaves_own_index(past_static_shared, 1, 0); }},
    {"write_past_dynamic_shared", [] { return leaves_own_index(write_past_dynamic_shared, 1, kSharedInts); }},
    {"read_past_dynamic_shared", [] { return leaves_own_index(read_past_dynamic_shared, 1, kSharedInts); }},
    {"misaligned_vector", run_misaligned_vector},
    {"uninitialised_dynamic_shared", run_uninitialised_dynamic_shared},
    {"barrier_in_branch", [] { return leaves_own_index(barrier_in_branch, 1, 0); }},
    {"barrier_in_both_branches", [] { return leaves_own_index(barrier_in_both_branches, 1, 0); }},
    {"exit_before_barrier", [] { return leaves_own_index(exit_before_barrier, 1, 0); }},
    {"lane_missing_from_shuffle", [] { return leaves_own_index(lane_missing_from_shuffle, 1, 0); }},
    {"shuffle_outside_mask", [] { return leaves_own_index(shuffle_outside_mask, 1, 0); }},
    {"different_masks", [] { return leaves_own_index(different_masks, 1, 0); }},
    {"failed_assertion", [] { return leaves_own_index(failed_assertion, 1, 0); }},
    {"trap", [] { return leaves_own_index(trapped, 2, 0); }},
    {"empty_grid", run_empty_grid},
    {"shared_without_opting_in", run_shared_without_opting_in},
};

}  // namespace

int main(int argc, char** argv) {
  Cases cases = cluster_cases();
  cases.insert(kCases.begin(), kCases.end());
  const auto found = argc == 2 ? cases.find(argv[1]) : cases.end();
  if (found == cases.end()) {
    std::printf("usage: planted_bugs NAME\n");
    return 64;
  }
  try {
    return found->second() ? 0 : 1;
  } catch (const cuda_emulator::DeviceError& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
