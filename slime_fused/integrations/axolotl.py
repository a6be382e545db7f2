"""SLIME, or any loss of pairs, in Axolotl's DPO training: a plugin with entries in Axolotl's configuration file.

::

    rl: dpo
    plugins:
      - slime_fused.integrations.axolotl.SlimePlugin
    slime_loss: slime        # or dpo, simpo, cpo, orpo, alphapo
    slime_lambda_w: 0.1      # any hyperparameter of that loss

The plugin hands the trainer that Axolotl has built, one of TRL's, to `slime_fused.integrations.trl.enable_loss`.
Read and run with Axolotl 0.21.0 (TRL 1.14.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, create_model, model_validator

from slime_fused.integrations.settings import PREFIX, read_settings, setting_names
from slime_fused.integrations.trl import enable_loss


class _Checked(BaseModel):
    """Looks at the entries while Axolotl validates its configuration, before it loads anything."""

    @model_validator(mode="before")
    @classmethod
    def check_slime(cls, data: Any) -> Any:
        """Refuse another ``rl``, and entries that name no setting, which Axolotl itself would ignore."""
        if isinstance(data, Mapping):
            read_settings(data)
            rl = getattr(data.get("rl"), "value", data.get("rl"))  # an enumeration once it is validated
            if rl != "dpo":
                raise ValueError(f"rl: expected 'dpo', whose trainer SlimePlugin takes over, got {rl!r}")
            if data.get("trainer_cls"):
                raise ValueError(f"trainer_cls: expected none beside SlimePlugin, got {data['trainer_cls']!r}")
        return data


if TYPE_CHECKING:
    SlimeArgs = _Checked
else:
    SlimeArgs = create_model("SlimeArgs", __base__=_Checked, **dict.fromkeys(setting_names(), (Any, None)))
    SlimeArgs.__doc__ = "The entries of `read_settings`, as a mixin of Axolotl's own configuration."


class SlimePlugin(BasePlugin):
    """The class that ``plugins`` names."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the entries."""
        return f"{__name__}.SlimeArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Put the loss into the trainer.

        Raises TypeError, ValueError: see `read_settings` and `enable_loss`.
        """
        settings = {name: cfg[name] for name in cfg if name.startswith(PREFIX)}
        wanted = read_settings(settings)
        enable_loss(trainer, wanted.loss, backend=wanted.backend, workspace=wanted.workspace)
