"""TRL: `enable_slime` and `enable_loss` change the loss of a `trl.DPOTrainer`, `accelerate_trl` the kernels under
TRL's own losses.
"""

from slime_fused.integrations.trl.enable import enable_loss, enable_slime
from slime_fused.integrations.trl.placeholder import no_reference
from slime_fused.integrations.trl.seam import TrlKernels, accelerate_trl

__all__ = ["TrlKernels", "accelerate_trl", "enable_loss", "enable_slime", "no_reference"]
