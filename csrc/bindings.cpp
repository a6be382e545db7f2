// The extension module slime_fused._C: kernels on raw addresses, no torch header and no link to libtorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/bindings_cpu.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace slime_fused {

#if defined(SLIME_FUSED_WITH_CUDA)
void bind_cuda(py::module_& module);  // csrc/cuda/bindings_cuda.cpp
#endif

namespace {

// What was compiled, and which of it is in use.
py::dict build_info() {
  py::dict info;
  info["compiler"] = SLIME_FUSED_COMPILER;
  info["build_type"] = SLIME_FUSED_BUILD_TYPE;
  info["cpu_isas"] = cpu::compiled_isas();
  info["cpu_isa"] = cpu::active_kernels().name;
#if defined(SLIME_FUSED_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_toolkit"] = SLIME_FUSED_CUDA_TOOLKIT;
  info["cuda_archs"] = SLIME_FUSED_CUDA_ARCH_LIST;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace slime_fused

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of slime_fused.";
  module.def("build_info", &slime_fused::build_info, "What was compiled, and which of it is in use.");
  py::module_ cpu = module.def_submodule("cpu", "CPU kernels on raw addresses.");
  slime_fused::cpu::bind(cpu);
#if defined(SLIME_FUSED_WITH_CUDA)
  py::module_ cuda = module.def_submodule("cuda", "CUDA kernels on raw device addresses.");
  slime_fused::bind_cuda(cuda);
#endif
}
