"""What preference optimisation minimises, as functions of the log-probabilities of a pair's two answers. Pure.

Legend: P pairs; of a pair's two columns the first is of the chosen answer, the second of the rejected one. All in fp64.

With π the trained model and ρ the reference, log π(y) and log ρ(y) of an answer y summed (or averaged) over its counted
tokens, w the chosen and l the rejected answer, r their rewards in the data, s the logistic function, and

    d = (log π(w) - log ρ(w)) - (log π(l) - log ρ(l))        the margin; with simpo without log ρ
    g = r(w) - r(l)                                          the gap of the rewards

a pair's loss is, for

    dpo          -(1 - e) log s(β d) - e log s(-β d)         arXiv 2305.18290, equation 7; label smoothing e as in its
                                                             authors' code ("conservative DPO")
    ipo          (d - 1 / (2 β))²                            arXiv 2310.12036, equation 17; averaged over tokens by
                                                             default, as its authors do it and `trl` says
    rpo_sq       (β d - η g)²                                NeMo-Aligner's `preference_loss` of the same names;
    rpo_fwd_kl   KL(s(β d) || s(η g))                        β is its `ref_policy_kl_penalty`, η its `gt_reward_scale`,
    rpo_bwd_kl   KL(s(η g) || s(β d))                        KL between two coins. The last one is that of the report
                                                             on Nemotron-4 340B (arXiv 2406.11704)
    simpo        -(1 - e) log s(β d - γ) - e log s(γ - β d)  arXiv 2405.14734; averaged by default

and to each `sft_weight` times -log π(w) is added, NeMo-Aligner's `sft_loss_weight`, summed or averaged as in d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minitron_mcore.alignment.config import REFERENCED, REWARDED, AlignConfig
from minitron_mcore.errors import InputError

# What is logged of pairs, by the names of `trl`; after them means of the two sides.
METRICS = (
    *("loss", "sft loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "mean length chosen", "mean length rejected"),
)


@dataclass(frozen=True)
class PreferenceSettings:
    """Which of the losses above, and its numbers."""

    method: str  # one of alignment.config.PREFERENCES
    beta: float = 0.1
    eta: float = 1.0
    gamma: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    averages: bool = False  # log-probabilities of an answer are averaged over its counted tokens, not summed

    def __post_init__(self) -> None:
        """For those who call from Python: a recipe's section has refused it before."""
        if self.method not in FORMULAS:
            raise InputError("method", self.method, f"must be one of {', '.join(FORMULAS)}")

    @classmethod
    def of(cls, align: AlignConfig) -> PreferenceSettings:
        """As the recipe's section has them."""
        numbers = align.beta, align.eta, align.gamma, align.label_smoothing, align.sft_weight
        return cls(align.method, *numbers, align.averages)

    @property
    def has_reference(self) -> bool:
        return self.method in REFERENCED

    @property
    def has_rewards(self) -> bool:
        return self.method in REWARDED


def _logistic(scaled_P: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(scaled_P) - smoothing * logsigmoid(-scaled_P)


def _coins(of_P: Tensor, to_P: Tensor) -> Tensor:
    """KL(s(of) || s(to)) between two coins, from the logits of their heads."""
    heads_P = of_P.sigmoid() * (logsigmoid(of_P) - logsigmoid(to_P))
    return heads_P + (-of_P).sigmoid() * (logsigmoid(-of_P) - logsigmoid(-to_P))


# Method -> the loss of each pair from its margin d, [P], and the gap g of its rewards, [P].
FORMULAS: dict[str, Callable[[Tensor, Tensor, PreferenceSettings], Tensor]] = {
    "dpo": lambda d, g, by: _logistic(by.beta * d, by.label_smoothing),
    "ipo": lambda d, g, by: (d - 1 / (2 * by.beta)).square(),
    "rpo_sq": lambda d, g, by: (by.beta * d - by.eta * g).square(),
    "rpo_fwd_kl": lambda d, g, by: _coins(by.beta * d, by.eta * g),
    "rpo_bwd_kl": lambda d, g, by: _coins(by.eta * g, by.beta * d),
    "simpo": lambda d, g, by: _logistic(by.beta * d - by.gamma, by.label_smoothing),
}


def pair_losses(
    log_probs_P2: Tensor,
    counts_P2: Tensor,
    reference_P2: Tensor | None,
    rewards_P2: Tensor | None,
    settings: PreferenceSettings,
) -> dict[str, Tensor]:
    """Of each pair what METRICS names, fp64 [P]; `loss` is differentiable in `log_probs_P2`, all else is detached.

    log_probs_P2, reference_P2: of both answers by the trained model and by the reference (None with simpo), summed over
    the counted tokens, of which there are counts_P2. rewards_P2: of both answers in the data; None without.

    As in `trl`, `rewards/…` are β (log π(y) - log ρ(y)) and `logps/…` log π(y) of summed log-probabilities; with simpo
    β log π(y) and log π(y), averaged where the loss averages.
    """
    divisor_P2 = counts_P2.clamp(min=1) if settings.averages else torch.ones_like(counts_P2)
    known_P2 = log_probs_P2.detach()
    if settings.has_reference:
        assert reference_P2 is not None
        ratios_P2, reported_P2 = log_probs_P2 - reference_P2, known_P2
        rewarded_P2 = known_P2 - reference_P2
    else:
        ratios_P2, reported_P2 = log_probs_P2, known_P2 / divisor_P2
        rewarded_P2 = reported_P2
    gap_P = torch.zeros_like(known_P2[:, 0])
    if settings.has_rewards:
        assert rewards_P2 is not None
        gap_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    trained_P2 = ratios_P2 / divisor_P2
    loss_P = FORMULAS[settings.method](trained_P2[:, 0] - trained_P2[:, 1], gap_P, settings)
    sft_P = -log_probs_P2[:, 0] / divisor_P2[:, 0]
    if settings.sft_weight:
        loss_P = loss_P + settings.sft_weight * sft_P
    implicit_P2 = settings.beta * rewarded_P2
    margins_P = implicit_P2[:, 0] - implicit_P2[:, 1]
    found = [loss_P, sft_P.detach(), *implicit_P2.unbind(1), (margins_P > 0).double(), margins_P]
    return dict(zip(METRICS, [*found, *reported_P2.unbind(1), *counts_P2.unbind(1)], strict=True))
