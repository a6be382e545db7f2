// Runs the threads of one CUDA block, or of all blocks of one cluster, as fibers on one host thread; the
// clusters of a grid run one after another.
//
// A fiber runs until it parks: at a block barrier until every thread of the block is there, at a warp
// collective until every lane of its mask is there. What a GPU would answer with a hang or with silent
// nonsense (a barrier that some threads skip, a lane that is missing from its mask) ends the launch with a
// DeviceError instead. Everything in this interface passes plain values: the bookkeeping is read and written
// by uninstrumented code only, so that ThreadSanitizer sees the kernels' own accesses and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

namespace cuda_emulator {

using Site = std::source_location;

// A kernel broke a rule. The message names the kernel, the thread, its block and the line.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which threads that could run do run. `random` now and then lets one warp run ahead as far as
// it can: shuffling alone rarely separates two warps far enough to expose a missing barrier.
enum class Order { fixed, reversed, random };

// Overrides CUDA_EMULATOR_SCHEDULE ("fixed", "reversed" or "random:SEED"), which is read at the first launch.
void set_schedule(Order order, uint64_t seed);

// Coordinates of the calling thread; constant while it lives.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_dim();
[[gnu::const]] dim3 grid_dim();
[[gnu::const]] int cluster_rank();
[[gnu::const]] int cluster_size();

// The block's dynamic shared memory: 0xFF bytes (NaN in every float format) when the block begins.
void* dynamic_shared_memory();

enum class BarrierKind { plain, any, all, count };
int block_barrier(BarrierKind kind, int predicate, const Site& site);

// The two halves of a barrier of the cluster; threads that exited are not waited for.
void cluster_arrive(const Site& site);
void cluster_wait(const Site& site);

// Where the variable of `bytes` bytes at `mine`, in this block's dynamic shared memory, lies in that of block
// `rank` of the cluster. It may be used only while that block runs.
void* shared_of_block(void* mine, size_t bytes, int rank, const Site& site);

// A barrier of 8 bytes in this block's dynamic shared memory that expects `bytes` bytes to be stored.
void transactions_begin(void* barrier, int64_t bytes, const Site& site);

// Waits until they are there.
void transactions_wait(void* barrier, const Site& site);

// The two halves of a store that the barrier of block `rank` counts: where `mine` lies there, and that it is
// written.
void* transaction_target(void* mine, size_t bytes, int rank, const Site& site);
void transaction_stored(void* barrier, size_t bytes, int rank, const Site& site);

enum class WarpOp {
  sync,
  align,  // lanes meet, and no memory is ordered
  shuffle_index,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  match_any,
  reduce_add,
  reduce_min_unsigned,
  reduce_max_unsigned,
  reduce_min_signed,
  reduce_max_signed,
  reduce_and,
  reduce_or,
  reduce_xor,
};

// Parks until all lanes of `mask` have called with the same op and mask; the last one computes every result.
// `parameter` is the shuffle's source lane, delta or lane mask, `width` its segment width.
uint64_t warp_collective(WarpOp op, uint32_t mask, uint64_t value, int parameter, int width,
                         const Site& site);

// Bits of the lanes of this warp that have not exited.
uint32_t live_lanes();

// Notes what the calling thread did wrong. To be followed by abandon_block(): two steps, because nothing on a
// fiber's stack is ever destroyed after the second.
void record_failure(const std::string& what);
void record_failure(const std::string& what, const Site& site);

// Ends the launch; the fibers of the block are left where they are.
[[noreturn]] void abandon_block();

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
  const char* name = "";
  unsigned cluster = 1;          // blocks along x
  const void* kernel = nullptr;  // whose attributes (cudaFuncSetAttribute) apply
};

// The capability that all kernels say they were compiled for, as 10 * major + minor; 90 unless told.
void set_compiled_for(int capability);

// What a cudaLaunchKernelEx asks for. Throws DeviceError for an attribute that the emulator does not know.
LaunchShape shape_of(const cudaLaunchConfig_t& config, const void* kernel);

// Runs body() once per thread. Throws DeviceError where a kernel breaks a rule, and where a GPU of compute
// capability 9.0 would refuse the launch.
void run_grid(const LaunchShape& shape, const std::function<void()>& body);

}  // namespace cuda_emulator
