// Instructions that have no name in C++, each with its model for the emulator.
//
// Asynchronous copies need sm_80; clusters and distributed shared memory need sm_90, and compile to the
// one-block case below it (the launcher never asks for a larger cluster there).
#pragma once

#include "launch.cuh"

#if !defined(SF_CUDA_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SF_HAS_CLUSTERS 1
#endif

namespace slime_fused::cuda {

// 2^x. One instruction, relative error below 2^-22; flushes denormal results to 0, keeps NaN, 2^-inf = 0.
__device__ inline float exp2_approx(float x) {
#ifdef SF_CUDA_EMULATOR
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 16 bytes that this thread alone will use: they need no line of L1.
__device__ inline uint4 load_once(const uint4* address) {
#ifdef SF_CUDA_EMULATOR
  return *address;
#else
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
#endif
}

// 16 bytes out. `streaming` marks the line as the first to leave L2. Both are written as one instruction:
// left to itself the compiler merges the plain store with a path for unaligned rows, and makes four of it.
__device__ inline void store_16(uint4* address, uint4 v, bool streaming) {
#ifdef SF_CUDA_EMULATOR
  static_cast<void>(streaming);
  *address = v;
#else
  if (streaming) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
#endif
}

// As store_16 with 8 bytes.
__device__ inline void store_8(uint2* address, uint2 v, bool streaming) {
#ifdef SF_CUDA_EMULATOR
  static_cast<void>(streaming);
  *address = v;
#else
  if (streaming) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" : : "l"(address), "r"(v.x), "r"(v.y) : "memory");
  } else {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(address), "r"(v.x), "r"(v.y) : "memory");
  }
#endif
}

// Makes the compiler forget what it knows about a vector: what was unpacked from it before is not kept in
// registers across this point, but unpacked again.
__device__ inline void forget(uint4& v) {
#ifdef SF_CUDA_EMULATOR
  static_cast<void>(v);
#else
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
#endif
}

// Starts a copy of 16 bytes from global to shared memory that passes through no register; both addresses
// `kOffset` vectors on, which costs no instruction.
template <int kOffset = 0>
__device__ inline void copy_async_16(uint4* shared, const uint4* global) {
#ifdef SF_CUDA_EMULATOR
  shared[kOffset] = global[kOffset];
#else
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;"
               :
               : "r"(target), "l"(global), "n"(kOffset * 16)
               : "memory");
#endif
}

// Closes the group of this thread's copies started since the last call.
__device__ inline void copy_async_commit() {
#ifndef SF_CUDA_EMULATOR
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until at most `pending` (0 to 3) of this thread's groups are under way.
__device__ inline void copy_async_wait(int pending) {
#ifdef SF_CUDA_EMULATOR
  static_cast<void>(pending);
#else
  if (pending == 3) {
    asm volatile("cp.async.wait_group 3;" : : : "memory");
  } else if (pending == 2) {
    asm volatile("cp.async.wait_group 2;" : : : "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" : : : "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" : : : "memory");
  }
#endif
}

__device__ inline int cluster_size() {
#if defined(SF_CUDA_EMULATOR)
  return cuda_emulator::cluster_size();
#elif defined(SF_HAS_CLUSTERS)
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

__device__ inline int cluster_rank() {
#if defined(SF_CUDA_EMULATOR)
  return cuda_emulator::cluster_rank();
#elif defined(SF_HAS_CLUSTERS)
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// The two halves of a barrier of the whole cluster, by which its blocks learn that the others run. It orders
// no memory but what transactions_begin wrote.
__device__ inline void cluster_arrive() {
#if defined(SF_CUDA_EMULATOR)
  cuda_emulator::cluster_arrive(cuda_emulator::Site::current());
#elif defined(SF_HAS_CLUSTERS)
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory");
#endif
}

__device__ inline void cluster_wait() {
#if defined(SF_CUDA_EMULATOR)
  cuda_emulator::cluster_wait(cuda_emulator::Site::current());
#elif defined(SF_HAS_CLUSTERS)
  asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
#endif
}

// Makes 8 bytes of this block's shared memory, aligned, a barrier that opens when `bytes` bytes have been
// stored by store_async. By one thread, before the barrier of the cluster that lets the others store.
__device__ inline void transactions_begin(void* barrier, int bytes) {
#if defined(SF_CUDA_EMULATOR)
  cuda_emulator::transactions_begin(barrier, bytes, cuda_emulator::Site::current());
#elif defined(SF_HAS_CLUSTERS)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n\t"
      "fence.mbarrier_init.release.cluster;"
      :
      : "r"(address), "r"(bytes)
      : "memory");
#else
  static_cast<void>(barrier), static_cast<void>(bytes);
#endif
}

// Waits until all the bytes are there and visible to this thread.
__device__ inline void transactions_wait(void* barrier) {
#if defined(SF_CUDA_EMULATOR)
  cuda_emulator::transactions_wait(barrier, cuda_emulator::Site::current());
#elif defined(SF_HAS_CLUSTERS)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  int is_open = 0;
  while (is_open == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(is_open)
        : "r"(address)
        : "memory");
  }
#else
  static_cast<void>(barrier);
#endif
}

// Stores to the shared variable of block `rank` of this cluster that has the address of `mine` here, and
// counts on the barrier there that has the address of `barrier` here.
template <class T>
__device__ inline void store_async(T* mine, const T& value, int rank, void* barrier) {
#if defined(SF_CUDA_EMULATOR)
  cuda_emulator::store_async(mine, value, rank, barrier, cuda_emulator::Site::current());
#elif defined(SF_HAS_CLUSTERS)
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  const auto counted = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  if constexpr (sizeof(T) == sizeof(float2)) {
    asm volatile(
        "{\n\t.reg .b32 to, bar;\n\t"
        "mapa.shared::cluster.u32 to, %0, %4;\n\t"
        "mapa.shared::cluster.u32 bar, %1, %4;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%2, %3}, [bar];\n\t}"
        :
        : "r"(target), "r"(counted), "f"(value.x), "f"(value.y), "r"(rank)
        : "memory");
  } else {
    asm volatile(
        "{\n\t.reg .b32 to, bar;\n\t"
        "mapa.shared::cluster.u32 to, %0, %3;\n\t"
        "mapa.shared::cluster.u32 bar, %1, %3;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %2, [bar];\n\t}"
        :
        : "r"(target), "r"(counted), "f"(value), "r"(rank)
        : "memory");
  }
#else
  static_cast<void>(mine), static_cast<void>(value), static_cast<void>(rank), static_cast<void>(barrier);
#endif
}

}  // namespace slime_fused::cuda
