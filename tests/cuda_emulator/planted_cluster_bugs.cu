// As planted_bugs.cu, for kernels whose blocks share a cluster: one warp a block.
#include <memory>

#include "cuda_emulator.h"
#include "planted_bugs.h"

namespace {

constexpr int kClusterInts = 8;  // dynamic shared memory of every kernel here
constexpr unsigned kFullWarp = 0xffffffffu;

void cluster_arrive(cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::cluster_arrive(site);
}
void cluster_wait(cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::cluster_wait(site);
}
int* in_block(int* mine, int rank, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return static_cast<int*>(cuda_emulator::shared_of_block(mine, sizeof(int), rank, site));
}

void begin(int* barrier, int ints, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::transactions_begin(barrier, ints * static_cast<int>(sizeof(int)), site);
}
void store(int* mine, int value, int rank, int* barrier,
           cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::store_async(mine, value, rank, barrier, site);
}
void wait(int* barrier, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::transactions_wait(barrier, site);
}

void meet() {
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}

// ---- a correct kernel, and two that miss a barrier

enum class Meet { before_reading, after_reading };

// Adds up the thread indices of all blocks of the cluster: each tells every other its own sum, in shared
// memory of the other's.
template <bool kBeginTogether, Meet kMeet>
__global__ void cluster_sum(int* out) {
  SF_DYNAMIC_SMEM(int, sums);
  const int rank = cuda_emulator::cluster_rank();
  const int size = cuda_emulator::cluster_size();
  if (kBeginTogether) meet();
  const int mine = __reduce_add_sync(kFullWarp, static_cast<int>(threadIdx.x)) + rank;
  if (static_cast<int>(threadIdx.x) < size) *in_block(sums + rank, static_cast<int>(threadIdx.x)) = mine;
  if (kMeet == Meet::before_reading) meet();
  int total = 0;
  for (int r = 0; r < size; ++r) total += sums[r];
  if (threadIdx.x == 0) out[blockIdx.x] = total;
  if (kMeet == Meet::after_reading) meet();
}

// The same through transactions; `kExpected` ints for each block of four, which all four send.
enum class Wait { before_reading, after_reading };

template <bool kBeginTogether, int kExpected, Wait kWait>
__global__ void transaction_sum(int* out) {
  SF_DYNAMIC_SMEM(int, shared);
  int* const sums = shared + 2;
  const int rank = cuda_emulator::cluster_rank();
  const int size = cuda_emulator::cluster_size();
  if (threadIdx.x == 0 && (kBeginTogether || rank == 0)) begin(shared, kExpected);
  meet();
  const int mine = __reduce_add_sync(kFullWarp, static_cast<int>(threadIdx.x)) + rank;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < size) store(sums + rank, mine, lane, shared);
  if (kWait == Wait::before_reading) wait(shared);
  int total = 0;
  for (int r = 0; r < size; ++r) total += sums[r];
  if (threadIdx.x == 0) out[blockIdx.x] = total;
  if (kWait == Wait::after_reading) wait(shared);
}

__global__ void no_wait_for_a_transaction(int*) {
  SF_DYNAMIC_SMEM(int, shared);
  if (threadIdx.x == 0) begin(shared, 1);
  meet();
  if (cuda_emulator::cluster_rank() == 0 && threadIdx.x == 0) store(shared + 2, 1, 1, shared);
}

__global__ void begin_a_barrier_twice(int*) {
  SF_DYNAMIC_SMEM(int, shared);
  begin(shared, 1);
}

// ---- planted bugs

// Blocks that return before the barrier are not waited for, and may not be written to after it.
__global__ void write_to_a_block_that_exited(int*) {
  SF_DYNAMIC_SMEM(int, shared);
  if (cuda_emulator::cluster_rank() == 1) return;
  cluster_arrive();
  cluster_wait();
  *in_block(shared, 1) = 1;
}

__global__ void no_barrier_after_a_write(int*) {
  SF_DYNAMIC_SMEM(int, shared);
  meet();
  if (cuda_emulator::cluster_rank() == 0 && threadIdx.x == 0) *in_block(shared, 1) = 1;
}

