"""Settings of a training run: `transformers.TrainingArguments` plus how the head runs, the data and the loss."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from slime_fused.losses import SlimeLossConfig
from slime_fused.trainer.config_checks import check_choices, check_devices, check_reports, liger_without_its_head

_CHOICES = {"loss_impl": ("fused", "naive"), "truncation": ("keep_start", "keep_end", "drop")}


@dataclass
class HeadConfig(TrainingArguments):
    """What every trainer on `HeadTrainer` takes, whatever its loss. Raises ValueError for what cannot work."""

    full_learning_rate: ClassVar[float] = 1e-6
    """The default where all weights are trained."""
    adapter_learning_rate: ClassVar[float] = 1e-4
    """The default for an adapter, of which 1e-6 makes next to nothing."""

    # None stands for "not chosen" here and below, which the base class does not need to tell apart.
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Initial learning rate of AdamW. Unset: 1e-6, or 1e-4 for an adapter (LoRA)."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many optimizer steps; below 1, that share of all steps."}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass to save memory. Unset: on, "
            "unless fsdp_config has activation_checkpointing, which is the better place under FSDP."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Mixed precision in bfloat16. Unset: on where the GPU supports it, unless fp16 is on."},
    )
    # None comes first because the argument parser takes the first type after it.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Where to report metrics: none, tensorboard, wandb, trackio, ..."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Unused here: the trainer keeps exactly the columns it makes itself."}
    )

    loss_impl: Literal["fused", "naive"] = field(
        default="fused",
        metadata={"help": "'fused': never materialise the logits. 'naive': the model's own logits, to compare."},
    )
    workspace: str = field(
        default="auto",
        metadata={"help": "Most that logits-shaped buffers may take: 'auto', bytes, or text such as 512MiB."},
    )
    backend: str = field(default="auto", metadata={"help": "Kernels to use: auto, cuda, triton, cpu or torch."})

    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of prompt and response together; none: no limit."}
    )
    truncation: Literal["keep_start", "keep_end", "drop"] = field(
        default="keep_start",
        metadata={
            "help": "What gives way when a row exceeds max_length. 'keep_start': the end of the response. "
            "'keep_end': the start of the prompt, then the end of the response. 'drop': the row. Rows left "
            "without a response token are dropped and counted."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this length."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the dataset."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of the model, adapters included, to 0."}
    )
    check_head: bool = field(
        default=True,
        metadata={"help": "Before the first step, compare the fused log-probs with the model's own logits."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained for a model given by name (JSON on a command line)."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.model_init_kwargs, str):
            try:
                self.model_init_kwargs = json.loads(self.model_init_kwargs)
            except json.JSONDecodeError as error:
                text = self.model_init_kwargs
                raise ValueError(f"model_init_kwargs: expected JSON, got {text!r}: {error}") from None
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = bool(on_gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False))
        self._resolve_checkpointing()
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length: expected at least 2 (a prompt and a response token), got {self.max_length}"
            )
        check_choices(self)
        super().__post_init__()
        check_devices(self)
        check_reports(list(self.report_to or ()))
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, as each epoch would tell
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_without_its_head(self.liger_kernel_config)

    def _resolve_checkpointing(self) -> None:
        """On by default, under the name this release of `transformers` uses (``activation_...`` since 5.x)."""
        if self.gradient_checkpointing is None:
            # The base trainer refuses to see both switched on.
            wanted = not _fsdp_checkpoints(self.fsdp_config)
        else:
            wanted = self.gradient_checkpointing
        if not hasattr(self, "activation_checkpointing"):
            self.gradient_checkpointing = wanted
        elif self.activation_checkpointing is None:
            self.activation_checkpointing = wanted

    def model_options(self) -> dict[str, Any]:
        """``model_init_kwargs`` as a dictionary."""
        return dict(self.model_init_kwargs) if isinstance(self.model_init_kwargs, dict) else {}

    def resolved_learning_rate(self, *, is_adapter: bool) -> float:
        """``learning_rate``, or the default where it is not set."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.adapter_learning_rate if is_adapter else self.full_learning_rate

    def workspace_limit(self) -> int | str:
        """``workspace`` in the form the loss takes: a number of bytes, or text."""
        return int(self.workspace) if str(self.workspace).isdigit() else self.workspace


