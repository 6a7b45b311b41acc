"""What the loss between logits is: one frozen object from the recipe to the sweep over the tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron_mcore.distillation.config import DIVERGENCES, PROBABILISTIC, DistillConfig
from minitron_mcore.errors import InputError


@dataclass(frozen=True)
class LossSettings:
    """The loss `lm_weight * next-token loss + kd_weight * divergence`. Raises InputError for settings at odds."""

    vocab_size: int  # the true vocabulary; rows of the head beyond it are padding
    lm_weight: float = 1.0
    kd_weight: float = 0.0
    divergence: str = "forward_kl"  # one of DIVERGENCES
    temperature: float = 1.0
    jensen_shannon_mix: float = 0.5
    top_k: int = 0  # compare the teacher's likeliest ids and one bucket of all others; 0: the whole vocabulary
    recompute: bool = False  # run the sweep again in backward instead of keeping gradients from forward
    chunk_tokens: int | None = None  # tokens whose logits exist at a time; None: default_chunk_tokens
    report: bool = True  # also compute the teacher's own loss and the top-1 agreement

    def __post_init__(self) -> None:
        """For those who call from Python: a recipe's section has refused all of this before."""
        if self.divergence not in DIVERGENCES:
            raise InputError("divergence", self.divergence, f"must be one of {', '.join(DIVERGENCES)}")
        if self.temperature <= 0:
            raise InputError("temperature", self.temperature, "must be positive")
        if self.divergence == "jensen_shannon" and not 0 < self.jensen_shannon_mix < 1:
            raise InputError("jensen_shannon_mix", self.jensen_shannon_mix, "must lie strictly between 0 and 1")
        if not 0 <= self.top_k <= self.vocab_size:
            raise InputError("top_k", self.top_k, f"must lie between 0 and the vocabulary size, {self.vocab_size}")
        if self.top_k and self.divergence not in PROBABILISTIC:
            raise InputError("top_k", self.top_k, f"does not go with {self.divergence}, which compares all logits")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise InputError("chunk_tokens", self.chunk_tokens, "must be positive")

    @classmethod
    def of(cls, distill: DistillConfig, vocab_size: int) -> LossSettings:
        """As the recipe's section has them."""
        d = distill
        how: Any = {"temperature": d.temperature, "jensen_shannon_mix": d.jensen_shannon_mix, "top_k": d.top_k}
        how |= {"recompute": d.recompute_loss, "chunk_tokens": d.loss_chunk_tokens}
        return cls(vocab_size, d.lm_weight, d.kd_weight, d.logit_loss, **how)

    def without_teacher(self) -> LossSettings:
        """The next-token loss alone, as where a batch has no teacher."""
        return LossSettings(self.vocab_size, self.lm_weight, recompute=self.recompute, chunk_tokens=self.chunk_tokens)

    @property
    def divisor(self) -> float:
        """What logits are divided by: the temperature; 1 for divergences that have none."""
        return self.temperature if self.divergence in PROBABILISTIC else 1.0

    @property
    def scale(self) -> float:
        """Factor of a chunk's logit gradient. It is applied apart, so that equal models give exactly zero."""
        return self.kd_weight * self.divisor if self.kd_weight else self.lm_weight

    @property
    def lm_share(self) -> float:
        """Weight of the next-token loss's gradient in the raw logits, in units of `scale`."""
        return self.lm_weight / self.scale if self.kd_weight else 1.0

    @property
    def can_keep(self) -> bool:
        """Whether the gradient can start from the exponentials of the statistics (`kept_gradient_`)."""
        is_kl = self.kd_weight != 0.0 and self.divergence in ("forward_kl", "reverse_kl")
        return is_kl and (self.divisor == 1.0 or not self.lm_share)
