"""Which losses the pairs of a dataset can train."""

from __future__ import annotations

from slime_fused.losses import KTO
from slime_fused.losses.base import Formula


def check_needs(loss: Formula) -> None:
    """Refuse, with a ValueError, a loss that needs what pairs do not give."""
    if isinstance(loss, KTO) and loss.baseline == "given":
        raise ValueError(
            "loss: KTO(baseline='given') expected a kl_baseline from responses to prompts that are not their own, "
            "which pairs do not hold; use baseline='batch' (an estimate from the batch) or 'zero'"
        )
    if "ref_token_logps" in loss.needs:
        raise ValueError(
            f"loss: {loss!r} expected a reference's log-prob of every token, and the trainer keeps sums per "
            "response; leave ld_alpha out, or call slime_fused.preference_loss yourself"
        )
    unknown = sorted(set(loss.needs) - {"ref_logps", "desirable"})
    if unknown:
        raise ValueError(
            f"loss: {loss.name} expected {unknown}, which the trainer does not know; override `given` to give it"
        )
