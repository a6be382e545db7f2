"""`accelerate_trl`: this package's kernels under TRL's own losses.

TRL's trainers compute log-probs by a fused head (`trl.trainer.utils.add_fused_lm_head`), which looks its kernel up
at every call in a global of that module. Here the global is replaced, so that trainers built before and after serve
themselves from `slime_fused.linear_logprobs`; their losses, metrics and data stay TRL's.

The name is private, and a kernel with other arguments would be called without a sign of it. So the TRL at hand is
compared with what was read: its version, the parameters of its kernel, the outputs it can be asked for, and that
the head still reads the global and calls it by `apply`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from types import CodeType, ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

import slime_fused
from slime_fused.model.options import check_options

_MODULE = "trl.trainer.utils"
_NAME = "_ChunkedLogProbFunction"
_VERSIONS = ("1.15", "1.16")
"""Whose source was read, and whose trainers were run on both kernels."""

_OPTIONAL = {
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
"""TRL's names of what may be asked for beside the log-probs, in the order in which they are returned: ours."""

_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_WAY_OUT = (
    f"accelerate_trl works with TRL {' and '.join(_VERSIONS)} (pip install 'trl=={_VERSIONS[-1]}.*'); with another "
    "one train on TRL's own kernel, without accelerate_trl"
)


class TrlKernels:
    """What `accelerate_trl` returns: which kernels TRL calls, how often it did, and the way back.

    A context manager, which undoes it at the end of the block.
    """

    def __init__(self, backend: str, workspace: int | str) -> None:
        self.backend = backend
        self.workspace = workspace
        self.calls = 0
        """Heads computed so far, reference and evaluation passes included. A graph of `torch.compile` counts once,
        when it is traced. 0 after a step of training: the trainer does not use TRL's fused head."""

    @property
    def active(self) -> bool:
        """Whether it has not been undone. Of several active ones TRL calls the last."""
        return self in _installed

    def undo(self) -> None:
        """Give TRL back the kernel that it had before; once undone, nothing happens.

        Of nested calls any may be undone first: TRL calls the last of those that are left.

        Raises RuntimeError where something else has taken the place of these kernels in the meantime.
        """
        if not self.active:
            return
        utils = import_module(_MODULE)
        _require_unreplaced(utils)
        _installed.remove(self)
        setattr(utils, _NAME, _installed[-1] if _installed else _original[0])

    def __enter__(self) -> TrlKernels:
        if not self.active:
            raise RuntimeError("accelerate_trl: expected kernels in use, got ones that were undone; call it again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"TrlKernels(backend={self.backend!r}, workspace={self.workspace!r}, calls={self.calls}, {state})"

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(_OPTIONAL),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What `trl.kernels.ChunkedLogProbFunction.apply` computes; TRL's head calls it in its place.

        Args:
            hidden: (N, H), N may be 0.
            weight: (V, H), of any floating dtype.
            bias: (V,) or None, likewise.
            targets: (N,) int64 in [0, V).
            temperature: divides the logits after the soft cap.
            chunk_size: not used: ``workspace`` says how much memory logits may take.
            final_logit_softcapping: of the scaled logits, or None.
            logit_scale: multiplies the raw logits.
            outputs: which of the four optional results to compute; the others are None.

        Returns:
            Log-probs, entropy, the logarithm of the sum of squared probabilities, mean logit (float32 each) and
            whether the target is the first of the likeliest tokens (bool), (N,) each. The first two carry
            gradients.

        Raises:
            As `slime_fused.linear_logprobs`; ValueError for a target outside [0, V) (on a GPU a device assertion),
            of which TRL's own kernel takes the logit to be 0, and for a weight that DeepSpeed ZeRO-3 has split.
        """
        self._count()
        _refuse_zero3(weight)
        told = [ours for theirs, ours in _OPTIONAL.items() if theirs in outputs]
        casts, weight, bias = _same_dtype(hidden, weight, bias)
        with casts:
            stats = slime_fused.linear_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                # No target is ignored: TRL has dropped those, or masks what is computed of them.
                ignore_index=-1 - weight.shape[0],
                logit_scale=logit_scale,
                logit_softcap=final_logit_softcapping,
                temperature=temperature,
                backend=self.backend,
                workspace=self.workspace,
                return_stats=told,
            )
        log_sum_sq_probs = None if stats.sum_sq_probs is None else stats.sum_sq_probs.log().float()
        assert stats.logps is not None  # always among the results of linear_logprobs
        return (
            stats.logps.float(),
            None if stats.entropy is None else stats.entropy.float(),
            log_sum_sq_probs,
            None if stats.mean_logit is None else stats.mean_logit.float(),
            stats.is_top1,
        )

    def _count(self) -> None:
        # A compiled graph would guard on the number and be traced again at every call.
        if torch.compiler.is_compiling():
            _count_trace(self)
        else:
            self.calls += 1


@torch.compiler.assume_constant_result
def _count_trace(kernels: TrlKernels) -> None:
    kernels.calls += 1


_installed: list[TrlKernels] = []
"""The active ones, the last of which stands in TRL's module."""

_original: list[Any] = []
"""TRL's own kernel while any is active."""


def accelerate_trl(*, backend: str = "auto", workspace: int | str = "auto") -> TrlKernels:
    """Let every TRL trainer of this process that has a fused head (DPO, KTO, GRPO, RLOO, SFT) run on these kernels.

    Losses, metrics and data stay TRL's; per-token log-probs, entropies and their gradients come from
    `slime_fused.linear_logprobs`. Before or after a trainer is built, as a plain call or in a ``with`` statement:

        kernels = accelerate_trl()
        DPOTrainer(...).train()
        assert kernels.calls > 0
        kernels.undo()

    A second call before the first is undone takes its place until it is undone itself.

    Args:
        backend: "auto" or a name of `slime_fused.available_backends`.
        workspace: the most that logits-shaped buffers may take, as for `slime_fused.slime_loss`.

    Raises:
        ModuleNotFoundError without TRL; RuntimeError for a TRL whose fused head is not the one known here, or whose
        kernel something else has replaced; ValueError or TypeError for a backend that is unknown or does not run
        here, and for a workspace that says no number of bytes.
    """
    _check_options(backend, workspace)
    try:
        utils = import_module(_MODULE)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"accelerate_trl needs TRL: pip install 'slime-fused[trl]' ({error})") from error
    if _installed:
        _require_unreplaced(utils)
    else:
        _original[:] = [check_seam(utils)]
    kernels = TrlKernels(backend, workspace)
    _installed.append(kernels)
    setattr(utils, _NAME, kernels)
    return kernels


