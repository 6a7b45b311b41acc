"""Hidden-state losses at every layout: each loss, every gradient, the projection's, the gradient norm.

Against formulas written out densely in float64. Tolerances: the engine sums in fp32, which leaves 1e-7 in a loss and up
to 1e-6 in a gradient by relative Frobenius norm (1e-5 asked for); a factor of TP, PP or DP, a mask that is cut wrongly
or a stage that is left out leaves 0.1 or more. The gradient norm is a sum of all of them: 1e-6.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from minitron_mcore.model.recompute import Recompute
from tests.distributed.models import LAYOUTS, assemble, relative_error
from tests.distributed.ranks import run_on_ranks
from tests.distributed.state_loss_problem import CASES, dense_solution, solve_on_rank

# Everything at once at every layout, each site alone where nothing is shared out; what hangs on heads where they are.
TOGETHER = ["all-mse", "all-cosine", "all-dynamic"]
HEADS = ["all-nemotron", "relation-heads"]
SLOW = {"TP2", "PP2"}  # TP2-PP2 is both


def cases_of(layout: str) -> list[str]:
    return {"1": list(CASES), "TP2-SP": [*TOGETHER, *HEADS]}.get(layout, TOGETHER)


def put_together(ranks: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Global gradients, and the numbers that must be the same on every rank."""
    found = {}
    for name in names:
        first = ranks[0][name]
        for rank in ranks:
            for part in ("means", "norm", "next_alpha"):
                assert rank[name][part] == first[part], f"{part} differ between ranks"
            for part in ("projection", "projection_gradient"):
                if first[part] is not None:
                    torch.testing.assert_close(rank[name][part], first[part], rtol=0, atol=0, msg=part)
        found[name] = {**first, "gradients": assemble([rank[name]["gradients"] for rank in ranks], CASES[name].student)}
    return found


@cache
def solved(layout: str) -> dict[str, Any]:
    world_size, parallel = LAYOUTS[layout]
    names = cases_of(layout)
    return put_together(run_on_ranks(solve_on_rank, world_size, names, parallel, world_size), names)


@cache
def dense(name: str) -> dict[str, Any]:
    return dense_solution(CASES[name], solved("1")[name]["projection"])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(layout, name, marks=[pytest.mark.slow] if layout in SLOW else [])
        for layout in LAYOUTS
        for name in cases_of(layout)
    ],
)
def test_against_dense_float64(layout: str, name: str) -> None:
    compare(name, solved(layout)[name])


def compare(name: str, ours: dict[str, Any]) -> None:
    case, expected = CASES[name], dense(name)
    assert (ours["projection"] is not None) == case.needs_projection
    if case.needs_projection:
        torch.testing.assert_close(ours["projection"], solved("1")[name]["projection"], rtol=0, atol=0)
        assert relative_error(ours["projection_gradient"], expected["projection_gradient"]) <= 1e-5
    for metric, value in expected["means"].items():
        assert value > 0.01, f"{metric} is too small to compare"
        assert ours["means"][metric] == pytest.approx(value, rel=1e-5), metric
    assert ours["means"]["hidden states alpha"] == pytest.approx(expected["alpha"], rel=1e-5)
    for key, gradient in ours["gradients"].items():
        assert relative_error(gradient, expected["gradients"][key]) <= 1e-5, key
    assert ours["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def test_norms_fused_into_the_next_linear() -> None:
    """As Transformer Engine has them: no module puts out the normed states."""
    world_size, parallel = LAYOUTS["TP2-SP"]
    ranks = run_on_ranks(solve_on_rank, world_size, ["all-mse"], parallel, world_size, fused=True)
    compare("all-mse", put_together(ranks, ["all-mse"])["all-mse"])


@pytest.mark.parametrize("layout", ["1", "PP2-VPP2"])
def test_teacher_in_windows(layout: str) -> None:
    """Two microbatches at a time: losses and weight of the whole batch, whose sums run in the same order, and gradients
    as near the dense ones as without windows."""
    world_size, parallel = LAYOUTS[layout]
    names = ["all-mse", "all-dynamic"]
    for name, ours in put_together(
        run_on_ranks(solve_on_rank, world_size, names, parallel, world_size, window=2), names
    ).items():
        whole = solved(layout)[name]
        assert ours["means"] == pytest.approx(whole["means"], rel=1e-12)
        assert ours["next_alpha"] == pytest.approx(whole["next_alpha"], rel=1e-12)
        compare(name, ours)


@pytest.mark.parametrize(
    ("layout", "recompute", "fused"),
    [
        ("1", Recompute("full", "uniform", 2), False),
        ("TP2-SP", Recompute("full", "block", 3), False),
        ("PP2-VPP2", Recompute("full"), False),
        ("TP2-SP", Recompute("selective"), True),  # the MLP's input is read within what is recomputed
    ],
)
def test_recomputed_layers(layout: str, recompute: Recompute, fused: bool) -> None:
    """Each pair's loss is added up once, and meets the teacher's state of its own microbatch."""
    world_size, parallel = LAYOUTS[layout]
    names = ["all-mse", "all-dynamic"]
    ranks = run_on_ranks(solve_on_rank, world_size, names, parallel, world_size, fused=fused, recompute=recompute)
    for name, ours in put_together(ranks, names).items():
        assert ours["next_alpha"] == pytest.approx(solved(layout)[name]["next_alpha"], rel=1e-5)
        compare(name, ours)


def test_bf16_stays_within_its_bound() -> None:
    """Losses are worked out in fp32 from states that have 8 bits: 1% of a loss (2^-8 of a state, twice, in a square),
    5% of a gradient, which has come through several layers."""
    world_size, parallel = LAYOUTS["TP2-SP"]
    ranks = run_on_ranks(solve_on_rank, world_size, TOGETHER, parallel, world_size, precision="bf16")
    for name, ours in put_together(ranks, TOGETHER).items():
        expected = dense(name)
        for metric, value in expected["means"].items():
            assert ours["means"][metric] == pytest.approx(value, rel=0.01), metric
        assert ours["norm"] == pytest.approx(expected["norm"], rel=0.05)
        if expected["projection_gradient"] is not None:
            assert relative_error(ours["projection_gradient"], expected["projection_gradient"]) <= 0.05
        for key, gradient in ours["gradients"].items():
            assert relative_error(gradient, expected["gradients"][key]) <= 0.05, key
