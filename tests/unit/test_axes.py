"""What is kept of every parameter, on tensors whose rows carry their own names; and that shards make up the whole."""

import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.layout import Parameter, parameter_table
from minitron_mcore.model.initialize import take_shard
from minitron_mcore.plan import PruningPlan
from minitron_mcore.pruning.apply import shard_moves
from minitron_mcore.pruning.axes import kept_rows, prune_dense, take


def random_plan(seed: int, family: str, groups: int, q: int, kept_q: int, ffn: int, kept_ffn: int) -> PruningPlan:
    draw = numpy.random.default_rng(seed)

    def choose(count: int, size: int) -> list[int]:
        return sorted(draw.choice(size, count, replace=False).tolist())

    teacher = build_architecture(
        {
            "family": family,
            "num_layers": 3,
            "hidden_size": 6,
            "ffn_hidden_size": ffn,
            "num_attention_heads": groups * q,
            "num_query_groups": groups,
            "kv_channels": 4,
            "vocab_size": 20,
            "make_vocab_size_divisible_by": 8,
        }
    )
    student = teacher.replace(
        num_layers=2, hidden_size=4, ffn_hidden_size=kept_ffn, num_attention_heads=groups * kept_q
    )
    layers = choose(2, 3)
    return PruningPlan(
        teacher,
        student,
        layers,
        choose(4, 6),
        {layer: choose(kept_ffn, ffn) for layer in layers},
        {layer: [g * q + head for g in range(groups) for head in choose(kept_q, q)] for layer in layers},
    )


def pairs(most: int) -> st.SearchStrategy[list[int]]:
    return st.tuples(st.integers(1, most), st.integers(1, most)).map(sorted)


# Everything that is sharded divides by 4.
plans = st.builds(
    lambda seed, family, groups, q, ffn: random_plan(seed, family, groups, q[1], q[0], 4 * ffn[1], 4 * ffn[0]),
    st.integers(0, 1000),
    st.sampled_from(["llama", "nemotron", "qwen2", "qwen3"]),
    st.sampled_from([4, 8]),
    pairs(4),
    pairs(5),
)


def row_names(axis: str, model: Architecture) -> list[Any]:
    """What each row of an axis is, spelled out one by one."""
    d, q, groups = model.kv_channels, model.heads_per_group, model.num_query_groups
    if axis == "qkv":
        names = []
        for group in range(groups):
            for head in range(group * q, (group + 1) * q):
                names += [("query", head, channel) for channel in range(d)]
            names += [("key", group, channel) for channel in range(d)]
            names += [("value", group, channel) for channel in range(d)]
        return names
    if axis == "heads":
        return [("query", head, channel) for head in range(groups * q) for channel in range(d)]
    if axis == "gated_ffn":
        return [(part, neuron) for part in ("gate", "up") for neuron in range(model.ffn_hidden_size)]
    sizes = {"head": d, "hidden": model.hidden_size, "ffn": model.ffn_hidden_size, "vocab": model.padded_vocab_size}
    return [(axis, row) for row in range(sizes[axis])]


def stays(name: Any, plan: PruningPlan, layer: int | None) -> bool:
    kind, index = name[0], name[1]
    if kind == "hidden":
        return index in plan.hidden
    if kind in ("ffn", "gate", "up"):
        return index in plan.ffn[layer or 0]
    return kind != "query" or index in plan.heads[layer or 0]


def parameters(plan: PruningPlan) -> list[tuple[Parameter, int | None]]:
    rows = parameter_table(plan.teacher)
    return [(row, layer) for row in rows for layer in (plan.layers if row.per_layer else [None])]


@given(plans)
@settings(max_examples=40, deadline=None)
def test_kept_rows_are_those_whose_names_stay_in_their_order(plan: PruningPlan) -> None:
    for parameter, layer in parameters(plan):
        for axis, rows in zip(parameter.axes, kept_rows(parameter, plan, layer), strict=True):
            names = row_names(axis, plan.teacher)
            assert [names[row] for row in rows] == [name for name in names if stays(name, plan, layer)]


@given(plans, st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_shards_exchange_into_the_shards_of_the_dense_student(plan: PruningPlan, size: int) -> None:
    """What ranks send each other, played through in one process."""
    for parameter, layer in parameters(plan):
        shape = parameter.shape(plan.teacher)
        whole = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
        student = prune_dense(whole, parameter, plan, layer)
        assert student.shape == parameter.shape(plan.student)
        if parameter.shard_axis is None:
            continue
        axis = parameter.shard_axis
        kept = kept_rows(parameter, plan, layer)
        held, wanted = shard_moves(parameter, plan, kept[axis], size)
        sent: dict[int, torch.Tensor] = {}
        for rank in range(size):
            local = take_shard(whole, parameter, plan.teacher, rank, size)
            for other, rows in enumerate(kept):
                local = local if other == axis else take(local, other, rows)
            for place, row in held[rank].tolist():
                assert row not in sent
                sent[row] = local.select(axis, place)
        for rank in range(size):
            expected = take_shard(student, parameter, plan.student, rank, size)
            assert torch.equal(torch.stack([sent[row] for row in wanted[rank].tolist()], dim=axis), expected)


@pytest.mark.parametrize("family", ["llama", "nemotron", "qwen2"])
def test_heads_and_vocabulary_move_nothing_between_ranks(family: str) -> None:
    plan = random_plan(1, family, groups=4, q=3, kept_q=2, ffn=12, kept_ffn=8)
    for parameter, layer in parameters(plan):
        if set(parameter.axes) & {"qkv", "heads", "vocab"}:
            axis = parameter.shard_axis or 0
            held, wanted = shard_moves(parameter, plan, kept_rows(parameter, plan, layer)[axis], 2)
            assert all(numpy.array_equal(held[rank][:, 1], wanted[rank]) for rank in range(2))
