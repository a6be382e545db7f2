// How the blocks of a cluster, their warps and their lanes share one row.
//
// A block owns a run of neighbouring vectors. Its warps take tiles of 128 of them in turn, four to a lane, 32
// apart: the loads of a warp are whole lines, and all addresses in a tile but the first are offsets within
// the instructions. The row's unaligned edges go to the first block. Who owns an element is a pure function
// of its index, so the thread that wrote a vector is the one that may patch an element of it later without a
// barrier.
#pragma once

#include "vec_io.cuh"

namespace slime_fused::cuda {

// A warp takes 128 neighbouring vectors at a time, four to a lane, so that all but the first address of a
// tile are offsets within the instructions.
constexpr int kTile = 4;
inline constexpr int kTileVectors = kTile * 32;

// The part of a row that one block owns: vectors [begin, begin + count); the first block has the edges too.
struct Slice {
  RowSpan span;
  int begin, count;

  template <class T>
  __device__ static Slice of(const T* row, int cols, int rank, int block_vectors) {
    const RowSpan span = RowSpan::of(row, cols);
    const int begin = rank * block_vectors;
    const int left = span.vectors - begin;
    return {span, begin, left < 0 ? 0 : (left < block_vectors ? left : block_vectors)};
  }

  // The edge element of thread `tid` of block `rank`, or -1.
  template <int E>
  __device__ int edge_of(int tid, int rank) const {
    return rank == 0 && span.has_edges() ? span.edge_of<E>(tid) : -1;
  }

  // Whether thread `tid` writes element `v` of the row, where the block's first `staged` vectors are one run
  // of tiles and the rest another.
  template <int E>
  __device__ bool is_owner(int v, int tid, int threads, int rank, int staged) const {
    if (v < span.head || v >= span.tail) return edge_of<E>(tid, rank) == v;
    int i = static_cast<int>(static_cast<unsigned>(v - span.head) / E) - begin;
    if (i < 0 || i >= count) return false;
    if (i >= staged) i -= staged;
    return ((i ^ tid) & 31) == 0 && (i / kTileVectors) % (threads / 32) == tid / 32;
  }
};

// Zeroes the block's part of a row.
template <class T>
__device__ void zero_slice(T* row, int cols, int rank, int block_vectors) {
  const Slice slice = Slice::of(row, cols, rank, block_vectors);
  auto* const vectors = reinterpret_cast<uint4*>(row + slice.span.head) + slice.begin;
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < slice.count; i += static_cast<int>(blockDim.x)) vectors[i] = make_uint4(0, 0, 0, 0);
  const int edge = slice.edge_of<kVecElems<T>>(tid, rank);
  if (edge >= 0) row[edge] = from_float<T>(0.f);
}

}  // namespace slime_fused::cuda
