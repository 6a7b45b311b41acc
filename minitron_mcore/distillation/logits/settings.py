"""What the loss between logits is: one frozen object from the recipe to the sweep over the tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minitron_mcore.distillation.config import PROBABILISTIC, DistillConfig, default_chunk_tokens

DIVERGENCES = (*PROBABILISTIC, "mse", "cosine")


@dataclass(frozen=True)
class Divergence:
    """Which divergence of divergences.py, and its constants; all that the elementwise passes know of the settings."""

    name: str
    temperature: float  # 1 where the divergence has none
    mix: float
    vocab_size: int  # the true vocabulary, over all shards

    @property
    def probabilistic(self) -> bool:
        return self.name in PROBABILISTIC

    @property
    def value_scale(self) -> float:
        """Factor of the value, where logits were divided by the temperature."""
        return self.temperature**2

    @property
    def gradient_scale(self) -> float:
        """Factor of the gradient in the raw logits. `gradient_` leaves it out: equal models then give exactly zero."""
        return self.temperature


@dataclass(frozen=True)
class LossSettings:
    """The loss `lm_weight * next-token loss + kd_weight * divergence`. The recipe's section checks its ranges."""

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

    @classmethod
    def of(cls, distill: DistillConfig, vocab_size: int) -> LossSettings:
        """As the recipe's section has them."""
        return cls(
            vocab_size,
            lm_weight=distill.lm_weight,
            kd_weight=distill.kd_weight,
            divergence=distill.logit_loss,
            temperature=distill.temperature,
            jensen_shannon_mix=distill.jensen_shannon_mix,
            top_k=distill.top_k,
            recompute=distill.recompute_loss,
            chunk_tokens=distill.loss_chunk_tokens,
        )

    def without_teacher(self) -> LossSettings:
        """The next-token loss alone, as where a batch has no teacher."""
        return LossSettings(
            self.vocab_size, lm_weight=self.lm_weight, recompute=self.recompute, chunk_tokens=self.chunk_tokens
        )

    def chunk_size(self, tokens: int) -> int:
        return self.chunk_tokens or default_chunk_tokens(tokens)

    @cached_property
    def form(self) -> Divergence:
        temperature = self.temperature if self.divergence in PROBABILISTIC else 1.0
        return Divergence(self.divergence, temperature, self.jensen_shannon_mix, self.vocab_size)

    @property
    def scale(self) -> float:
        """Factor of a chunk's logit gradient. It is applied apart, so that equal models give exactly zero."""
        return self.kd_weight * self.form.gradient_scale if self.kd_weight else self.lm_weight

    @property
    def lm_share(self) -> float:
        """Weight of the next-token loss's gradient in the raw logits, in units of `scale`."""
        return self.lm_weight / self.scale if self.kd_weight else 1.0
