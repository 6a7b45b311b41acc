"""What `align` trains on: the next tokens of answers, or the preference for one of a pair's answers.

Both run as every objective does (distillation/objective.py): a resident reference stands in the teacher's place, and
runs ahead of the trained model.

Legend: S sequence (under context parallelism this rank's part of it), B rows, P pairs of the microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minitron_mcore.alignment.losses import METRICS, PreferenceSettings, pair_losses
from minitron_mcore.alignment.segments import Segments
from minitron_mcore.alignment.token_losses import token_losses
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import LossSums
from minitron_mcore.runtime.groups import context_group, tensor_group
from minitron_mcore.runtime.pace import timed

SHARE = "share of counted tokens"
LENGTH = "mean length"  # of what counts of a sample, in tokens
# Sums that `reported` makes ratios of.
_SUMS = _COUNTED, _TOKENS, _SEGMENTS = "counted tokens", "tokens of samples", "segments"


@dataclass(frozen=True)
class Pairs:
    """What is known of the pairs of one set of samples, on the device, looked up by the number of a segment or pair."""

    reference: Tensor | None = None  # fp64 [segments]: log-probabilities, summed; None: a resident reference, or none
    rewards: Tensor | None = None  # fp64 [pairs, 2]: of the chosen and the rejected side


@dataclass(kw_only=True)
class PreferenceObjective(Objective):
    """A preference loss (losses.py); a mean over pairs, whatever the lengths of their answers.

    `settings`: its `vocab_size` and `chunk_tokens` alone. `teacher`: the resident reference; None: `pairs` have its
    log-probabilities, or the loss needs none. A microbatch that comes in has both sides of its pairs, and their
    `segments`; tokens with a `loss_mask` above 0 count. A pair without such a token on both sides counts nothing.
    """

    preference: PreferenceSettings
    pairs: Pairs
    valid: Pairs | None = None  # of the samples that validate; None: they are numbered among those of training

    def held_out(self) -> PreferenceObjective:
        return replace(self, pairs=self.valid or self.pairs)

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """Means over pairs by the names of losses.METRICS, and `share of counted tokens`."""
        return _with_ratios(means)

    def loss(self, model: LanguageModel, hidden_SBH: Tensor, microbatch: Microbatch) -> LossSums:
        """Sums over the microbatch's pairs; last stage only (see model/schedule.py)."""
        final, microbatch.teacher.final = microbatch.teacher.final, None  # used once
        with timed(self.timers, "logits-loss"):
            segments, counted_SB = Segments.of(microbatch), _counted(microbatch)
            numbers_P2 = segments.pairs
            losses_SB = self._token_losses(model, hidden_SBH, model.head_weight(), microbatch, counted_SB)
            sums_P2, counts_P2 = (segments.sums(each).view_as(numbers_P2) for each in (-losses_SB, counted_SB))
            reference_P2 = rewards_P2 = None
            if isinstance(self.teacher, Teacher):
                with torch.no_grad():
                    given = model, final, self.teacher.head_weight(), microbatch, counted_SB
                    reference_P2 = segments.sums(-self._token_losses(*given)).view_as(numbers_P2)
            elif self.preference.has_reference:
                assert self.pairs.reference is not None
                reference_P2 = self.pairs.reference[numbers_P2]
            if self.preference.has_rewards:
                assert self.pairs.rewards is not None
                rewards_P2 = self.pairs.rewards[numbers_P2[:, 0] // 2]
            found = pair_losses(sums_P2, counts_P2, reference_P2, rewards_P2, self.preference)
            is_pair_P = (counts_P2 > 0).all(1)
            totals = {name: found[name].masked_fill(~is_pair_P, 0.0).sum() for name in METRICS}
        # Every context-parallel rank has the whole sums: together they report them once. But each rank's tokens get the
        # gradient of the whole loss.
        parts = context_group().size()
        sums = {name: total.detach() / parts for name, total in totals.items()} | _token_counts(microbatch, counted_SB)
        return totals["loss"].float(), is_pair_P.sum().double() / parts, sums

    def _token_losses(
        self, model: LanguageModel, hidden_SBH: Tensor, weight_VH: Tensor, microbatch: Microbatch, counted_SB: Tensor
    ) -> Tensor:
        how: Any = {"tp_group": tensor_group(), "sequence_parallel": model.config.sequence_parallel}
        labels_SB = microbatch.labels.transpose(0, 1)
        return token_losses(hidden_SBH, weight_VH, labels_SB, counted_SB, self.settings, **how)


class AnswerObjective(Objective):
    """The next token of answers; the mean over tokens or samples is in the samples' loss masks (data/chat/dataset.py).

    Besides the metrics of every objective it reports `loss`, the loss that is trained under the name that all methods
    of alignment have it by, `mean length` and `share of counted tokens`.
    """

    def held_out(self) -> AnswerObjective:
        return self

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["lm loss"], **_with_ratios(means)}

    def loss(self, model: LanguageModel, hidden_SBH: Tensor, microbatch: Microbatch) -> LossSums:
        total, num_tokens, sums = super().loss(model, hidden_SBH, microbatch)
        segments, counted_SB = Segments.of(microbatch), _counted(microbatch)
        answered = (segments.sums(counted_SB) > 0).sum().double() / context_group().size()
        return total, num_tokens, {**sums, _SEGMENTS: answered, **_token_counts(microbatch, counted_SB)}


def _counted(microbatch: Microbatch) -> Tensor:
    """bool [S, B]: the tokens that count."""
    return microbatch.loss_mask.transpose(0, 1) > 0


def _token_counts(microbatch: Microbatch, counted_SB: Tensor) -> dict[str, Tensor]:
    assert microbatch.segments is not None
    is_token_BS = microbatch.segments >= 0
    return {_COUNTED: counted_SB.sum().double(), _TOKENS: is_token_BS.sum().double()}


def _with_ratios(means: dict[str, float]) -> dict[str, float]:
    """Of sums over one number the ratios that are reported; 0 where there is nothing to divide by."""
    counted, rest = means[_COUNTED], {name: value for name, value in means.items() if name not in _SUMS}
    if _SEGMENTS in means:
        rest[LENGTH] = counted / (means[_SEGMENTS] or 1.0)
    return rest | {SHARE: counted / (means[_TOKENS] or 1.0)}
