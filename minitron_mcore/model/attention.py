"""Core attention on torch's scaled_dot_product_attention, where Transformer Engine is not installed.

megatron-core's local DotProductAttention materialises the [s, s] scores; this does not. Legend: s sequence (this
context-parallel rank's part of it), S the whole sequence, b batch, n query heads and g key-value groups of this
tensor-parallel rank, d head dimension.

Under context parallelism keys and values are gathered over the ranks of a sequence, and each of a rank's two chunks
of queries attends to the keys up to its own end (runtime/groups.py draws which chunks a rank holds).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.groups import context_group, held_chunks, in_order


class SDPACoreAttention(MegatronModule):
    """Causal attention with grouped queries; takes the constructor arguments of Megatron's core attentions."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **others: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise InputError("attn_mask_type", attn_mask_type.name, "is not supported", "use causal")
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale
        self.context_group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            # Of this model: a teacher may have groups of its own.
            self.context_group = getattr(pg_collection, "cp", None) or context_group()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: Any, **others: Any
    ) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]. The mask is causal, whatever is given."""
        if self.context_group is None:
            return self._attend(query, key, value)
        rank, size = self.context_group.rank(), self.context_group.size()
        # Every rank adds its share to the gradient of all keys: backward reduce-scatters the sums.
        key, value = (
            in_order(gather_from_sequence_parallel_region(part.contiguous(), group=self.context_group), size)
            for part in (key, value)
        )
        length, chunks = key.shape[0] // (2 * size), zip(held_chunks(rank, size), query.chunk(2), strict=True)
        seen = ((queries, (chunk + 1) * length) for chunk, queries in chunks)
        return torch.cat([self._attend(queries, key[:end], value[:end]) for queries, end in seen])

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The queries [s, b, n, d] are those of the last s of the keys' [S, b, g, d] positions -> [s, b, n * d]."""
        groups = query.shape[2] // key.shape[2]
        whole = query.shape[0] == key.shape[0]
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        # Of fewer queries than keys, `is_causal` would take the first.
        mask = None if whole else causal_lower_right(query.shape[2], key.shape[2])
        causal: Any = {"attn_mask": mask, "is_causal": whole, "enable_gqa": groups > 1}
        dropout = self.dropout if self.training else 0.0
        attend = torch.nn.functional.scaled_dot_product_attention
        context = attend(query, key, value, dropout_p=dropout, scale=self.softmax_scale, **causal)
        return context.permute(2, 0, 1, 3).flatten(2)
