#pragma once

#include <pybind11/pybind11.h>

namespace slime_fused::cpu {

// Adds the CPU kernels to `module`. Buffers come as integer addresses; the caller keeps them alive.
void bind(pybind11::module_& module);

}  // namespace slime_fused::cpu
