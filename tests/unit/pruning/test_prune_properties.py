"""What pruning means, by properties over random small models: global weights through `prune_dense`, functions in the
open, dense in float64 (tests/distributed/dense_reference.py). 1e-10 covers the order of float64 sums on logits of
order one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.importance.scores import Scores
from minitron_mcore.layout import parameter_table
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
    QKV_BIAS,
    DenseModel,
    Name,
    draw_weights,
)
from tests.plans import make_plan, prune_dense

Weights = dict[Name, torch.Tensor]
FAMILIES = ("llama", "nemotron", "qwen2", "qwen3")


@st.composite
def teachers(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES) -> Architecture:
    groups, q = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return build_architecture(
        {
            "family": draw(st.sampled_from(families)),
            "num_layers": draw(st.integers(1, 3)),
            "hidden_size": draw(st.integers(3, 12)),
            "ffn_hidden_size": draw(st.integers(2, 9)),
            "num_attention_heads": groups * q,
            "num_query_groups": groups,
            "kv_channels": 4,
            "vocab_size": 17,
            "make_vocab_size_divisible_by": 1,
            "init_method_std": 0.4,
            "untie_embeddings_and_output_weights": draw(st.booleans()),
        }
    )


@st.composite
def sizes(draw: st.DrawFn, teacher: Architecture, fields: tuple[str, ...]) -> dict[str, int | None]:
    """A student in `fields` of at most the teacher's size."""
    found: dict[str, int | None] = {
        name: draw(st.integers(1, getattr(teacher, name)))
        for name in fields
        if name not in ("num_attention_heads", "num_query_groups")
    }
    groups = draw(st.integers(1, teacher.num_query_groups)) if "num_query_groups" in fields else None
    if teacher.heads_per_group == 1 and "num_attention_heads" in fields and groups is None:
        groups = draw(st.integers(1, teacher.num_query_groups))
    count = groups or teacher.num_query_groups
    q = draw(st.integers(1, teacher.heads_per_group)) if "num_attention_heads" in fields else teacher.heads_per_group
    return {**found, "num_query_groups": count, "num_attention_heads": count * q}


ALL = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def scores_of(a: Architecture, seed: int) -> Scores:
    """Of few values, so that there are ties."""
    draw = numpy.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "groups": (a.num_layers, a.num_query_groups),
        "layers": (a.num_layers,),
    }
    arrays: dict[str, Any] = {axis: draw.integers(1, 6, shape).astype(float) for axis, shape in shapes.items()}
    return Scores(a, **arrays)


def pruned(weights: Mapping[Name, torch.Tensor], plan: PruningPlan) -> Weights:
    result: Weights = {}
    for parameter in parameter_table(plan.student):
        for place, layer in enumerate(plan.layers) if parameter.per_layer else [(None, None)]:
            result[parameter.key, place] = prune_dense(weights[parameter.key, layer], parameter, plan, layer)
    return result


def logits(a: Architecture, weights: Mapping[Name, torch.Tensor]) -> torch.Tensor:
    tokens = torch.randint(0, a.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    return DenseModel(a, weights).forward(tokens)["logits"]


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10 * max(1.0, float(left.abs().max())))


def copied(weights: Mapping[Name, torch.Tensor]) -> Weights:
    return {name: value.clone() for name, value in weights.items()}


seeds = st.integers(0, 10**6)


@given(
    teachers(), seeds, st.sampled_from(["scattered", "contiguous"]), st.sampled_from([torch.bfloat16, torch.float32])
)
@settings(max_examples=25, deadline=None)
def test_the_identity_plan_changes_no_bit(a: Architecture, seed: int, layers: str, dtype: torch.dtype) -> None:
    weights = draw_weights(a, seed, dtype)
    for rule in ("none", "paper"):
        plan = make_plan(scores_of(a, seed), dict.fromkeys(ALL), layers=layers, head_residual=rule)
        student = pruned(weights, plan)
        assert plan.student == a and student.keys() == weights.keys()
        assert all(torch.equal(student[name], weights[name]) for name in weights)


def masked(weights: Weights, plan: PruningPlan) -> Weights:
    """The teacher's weights with a way out of nothing that is dropped; hidden channels are no matter here."""
    a, d = plan.teacher, plan.teacher.kv_channels
    result = copied(weights)
    for layer in range(a.num_layers):
        stays = layer in plan.layers
        neurons = set(range(a.ffn_hidden_size)) - set(plan.ffn[layer] if stays else [])
        heads = set(range(a.num_attention_heads)) - set(plan.heads[layer] if stays else [])
        result[FC2, layer][:, sorted(neurons)] = 0
        for head in heads:
            result[PROJ, layer][:, head * d : (head + 1) * d] = 0
    return result


