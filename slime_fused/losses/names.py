"""Losses of pairs by the names that command lines and configuration files give them."""

from __future__ import annotations

from slime_fused.losses.alphapo import AlphaPO
from slime_fused.losses.base import Formula
from slime_fused.losses.cpo import CPO
from slime_fused.losses.dpo import DPO
from slime_fused.losses.orpo import ORPO
from slime_fused.losses.simpo import SimPO
from slime_fused.losses.slime import Slime

PAIR_LOSSES: dict[str, type[Formula]] = {
    "slime": Slime,
    "dpo": DPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
    "alphapo": AlphaPO,
}
