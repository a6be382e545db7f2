// Memory of large scratch buffers: in large pages, and kept from one call to the next while idle.
//
// A fresh page of 4 KiB costs a fault and a clearing of its own, 1.5 us on an EPYC virtual machine: 50 ms for
// the 131 MB of 2048 x 32000 logits in bfloat16, whose three products (D = 1024) take 900 ms on one core. In
// pages of 2 MiB it is 8 ms, and 4 ms where the memory is still there from the call before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace slime_fused::cpu {

// Uninitialised memory that this object alone owns; its destructor leaves it to the cache or gives it back.
class Scratch {
 public:
  // Throws std::bad_alloc where the system has none left.
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;     // as asked for
  int64_t capacity_ = 0;  // of the mapping, at least as many
};

// The most bytes that idle scratch may take, all together; what is above is given back at once. 0: none.
void set_cache_limit(int64_t bytes);
int64_t cache_limit();

// Bytes of idle scratch now.
int64_t cached_bytes();

// Gives all idle scratch back to the system.
void empty_cache();

}  // namespace slime_fused::cpu
