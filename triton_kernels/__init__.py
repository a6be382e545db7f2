"""The Triton kernels of slime_fused, installed as ``slime_fused.triton_kernels``.

Kernels and their launchers only: they take tensors (anything Triton accepts as a pointer), allocate nothing and
import neither torch nor the rest of the package. `slime_fused.backends.triton` is their one caller. Importing this
package does not import Triton; importing one of its modules does.

| module | kernels |
|---|---|
| `numerics` | device functions: head transform, expm1, softplus, the online softmax |
| `rows` | `softmax_residual`, `logits_stats`, `residual_from_stats`: one row of logits at a time |
| `row_visits` | what those do with a row: its two visits |
| `segments` | `segment_sum` and its backward, `slime_terms`, `scale_` |
| `linear_stats` | the head's product with the softmax statistics in its epilogue: no logits are stored |
| `configs` | every tile size, with the measurement behind it |
"""
