// Python bindings of the CUDA kernels: integers become pointers and streams, the GIL is released while they
// launch.
//
// The caller (slime_fused/backends/cuda.py) has made `device` PyTorch's current device; cudaSetDevice here
// tells the statically linked runtime of this module the same, which it keeps apart from PyTorch's own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace slime_fused {
namespace {

namespace py = pybind11;
using py::literals::operator""_a;
using Address = std::uintptr_t;  // 0 stands for "none"

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void use_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    throw std::runtime_error("cudaSetDevice(" + std::to_string(device) +
                             ") failed: " + cudaGetErrorString(error));
  }
}

// Versions and device count, or the runtime's message; never throws, so it works on a machine without a
// driver.
py::dict runtime_info() {
  py::dict info;
  int runtime = 0;
  int driver = 0;
  int devices = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  info["runtime_version"] = runtime;
  info["driver_version"] = driver;  // 0: no driver
  info["device_count"] = error == cudaSuccess ? devices : 0;
  info["error"] =
      error == cudaSuccess ? py::object(py::none()) : py::object(py::str(cudaGetErrorString(error)));
  cudaGetLastError();  // an absent driver is an answer here, not an error of the next launch
  return info;
}

void bind_row_plan(py::module_& module) {
  using cuda::RowPlan;
  // module_local: two builds of these kernels may be loaded at once, as the tests do.
  py::enum_<cuda::RowStage>(module, "RowStage", py::module_local(),
                            "Where a row waits between its two visits.")
      .value("shared", cuda::RowStage::shared)
      .value("registers", cuda::RowStage::registers);
  py::class_<RowPlan>(module, "RowPlan", py::module_local(),
                      "How softmax_residual lays rows out on the device (csrc/cuda/row_plan.h).")
      .def(py::init([](cuda::RowStage stage, int cluster, int threads, int shared_vectors, int pad_bytes,
                       bool streaming, int64_t max_blocks) {
             const RowPlan plan{stage, cluster, threads, shared_vectors, pad_bytes, streaming, max_blocks};
             cuda::check_row_plan(plan);
             return plan;
           }),
           "stage"_a = cuda::RowStage::shared, "cluster"_a = 1, "threads"_a = 512, "shared_vectors"_a = 0,
           "pad_bytes"_a = 0, "streaming"_a = false, "max_blocks"_a = 0)
      .def_readonly("stage", &RowPlan::stage)
      .def_readonly("cluster", &RowPlan::cluster)
      .def_readonly("threads", &RowPlan::threads)
      .def_readonly("shared_vectors", &RowPlan::shared_vectors)
      .def_readonly("pad_bytes", &RowPlan::pad_bytes)
      .def_readonly("streaming", &RowPlan::streaming)
      .def_readonly("max_blocks", &RowPlan::max_blocks)
      .def("__repr__", [](const RowPlan& p) {
        return "RowPlan(stage=" + std::string(p.stage == cuda::RowStage::shared ? "shared" : "registers") +
               ", cluster=" + std::to_string(p.cluster) + ", threads=" + std::to_string(p.threads) +
               ", shared_vectors=" + std::to_string(p.shared_vectors) +
               (p.pad_bytes > 0 ? ", pad_bytes=" + std::to_string(p.pad_bytes) : "") +
               (p.streaming ? ", streaming=True" : "") +
               (p.max_blocks > 0 ? ", max_blocks=" + std::to_string(p.max_blocks) : "") + ")";
      });
  module.def(
      "row_kernel_capability",
      [](int device) {
        use_device(device);
        return cuda::row_kernel_capability();
      },
      "device"_a,
      "10 * major + minor that softmax_residual was compiled for on this device: its plan may not ask for "
      "more.");
  module.def(
      "choose_row_plan", &cuda::choose_row_plan, "cols"_a, "elem_bytes"_a, "capability"_a,
      "The plan that softmax_residual takes for rows of `cols` elements on a device of this capability.");
  module.def(
      "row_plan_candidates", &cuda::row_plan_candidates, "cols"_a, "elem_bytes"_a, "capability"_a,
      "Plans worth measuring for such rows, the chosen one first; `softmax_residual` takes each as `plan`.");
}