@dataclass
class PreferenceConfig(HeadConfig):
    """Settings of `PreferenceTrainer`: any loss of preference pairs.

    ``per_device_train_batch_size`` counts pairs. The loss's hyperparameters are its own: see `slime_fused.losses`.
    """

    log_token_statistics: bool = field(
        default=True,
        metadata={"help": "Log entropy and mean_token_accuracy of the responses (not with loss_impl='naive')."},
    )

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}: it smooths a "
                "cross-entropy. Losses of pairs that know a smoothing take it themselves: DPO(label_smoothing=...)"
            )
        super().__post_init__()


@dataclass
class SlimeConfig(PreferenceConfig):
    """Settings of `SlimeTrainer`.

    The loss's hyperparameters carry the names and defaults of `slime_fused.SlimeLossConfig` (the paper's). Raises
    ValueError or TypeError for values the loss refuses.
    """

    lambda_w: float = field(
        default=SlimeLossConfig.lambda_w, metadata={"help": "Weight of the likelihood anchor on chosen responses."}
    )
    lambda_l: float = field(
        default=SlimeLossConfig.lambda_l, metadata={"help": "Weight of the token stabilizer on rejected responses."}
    )
    lambda_d: float = field(default=SlimeLossConfig.lambda_d, metadata={"help": "Weight of the dual-margin term."})
    delta: float = field(
        default=SlimeLossConfig.delta,
        metadata={"help": "Shift of the stabilizer: rejected tokens below about exp(-delta) are held up."},
    )
    margin_hard: float = field(
        default=SlimeLossConfig.margin_hard,
        metadata={"help": "Hard margin: pairs whose mean log-prob margin is above it no longer push."},
    )
    margin_soft: float = field(
        default=SlimeLossConfig.margin_soft, metadata={"help": "Soft margin: centre of the sigmoid gate."}
    )
    kappa: float = field(default=SlimeLossConfig.kappa, metadata={"help": "Steepness of the sigmoid gate."})
    power: float = field(default=SlimeLossConfig.power, metadata={"help": "Exponent of the stabilizer (p)."})
    stabilizer_reduction: Literal["sequence", "token"] = field(
        default=SlimeLossConfig.stabilizer_reduction,
        metadata={
            "help": "'sequence' (paper): mean over each rejected response, then over pairs. 'token' (authors' "
            "code): one mean over all rejected tokens of the optimizer step, over accumulation steps and devices."
        },
    )

    def __post_init__(self) -> None:
        self.loss_config()
        super().__post_init__()

    def loss_config(self) -> SlimeLossConfig:
        """The loss's hyperparameters as the validated, frozen value that the loss takes."""
        return SlimeLossConfig(
            lambda_w=self.lambda_w,
            lambda_l=self.lambda_l,
            lambda_d=self.lambda_d,
            delta=self.delta,
            margin_hard=self.margin_hard,
            margin_soft=self.margin_soft,
            kappa=self.kappa,
            power=self.power,
            stabilizer_reduction=self.stabilizer_reduction,
        )


def _fsdp_checkpoints(config: Any) -> bool:
    """Whether FSDP is to recompute activations itself: by ``fsdp_config`` or by the launcher's environment."""
    if isinstance(config, str):
        try:
            config = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text())
        except (OSError, json.JSONDecodeError):
            config = None  # the base class reads it next, and says what is wrong
    values = [os.environ.get("FSDP_ACTIVATION_CHECKPOINTING")] if "ACCELERATE_USE_FSDP" in os.environ else []
    if isinstance(config, dict):
        values += [config.get(prefix + "activation_checkpointing") for prefix in ("", "fsdp_")]
    return any(str(value).lower() in ("true", "1") for value in values)
