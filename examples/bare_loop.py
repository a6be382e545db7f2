"""SLIME in a PyTorch loop of one's own: hidden states, the head's weight and labels are all it takes.

python examples/bare_loop.py            a model made on the spot learns to prefer counting to noise
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import slime_fused as sf

VOCABULARY, WIDTH, PROMPT, LENGTH = 64, 32, 4, 16


class TinyDecoder(nn.Module):
    """Whatever comes before the head: here two causal Transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(S, T) token ids -> (S, T, D) hidden states. The head is not called: the loss takes its weight."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], ids.device, self.head.weight.dtype)
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.layers(self.tokens(ids) + self.positions(places), mask=mask, is_causal=True)


def make_batch(pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(2P, T) ids and labels, chosen rows first: a chosen response counts on from its prompt."""
    start = torch.randint(VOCABULARY, (pairs, 1), generator=generator)
    chosen = (start + torch.arange(LENGTH)) % VOCABULARY
    rejected = torch.cat(
        [chosen[:, :PROMPT], torch.randint(VOCABULARY, (pairs, LENGTH - PROMPT), generator=generator)], 1
    )
    ids = torch.cat([chosen, rejected])
    labels = ids.clone()
    labels[:, :PROMPT] = -100  # the prompt is not trained on
    return ids, labels


def training_step(model: TinyDecoder, ids: Tensor, labels: Tensor) -> sf.SlimeOutput:
    """The loss, from which `backward` reaches every parameter; `shift`: position t predicts the label at t + 1."""
    return sf.slime_loss(model(ids), model.head.weight, labels, shift=True)


def train(model: TinyDecoder, steps: int, pairs: int = 8) -> list[sf.SlimeOutput]:
    """What each step said."""
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    said = []
    for _ in range(steps):
        ids, labels = make_batch(pairs, generator)
        out = training_step(model, ids.to(device), labels.to(device))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        said.append(out)
    return said


def main() -> None:
    torch.manual_seed(0)
    model = TinyDecoder().to("cuda" if torch.cuda.is_available() else "cpu")
    for step, out in enumerate(train(model, steps=60)):
        if step % 10 == 9:
            margin = out.margins.mean()
            print(f"step {step + 1}: loss {out.loss:.4f}, margin {margin:.3f}, accuracy {out.accuracy:.2f}")


if __name__ == "__main__":
    main()
