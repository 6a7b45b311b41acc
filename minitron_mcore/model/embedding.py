"""The embedding's lookup, whose backward pass adds the gradient of a microbatch's rows, and touches no others.

Legend: b batch, s sequence (its tensor-parallel part under sequence parallelism), V rows of this rank's shard,
h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable


class Embedding(VocabParallelEmbedding):
    """Megatron's, with `look_up` for its lookup."""

    def forward(self, ids: Tensor) -> Tensor:
        """Global ids [b, s] -> [b, s, h]; [s, b, h] under sequence parallelism. All tensor-parallel ranks call."""
        group = self.tp_group
        if group.size() > 1:
            elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
            rows = look_up((ids - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
            rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        else:
            rows = look_up(ids, self.weight)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=group)
        return reduce_from_tensor_model_parallel_region(rows, group=group)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """weight [V, h], ids of any shape -> [*ids, h].

    Where Megatron's DDP keeps an fp32 `main_grad`, backward adds the rows' gradients to it, in fp32, and autograd gets
    none: the whole one would be [V, h], zeros but for a microbatch's rows, to be filled and then added. Megatron's hook
    then adds nothing, as with the output head's (distillation/logits/loss.py); overlapped, runtime/overlap.py tells it.
    """
    return _LookUp.apply(ids, weight)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight  # the parameter itself: a saved tensor comes back without `main_grad`
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (ids,) = ctx.saved_tensors
        weight, main_grad = ctx.weight, getattr(ctx.weight, "main_grad", None)
        if main_grad is None or main_grad.dtype != torch.float32:
            count = weight.shape[0]
            return None, torch.ops.aten.embedding_dense_backward(gradient.contiguous(), ids, count, -1, False)
        rows, gradient = ids.flatten(), gradient.reshape(-1, weight.shape[1]).float()
        if main_grad.is_cuda:  # sorted by rows: the same sums every time
            main_grad.index_put_((rows,), gradient, accumulate=True)
        else:
            main_grad.index_add_(0, rows, gradient)
        return None, None
