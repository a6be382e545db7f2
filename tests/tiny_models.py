"""A tiny model, a tokenizer trained on the spot and a few pairs: nothing here needs a network."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "the cat dog sat ran on under a red blue mat tree and then slept well but nobody saw it again"
WORDS = TEXT.split()
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
"""Of the config of a tiny model, by the names that most architectures have."""


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of word salad of varied length: the loss does not care, and lengths exercise the padding."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        size = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator).tolist())

    return [
        {"prompt": text(2, 8) + "?", "chosen": " " + text(2, 12), "rejected": " " + text(2, 12)}
        for _ in range(count)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(vocab_size: int, seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            **SIZES,
            "vocab_size": vocab_size,
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
            **overrides,
        }
    )
    return LlamaForCausalLM(config)


def quick_settings(folder: object, **overrides: object) -> dict[str, object]:
    """Of a trainer's arguments: two steps on the CPU, each of them reported, and nothing saved."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }


class GradientRecorder(TrainerCallback):
    """Copies the gradients of each optimizer step before they are clipped away or zeroed."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        module = getattr(model, "module", model)
        self.steps.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})


def slime_by_hand(model, batch, loss_config, transform=lambda z: z) -> torch.Tensor:
    """The loss of a collated batch from the model's own logits in float64, written pair by pair (eq. 5 to 10)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    responses = []
    for row, labels in zip(transform(logits), batch["labels"], strict=True):
        positions = (labels != -100).nonzero().flatten()
        responses.append(torch.log_softmax(row[positions - 1], -1)[torch.arange(len(positions)), labels[positions]])
    pairs = len(responses) // 2
    c = loss_config
    total, penalties = 0.0, []
    for chosen, rejected in zip(responses[:pairs], responses[pairs:], strict=True):
        margin = chosen.mean() - rejected.mean()
        gate = 1 / (1 + torch.exp(c.kappa * (margin - c.margin_soft)))
        total = total - c.lambda_w * chosen.mean() + c.lambda_d * torch.clamp(c.margin_hard - margin, min=0) * gate
        penalties.append(torch.log1p(torch.exp(-rejected - c.delta)) ** c.power)
    if c.stabilizer_reduction == "sequence":
        stabilizer = sum(p.mean() for p in penalties) / pairs
    else:
        stabilizer = torch.cat(penalties).mean()
    return total / pairs + c.lambda_l * stabilizer


def require_transformers_adapters() -> None:
    """Skip where `transformers` refuses the PEFT at hand, which it asks for its own `add_adapter` alone."""
    # Not every environment of the tests has PEFT.
    import peft
    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(
            f"this transformers adds adapters with PEFT {MIN_PEFT_VERSION} or newer, got {peft.__version__}"
        )
