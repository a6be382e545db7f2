// The Python module _C_emulated: the CUDA bindings of slime_fused._C over the emulator, and its scheduler's
// knobs.
#include <pybind11/pybind11.h>

#include "scheduler.h"

namespace py = pybind11;

namespace slime_fused {
void bind_cuda(py::module_& module);  // csrc/cuda
}

PYBIND11_MODULE(_C_emulated, module) {
  using cuda_emulator::Order;
  py::register_exception<cuda_emulator::DeviceError>(module, "DeviceError", PyExc_RuntimeError);
  module.def(
      "set_schedule",
      [](const std::string& order, uint64_t seed) {
        if (order != "fixed" && order != "reversed" && order != "random") {
          throw py::value_error("order: expected fixed, reversed or random, got " + order);
        }
        cuda_emulator::set_schedule(order == "fixed"      ? Order::fixed
                                    : order == "reversed" ? Order::reversed
                                                          : Order::random,
                                    seed);
      },
      py::arg("order"), py::arg("seed") = 0,
      "The order in which threads of a block run: fixed, reversed or random.");
  module.def("set_compiled_for", &cuda_emulator::set_compiled_for, py::arg("capability"),
             "The capability that kernels say they were compiled for; 90 unless told.");
  py::module_ cuda = module.def_submodule("cuda", "The CUDA kernels on host addresses.");
  slime_fused::bind_cuda(cuda);
}
