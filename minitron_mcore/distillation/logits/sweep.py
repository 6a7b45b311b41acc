"""One sweep over the tokens by chunks: both heads' logits, the losses, and the gradients of hidden states and head.

A chunk is: the products that give its logits; what chunk.py makes of them, the losses and the logits' gradient in their
place; the two products with it. On the CPU an elementwise pass goes over as many rows at a time as stay in cache; on
CUDA it is compiled to one kernel.

Legend: N tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minitron_mcore.distillation.config import default_chunk_tokens
from minitron_mcore.distillation.logits.chunk import losses_and_gradient
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.model.vocab_parallel import ABSENT, VocabularyShard, add_product_, product_, product_operand

Wanted = tuple[bool, bool]  # of hidden states and head: whether their gradients are


class Model(NamedTuple):
    """A model's final hidden states, [S, B, H] or in the sweep [N, H], and its shard of the output head, [V, H]."""

    hidden: Tensor
    weight: Tensor

    def flat(self) -> Model:
        """The tokens along one axis, without a gradient."""
        return Model(self.hidden.detach().flatten(0, 1), self.weight.detach())


# Losses of each token, [N] fp32 each, by name; this shard's part of the hidden states' gradient, [N, H] in their type;
# the head's, fp32 [V, H], None also where it was added to the head's fp32 `main_grad`.
Swept = tuple[dict[str, Tensor], Tensor | None, Tensor | None]


def sweep(
    student: Model,
    teacher: Model | SparseTarget | None,
    labels_N: Tensor,
    weight_N: Tensor,
    settings: LossSettings,
    shard: VocabularyShard,
    wanted: Wanted,
) -> Swept:
    """Every token's losses (`losses_and_gradient`) and, if `wanted`, the gradients of hidden states and head.
    weight_N: fp32, each token's weight in both gradients, besides the settings' two weights."""
    grad_hidden_NH = torch.empty_like(student.hidden) if wanted[0] else None
    grad_weight_VH = own_VH = None
    if wanted[1]:
        grad_weight_VH = getattr(student.weight, "main_grad", None)  # Megatron's DDP keeps it
        if grad_weight_VH is None or grad_weight_VH.dtype != torch.float32:
            grad_weight_VH = own_VH = torch.zeros_like(student.weight, dtype=torch.float32)
    tokens = labels_N.shape[0]
    chunk_size = min(settings.chunk_tokens or default_chunk_tokens(tokens), tokens)
    models = [student, teacher] if isinstance(teacher, Model) else [student]
    heads = [product_operand(model.weight[: shard.width]) for model in models]
    buffers = weight_N.new_empty(len(models), chunk_size, shard.width)  # the chunks take turns in them
    losses: dict[str, Tensor] = {}
    for start in range(0, tokens, chunk_size):
        rows = slice(start, min(start + chunk_size, tokens))
        logits = [buffer[: rows.stop - rows.start] for buffer in buffers]
        hidden = [product_operand(model.hidden[rows].to(model.weight.dtype)) for model in models]
        for logits_CV, hidden_CH, head_VH in zip(logits, hidden, heads, strict=True):
            product_(logits_CV, hidden_CH, head_VH.t())
            if shard.absent:
                logits_CV.fill_(ABSENT)
        target = teacher.rows(rows) if isinstance(teacher, SparseTarget) else logits[1] if teacher else None
        found, gradient_CV = losses_and_gradient(logits[0], target, labels_N[rows], settings, shard, any(wanted))
        for name, value_C in found.items():
            losses.setdefault(name, weight_N.new_empty(tokens))[rows] = value_C.float()
        if gradient_CV is None:
            continue
        gradient_CV = gradient_CV.to(heads[0].dtype)
        # The tokens' weights go to the narrow factors of the products instead of the [C, V] gradient.
        weight_C1 = weight_N[rows].unsqueeze(1) * settings.scale
        if grad_hidden_NH is not None:
            part_CH = weight_N.new_empty(gradient_CV.shape[0], grad_hidden_NH.shape[1])
            grad_hidden_NH[rows] = product_(part_CH, gradient_CV, heads[0]).mul_(weight_C1)
        if grad_weight_VH is not None:
            add_product_(grad_weight_VH[: shard.width], gradient_CV.t(), (hidden[0] * weight_C1).to(heads[0].dtype))
    return losses, grad_hidden_NH, own_VH