def check_seam(utils: ModuleType) -> Any:
    """The kernel of `trl.trainer.utils`. Raises RuntimeError unless it is called as `TrlKernels.apply` expects."""
    version = import_module("trl").__version__
    if ".".join(version.split(".")[:2]) not in _VERSIONS:
        raise RuntimeError(
            f"trl: expected version {' or '.join(_VERSIONS)}, got {version}, whose fused head is not known to call "
            f"its kernel in the same way; {_WAY_OUT}"
        )
    kernel: Any = getattr(utils, _NAME, None)
    is_function = inspect.isclass(kernel) and issubclass(kernel, torch.autograd.Function)
    _require(is_function and kernel.__module__.startswith("trl."), "an autograd.Function of TRL", kernel)
    kernels = import_module(kernel.__module__)
    parameters = tuple(inspect.signature(kernel.forward).parameters)
    _require(parameters == _PARAMETERS, f"a forward with the parameters {_PARAMETERS}", parameters)
    offered = getattr(kernels, "OPTIONAL_OUTPUTS", None)
    _require(offered == tuple(_OPTIONAL), f"optional outputs {tuple(_OPTIONAL)}", offered)
    head = getattr(utils, "add_fused_lm_head", None)
    codes = [] if head is None else list(_codes(head.__code__))
    # The global and the attribute, by name, in one function of the head: it is looked up at every call.
    looks_up = any(_NAME in code.co_names and "apply" in code.co_names for code in codes)
    _require(looks_up, f"add_fused_lm_head to call {_NAME}.apply", "one that does not")
    return kernel


def _codes(code: CodeType) -> list[CodeType]:
    """Of a function and all functions in it."""
    return [code, *(c for inner in code.co_consts if isinstance(inner, CodeType) for c in _codes(inner))]


def _require(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise RuntimeError(f"{_MODULE}.{_NAME}: expected {expected}, got {got}; {_WAY_OUT}")


def _require_unreplaced(utils: ModuleType) -> None:
    found = getattr(utils, _NAME, None)
    if found is not _installed[-1]:
        raise RuntimeError(
            f"{_MODULE}.{_NAME}: expected the kernels that accelerate_trl put there, got {found!r}; undo first "
            "what has replaced them"
        )


def _check_options(backend: str, workspace: int | str) -> None:
    check_options(backend, workspace)
    reason = slime_fused.available_backends().get(backend)
    if reason is not None:
        raise ValueError(f"backend: expected one that runs here, got {backend!r}: {reason}")


def _refuse_zero3(weight: Tensor) -> None:
    # DeepSpeed marks what it has split. TRL gathers it around the forward pass only.
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "weight: expected a whole head, got one that DeepSpeed ZeRO-3 splits, which is not there in backward; "
            "train with ZeRO-2 or FSDP, or without accelerate_trl"
        )


def _same_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[AbstractContextManager[Any], Tensor, Tensor | None]:
    """As TRL's kernel, which multiplies in autocast's dtype, or else in that of ``hidden``."""
    device, dtype = hidden.device.type, hidden.dtype
    same = weight.dtype == dtype and (bias is None or bias.dtype == dtype)
    if same or torch.is_autocast_enabled(device):
        return contextlib.nullcontext(), weight, bias
    if dtype.itemsize == 2 and weight.dtype != torch.float64:
        # Rather than a cast of the weight, whose gradient would be rounded to 16 bits before its own dtype.
        return torch.autocast(device, dtype=dtype), weight, bias
    return contextlib.nullcontext(), weight.to(dtype), None if bias is None else bias.to(dtype)
