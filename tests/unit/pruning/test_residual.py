"""Head residuals against the paper's formula, written out head by head, and what is refused.

Reference: arXiv 2407.14679, section 2.3: for L heads pruned to K, ranked 1 .. L by descending importance, each head
i in [2K - L + 1, K] becomes head_i + (head_i - head_{2K - i + 1}).
"""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.importance.scores import Scores
from minitron_mcore.layout import parameter_table
from minitron_mcore.pruning.plan_file import PruningPlan
from minitron_mcore.pruning.ranking import residual_pairs
from tests.plans import make_plan, prune_dense
from tests.refusals import refuses

D = 4


def model(heads: int, groups: int) -> Architecture:
    return build_architecture(
        {
            "family": "qwen2",  # whose query, key and value have biases
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 8,
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "kv_channels": D,
            "vocab_size": 16,
            "make_vocab_size_divisible_by": 16,
        }
    )


def scores_of(a: Architecture, heads: Any, groups: Any = None) -> Scores:
    return Scores(
        a,
        numpy.ones(a.hidden_size),
        numpy.ones((a.num_layers, a.ffn_hidden_size)),
        numpy.tile(numpy.array(heads, dtype=float), (a.num_layers, 1)),
        numpy.ones(a.num_layers),
        groups=None if groups is None else numpy.tile(numpy.array(groups, dtype=float), (a.num_layers, 1)),
    )


def by_the_formula(
    heads: dict[int, numpy.ndarray], importance: dict[int, float], kept: int, sign: float
) -> dict[int, numpy.ndarray]:
    """The student's heads, by the teacher's index: the paper's lines, with 1-based places."""
    ranked = sorted(heads, key=lambda head: (-importance[head], head))
    place = {number: head for number, head in enumerate(ranked, start=1)}
    total = len(heads)
    result = {}
    for i in range(1, kept + 1):
        value = heads[place[i]]
        if i >= 2 * kept - total + 1:
            value = value + sign * (heads[place[i]] - heads[place[2 * kept - i + 1]])
        result[place[i]] = value
    return dict(sorted(result.items()))