void bind_rows(py::module_& module) {
  module.def(
      "softmax_residual",
      [](Address logits, Address out, int64_t rows, int64_t cols, int64_t logits_stride, int64_t out_stride,
         int dtype, int out_dtype, Address labels, Address bias, double scale, double softcap,
         double temperature, double label_smoothing, double z_loss, Address row_max, Address row_sum,
         Address logp, Address loss, const cuda::RowPlan& plan, int device, Address stream) {
        const py::gil_scoped_release unlocked;
        use_device(device);
        cuda::softmax_residual({pointer(logits), pointer(out), rows, cols, logits_stride, out_stride, 0,
                                static_cast<DType>(dtype), static_cast<DType>(out_dtype)},
                               pointer<const int64_t>(labels), {pointer(bias), scale, softcap, temperature},
                               {label_smoothing, z_loss, cols}, pointer<float>(row_max),
                               pointer<float>(row_sum), pointer<float>(logp), pointer<float>(loss), plan,
                               stream_of(stream));
      },
      "logits"_a, "out"_a, "rows"_a, "cols"_a, "logits_stride"_a, "out_stride"_a, "dtype"_a, "out_dtype"_a,
      "labels"_a, "bias"_a, "scale"_a, "softcap"_a, "temperature"_a = 1.0, "label_smoothing"_a, "z_loss"_a,
      "row_max"_a, "row_sum"_a, "logp"_a, "loss"_a, "plan"_a, "device"_a, "stream"_a);

  module.def(
      "logits_stats",
      [](Address logits, int64_t rows, int64_t cols, int64_t logits_stride, int64_t col_offset, int dtype,
         Address labels, Address bias, double scale, double softcap, double temperature, Address row_max,
         Address row_sum, Address label_logit, Address logit_sum, Address centred_sum, Address square_sum,
         Address max_before, bool merge, int device, Address stream) {
        const py::gil_scoped_release unlocked;
        use_device(device);
        cuda::logits_stats(
            {pointer(logits), nullptr, rows, cols, logits_stride, 0, col_offset, static_cast<DType>(dtype)},
            pointer<const int64_t>(labels), {pointer(bias), scale, softcap, temperature},
            pointer<float>(row_max), pointer<float>(row_sum), pointer<float>(label_logit),
            pointer<float>(logit_sum), pointer<float>(centred_sum), pointer<float>(square_sum),
            pointer<float>(max_before), merge, stream_of(stream));
      },
      "logits"_a, "rows"_a, "cols"_a, "logits_stride"_a, "col_offset"_a, "dtype"_a, "labels"_a, "bias"_a,
      "scale"_a, "softcap"_a, "temperature"_a = 1.0, "row_max"_a, "row_sum"_a, "label_logit"_a, "logit_sum"_a,
      "centred_sum"_a = 0, "square_sum"_a = 0, "max_before"_a = 0, "merge"_a, "device"_a, "stream"_a);

  module.def(
      "residual_from_stats",
      [](Address logits, Address out, int64_t rows, int64_t cols, int64_t logits_stride, int64_t out_stride,
         int64_t col_offset, int64_t vocab_size, int dtype, int out_dtype, Address labels, Address bias,
         double scale, double softcap, double temperature, double label_smoothing, double z_loss,
         Address row_max, Address row_sum, Address logp, Address row_scale, Address entropy,
         Address entropy_scale, int device, Address stream) {
        const py::gil_scoped_release unlocked;
        use_device(device);
        cuda::residual_from_stats(
            {pointer(logits), pointer(out), rows, cols, logits_stride, out_stride, col_offset,
             static_cast<DType>(dtype), static_cast<DType>(out_dtype)},
            pointer<const int64_t>(labels), {pointer(bias), scale, softcap, temperature},
            {label_smoothing, z_loss, vocab_size}, pointer<const float>(row_max),
            pointer<const float>(row_sum), pointer<const float>(logp), pointer<const float>(row_scale),
            pointer<const float>(entropy), pointer<const float>(entropy_scale), stream_of(stream));
      },
      "logits"_a, "out"_a, "rows"_a, "cols"_a, "logits_stride"_a, "out_stride"_a, "col_offset"_a,
      "vocab_size"_a, "dtype"_a, "out_dtype"_a, "labels"_a, "bias"_a, "scale"_a, "softcap"_a,
      "temperature"_a = 1.0, "label_smoothing"_a, "z_loss"_a, "row_max"_a, "row_sum"_a, "logp"_a,
      "row_scale"_a, "entropy"_a = 0, "entropy_scale"_a = 0, "device"_a, "stream"_a);
}

