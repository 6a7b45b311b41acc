"""Each token's next-token loss, differentiable one by one, from final hidden states over vocabulary shards.

The loss of a pair of answers is no weighted sum of its tokens' losses: a token's weight, the derivative of the pair's
loss in the answer's log-probability, is known only when the whole answer has been seen. So forward sweeps over the
tokens for their losses alone, and backward sweeps again with those weights, by the sweep of the loss between logits
(distillation/logits/loss.py, which says how products are rounded and what memory it takes). Full logits never exist,
and the head sees counted tokens alone: of a chat or a pair often less than half.

Where the head has an fp32 `main_grad`, backward adds its gradient there.

Legend: S sequence (under context parallelism this rank's part of it), B batch, P counted tokens, H hidden size, V this
rank's vocabulary shard.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_mcore.distillation.logits.loss import Model, Run, Wanted, on_every_shard, sweep
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.model.vocab_parallel import VocabularyShard


def token_losses(
    hidden_SBH: Tensor,
    weight_VH: Tensor,
    labels_SB: Tensor,
    counted_SB: Tensor,
    settings: LossSettings,
    *,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
) -> Tensor:
    """-log p(label) of every counted token, 0 of the others: fp32 [S, B], equal on every tensor-parallel rank, and
    differentiable in `hidden_SBH` and `weight_VH`.

    hidden_SBH: after the final norm: the full sequence on every TP rank, or with `sequence_parallel` a rank's
        contiguous part of it. weight_VH: this rank's shard of the output head, [padded vocabulary / TP, H].
    labels_SB, counted_SB (bool): of the full sequence; a label that counts must lie in the vocabulary.
    settings: its `vocab_size` and `chunk_tokens`. tp_group: over which the vocabulary is sharded; None for one rank.

    All its ranks call, on the last stage.
    """
    hidden_SBH = on_every_shard(hidden_SBH, tp_group, sequence_parallel)
    assert hidden_SBH.shape[:2] == labels_SB.shape == counted_SB.shape, "hidden states of the labels' tokens"
    counted_N = counted_SB.flatten()
    places_P = counted_N.nonzero().squeeze(1)
    if not len(places_P):  # as on a context-parallel rank that has nothing but padding: one token that counts nothing
        places_P = places_P.new_zeros(1)
    hidden_PH = hidden_SBH.flatten(0, 1)[places_P]
    run = partial(
        sweep,
        teacher=None,
        labels_N=labels_SB.flatten()[places_P],
        settings=LossSettings(settings.vocab_size, chunk_tokens=settings.chunk_tokens),
        shard=VocabularyShard.of(weight_VH.shape[0], settings.vocab_size, tp_group),
    )
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_PH, weight_VH))
    losses_P = _TokenLosses.apply(hidden_PH, weight_VH, wanted, run)
    losses_P = losses_P.masked_fill(~counted_N[places_P], 0.0)
    losses_N = torch.zeros_like(counted_N, dtype=torch.float32).index_copy(0, places_P, losses_P)
    return losses_N.view(labels_SB.shape)


class _TokenLosses(torch.autograd.Function):
    """Where the head has a `main_grad`, autograd gets no gradient for it, as in the loss between logits."""

    @staticmethod
    def forward(ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, wanted: Wanted, run: Run) -> Tensor:
        ones_P = torch.ones(len(hidden_PH), dtype=torch.float32, device=hidden_PH.device)
        losses, *_ = run(Model(hidden_PH, weight_VH), weight_N=ones_P, wanted=(False, False))
        ctx.run, ctx.wanted = run, wanted
        ctx.save_for_backward(hidden_PH)
        ctx.weight_VH = weight_VH  # the parameter itself: a saved tensor comes back without `main_grad`
        return losses["lm"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_PH,) = ctx.saved_tensors
        _, grad_hidden_PH, grad_VH = ctx.run(
            Model(hidden_PH, ctx.weight_VH), weight_N=grad_P.contiguous(), wanted=ctx.wanted
        )
        return grad_hidden_PH, None if grad_VH is None else grad_VH.to(ctx.weight_VH.dtype), None, None
