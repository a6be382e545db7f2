// The part of the CUDA runtime API that the kernels' host code uses, for one imaginary device of compute
// capability 9.0. A call that is missing here is a link error, not a silent success.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>

#include "runtime_state.h"

namespace cuda_emulator {
namespace {

constexpr uint64_t kMaxThreads = 1024;
constexpr unsigned kMaxBlockZ = 64;
constexpr unsigned kMaxGridX = 0x7fffffffu;
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kMaxSharedBytes = 227 * 1024;       // the limit of one block
constexpr size_t kSharedBytesByDefault = 48 * 1024;  // what a kernel may use that did not opt in
constexpr unsigned kMaxCluster = 16;
constexpr unsigned kMaxPortableCluster = 8;
constexpr size_t kSharedAlignment = 1024;
constexpr unsigned char kFill = 0xFF;
#ifdef CUDA_EMULATOR_ASAN
constexpr size_t kCanaryBytes = 0;  // the allocator's own redzone begins at once
#else
constexpr size_t kCanaryBytes = 256;
#endif

std::string to_string(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

int compiled_for = 90;  // 10 * major + minor

// What cudaFuncSetAttribute has set, by kernel.
struct KernelAttributes {
  size_t shared_bytes = kSharedBytesByDefault;
  bool allows_large_cluster = false;
};

std::map<const void*, KernelAttributes>& kernel_attributes() {
  static std::map<const void*, KernelAttributes> attributes;
  return attributes;
}

}  // namespace

void set_compiled_for(int capability) { compiled_for = capability; }

LaunchShape shape_of(const cudaLaunchConfig_t& config, const void* kernel) {
  LaunchShape shape{config.gridDim, config.blockDim, config.dynamicSmemBytes, "cudaLaunchKernelEx", 1,
                    kernel};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) {
      throw DeviceError("cudaLaunchKernelEx: unknown attribute " + std::to_string(attribute.id));
    }
    const auto& dims = attribute.val.clusterDim;
    if (dims.y != 1 || dims.z != 1) throw DeviceError("cudaLaunchKernelEx: clusters lie along x here");
    shape.cluster = dims.x;
  }
  return shape;
}

void check_launch(const LaunchShape& shape) {
  const dim3 grid = shape.grid, block = shape.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto refuse = [&](const std::string& why) {
    throw DeviceError(std::string(shape.name) + ": " + why);
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ) {
    refuse("grid " + to_string(grid) + " is outside (1..2^31 - 1, 1..65535, 1..65535)");
  }
  if (threads == 0 || threads > kMaxThreads || block.z > kMaxBlockZ) {
    refuse("block " + to_string(block) + " has no thread, more than 1024, or more than 64 along z");
  }
  if (shape.dynamic_shared_bytes > kMaxSharedBytes) {
    refuse(std::to_string(shape.dynamic_shared_bytes) + " bytes of dynamic shared memory, the limit is " +
           std::to_string(kMaxSharedBytes));
  }
  const KernelAttributes allowed = kernel_attributes()[shape.kernel];
  if (shape.dynamic_shared_bytes > allowed.shared_bytes) {
    refuse(std::to_string(shape.dynamic_shared_bytes) +
           " bytes of dynamic shared memory, the kernel opted in to " + std::to_string(allowed.shared_bytes));
  }
  const unsigned limit = allowed.allows_large_cluster ? kMaxCluster : kMaxPortableCluster;
  if (shape.cluster == 0 || shape.cluster > limit || grid.x % shape.cluster != 0) {
    refuse("clusters of " + std::to_string(shape.cluster) + " blocks in a grid of " + std::to_string(grid.x) +
           ": the size must divide the grid and be at most " + std::to_string(limit));
  }
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

extern "C" {

// Whatever could set an error throws instead.
cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid device";
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  auto& attributes = cuda_emulator::kernel_attributes()[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<size_t>(value) > cuda_emulator::kMaxSharedBytes) {
      throw cuda_emulator::DeviceError("cudaFuncSetAttribute: " + std::to_string(value) +
                                       " bytes of dynamic shared memory, the limit is " +
                                       std::to_string(cuda_emulator::kMaxSharedBytes));
    }
    attributes.shared_bytes = static_cast<size_t>(value);
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes.allows_large_cluster = value != 0;
  } else {
    throw cuda_emulator::DeviceError("cudaFuncSetAttribute: unknown attribute " + std::to_string(attribute));
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = cuda_emulator::compiled_for;
  attributes->maxDynamicSharedSizeBytes =
      static_cast<int>(cuda_emulator::kernel_attributes()[kernel].shared_bytes);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

// `assert` in device code ends the launch: files with kernels are compiled with __assert_fail renamed to
// this.
[[noreturn]] void cuda_emulator_assert_fail(const char* expression, const char* file, unsigned line,
                                            const char*) {
  cuda_emulator::record_failure(std::string("assertion failed: ") + expression + " at " + file + ":" +
                                std::to_string(line));
  cuda_emulator::abandon_block();
}
}