@given(teachers(), st.data(), seeds)
@settings(max_examples=40, deadline=None)
def test_pruned_is_masked_but_for_hidden_channels(a: Architecture, data: st.DataObject, seed: int) -> None:
    axes = data.draw(st.sampled_from([*[(name,) for name in ALL if name != "hidden_size"], ALL[:1] + ALL[2:]]))
    plan = make_plan(scores_of(a, seed), data.draw(sizes(a, axes)))
    weights = draw_weights(a, seed, torch.float64)
    assert_same(logits(plan.student, pruned(weights, plan)), logits(a, masked(weights, plan)))


@given(teachers(), st.data(), seeds)
@settings(max_examples=30, deadline=None)
def test_what_is_dead_can_go(a: Architecture, data: st.DataObject, seed: int) -> None:
    """Dead is: a neuron whose rows of fc1 are zero (so is its activation), a head or group whose value rows are zero
    (so is its output), a layer that adds nothing to the residual stream. The logits stay what they were."""
    weights, draw = draw_weights(a, seed, torch.float64), numpy.random.default_rng(seed)
    target = data.draw(sizes(a, ("num_layers", "ffn_hidden_size", "num_query_groups")))
    plan = make_plan(scores_of(a, seed), target)
    q, d, f = a.heads_per_group, a.kv_channels, a.ffn_hidden_size
    for layer in range(a.num_layers):
        if layer not in plan.layers:
            weights[PROJ, layer].zero_()
            weights[FC2, layer].zero_()
            continue
        gone = sorted(set(range(f)) - set(plan.ffn[layer]))
        halves = [0, f] if a.gated_linear_unit else [0]
        half = draw.choice(halves)  # either half of a gated neuron is enough
        weights[FC1, layer][[int(half) + neuron for neuron in gone]] = 0
        for group in set(range(a.num_query_groups)) - set(plan.groups[layer]):
            first = (group * (q + 2) + q + 1) * d
            for key in (QKV, QKV_BIAS) if a.add_qkv_bias else (QKV,):
                weights[key, layer][first : first + d] = 0
    assert_same(logits(plan.student, pruned(weights, plan)), logits(a, weights))


# Not Qwen3, whose norms of queries and keys share the epsilon and not the width.
@given(teachers(("llama", "nemotron", "qwen2")), st.data(), seeds)
@settings(max_examples=30, deadline=None)
def test_a_dead_hidden_channel_leaves_a_norm_of_another_width(a: Architecture, data: st.DataObject, seed: int) -> None:
    """Dead hidden channels are zero in all that writes to the residual stream; under LayerNorm the others must also
    add up to zero, or the mean would move. Then every norm's input is the same but for h, over which it averages: the
    student is the teacher with norm weights times sqrt(h_student / h) and an epsilon of h_student / h as much. No more
    than that, since the papers do not rescale."""
    weights = draw_weights(a, seed, torch.float64)
    plan = make_plan(scores_of(a, seed), data.draw(sizes(a, ("hidden_size",))))
    gone = sorted(set(range(a.hidden_size)) - set(plan.hidden))
    writes = [(EMBEDDING, None), *((key, layer) for key in (PROJ, FC2) for layer in range(a.num_layers))]
    for key, layer in writes:
        channels = weights[key, layer].T if key == EMBEDDING else weights[key, layer]  # a view [h, …]
        channels[gone] = 0
        if a.normalization == "LayerNorm":
            channels[plan.hidden] -= channels[plan.hidden].mean(0)
    share = plan.student.hidden_size / a.hidden_size
    rescaled = copied(weights)
    for prefix in (INPUT_NORM, PRE_MLP_NORM, FINAL_NORM):
        for layer in range(a.num_layers) if prefix != FINAL_NORM else [None]:
            weight = rescaled[prefix + "weight", layer]
            one = 1.0 if a.layernorm_zero_centered_gamma else 0.0  # stored is gamma - 1
            rescaled[prefix + "weight", layer] = (weight + one) * math.sqrt(share) - one
            if a.normalization == "LayerNorm":  # what a dead channel's norm puts out is its bias: dead it must be
                for owner in (weights, rescaled):
                    owner[prefix + "bias", layer][gone] = 0
    teacher = a.replace(layernorm_epsilon=a.layernorm_epsilon * share)
    if a.normalization == "RMSNorm" or plan.student.hidden_size > 1:  # the mean of one channel is the channel
        assert_same(logits(plan.student, pruned(weights, plan)), logits(teacher, rescaled))


