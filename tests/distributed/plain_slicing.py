"""A teacher's global tensors at random, and the student of a plan sliced out of them in the open: no table, no shards.

Legend: h hidden, f ffn, G KV groups, q query heads in a group, d head dimension.
"""

from __future__ import annotations

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.pruning.plan_file import PruningPlan


def teacher_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Checkpoint key -> random global tensor, layers stacked [L, …]. Shapes as the format has them."""
    a = architecture
    h, f, d, groups = a.hidden_size, a.ffn_hidden_size, a.kv_channels, a.num_query_groups
    layer = "decoder.layers."
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (a.padded_vocab_size, h),
        layer + "self_attention.linear_qkv.weight": (a.num_layers, (a.num_attention_heads + 2 * groups) * d, h),
        layer + "self_attention.linear_proj.weight": (a.num_layers, h, a.num_attention_heads * d),
        layer + "mlp.linear_fc1.weight": (a.num_layers, (2 if a.gated_linear_unit else 1) * f, h),
        layer + "mlp.linear_fc2.weight": (a.num_layers, h, f),
    }
    for part in ("weight", "bias") if a.family == "nemotron" else ("weight",):
        shapes[layer + f"self_attention.linear_qkv.layer_norm_{part}"] = (a.num_layers, h)
        shapes[layer + f"mlp.linear_fc1.layer_norm_{part}"] = (a.num_layers, h)
        shapes[f"decoder.final_layernorm.{part}"] = (h,)
    if a.add_qkv_bias:
        shapes[layer + "self_attention.linear_qkv.bias"] = (a.num_layers, (a.num_attention_heads + 2 * groups) * d)
    if a.qk_layernorm:
        shapes |= {f"{layer}self_attention.{part}_layernorm.weight": (a.num_layers, d) for part in "qk"}
    if a.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (a.padded_vocab_size, h)
    generator = torch.Generator().manual_seed(11)
    return {
        key: torch.randn(shape, generator=generator) * (0.3 if "norm" in key else 0.08)
        + key.endswith(("norm_weight", "norm.weight"))
        for key, shape in sorted(shapes.items())
    }


def sliced(teacher: dict[str, torch.Tensor], plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The student by plain slicing of global tensors."""
    a = plan.teacher
    groups, q, d = a.num_query_groups, a.num_attention_heads // a.num_query_groups, a.kv_channels
    student: dict[str, torch.Tensor] = {}
    for key, whole in teacher.items():
        if not key.startswith("decoder.layers."):
            student[key] = whole[..., plan.hidden]
            continue
        rows = []
        for layer in plan.layers:
            one, neurons, heads = with_residuals(key, whole[layer], plan, layer), plan.ffn[layer], plan.heads[layer]
            if "layer_norm" in key:
                one = one[plan.hidden]
            elif "k_layernorm" in key or "q_layernorm" in key:
                pass
            elif "linear_qkv" in key:
                by_group = one.view(groups, q + 2, d, -1)
                places = [[head - group * q for head in heads if head // q == group] for group in range(groups)]
                parts = [by_group[group, [*places[group], q, q + 1]].flatten(0, 1) for group in plan.groups[layer]]
                one = torch.cat(parts)
                one = one.flatten() if key.endswith("bias") else one[:, plan.hidden]
            elif "linear_proj" in key:
                one = one.view(-1, a.num_attention_heads, d)[plan.hidden][:, heads].flatten(1)
            elif "linear_fc1" in key:
                halves = one.view(-1, a.ffn_hidden_size, one.shape[-1])
                one = halves[:, neurons].flatten(0, 1)[:, plan.hidden]
            else:
                one = one[plan.hidden][:, neurons]
            rows.append(one)
        student[key] = torch.stack(rows)
    return student


def with_residuals(key: str, whole: torch.Tensor, plan: PruningPlan, layer: int) -> torch.Tensor:
    """One layer's tensor with every kept head + (head - its dropped one), or the other sign, in float32."""
    if plan.residual is None or not ("linear_qkv.weight" in key or "linear_qkv.bias" in key or "linear_proj" in key):
        return whole
    a, d, sign = plan.teacher, plan.teacher.kv_channels, 1 if plan.residual.rule == "paper" else -1
    q = a.num_attention_heads // a.num_query_groups
    turned = (whole.T if "linear_proj" in key else whole).float().clone()
    # Each head's blocks of d rows, as (group, place): query heads, key, value.
    blocks = turned.view(a.num_query_groups, q if "linear_proj" in key else q + 2, d, -1)
    source = blocks.clone()
    for kept, gone in plan.residual.pairs[layer]:
        group, place = divmod(kept, q)
        other, other_place = divmod(gone, q)
        matrices = {"query": (place, other_place), "key": (q, q), "value": (q + 1, q + 1)}
        if "linear_proj" in key:
            matrices = {"output": (place, other_place)}
        for matrix, (mine, its) in matrices.items():
            if matrix in plan.residual.matrices:
                blocks[group, mine] += sign * (source[group, mine] - source[other, its])
    return (turned.T if "linear_proj" in key else turned).to(whole.dtype)
