// What the emulated CUDA runtime and the scheduler share: launch limits and the dynamic shared memory of a
// launch.
#pragma once

#include <cstddef>

#include "scheduler.h"

namespace cuda_emulator {

// Throws DeviceError if a GPU of compute capability 9.0 would refuse this launch.
void check_launch(const LaunchShape& shape);

// The dynamic shared memory of one launch, of exactly the size asked for. What lies behind it is a redzone
// under AddressSanitizer and a canary otherwise.
class DynamicSharedMemory {
 public:
  explicit DynamicSharedMemory(size_t bytes);
  ~DynamicSharedMemory();
  DynamicSharedMemory(const DynamicSharedMemory&) = delete;
  DynamicSharedMemory& operator=(const DynamicSharedMemory&) = delete;

  char* data() const { return data_; }
  void fill();          // to 0xFF: NaN in every float format
  bool intact() const;  // false once something has written behind it

 private:
  size_t bytes_;
  char* data_ = nullptr;
};

}  // namespace cuda_emulator