def permuted(weights: Weights, scores: Scores, draw: numpy.random.Generator) -> tuple[Weights, Scores]:
    """The same function with other neighbours: neurons, groups, and heads within a group, in every layer anew."""
    a, d = scores.architecture, scores.architecture.kv_channels
    q, groups = a.heads_per_group, a.num_query_groups
    result, arrays = copied(weights), {axis: getattr(scores, axis).copy() for axis in ("ffn", "heads", "groups")}
    for layer in range(a.num_layers):
        neurons, order = draw.permutation(a.ffn_hidden_size), draw.permutation(groups)
        heads = numpy.concatenate([group * q + draw.permutation(q) for group in order])
        halves = [neurons, a.ffn_hidden_size + neurons] if a.gated_linear_unit else [neurons]
        result[FC1, layer] = weights[FC1, layer][numpy.concatenate(halves)]
        result[FC2, layer] = weights[FC2, layer][:, neurons]
        blocks = []
        for place, group in enumerate(order):
            own = heads[place * q : (place + 1) * q] - group * q
            blocks += [*(group * (q + 2) + own), group * (q + 2) + q, group * (q + 2) + q + 1]
        rows = (numpy.array(blocks)[:, None] * d + numpy.arange(d)).reshape(-1)
        for key in (QKV, QKV_BIAS) if a.add_qkv_bias else (QKV,):
            result[key, layer] = weights[key, layer][rows]
        result[PROJ, layer] = weights[PROJ, layer][:, (heads[:, None] * d + numpy.arange(d)).reshape(-1)]
        for axis, indices in (("ffn", neurons), ("heads", heads), ("groups", order)):
            arrays[axis][layer] = arrays[axis][layer][indices]
    return result, Scores(a, scores.hidden, layers=scores.layers, **arrays)


@given(teachers(), st.data(), seeds, st.sampled_from(["none", "paper", "laco"]))
@settings(max_examples=40, deadline=None)
def test_permuting_changes_neither_the_teacher_nor_the_student(
    a: Architecture, data: st.DataObject, seed: int, rule: str
) -> None:
    draw = numpy.random.default_rng(seed)
    scores, weights = scores_of(a, seed), draw_weights(a, seed, torch.float64)
    for axis in ("ffn", "heads", "groups"):  # without ties, which order decides
        values = getattr(scores, axis)
        values[...] = draw.permuted(numpy.tile(numpy.arange(1.0, values.shape[1] + 1), (len(values), 1)), axis=1)
    others, moved = permuted(weights, scores, draw)
    assert_same(logits(a, weights), logits(a, others))
    target = data.draw(sizes(a, ALL))
    kept, of = int(target["num_attention_heads"] or 0), a.num_attention_heads
    if a.heads_per_group > 1:
        kept, of = kept // int(target["num_query_groups"] or 1), a.heads_per_group
    if 2 * kept < of:
        rule = "none"
    plan, other = (make_plan(given, target, head_residual=rule) for given in (scores, moved))
    assert_same(logits(plan.student, pruned(weights, plan)), logits(other.student, pruned(others, other)))


def left(scores: Scores, plan: PruningPlan) -> Scores:
    """The scores of what a plan keeps, as scores of its student."""
    return Scores(
        plan.student,
        scores.hidden[plan.hidden],
        numpy.stack([scores.ffn[layer, plan.ffn[layer]] for layer in plan.layers]),
        numpy.stack([scores.heads[layer, plan.heads[layer]] for layer in plan.layers]),
        scores.layers[plan.layers],
        groups=numpy.stack([scores.groups[layer, plan.groups[layer]] for layer in plan.layers]),  # type: ignore[index]
    )


@given(teachers(), st.data(), seeds)
@settings(max_examples=40, deadline=None)
def test_two_steps_with_fixed_scores_are_one(a: Architecture, data: st.DataObject, seed: int) -> None:
    """By the bit, ties and all; without residuals, which the second step would take from heads already changed."""
    scores, weights = scores_of(a, seed), draw_weights(a, seed)
    first = make_plan(scores, data.draw(sizes(a, ALL)))
    second_scores = left(scores, first)
    target = data.draw(sizes(first.student, ALL))
    second, once = make_plan(second_scores, target), make_plan(scores, target)
    twice, direct = pruned(pruned(weights, first), second), pruned(weights, once)
    assert second.student == once.student and twice.keys() == direct.keys()
    assert all(torch.equal(twice[name], direct[name]) for name in direct)


def test_the_reference_can_tell() -> None:
    """Two of the properties with the wrong rows, so that they are known to be able to fail."""
    a = build_architecture({"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 6, "num_attention_heads": 4} | SMALL)
    weights, scores = draw_weights(a, 0, torch.float64), scores_of(a, 0)
    plan = make_plan(scores, {"num_attention_heads": 2})
    wrong = {0: [index for index in range(4) if index not in plan.heads[0]]}
    other = dataclasses.replace(plan, heads=wrong, groups={})
    difference = logits(plan.student, pruned(weights, other)) - logits(a, masked(weights, plan))
    assert difference.abs().max() > 1e-3


SMALL: dict[str, Any] = {"num_query_groups": 2, "kv_channels": 4, "vocab_size": 17, "init_method_std": 0.4}
