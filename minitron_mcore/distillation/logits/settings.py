"""What the loss between logits is: one frozen object from the recipe to the sweep over the tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_mcore.distillation.config import PROBABILISTIC, DistillConfig

DIVERGENCES = (*PROBABILISTIC, "mse", "cosine")


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
