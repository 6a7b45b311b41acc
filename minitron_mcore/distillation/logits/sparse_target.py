"""A teacher's distribution by few of its outcomes, as the logit loss takes it from a cache of teacher targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron_mcore.distillation.config import PROBABILISTIC
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.errors import InputError

# What the selected outcomes leave of 1 where rounding leaves nothing: less than the last digit of their sum in fp64.
_LEAST_REST = 1e-37


@dataclass(frozen=True)
class SparseTarget:
    """K outcomes of the teacher for each token, at the loss's temperature. Legend: S sequence, B batch, N = S * B.

    ids [S, B, K] int64: global token ids, distinct within a token; -1 marks an unused slot.
    log_probs [S, B, K] fp32: natural logarithm of each outcome's probability (of any value in an unused slot).
    tail: True: the other ids are one more outcome; student and teacher are compared over these K + 1 outcomes. False:
        exp(log_probs) are the target's weights as they are (their sum is about 1, as unbiased sampling of the teacher
        gives), and every other id has weight 0.
    log_tail [S, B] fp32: natural logarithm of the tail's probability. None: that is 1 - sum(exp(log_probs)), which is
        nothing but rounding where the tail is less probable than log_probs are exact.
    is_drawn: by random draws: the id drawn most often need not be the likeliest, so no agreement is reported.
    """

    ids: Tensor
    log_probs: Tensor
    tail: bool
    log_tail: Tensor | None = None
    is_drawn: bool = False

    def __post_init__(self) -> None:
        if self.ids.dim() < 2 or self.ids.shape != self.log_probs.shape:
            shape, other = list(self.ids.shape), list(self.log_probs.shape)
            raise InputError("ids", shape, f"and log_probs={other} must be of one shape, [sequence, batch, K]")
        if self.log_tail is not None and (not self.tail or self.log_tail.shape != self.ids.shape[:-1]):
            shape = list(self.log_tail.shape)
            raise InputError("log_tail", shape, f"needs tail=True and the shape {list(self.ids.shape[:-1])} of the ids")

    def check_loss(self, settings: LossSettings) -> None:
        """Raise InputError for a loss that cannot be had from this target."""
        if settings.divergence not in PROBABILISTIC:
            rule = "compares all logits, which a sparse target does not have"
            raise InputError("divergence", settings.divergence, rule)
        if settings.top_k:
            raise InputError("top_k", settings.top_k, "must be 0 with a sparse target, which has its own outcomes")
        if settings.divergence == "reverse_kl" and not self.tail:
            raise InputError("divergence", "reverse_kl", "is infinite where the target has weight 0", "give it a tail")

    def each(self, change: Callable[[Tensor], Tensor]) -> SparseTarget:
        """With `change` applied to every tensor, along the tokens' axes."""
        log_tail = None if self.log_tail is None else change(self.log_tail)
        return replace(self, ids=change(self.ids), log_probs=change(self.log_probs), log_tail=log_tail)

    def flat(self) -> SparseTarget:
        """The tokens along one axis: [N, K] and [N]."""
        return self.each(lambda whole: whole.flatten(0, 1))

    def rows(self, rows: slice) -> SparseTarget:
        """Some tokens of a flat target."""
        return self.each(lambda flat: flat[rows])

    def log_tail_probability(self, vocab_size: int) -> Tensor:
        """Of the ids in no used slot, fp64 [N]; minus infinity where there are none, or without a tail."""
        used = self.ids >= 0
        if self.log_tail is not None:
            log_tail_N = self.log_tail.double()
        else:
            selected_N = self.log_probs.double().exp().masked_fill(~used, 0.0).sum(-1)
            log_tail_N = (1.0 - selected_N).clamp_min(_LEAST_REST).log()
        without = used.sum(-1) >= vocab_size if self.tail else torch.ones_like(log_tail_N, dtype=torch.bool)
        return log_tail_N.masked_fill(without, -torch.inf)

    def top(self, vocab_size: int) -> Tensor:
        """The likeliest id, the lowest of several, fp64 [N]; `vocab_size` where no slot is used."""
        used = self.ids >= 0
        log_probs = self.log_probs.masked_fill(~used, float("-inf"))
        best = used & (log_probs == log_probs.amax(-1, keepdim=True))
        return self.ids.masked_fill(~best, vocab_size).amin(-1).double()