@given(st.integers(1, 4), st.integers(2, 6), st.data(), st.sampled_from(["paper", "laco"]))
@settings(max_examples=40, deadline=None)
def test_query_heads_of_each_group_follow_the_formula(groups: int, q: int, data: st.DataObject, rule: str) -> None:
    """In float64, where the sums are the reference's own: no tolerance."""
    kept = data.draw(st.integers(-(-q // 2), q))
    importance = data.draw(st.lists(st.integers(0, 4), min_size=groups * q, max_size=groups * q))
    matrices = data.draw(st.sampled_from([["query"], ["output"], ["output", "query"]]))
    teacher, sign = model(groups * q, groups), 1.0 if rule == "paper" else -1.0
    plan = make_plan(
        scores_of(teacher, importance, range(groups)),
        {"num_attention_heads": groups * kept},
        head_residual=rule,
        residual_matrices=matrices,
    )
    assert PruningPlan.from_json(plan.to_json()) == plan
    draw = torch.Generator().manual_seed(groups * q)
    for parameter in parameter_table(teacher):
        if "qkv" not in parameter.axes and "heads" not in parameter.axes:
            continue
        whole = torch.randn(parameter.shape(teacher), generator=draw, dtype=torch.float64)
        blocks = whole.T.numpy() if "heads" in parameter.axes else whole.numpy()
        blocks = blocks.reshape(-1, D, *blocks.shape[1:])
        expected: list[numpy.ndarray] = []
        for group in range(groups):
            own = q + 2 if "qkv" in parameter.axes else q
            of_group = blocks[group * own : (group + 1) * own]
            touched = ("query" if own > q else "output") in matrices
            heads = {head: of_group[head] for head in range(q)}
            ranks: dict[int, float] = {head: importance[group * q + head] for head in range(q)}
            expected += by_the_formula(heads, ranks, kept, sign if touched else 0.0).values()
            expected += [*of_group[q:]]
        wanted = numpy.concatenate(expected)
        actual = prune_dense(whole, parameter, plan, 0).numpy()
        assert numpy.array_equal(actual.T if "heads" in parameter.axes else actual, wanted), parameter.key


def test_without_groups_key_and_value_may_follow_too() -> None:
    """Five heads with a key and a value each, three stay: the third takes up the fourth, the second the fifth."""
    teacher = model(5, 5)
    plan = make_plan(
        scores_of(teacher, [3, 1, 5, 2, 4]),
        {"num_attention_heads": 3},
        head_residual="paper",
        residual_matrices=["key", "output"],
    )
    assert plan.student.num_query_groups == 3
    assert plan.residual is not None and plan.residual.pairs[0] == [(0, 3), (4, 1)] == plan.residual.pairs[1]
    table = {parameter.key: parameter for parameter in parameter_table(teacher)}
    qkv = torch.randn(5 * 3 * D, 8)
    blocks = qkv.view(5, 3, D, 8)
    expected = blocks[[0, 2, 4]].clone()
    expected[0, 1] = blocks[0, 1] + (blocks[0, 1] - blocks[3, 1])
    expected[2, 1] = blocks[4, 1] + (blocks[4, 1] - blocks[1, 1])
    parameter = table["decoder.layers.self_attention.linear_qkv.weight"]
    assert torch.equal(prune_dense(qkv, parameter, plan, 1), expected.flatten(0, 2))
    proj = torch.randn(8, 5 * D)
    heads = proj.view(8, 5, D)
    expected = heads[:, [0, 2, 4]].clone()
    expected[:, 0] += heads[:, 0] - heads[:, 3]
    expected[:, 2] += heads[:, 4] - heads[:, 1]
    parameter = table["decoder.layers.self_attention.linear_proj.weight"]
    assert torch.equal(prune_dense(proj, parameter, plan, 0), expected.flatten(1))


@pytest.mark.parametrize("rule", ["paper", "laco"])
def test_bf16_is_rounded_once(rule: str) -> None:
    teacher = model(4, 2)
    plan = make_plan(scores_of(teacher, [2, 1, 1, 2]), {"num_attention_heads": 2}, head_residual=rule)
    parameter = next(row for row in parameter_table(teacher) if row.key.endswith("linear_proj.weight"))
    proj = torch.randn(8, 4 * D).to(torch.bfloat16)
    heads = proj.float().view(8, 4, D)
    kept, gone = heads[:, [0, 3]], heads[:, [1, 2]]
    expected = kept + (kept - gone) if rule == "paper" else kept + (gone - kept)
    assert torch.equal(prune_dense(proj, parameter, plan, 0), expected.flatten(1).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("importance", "count", "pairs"),
    [
        ([9, 8, 7, 6], 2, [(0, 3), (1, 2)]),
        ([9, 8, 7, 6], 3, [(2, 3)]),
        ([9, 8, 7, 6], 4, []),
        ([1, 1, 1, 1, 1], 3, [(1, 4), (2, 3)]),  # ties: the lower index counts as more important
    ],
)
def test_pairs(importance: list[float], count: int, pairs: list[tuple[int, int]]) -> None:
    assert residual_pairs(numpy.array(importance), count) == pairs


PAPER = {"head_residual": "paper"}
MATRICES = "prune.residual_matrices"
BAD: list[tuple[tuple[int, int], int, dict[str, Any], tuple[Any, ...]]] = [
    ((8, 2), 2, PAPER, ("prune.head_residual", "paper", "student.num_attention_heads=2 keeps 1 of 4 in each KV group")),
    ((5, 5), 2, {"head_residual": "laco"}, ("prune.head_residual", "laco", "num_attention_heads=2 keeps 2 of 5")),
    (
        (8, 2),
        4,
        {"head_residual": "both"},
        ("prune.head_residual", "both", "must be one of none, paper, laco"),
    ),
    (
        (8, 2),
        4,
        {**PAPER, "residual_matrices": ["query", "key"]},
        (MATRICES, ["query", "key"], "holds key, which is not allowed, because", "choose from query, output"),
    ),
    (
        (8, 2),
        4,
        {**PAPER, "residual_matrices": ["mlp"]},
        (f"{MATRICES}[0]", "mlp", "must be one of query, key"),
    ),
    ((8, 2), 4, {**PAPER, "residual_matrices": []}, (MATRICES, [], "must name one or more of query, output")),
    (
        (8, 2),
        4,
        {**PAPER, "residual_matrices": ["query"] * 2},
        (MATRICES, ["query"] * 2, "holds query twice"),
    ),
]


@pytest.mark.parametrize(("shape", "heads", "options", "refusal"), BAD)
def test_impossible_residuals_are_refused(
    shape: tuple[int, int], heads: int, options: dict[str, Any], refusal: tuple[Any, ...]
) -> None:
    with refuses(*refusal):
        make_plan(scores_of(model(*shape), numpy.arange(shape[0])), {"num_attention_heads": heads}, **options)


@pytest.mark.parametrize(
    ("pair", "rule"),
    [
        ([1, 0], "has the pair [1, 0] in residual.pairs.0, which must be a kept head, at most once each"),
        ([3, 3], "must be a kept head, at most once each"),
        ([3, 5], "must be two heads of one KV group"),
        ([3, 99], "must be two heads of one KV group"),
        ([3], "lacks residual.pairs.0.0.1"),
    ],
)
def test_pairs_in_a_file_are_checked(pair: list[int], rule: str) -> None:
    plan = make_plan(scores_of(model(8, 2), range(8)), {"num_attention_heads": 4}, head_residual="paper")
    data = json.loads(plan.to_json())
    assert data["residual"]["pairs"]["0"] == [[2, 1], [3, 0], [6, 5], [7, 4]]
    data["residual"]["pairs"]["0"] = [pair]
    with refuses("plan", None, rule):
        PruningPlan.from_json(json.dumps(data))
