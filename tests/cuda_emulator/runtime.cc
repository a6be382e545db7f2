// The part of the CUDA runtime API that the kernels' host code uses, for one imaginary device of compute
// capability 9.0. A call that is missing here is a link error, not a silent success.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <utility>

#include "runtime_state.h"

namespace cuda_emulator {
namespace {

constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr int kOptInSharedBytes = 227 * 1024;
constexpr size_t kSharedAlignment = 1024;
constexpr unsigned char kFill = 0xFF;
#ifdef CUDA_EMULATOR_ASAN
constexpr size_t kCanaryBytes = 0;
#else
constexpr size_t kCanaryBytes = 256;
#endif

cudaError_t last_error = cudaSuccess;

std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

bool check_launch(const LaunchShape& shape) {
  const dim3 grid = shape.grid, block = shape.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool bad_grid = grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
                        grid.y > kMaxGridYZ || grid.z > kMaxGridYZ;
  if (bad_grid || threads == 0 || threads > kMaxThreadsPerBlock || block.z > 64) {
    return record(cudaErrorInvalidConfiguration) == cudaSuccess;
  }
  const auto limit = shared_limits().find(shape.kernel);
  const size_t most = limit == shared_limits().end()
                          ? kDefaultSharedBytes
                          : std::max(kDefaultSharedBytes, static_cast<size_t>(limit->second));
  return record(shape.dynamic_shared_bytes > most ? cudaErrorInvalidValue : cudaSuccess) == cudaSuccess;
}

DynamicSharedMemory::DynamicSharedMemory(size_t bytes) : bytes_(bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, bytes + kCanaryBytes) != 0) throw std::bad_alloc();
  data_ = static_cast<char*>(memory);
}

DynamicSharedMemory::~DynamicSharedMemory() { std::free(data_); }

void DynamicSharedMemory::fill() { std::memset(data_, kFill, bytes_ + kCanaryBytes); }

bool DynamicSharedMemory::intact() const {
  return std::all_of(data_ + bytes_, data_ + bytes_ + kCanaryBytes,
                     [](char byte) { return static_cast<unsigned char>(byte) == kFill; });
}

}  // namespace cuda_emulator

using cuda_emulator::last_error;
using cuda_emulator::record;

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    default:
      return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "unknown error";
  }
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return record(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 2;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = cuda_emulator::kMaxThreadsPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = cuda_emulator::kDefaultSharedBytes;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_emulator::kOptInSharedBytes;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    default:
      return record(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > cuda_emulator::kOptInSharedBytes) return record(cudaErrorInvalidValue);
    cuda_emulator::shared_limits()[kernel] = value;
  }
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

// `assert` in device code ends the launch: files with kernels are compiled with __assert_fail renamed to
// this.
[[noreturn]] void cuda_emulator_assert_fail(const char* expression, const char* file, unsigned line,
                                            const char*) {
  const std::string what =
      std::string("assertion failed: ") + expression + " at " + file + ":" + std::to_string(line);
  cuda_emulator::fail_thread(what.c_str());
}
}
