"""One sweep over the tokens by chunks: both heads' logits, the losses, and the gradients of hidden states and head.

A chunk is: the products that give its logits; what chunk.py makes of them, the losses and the logits' gradient in their
place; the two products with it. On the CPU an elementwise pass goes over as many rows at a time as stay in cache; on
CUDA it is compiled to one kernel.

Legend: N tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minitron_mcore.distillation.logits.chunk import Chunk, gradient_, measure
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.model.vocab_parallel import ABSENT, VocabularyShard, add_product_, product_, product_operand


@dataclass(frozen=True)
class Model:
    """A model's final hidden states, [S, B, H] or in the sweep [N, H], and its shard of the output head, [V, H]."""

    hidden: Tensor
    weight: Tensor


def sweep(
    student: Model,
    teacher: Model | SparseTarget | None,
    labels_N: Tensor,
    weight_N: Tensor,
    settings: LossSettings,
    shard: VocabularyShard,
    grad_hidden_NH: Tensor | None = None,
    grad_weight_VH: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every token's losses, [N] fp32 each: `lm`; with a teacher `kd`; if reported `teacher_lm` and `agreement`.

    weight_N: fp32, each token's weight in both gradients, besides the settings' two weights.
    grad_hidden_NH: overwritten with this shard's part of the gradient, where given, in its own type.
    grad_weight_VH: fp32 (or the head's type); the gradient is added to it, where given.
    """
    tokens = labels_N.shape[0]
    chunk_size = min(settings.chunk_size(tokens), tokens)
    models = [student, teacher] if isinstance(teacher, Model) else [student]
    heads = [product_operand(model.weight[: shard.width]) for model in models]
    buffers = weight_N.new_empty(len(models), chunk_size, shard.width)  # the chunks take turns in them
    losses: dict[str, Tensor] = {}
    wanted = grad_hidden_NH is not None or grad_weight_VH is not None

    for start in range(0, tokens, chunk_size):
        rows = slice(start, min(start + chunk_size, tokens))
        logits = [buffer[: rows.stop - rows.start] for buffer in buffers]
        hidden = [product_operand(model.hidden[rows].to(model.weight.dtype)) for model in models]
        for logits_CV, hidden_CH, head_VH in zip(logits, hidden, heads, strict=True):
            product_(logits_CV, hidden_CH, head_VH.t())
            if shard.absent:
                logits_CV.fill_(ABSENT)
        of_teacher = teacher.rows(rows) if isinstance(teacher, SparseTarget) else logits[1] if teacher else None
        chunk = Chunk(logits[0], of_teacher, labels_N[rows], settings, shard, gradient=wanted)
        measured = measure(chunk)
        for name, value_C in measured.losses.items():
            losses.setdefault(name, weight_N.new_empty(tokens))[rows] = value_C.float()
        if not wanted:
            continue
        gradient_CV = gradient_(chunk, measured).to(heads[0].dtype)
        # The tokens' weights go to the narrow factors of the products instead of the [C, V] gradient.
        weight_C1 = weight_N[rows].unsqueeze(1) * settings.scale
        if grad_hidden_NH is not None:
            part_CH = weight_N.new_empty(gradient_CV.shape[0], grad_hidden_NH.shape[1])
            grad_hidden_NH[rows] = product_(part_CH, gradient_CV, heads[0]).mul_(weight_C1)
        if grad_weight_VH is not None:
            weighted_CH = (hidden[0] * weight_C1).to(heads[0].dtype)
            add_product_(grad_weight_VH[: shard.width], gradient_CV.t(), weighted_CH)
    return losses
