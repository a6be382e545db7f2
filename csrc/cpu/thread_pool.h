// A small persistent thread pool: parallel_for over a range that is split by index, never by time.
//
// The package keeps its own threads so that it loads no second OpenMP runtime next to the one in torch.
// Properties that callers rely on:
//   - part i of n is always [total * i / n, total * (i + 1) / n), so the work of an index never depends on
//   timing;
//   - the calling thread takes part 0; a call made while another is running runs all parts itself;
//   - the first exception of a part is rethrown in the caller, after all parts have ended;
//   - idle threads sleep; after fork() the child starts with no threads and makes its own on demand.
#pragma once

#include <cstdint>
#include <functional>

namespace slime_fused::cpu {

// Calls body(begin, end) on up to `num_threads` disjoint parts of [0, total) and returns when all have ended.
// Parts are no smaller than `min_part` indices. body must not call parallel_for.
void parallel_for(int64_t total, int64_t min_part, int num_threads,
                  const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace slime_fused::cpu
