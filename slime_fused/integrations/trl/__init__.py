"""TRL (0.29 or newer): `enable_slime` and `enable_loss` change the loss of a `trl.DPOTrainer`, `accelerate_trl` the
kernels of TRL's own losses.
"""

from importlib import import_module
from typing import Any

from slime_fused.integrations.trl.enable import enable_loss, enable_slime
from slime_fused.integrations.trl.placeholder import no_reference

__all__ = ["accelerate_trl", "enable_loss", "enable_slime", "no_reference"]


def __getattr__(name: str) -> Any:
    """`accelerate_trl`, whose module patches TRL's, is imported when it is asked for."""
    if name == "accelerate_trl":
        return import_module(f"{__name__}.seam").accelerate_trl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
