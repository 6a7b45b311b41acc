"""A planted model, of which it is known what is useful: the scoring pass and the plan find exactly that.

Planted, at random places in every layer, as the scores define use (facts of the forward pass, whatever follows):
- useless neurons: rows of fc1 a hundredth of the others';
- useless KV groups: value rows a hundredth;
- useless heads: query rows of zero, so that they look at everything alike and average it away, where useful ones look
  at single tokens, whose values do not shrink;
- useless hidden channels: norm weights a hundredth;
- useless layers: what they add to the residual stream a thousandth.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.pruning.plan_file import PruningPlan
from tests.distributed.dense_reference import (
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    INPUT_NORM,
    PRE_MLP_NORM,
    PROJ,
    QKV,
    Name,
    draw_weights,
    fill,
)
from tests.distributed.models import SEQUENCE, global_batch, start_layout, tiny
from tests.distributed.ranks import run_on_ranks
from tests.plans import make_plan

LAYERS, HIDDEN, NEURONS, GROUPS, HEADS = 4, 32, 40, 2, 2  # that are of use; heads in each group
FAMILIES = ("llama", "nemotron")


def architecture_of(family: str) -> Architecture:
    return tiny(family, num_layers=6, num_attention_heads=12, num_query_groups=3, vocab_size=256, init_method_std=0.2)


def useful(a: Architecture) -> dict[str, Any]:
    draw = numpy.random.default_rng(17)

    def choose(count: int, size: int) -> list[int]:
        return sorted(draw.choice(size, count, replace=False).tolist())

    layers = range(a.num_layers)
    groups = {layer: choose(GROUPS, a.num_query_groups) for layer in layers}
    q = a.heads_per_group
    return {
        "layers": choose(LAYERS, a.num_layers),
        "hidden": choose(HIDDEN, a.hidden_size),
        "ffn": {layer: choose(NEURONS, a.ffn_hidden_size) for layer in layers},
        "groups": groups,
        "heads": {
            layer: [g * q + head for g in range(a.num_query_groups) for head in choose(HEADS, q)] for layer in layers
        },
    }


def planted(a: Architecture) -> dict[Name, torch.Tensor]:
    weights, kept = draw_weights(a, 5), useful(a)
    q, d, f = a.heads_per_group, a.kv_channels, a.ffn_hidden_size
    draw = torch.Generator().manual_seed(3)
    weights[EMBEDDING, None] = torch.randn(weights[EMBEDDING, None].shape, generator=draw)
    useless = sorted(set(range(a.hidden_size)) - set(kept["hidden"]))
    one = 1.0 if a.layernorm_zero_centered_gamma else 0.0
    for (key, _), weight in weights.items():
        if key.startswith((INPUT_NORM, PRE_MLP_NORM, FINAL_NORM)):
            weight[useless] = 0.0 if key.endswith("bias") else 0.01 - one
            others = kept["hidden"]
            weight[others] = 0.0 if key.endswith("bias") else 1.0 - one
    for layer in range(a.num_layers):
        neurons = sorted(set(range(f)) - set(kept["ffn"][layer]))
        for half in (0, f) if a.gated_linear_unit else (0,):
            weights[FC1, layer][[half + neuron for neuron in neurons]] *= 0.01
        blocks = weights[QKV, layer].view(a.num_query_groups, q + 2, d, -1)
        for group in range(a.num_query_groups):
            for head in range(q):
                blocks[group, head] *= 4.0 if group * q + head in kept["heads"][layer] else 0.0
            if group not in kept["groups"][layer]:
                blocks[group, q + 1] *= 0.01
        if layer not in kept["layers"]:
            weights[PROJ, layer] *= 1e-3
            weights[FC2, layer] *= 1e-3
    return weights


def scored(family: str, world_size: int) -> PruningPlan:
    from minitron_mcore.importance.config import ImportanceConfig
    from minitron_mcore.importance.score import score_model
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.microbatch import Microbatch

    a = architecture_of(family)
    config = start_layout({"tensor": 1, "pipeline": world_size}, world_size)
    chunks = build_model(a, config, "fp32", trainable=False)
    fill(chunks, a, planted(a))
    batches = [
        Microbatch.of({name: value[index : index + 1] for name, value in batch.items()})
        for batch in global_batch(a.vocab_size)
        for index in range(len(batch["tokens"]))
    ]
    assert batches[0].tokens.shape == (1, SEQUENCE)
    scores = score_model(chunks, batches, a, ImportanceConfig(num_samples=len(batches)))
    target: dict[str, int | None] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": NEURONS,
        "num_query_groups": GROUPS,
        "num_attention_heads": GROUPS * HEADS,
    }
    return make_plan(scores, target)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_useful_stays(family: str, world_size: int) -> None:
    a = architecture_of(family)
    kept, q = useful(a), a.heads_per_group
    for plan in run_on_ranks(scored, world_size, family, world_size):
        assert plan.layers == kept["layers"]
        assert plan.hidden == kept["hidden"]
        for layer in plan.layers:
            assert plan.ffn[layer] == kept["ffn"][layer]
            assert plan.groups[layer] == kept["groups"][layer]
            of_groups = [head for head in kept["heads"][layer] if head // q in kept["groups"][layer]]
            assert plan.heads[layer] == of_groups
        # No chance: between what was planted and the rest there is a gap.
        assert all(cut.margin is not None and cut.margin > 0.05 for cut in plan.cuts.values()), plan.cuts
