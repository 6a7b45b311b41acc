"""Layer specs: Transformer Engine's layers where it is installed, otherwise megatron-core's local ones, with the norm
and the attention below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec as get_gpt_layer_te_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn.attention.bias import causal_lower_right

from minitron_mcore.errors import InputError
from minitron_mcore.model.elementwise import packed_rotary, rms_norm, rotary, swiglu
from minitron_mcore.runtime.groups import context_group, held_chunks, in_order


def apply_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: TransformerConfig
) -> torch.Tensor:
    """The norm that `config` names, over the last axis of `x` [..., h]; weight and bias [h].

    LayerNorm1P (Nemotron) stores gamma - 1 (`layernorm_zero_centered_gamma`).
    """
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if config.normalization == "RMSNorm":
        return rms_norm(x, weight, config.layernorm_epsilon)
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, config.layernorm_epsilon)


class Norm(torch.nn.Module):
    """RMSNorm and LayerNorm that allow sequence parallelism and Nemotron's zero-centred gamma.

    Transformer Engine and Apex norms do both; this one stands in where neither is installed, since megatron-core's
    WrappedTorchNorm refuses both. `weight.sequence_parallel` makes Megatron sum its gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        initial = 0.0 if config.layernorm_zero_centered_gamma else 1.0
        self.weight = self._parameter(hidden_size, initial)
        self.bias = self._parameter(hidden_size, 0.0) if config.normalization == "LayerNorm" else None

    def _parameter(self, size: int, value: float) -> torch.nn.Parameter:
        place: Any = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
        parameter = torch.nn.Parameter(torch.full((size,), value, **place))
        parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_norm(x, self.weight, self.bias, self.config)


class SwiGLU(MegatronModule):
    """The activation of a SiLU-gated MLP. Megatron's own adds a zero to one half, and keeps both halves twice."""

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        return swiglu(both)


class SDPACoreAttention(MegatronModule):
    """Causal attention with grouped queries, on torch's scaled_dot_product_attention; takes the constructor arguments
    of Megatron's core attentions, whose local one materialises the [s, s] scores.

    Legend: s sequence (this context-parallel rank's part of it), S the whole sequence, b batch, t tokens of packed
    segments (packing.py), n query heads and g key-value groups of this tensor-parallel rank, d head dimension.

    Under context parallelism keys and values are gathered over the ranks of a sequence, and each of a rank's two chunks
    of queries attends to the keys up to its own end (runtime/groups.py draws which chunks a rank holds).
    """

    def __init__(
        self, config: TransformerConfig, *, attn_mask_type: AttnMaskType, softmax_scale: Any = None, **others: Any
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise InputError("attn_mask_type", attn_mask_type.name, "is not supported", "use causal")
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale
        self.context_group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            # Of this model: a teacher may have groups of its own.
            self.context_group = getattr(others.get("pg_collection"), "cp", None) or context_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *mask: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]. The mask is causal, whatever is given.

        Of packed segments: query [t, n, d], key and value [t, g, d] -> [t, n * d], each segment by itself."""
        if packed_seq_params is not None:
            assert self.context_group is None, "packed segments are not cut over ranks (runtime.config.check_packing)"
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            # Split once, so that backward puts the gradients together once.
            parts = (part.unsqueeze(1).split(lengths) for part in (query, key, value))
            return torch.cat([self._attend(*part) for part in zip(*parts, strict=True)]).squeeze(1)
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


def use_transformer_engine(config: TransformerConfig) -> bool:
    """Whether models are built from Transformer Engine's layers: installed, on a CUDA device, in bf16.

    Its matrix products are TF32 where the weights are fp32; the local layers keep fp32.
    """
    return bool(HAVE_TE) and torch.cuda.is_available() and config.bf16


def rotary_fields() -> dict[str, bool]:
    """TransformerConfig's fields of the rotation: where Megatron looks for Transformer Engine's kernel and finds none,
    on the CPU, it gets ours. Its own operations write every head twice, and a gradient of zeros for no channels."""
    if torch.cuda.is_available():
        return {}
    rope_utils.fused_apply_rotary_pos_emb, rope_utils.fused_apply_rotary_pos_emb_thd = rotary, packed_rotary
    return {"apply_rope_fusion": True}


class BareLayer(TransformerLayer):
    """A layer without memory for its weights, which are fetched before it runs (distillation/teacher/placement.py)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parameter_shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        for parameter in self.parameters():
            parameter.data = parameter.data.new_empty(0)


def block_submodules(
    config: TransformerConfig, vp_stage: int | None, pp_rank: int, *, bare_layers: bool = False
) -> TransformerBlockSubmodules:
    """The layers and the final norm of one pipeline stage (chunk `vp_stage` of it, when interleaved).

    `bare_layers`: as BareLayer, one after another, so that no more than one is ever whole.
    """
    fused = use_transformer_engine(config)
    layer = get_gpt_layer_te_spec(qk_layernorm=config.qk_layernorm) if fused else _local(config)
    if config.use_te_activation_func:  # a module as Transformer Engine's are, which gets both halves (model/gpt.py)
        layer.submodules.mlp.submodules.activation_func = SwiGLU
    if bare_layers:
        layer = replace(layer, module=BareLayer)
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LayerNormImpl if fused else Norm)


def _local(config: TransformerConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.input_layernorm = Norm
    spec.submodules.pre_mlp_layernorm = Norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return spec
