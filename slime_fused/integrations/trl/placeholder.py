"""A reference model that is none, for the constructor of `trl.DPOTrainer`."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import PretrainedConfig, PreTrainedModel


class NoReference(PreTrainedModel):
    """See `no_reference`. It has no parameters, and no forward that could be trained against."""

    config_class = PretrainedConfig

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError(
            "ref_model: no_reference() was passed to the trainer, whose loss asks for a reference model; call "
            "enable_slime(trainer), or pass a reference model"
        )


def no_reference() -> PreTrainedModel:
    """For ``DPOTrainer(..., ref_model=no_reference())``, where a loss without a reference will be enabled.

    Without a ``ref_model`` TRL loads a second copy of the model by its name (unless an adapter is trained), only to
    have it dropped, and fails for a model that was made in memory and has no name.
    """
    return NoReference(PretrainedConfig())
