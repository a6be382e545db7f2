"""SLIME in ms-swift's DPO training: the file that `external_plugins` in ms_swift.yaml names."""

from slime_fused.integrations.swift import enable_loss
from slime_fused.losses import Slime

enable_loss(Slime(lambda_w=0.1, lambda_l=0.1, delta=1.25))
