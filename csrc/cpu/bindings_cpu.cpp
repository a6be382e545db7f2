// Python bindings of the CPU kernels: integers become pointers, the GIL is released while kernels run.
#include "bindings_cpu.h"

#include <pybind11/stl.h>

#include <cstdint>

#include "buffers.h"
#include "dispatch.h"
#include "logits.h"
#include "segments.h"

namespace slime_fused::cpu {
namespace {

namespace py = pybind11;
using py::literals::operator""_a;
using Address = std::uintptr_t;  // 0 stands for "none"

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The statistics kernels name their accumulation type by the dtype of the logits; these have only that one.
template <typename Call>
void with_acc_type(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::f32:
      return call(float{});
    case DType::f64:
      return call(double{});
    default:
      throw std::invalid_argument("dtype: expected 0 (f32) or 3 (f64), got " +
                                  std::to_string(static_cast<int>(dtype)));
  }
}

void bind_logits(py::module_& module) {
  module.def(
      "softmax_residual",
      [](Address logits, Address out, int64_t rows, int64_t cols, int64_t logits_stride, int64_t out_stride,
         int dtype, int out_dtype, Address labels, Address bias, double scale, double softcap,
         double temperature, double label_smoothing, double z_loss, Address row_max, Address row_sum,
         Address logp, Address loss, int num_threads) {
        SoftmaxResidualArgs args;
        args.block = {pointer(logits),
                      pointer(out),
                      rows,
                      cols,
                      logits_stride,
                      out_stride,
                      0,
                      static_cast<DType>(dtype),
                      static_cast<DType>(out_dtype)};
        args.labels = pointer<const int64_t>(labels);
        args.head = {pointer(bias), scale, softcap, temperature};
        args.token_loss = {label_smoothing, z_loss, cols};
        args.row_max = pointer(row_max);
        args.row_sum = pointer(row_sum);
        args.logp = pointer(logp);
        args.loss = pointer(loss);
        const py::gil_scoped_release unlocked;
        softmax_residual(args, num_threads);
      },
      "logits"_a, "out"_a, "rows"_a, "cols"_a, "logits_stride"_a, "out_stride"_a, "dtype"_a, "out_dtype"_a,
      "labels"_a, "bias"_a, "scale"_a, "softcap"_a, "temperature"_a = 1.0, "label_smoothing"_a, "z_loss"_a,
      "row_max"_a, "row_sum"_a, "logp"_a, "loss"_a, "num_threads"_a);

  module.def(
      "logits_stats",
      [](Address logits, int64_t rows, int64_t cols, int64_t logits_stride, int64_t col_offset, int dtype,
         Address labels, Address bias, double scale, double softcap, double temperature, Address row_max,
         Address row_sum, Address label_logit, Address logit_sum, Address centred_sum, Address square_sum,
         Address max_before, bool merge, int num_threads) {
        LogitsStatsArgs args;
        args.block = {pointer(logits), nullptr, rows,       cols,
                      logits_stride,   0,       col_offset, static_cast<DType>(dtype)};
        args.labels = pointer<const int64_t>(labels);
        args.head = {pointer(bias), scale, softcap, temperature};
        args.row_max = pointer(row_max);
        args.row_sum = pointer(row_sum);
        args.label_logit = pointer(label_logit);
        args.logit_sum = pointer(logit_sum);
        args.centred_sum = pointer(centred_sum);
        args.square_sum = pointer(square_sum);
        args.max_before = pointer(max_before);
        args.merge = merge;
        const py::gil_scoped_release unlocked;
        logits_stats(args, num_threads);
      },
      "logits"_a, "rows"_a, "cols"_a, "logits_stride"_a, "col_offset"_a, "dtype"_a, "labels"_a, "bias"_a,
      "scale"_a, "softcap"_a, "temperature"_a = 1.0, "row_max"_a, "row_sum"_a, "label_logit"_a, "logit_sum"_a,
      "centred_sum"_a = 0, "square_sum"_a = 0, "max_before"_a = 0, "merge"_a, "num_threads"_a);

  module.def(
      "residual_from_stats",
      [](Address logits, Address out, int64_t rows, int64_t cols, int64_t logits_stride, int64_t out_stride,
         int64_t col_offset, int64_t vocab_size, int dtype, int out_dtype, Address labels, Address bias,
         double scale, double softcap, double temperature, double label_smoothing, double z_loss,
         Address row_max, Address row_sum, Address logp, Address row_scale, Address entropy,
         Address entropy_scale, int num_threads) {
        ResidualFromStatsArgs args;
        args.block = {pointer(logits),
                      pointer(out),
                      rows,
                      cols,
                      logits_stride,
                      out_stride,
                      col_offset,
                      static_cast<DType>(dtype),
                      static_cast<DType>(out_dtype)};
        args.labels = pointer<const int64_t>(labels);
        args.head = {pointer(bias), scale, softcap, temperature};
        args.token_loss = {label_smoothing, z_loss, vocab_size};
        args.row_max = pointer(row_max);
        args.row_sum = pointer(row_sum);
        args.logp = pointer(logp);
        args.row_scale = pointer(row_scale);
        args.entropy = pointer(entropy);
        args.entropy_scale = pointer(entropy_scale);
        const py::gil_scoped_release unlocked;
        residual_from_stats(args, num_threads);
      },
      "logits"_a, "out"_a, "rows"_a, "cols"_a, "logits_stride"_a, "out_stride"_a, "col_offset"_a,
      "vocab_size"_a, "dtype"_a, "out_dtype"_a, "labels"_a, "bias"_a, "scale"_a, "softcap"_a,
      "temperature"_a = 1.0, "label_smoothing"_a, "z_loss"_a, "row_max"_a, "row_sum"_a, "logp"_a,
      "row_scale"_a, "entropy"_a = 0, "entropy_scale"_a = 0, "num_threads"_a);
}

void bind_segments(py::module_& module) {
  module.def(
      "segment_sum",
      [](Address values, Address cu_seqlens, int64_t segments, int64_t tokens, Address out, int dtype,
         bool mean, int num_threads) {
        const py::gil_scoped_release unlocked;
        with_acc_type(static_cast<DType>(dtype), [&]<typename T>(T) {
          segment_sum(pointer<const T>(values), {pointer<const int32_t>(cu_seqlens), segments, tokens},
                      pointer<T>(out), mean, num_threads);
        });
      },
      "values"_a, "cu_seqlens"_a, "segments"_a, "tokens"_a, "out"_a, "dtype"_a, "mean"_a, "num_threads"_a);

  module.def(
      "segment_sum_backward",
      [](Address d_out, Address cu_seqlens, int64_t segments, int64_t tokens, Address d_values, int dtype,
         bool mean, int num_threads) {
        const py::gil_scoped_release unlocked;
        with_acc_type(static_cast<DType>(dtype), [&]<typename T>(T) {
          segment_sum_backward(pointer<const T>(d_out),
                               {pointer<const int32_t>(cu_seqlens), segments, tokens}, pointer<T>(d_values),
                               mean, num_threads);
        });
      },
      "d_out"_a, "cu_seqlens"_a, "segments"_a, "tokens"_a, "d_values"_a, "dtype"_a, "mean"_a,
      "num_threads"_a);

  module.def(
      "slime_terms",
      [](Address logp, Address cu_seqlens, int64_t segments, int64_t tokens, int dtype, double lambda_w,
         double lambda_l, double lambda_d, double delta, double margin_hard, double margin_soft, double kappa,
         double power, double pair_weight, double token_weight, Address chosen_logps, Address rejected_logps,
         Address anchor, Address margin_loss, Address stabilizer, Address d_logp, int num_threads) {
        const py::gil_scoped_release unlocked;
        with_acc_type(static_cast<DType>(dtype), [&]<typename T>(T) {
          SlimeTermsArgs<T> args;
          args.logp = pointer<const T>(logp);
          args.segments = {pointer<const int32_t>(cu_seqlens), segments, tokens};
          args.params = {lambda_w,    lambda_l, lambda_d, delta,       margin_hard,
                         margin_soft, kappa,    power,    pair_weight, token_weight};
          args.chosen_logps = pointer<T>(chosen_logps);
          args.rejected_logps = pointer<T>(rejected_logps);
          args.anchor = pointer<T>(anchor);
          args.margin_loss = pointer<T>(margin_loss);
          args.stabilizer = pointer<T>(stabilizer);
          args.d_logp = pointer<T>(d_logp);
          slime_terms(args, num_threads);
        });
      },
      "logp"_a, "cu_seqlens"_a, "segments"_a, "tokens"_a, "dtype"_a, py::kw_only(), "lambda_w"_a,
      "lambda_l"_a, "lambda_d"_a, "delta"_a, "margin_hard"_a, "margin_soft"_a, "kappa"_a, "power"_a,
      "pair_weight"_a, "token_weight"_a, "chosen_logps"_a, "rejected_logps"_a, "anchor"_a, "margin_loss"_a,
      "stabilizer"_a, "d_logp"_a, "num_threads"_a);
}

void bind_buffers(py::module_& module) {
  py::class_<Scratch>(module, "Scratch", py::buffer_protocol(),
                      "Memory from the cache, as a buffer of bytes.")
      .def(py::init<int64_t>(), "bytes"_a)
      .def_buffer([](Scratch& scratch) {
        return py::buffer_info(static_cast<uint8_t*>(scratch.data()), scratch.bytes());
      });
  module.def("set_cache_limit", &set_cache_limit, "max_bytes"_a, "The most bytes of idle scratch.");
  module.def("cache_limit", &cache_limit, "That limit.");
  module.def("cached_bytes", &cached_bytes, "Bytes of idle scratch.");
  module.def("empty_cache", &empty_cache, "Give all idle scratch back to the system.");
}

}  // namespace

void bind(pybind11::module_& module) {
  bind_logits(module);
  bind_buffers(module);
  bind_segments(module);
  module.def("compiled_isas", &compiled_isas, "Instruction sets compiled into this build, narrowest first.");
  module.def("runnable_isas", &runnable_isas, "Of those, the ones this processor runs.");
  module.def(
      "active_isa", [] { return active_kernels().name; }, "The instruction set of the kernels in use.");
  module.def("use_isa", &use_isa, "name"_a = "",
             "Use the named kernels in all threads; empty: the default ones.");
}

}  // namespace slime_fused::cpu
