// Which instruction set the row kernels use: chosen once from the processor, or named by a test.
#pragma once

#include <string>
#include <vector>

#include "row_kernels.h"

namespace slime_fused::cpu {

// Compiled into this build, narrowest first.
std::vector<std::string> compiled_isas();

// Of those, the ones this processor runs, narrowest first. Never empty.
std::vector<std::string> runnable_isas();

// The kernels in use: the widest runnable ones, or those named by the environment variable
// SLIME_FUSED_CPU_ISA. Throws std::invalid_argument if that names none that runs here.
const RowKernels& active_kernels();

// Switches to the named kernels (empty: back to the default) for all threads. Throws like active_kernels().
void use_isa(const std::string& name);

}  // namespace slime_fused::cpu