__global__ void write_beyond_the_cluster(int*) {
  SF_DYNAMIC_SMEM(int, shared);
  cluster_arrive();
  cluster_wait();
  *in_block(shared, cuda_emulator::cluster_size()) = 1;
}

__global__ void write_beyond_the_other_blocks_memory(int*) {
  SF_DYNAMIC_SMEM(int, shared);
  cluster_arrive();
  cluster_wait();
  *in_block(shared + kClusterInts, 0) = 1;
}

__global__ void half_a_warp_at_the_cluster_barrier(int*) {
  if (threadIdx.x % 32 < 16) {
    cluster_arrive();
    cluster_wait();
  }
}

__global__ void arrive_twice(int*) {
  cluster_arrive();
  cluster_arrive();
  cluster_wait();
}

__global__ void wait_without_arriving(int*) { cluster_wait(); }

// ---- launches

// Two clusters of `cluster` one-warp blocks.
template <class Kernel>
std::unique_ptr<int[]> run_clusters(Kernel kernel, unsigned cluster,
                                    size_t shared_bytes = kClusterInts * sizeof(int)) {
  auto out = std::make_unique<int[]>(2 * cluster);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{dim3(2 * cluster), dim3(32), shared_bytes, nullptr, &attribute, 1};
  cudaLaunchKernelEx(&config, kernel, out.get());
  return out;
}

template <auto kKernel>
bool run_sum() {
  constexpr int kBlocks = 4;
  const auto out = run_clusters(kKernel, kBlocks);
  constexpr int kExpected = kBlocks * 32 * 31 / 2 + kBlocks * (kBlocks - 1) / 2;
  for (int block = 0; block < 2 * kBlocks; ++block) {
    if (out[block] != kExpected) return false;
  }
  return true;
}

template <auto kKernel>
bool run_broken_clusters() {
  run_clusters(kKernel, 2);
  return true;
}

bool run_large_cluster() {
  run_clusters(arrive_twice, 9);
  return true;
}

bool run_cluster_that_does_not_divide_the_grid() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {2, 1, 1};
  const cudaLaunchConfig_t config{dim3(3), dim3(32), 0, nullptr, &attribute, 1};
  int out[3];
  cudaLaunchKernelEx(&config, arrive_twice, out);
  return true;
}

}  // namespace

Cases cluster_cases() {
  return {
      {"cluster_sum", run_sum<cluster_sum<true, Meet::before_reading>>},
      {"cluster_write_before_begin", run_sum<cluster_sum<false, Meet::before_reading>>},
      {"cluster_read_before_barrier", run_sum<cluster_sum<true, Meet::after_reading>>},
      {"transaction_sum", run_sum<transaction_sum<true, 4, Wait::before_reading>>},
      {"transaction_read_before_wait", run_sum<transaction_sum<true, 4, Wait::after_reading>>},
      {"transaction_no_wait", run_broken_clusters<no_wait_for_a_transaction>},
      {"transaction_expects_more", run_sum<transaction_sum<true, 5, Wait::before_reading>>},
      {"transaction_expects_less", run_sum<transaction_sum<true, 3, Wait::before_reading>>},
      {"transaction_not_begun", run_sum<transaction_sum<false, 4, Wait::before_reading>>},
      {"transaction_begun_twice", run_broken_clusters<begin_a_barrier_twice>},
      {"cluster_no_last_barrier", run_broken_clusters<no_barrier_after_a_write>},
      {"cluster_write_to_exited", run_broken_clusters<write_to_a_block_that_exited>},
      {"cluster_write_beyond_cluster", run_broken_clusters<write_beyond_the_cluster>},
      {"cluster_write_beyond_memory", run_broken_clusters<write_beyond_the_other_blocks_memory>},
      {"cluster_half_a_warp", run_broken_clusters<half_a_warp_at_the_cluster_barrier>},
      {"cluster_arrive_twice", run_broken_clusters<arrive_twice>},
      {"cluster_wait_without_arriving", run_broken_clusters<wait_without_arriving>},
      {"cluster_too_large", run_large_cluster},
      {"cluster_does_not_divide_grid", run_cluster_that_does_not_divide_the_grid},
  };
}
