#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace slime_fused::cpu {
namespace {

struct Variant {
  const RowKernels* kernels;
  bool (*runs_here)();
};

// The conditions are the flags csrc/cpu/CMakeLists.txt compiles each variant with.
const Variant kVariants[] = {
    {&scalar::kRowKernels, [] { return true; }},
#if defined(SLIME_FUSED_X86_VARIANTS)
    {&avx2::kRowKernels,
     [] {
       return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
              __builtin_cpu_supports("f16c") != 0;
     }},
    {&avx512::kRowKernels,
     [] {
       return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
              __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
              __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
              __builtin_cpu_supports("f16c") != 0;
     }},
#endif
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const RowKernels* find_runnable(const std::string& name) {
  const RowKernels* found = nullptr;
  for (const Variant& variant : kVariants) {
    if (variant.runs_here() && (name.empty() || name == variant.kernels->name)) found = variant.kernels;
  }
  if (found == nullptr) {
    throw std::invalid_argument("instruction set (SLIME_FUSED_CPU_ISA): expected one of " +
                                joined(runnable_isas()) + " on this processor, got '" + name + "'");
  }
  return found;
}

std::atomic<const RowKernels*> g_active{nullptr};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : kVariants) names.emplace_back(variant.kernels->name);
  return names;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : kVariants) {
    if (variant.runs_here()) names.emplace_back(variant.kernels->name);
  }
  return names;
}

const RowKernels& active_kernels() {
  const RowKernels* kernels = g_active.load();
  if (kernels == nullptr) {
    const char* const wanted = std::getenv("SLIME_FUSED_CPU_ISA");
    kernels = find_runnable(wanted == nullptr ? "" : wanted);
    g_active.store(kernels);
  }
  return *kernels;
}

void use_isa(const std::string& name) { g_active.store(name.empty() ? nullptr : find_runnable(name)); }

}  // namespace slime_fused::cpu