void bind_tokens(py::module_& module) {
  module.def(
      "segment_sum",
      [](Address values, Address cu_seqlens, int64_t segments, Address out, bool mean, int device,
         Address stream) {
        const py::gil_scoped_release unlocked;
        use_device(device);
        cuda::segment_sum(pointer<const float>(values), pointer<const int32_t>(cu_seqlens),
                          pointer<float>(out), segments, mean, stream_of(stream));
      },
      "values"_a, "cu_seqlens"_a, "segments"_a, "out"_a, "mean"_a, "device"_a, "stream"_a);

  module.def(
      "segment_sum_backward",
      [](Address d_out, Address cu_seqlens, int64_t segments, Address d_values, bool mean, int device,
         Address stream) {
        const py::gil_scoped_release unlocked;
        use_device(device);
        cuda::segment_sum_backward(pointer<const float>(d_out), pointer<const int32_t>(cu_seqlens),
                                   pointer<float>(d_values), segments, mean, stream_of(stream));
      },
      "d_out"_a, "cu_seqlens"_a, "segments"_a, "d_values"_a, "mean"_a, "device"_a, "stream"_a);

  module.def(
      "slime_terms",
      [](Address logp, Address cu_seqlens, int64_t pairs, double lambda_w, double lambda_l, double lambda_d,
         double delta, double margin_hard, double margin_soft, double kappa, double power, double pair_weight,
         double token_weight, Address chosen_logps, Address rejected_logps, Address anchor,
         Address margin_loss, Address stabilizer, Address d_logp, int device, Address stream) {
        const SlimeParams params{lambda_w,    lambda_l, lambda_d, delta,       margin_hard,
                                 margin_soft, kappa,    power,    pair_weight, token_weight};
        const py::gil_scoped_release unlocked;
        use_device(device);
        cuda::slime_terms(pointer<const float>(logp), pointer<const int32_t>(cu_seqlens), pairs, params,
                          pointer<float>(chosen_logps), pointer<float>(rejected_logps),
                          pointer<float>(anchor), pointer<float>(margin_loss), pointer<float>(stabilizer),
                          pointer<float>(d_logp), stream_of(stream));
      },
      "logp"_a, "cu_seqlens"_a, "pairs"_a, "lambda_w"_a, "lambda_l"_a, "lambda_d"_a, "delta"_a,
      "margin_hard"_a, "margin_soft"_a, "kappa"_a, "power"_a, "pair_weight"_a, "token_weight"_a,
      "chosen_logps"_a, "rejected_logps"_a, "anchor"_a, "margin_loss"_a, "stabilizer"_a, "d_logp"_a,
      "device"_a, "stream"_a);

  module.def(
      "scale_",
      [](Address data, int64_t n, int dtype, Address factor, int device, Address stream) {
        const py::gil_scoped_release unlocked;
        use_device(device);
        cuda::scale_in_place(pointer(data), n, static_cast<DType>(dtype), pointer<const float>(factor),
                             stream_of(stream));
      },
      "data"_a, "n"_a, "dtype"_a, "factor"_a, "device"_a, "stream"_a);
}

}  // namespace

void bind_cuda(py::module_& module);

void bind_cuda(py::module_& module) {
  module.def(
      "runtime_info", &runtime_info,
      "Versions of the CUDA runtime and driver, the number of devices, and the error where there is none.");
  bind_row_plan(module);
  bind_rows(module);
  bind_tokens(module);
}

}  // namespace slime_fused
