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
from minitron_mcore.pruning.axes import kept_rows, part_of, select, take, take_kept
from minitron_mcore.pruning.plan_file import HeadResidual, PruningPlan
from tests.plans import prune_dense


def random_plan(
    seed: int, family: str, groups: tuple[int, int], heads: tuple[int, int], ffn: tuple[int, int], rule: str = "none"
) -> PruningPlan:
    """(kept, of the teacher): KV groups, query heads in each, neurons. `rule`: with head residuals, where half stay."""
    draw = numpy.random.default_rng(seed)

    def choose(sizes: tuple[int, int]) -> list[int]:
        return sorted(draw.choice(sizes[1], sizes[0], replace=False).tolist())

    (kept_groups, all_groups), (kept_q, q), (kept_ffn, all_ffn) = groups, heads, ffn
    teacher = build_architecture(
        {
            "family": family,
            "num_layers": 3,
            "hidden_size": 6,
            "ffn_hidden_size": all_ffn,
            "num_attention_heads": all_groups * q,
            "num_query_groups": all_groups,
            "kv_channels": 4,
            "vocab_size": 20,
            "make_vocab_size_divisible_by": 8,
        }
    )
    student = teacher.replace(
        num_layers=2,
        hidden_size=4,
        ffn_hidden_size=kept_ffn,
        num_attention_heads=kept_groups * kept_q,
        num_query_groups=kept_groups,
    )
    layers = choose((2, 3))
    of_groups = {layer: choose(groups) for layer in layers}
    of_heads = {layer: [g * q + head for g in of_groups[layer] for head in choose(heads)] for layer in layers}
    residual = None
    if rule != "none" and (2 * kept_q >= q if q > 1 else 2 * kept_groups >= all_groups):
        # With one head in each group, heads of the whole layer are paired; else those of one group.
        pairs: dict[int, list[tuple[int, int]]] = {}
        for layer in layers:
            fields = [range(all_groups)] if q == 1 else [range(g * q, (g + 1) * q) for g in of_groups[layer]]
            pairs[layer] = []
            for field in fields:
                kept = draw.permutation([head for head in field if head in of_heads[layer]]).tolist()
                gone = draw.permutation([head for head in field if head not in of_heads[layer]]).tolist()
                pairs[layer] += list(zip(kept, gone, strict=False))
        matrices = ["query", "output", *(["key", "value"] if q == 1 else [])]
        residual = HeadResidual(rule, draw.permutation(matrices).tolist()[: 1 + seed % 4], pairs)
    return PruningPlan(
        teacher=teacher,
        student=student,
        layers=layers,
        hidden=choose((4, 6)),
        ffn={layer: choose(ffn) for layer in layers},
        heads=of_heads,
        groups=of_groups,
        residual=residual,
    )


def pairs(most: int) -> st.SearchStrategy[list[int]]:
    return st.tuples(st.integers(1, most), st.integers(1, most)).map(sorted)


# Everything that is sharded divides by 4.
plans = st.builds(
    lambda seed, family, groups, q, ffn, rule: random_plan(
        seed, family, (4 * groups[0], 4 * groups[1]), q, (4 * ffn[0], 4 * ffn[1]), rule
    ),
    st.integers(0, 1000),
    st.sampled_from(["llama", "nemotron", "qwen2", "qwen3"]),
    pairs(3).map(tuple),
    pairs(4).map(tuple),
    pairs(5),
    st.sampled_from(["none", "paper", "laco"]),
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
    if kind in ("key", "value"):
        return index in plan.groups[layer or 0]
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
def test_parts_make_up_the_dense_student(plan: PruningPlan, size: int) -> None:
    """Each rank's part, from the rows it asks for alone."""
    for parameter, layer in parameters(plan):
        shape = parameter.shape(plan.teacher)
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.bfloat16)
        student = prune_dense(whole, parameter, plan, layer)
        assert student.shape == parameter.shape(plan.student) and student.dtype == whole.dtype
        for rank in range(size):
            part = part_of(parameter, plan, layer, rank, size)
            needed = take_kept(whole, parameter, plan, layer, part.axis, part.needed)
            expected = take_shard(student, parameter, plan.student, rank, size)
            assert torch.equal(part.made_from(needed, plan), expected)


@given(plans, st.sampled_from([2, 4]))
@settings(max_examples=40, deadline=None)
def test_spans_of_a_part_do_not_overlap(plan: PruningPlan, size: int) -> None:
    """So that together the ranks read a teacher once, wherever it was sharded; the halves of a gated fc1 by itself."""
    for parameter, layer in parameters(plan):
        if parameter.shard_axis is None:
            continue
        parts = [part_of(parameter, plan, layer, rank, size).rows for rank in range(size)]
        halves = [numpy.split(rows, 2) for rows in parts] if parameter.gated else [[rows] for rows in parts]
        for spans in zip(*halves, strict=True):
            assert (numpy.diff(numpy.concatenate(spans)) > 0).all()


@pytest.mark.parametrize("family", ["llama", "nemotron", "qwen2"])
def test_where_all_groups_stay_heads_and_vocabulary_stay_on_their_rank(family: str) -> None:
    plan = random_plan(1, family, (4, 4), (2, 3), (8, 12))
    for parameter, layer in parameters(plan):
        if set(parameter.axes) & {"qkv", "heads", "vocab"}:
            axis = parameter.shard_axis or 0
            half = parameter.shape(plan.teacher)[axis] // 2
            assert part_of(parameter, plan, layer, 0, 2).needed.max() < half
            assert part_of(parameter, plan, layer, 1, 2).needed.min() >= half


def test_what_the_dense_student_is_made_of_by_name() -> None:
    """A tensor whose values are its rows' numbers: just the kept rows are there, in order."""
    plan = random_plan(3, "qwen2", (4, 8), (1, 2), (4, 8))
    for parameter, layer in parameters(plan):
        whole = torch.arange(math.prod(parameter.shape(plan.teacher))).view(parameter.shape(plan.teacher))
        expected = whole
        for axis, name in enumerate(parameter.axes):
            rows = [row for row, named in enumerate(row_names(name, plan.teacher)) if stays(named, plan, layer)]
            expected = expected.index_select(axis, torch.tensor(rows))
        assert torch.equal(prune_dense(whole, parameter, plan, layer), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(7,), (300, 5), (3, 70000), (4, 5, 6)])
def test_rows_of_every_axis_at_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against plain indexing, by the bit; blocks of one row and of many, views that are not contiguous."""
    draw = numpy.random.default_rng(0)
    kept = [numpy.sort(draw.choice(size, -(-size // 2), replace=False)) for size in shape]
    for whole in (torch.randn(shape).to(dtype), torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1])):
        bits = whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
        expected = bits
        for axis, rows in enumerate(kept):
            expected = expected.index_select(axis, torch.from_numpy(rows))
            one = bits.index_select(axis, torch.from_numpy(rows))
            assert torch.equal(take(whole, axis, rows).view(bits.dtype), one)
        assert torch.equal(select(whole, kept).view(bits.dtype), expected)
        last = [None] * (len(shape) - 1) + [kept[-1]]
        assert torch.equal(select(whole, last).view(bits.dtype), bits.index_select(-1, torch.from_numpy(kept[-1])))
        assert select(whole, [None] * len(shape)) is whole
        assert select(whole, [numpy.arange(size) for size in shape]) is whole
