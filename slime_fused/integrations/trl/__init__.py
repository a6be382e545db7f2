"""Kernels of this package under TRL's own losses, in one line: `accelerate_trl`."""

from slime_fused.integrations.trl.seam import TrlKernels, accelerate_trl

__all__ = ["TrlKernels", "accelerate_trl"]
