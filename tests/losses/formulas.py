"""The published formulas once more, unit by unit in loops: what the tests hold the losses against.

Each function takes a `Batch` and its log-probs, a leaf, and returns each unit's share of the loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from slime_fused import losses as L


def _bounded(x):
    """x as far as the dtype holds its exponential with 20 bits to spare; constant beyond."""
    return torch.clamp(x, max=math.log(torch.finfo(x.dtype).max) - 20 * math.log(2))


def _exp(x):
    return torch.exp(_bounded(x))


def pairs_of(batch, values):
    pieces = batch.split(values)
    half = len(pieces) // 2
    return list(zip(pieces[:half], pieces[half:], strict=True))


def nll(batch, w, reduction, pairs):
    chosen = sum(batch.lengths[: len(batch.lengths) // 2])
    return -w.mean() if reduction == "sequence" else -w.sum() * pairs / chosen


def cdpo(x, eps=0.0):
    return -(1 - eps) * F.logsigmoid(x) - (eps * F.logsigmoid(-x) if eps else 0)


def dpo(loss):
    def shares(batch, logps):
        ref = pairs_of(batch, batch.given["ref_token_logps"].to(logps.dtype))
        result = []
        for (w, r), (ref_w, ref_r) in zip(pairs_of(batch, logps), ref, strict=True):
            alpha = 1.0 if loss.ld_alpha is None else loss.ld_alpha
            short = min(len(w), len(r))
            d_w = (w - ref_w)[:short].sum() + alpha * (w - ref_w)[short:].sum()
            d_r = (r - ref_r)[:short].sum() + alpha * (r - ref_r)[short:].sum()
            if loss.length_normalised or loss.loss_type == "ipo":
                d_w, d_r = d_w / len(w), d_r / len(r)
            x = loss.beta * (d_w - d_r - loss.dpop * torch.relu(-d_w))
            eps = loss.label_smoothing
            value = {
                "sigmoid": lambda x=x, eps=eps: cdpo(x, eps),
                "hinge": lambda x=x: torch.relu(1 - x),
                "ipo": lambda d=d_w - d_r: (d - 0.5 / loss.beta) ** 2,
                "robust": lambda x=x, eps=eps: (
                    (-(1 - eps) * F.logsigmoid(x) + (eps * F.logsigmoid(-x) if eps else 0)) / (1 - 2 * eps)
                ),
            }[loss.loss_type]()
            if loss.nll_weight:
                value = value + loss.nll_weight * nll(batch, w, loss.nll_reduction, len(ref))
            result.append(value / len(ref))
        return result

    return shares


def margin_loss(loss, value_of):
    """Of a loss of pairs without references: ``value_of(w, r)``, with its NLL."""

    def shares(batch, logps):
        pairs = pairs_of(batch, logps)
        result = []
        for w, r in pairs:
            value = value_of(w, r)
            if loss.nll_weight:
                value = value + loss.nll_weight * nll(batch, w, loss.nll_reduction, len(pairs))
            result.append(value / len(pairs))
        return result

    return shares


def simpo(loss):
    def value(w, r):
        x = loss.beta * (w.mean() - r.mean()) - loss.gamma
        return torch.relu(1 - x) if loss.loss_type == "hinge" else cdpo(x, loss.label_smoothing)

    return margin_loss(loss, value)


def cpo(loss):
    def value(w, r):
        if loss.loss_type == "ipo":
            return (w.mean() - r.mean() - 0.5 / loss.beta) ** 2
        x = loss.beta * (w.sum() - r.sum())
        return torch.relu(1 - x) if loss.loss_type == "hinge" else cdpo(x, loss.label_smoothing)

    return margin_loss(loss, value)


class _LogOdds(torch.autograd.Function):
    """log(p / (1 - p)), with the derivative 1 / (1 - p), both at min(log p, -eps)."""

    @staticmethod
    def forward(ctx, logp):
        logp = torch.clamp(logp, max=-torch.finfo(logp.dtype).eps)
        ctx.save_for_backward(logp)
        return logp - (-torch.expm1(logp)).log()

    @staticmethod
    def backward(ctx, d_out):
        (logp,) = ctx.saved_tensors
        return d_out / -torch.expm1(logp)


def orpo(loss):
    def value(w, r):
        return -loss.beta * F.logsigmoid(_LogOdds.apply(w.mean()) - _LogOdds.apply(r.mean()))

    return margin_loss(loss, value)


def alphapo(loss):
    def reward(m):
        return loss.beta * (m if loss.alpha == 0 else (1 - _exp(-loss.alpha * m)) / loss.alpha)

    return margin_loss(
        loss, lambda w, r: cdpo(reward(w.mean()) - reward(r.mean()) - loss.gamma, loss.label_smoothing)
    )


def slime(loss):
    def shares(batch, logps):
        pairs = pairs_of(batch, logps)
        tokens = sum(batch.lengths[len(pairs) :])
        result = []
        for w, r in pairs:
            d = w.mean() - r.mean()
            penalty = torch.logaddexp(-r - loss.delta, torch.zeros_like(r)) ** loss.power
            stabilizer = penalty.sum() / tokens
            if loss.stabilizer_reduction == "sequence":
                stabilizer = penalty.mean() / len(pairs)
            hinge = torch.relu(loss.margin_hard - d) * torch.sigmoid(loss.kappa * (loss.margin_soft - d))
            pair = loss.lambda_d * hinge - loss.lambda_w * w.mean()
            result.append(pair / len(pairs) + loss.lambda_l * stabilizer)
        return result

    return shares


def kto(loss):
    def shares(batch, logps):
        ref = batch.split(batch.given["ref_token_logps"].to(logps.dtype))
        ratios = [x.sum() - y.sum() for x, y in zip(batch.split(logps), ref, strict=True)]
        z = {
            "given": lambda: max(0.0, batch.given.get("kl_baseline", torch.zeros(())).item()),
            "batch": lambda: max(0.0, sum(d.item() for d in ratios) / len(ratios)),
            "zero": lambda: 0.0,
        }[loss.baseline]()
        result = []
        for d, good in zip(ratios, batch.given["desirable"].tolist(), strict=True):
            weight = loss.desirable_weight if good else loss.undesirable_weight
            x = loss.beta * (d - z) if good else loss.beta * (z - d)
            result.append(weight * torch.sigmoid(-x) / len(ratios))
        return result

    return shares


def sft(loss):
    return lambda batch, logps: [-x / len(logps) for x in logps]


def policy_gradient(loss):
    def one(log_ratio, advantage):
        r = _exp(log_ratio)
        clipped = torch.clamp(r, 1 - loss.epsilon_low, 1 + loss.epsilon_high)
        bounded = r if loss.delta is None else torch.clamp(r, max=loss.delta)
        # The minimum, by the sign of the advantage: where it is positive a ratio above the range is cut.
        return -advantage * (torch.minimum(bounded, clipped) if advantage >= 0 else torch.maximum(bounded, clipped))

    def shares(batch, logps):
        old = batch.split(batch.given.get("old_logps", logps).detach().to(logps.dtype))
        advantages = batch.given["advantages"].to(logps.dtype)
        ref = batch.split(batch.given["ref_token_logps"].to(logps.dtype)) if loss.beta else old
        by_token = advantages if advantages.shape == logps.shape else None
        place, result = 0, []
        for i, (new, before, reference) in enumerate(zip(batch.split(logps), old, ref, strict=True)):
            weight = {
                "token": lambda: 1 / len(logps),
                "sequence": lambda new=new: 1 / len(new) / len(batch.lengths),
                "constant": lambda: 1 / loss.max_length / len(batch.lengths),
            }[loss.normalisation]()
            values = []
            for t in range(len(new)):
                if loss.level == "token":
                    value = one(new[t] - before[t], by_token[place])
                else:
                    value = one((new - before).mean(), advantages[i])
                if loss.beta:
                    x = _bounded(reference[t] - new[t])
                    value = value + loss.beta * (_exp(x) - x - 1)
                values.append(weight * value)
                place += 1
            result += values if loss.level == "token" else [sum(values)]
        return result

    return shares


ORACLES = {
    L.Slime: slime, L.DPO: dpo, L.SimPO: simpo, L.CPO: cpo, L.ORPO: orpo, L.AlphaPO: alphapo, L.KTO: kto,
    L.SFT: sft, L.PolicyGradient: policy_gradient,
}  # fmt: skip


CASES = [
    L.Slime(),
    L.Slime(lambda_w=0.3, lambda_l=0.2, lambda_d=0.7, delta=0.5, stabilizer_reduction="token"),
    L.Slime(margin_hard=3.0, margin_soft=0.2, kappa=1.5, power=2.0),
    L.DPO(),
    L.DPO(beta=0.5, label_smoothing=0.1),
    L.DPO(beta=0.3, loss_type="ipo"),
    L.DPO(beta=0.7, loss_type="hinge"),
    L.DPO(loss_type="robust", label_smoothing=0.2),
    L.DPO(loss_type="robust"),
    L.DPO(beta=2.0, length_normalised=True),
    L.DPO(dpop=5.0),
    L.DPO(ld_alpha=0.4),
    L.DPO(ld_alpha=0.0, length_normalised=True, beta=1.0),
    L.DPO(nll_weight=0.7),
    L.DPO(nll_weight=0.7, nll_reduction="token"),
    L.SimPO(),
    L.SimPO(beta=1.3, gamma=0.0, label_smoothing=0.2),
    L.SimPO(loss_type="hinge"),
    L.SimPO.from_ratio(2.5, 0.3, nll_weight=0.5),
    L.SimPO(nll_weight=0.5, nll_reduction="sequence"),
    L.CPO(),
    L.CPO(beta=0.4, label_smoothing=0.1, nll_weight=0.0),
    L.CPO(loss_type="hinge", nll_reduction="sequence"),
    L.CPO(loss_type="ipo", nll_weight=0.3),
    L.ORPO(),
    L.ORPO(beta=0.8, nll_weight=0.5, nll_reduction="token"),
    L.AlphaPO(),
    L.AlphaPO(alpha=-0.5, beta=3.0, gamma=0.2),
    L.AlphaPO(alpha=0.0, label_smoothing=0.1, nll_weight=0.2),
    L.AlphaPO(nll_weight=0.2, nll_reduction="sequence"),
    L.KTO(),
    L.KTO(beta=0.4, desirable_weight=1.3, undesirable_weight=0.6),
    L.KTO(baseline="batch"),
    L.KTO(baseline="zero"),
    L.SFT(),
    L.PolicyGradient(),
    L.PolicyGradient(epsilon_low=0.1, epsilon_high=0.28, delta=2.0),
    L.PolicyGradient(beta=0.04, normalisation="sequence"),
    L.PolicyGradient(normalisation="constant", max_length=7),
    L.PolicyGradient(level="sequence", epsilon_low=0.05, epsilon_high=0.1, normalisation="sequence", delta=1.5),
    L.PolicyGradient(level="sequence", beta=0.1, normalisation="token"),
    L.PolicyGradient(level="sequence", beta=0.1, normalisation="constant", max_length=9),
    L.PolicyGradient(level="sequence", beta=0.1, normalisation="sequence"),
]  # fmt: skip
"""Every loss, and every hyperparameter of it away from its default at least once."""


def oracle(loss, batch, dtype=torch.float64):
    """(shares, dL/dlogps) of the batch in that dtype, by autograd."""
    logps = batch.logps.to(dtype).clone().requires_grad_()
    shares = torch.stack(ORACLES[type(loss)](loss)(batch, logps))
    (d_logps,) = torch.autograd.grad(shares.sum(), logps)
    return shares.detach(), d_logps
