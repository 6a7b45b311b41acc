"""A teacher's distribution by few of its outcomes, as the logit loss takes it from a cache of teacher targets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SparseTarget:
    """K outcomes of the teacher for each of S x B tokens (S sequence, B batch), at the loss's temperature.

    ids [S, B, K] int64: global token ids, distinct within a token; -1 marks an unused slot.
    log_probs [S, B, K] fp32: natural logarithm of each outcome's probability (of any value in an unused slot).
    tail: True: the other ids are one more outcome; student and teacher are compared over these K + 1 outcomes. False:
        exp(log_probs) are the target's weights as they are (their sum is about 1, as unbiased sampling of the teacher
        gives), and every other id has weight 0.
    log_tail [S, B] fp32: natural logarithm of the tail's probability. None: that is 1 - sum(exp(log_probs)), which is
        nothing but rounding where the tail is less probable than log_probs are exact.
    """

    ids: Tensor
    log_probs: Tensor
    tail: bool
    log_tail: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 3 or self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f"a sparse target has ids of {tuple(self.ids.shape)} and log_probs of {tuple(self.log_probs.shape)}: "
                "both must be [sequence, batch, K]"
            )
        if self.log_tail is not None and (not self.tail or self.log_tail.shape != self.ids.shape[:2]):
            raise ValueError(
                f"log_tail of {tuple(self.log_tail.shape)} goes with tail=True and ids of {tuple(self.ids.shape)}: it "
                "must be [sequence, batch]"
            )
