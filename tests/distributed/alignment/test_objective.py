"""The objectives of alignment where no other code is asked: RPO against its formulas in float64 on the dense model,
tied heads, the first step of a model that is its own reference, bf16.

fp32 on our side: means to 1e-5 relative, gradients to 1e-5 by relative Frobenius norm, as in test_trl.py.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.alignment.problems import Expected, dense_preference, draw_answers, rewards_of, rows_of
from tests.distributed.alignment.runs import (
    LAYOUTS,
    MIXED,
    first_steps,
    packed_segments_found,
    segments_found,
    several_steps,
)
from tests.distributed.models import assemble, relative_error, tiny
from tests.distributed.ranks import run_on_ranks

TOLERANCE = 1e-5
BETA, ETA = 0.3, 0.6


def coins(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL between two coins."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def formula(method: str, averages: bool, sft_weight: float) -> Any:
    """The mean loss, from log-probabilities, those of the reference, counts and rewards, [P, 2] each."""

    def loss(ours: torch.Tensor, theirs: torch.Tensor, counts: torch.Tensor, rewards: Any) -> torch.Tensor:
        divisor = counts if averages else 1.0
        of = (ours - theirs) / divisor
        policy, wanted = BETA * (of[:, 0] - of[:, 1]), ETA * (rewards[:, 0] - rewards[:, 1])
        by_pair = {
            "dpo": -policy.sigmoid().log(),
            "rpo_sq": (policy - wanted).square(),
            "rpo_fwd_kl": coins(policy.sigmoid(), wanted.sigmoid()),
            "rpo_bwd_kl": coins(wanted.sigmoid(), policy.sigmoid()),
        }
        return (by_pair[method] - sft_weight * (ours / divisor)[:, 0]).mean()

    return loss


RUNS: dict[str, dict[str, Any]] = {
    "rpo_sq": {"method": "rpo_sq", "micro_batch": 4},
    "rpo_fwd_kl": {"method": "rpo_fwd_kl", "micro_batch": 2, "averages": True},
    "rpo_bwd_kl": {"method": "rpo_bwd_kl", "micro_batch": 1},
    "dpo and answers": {"method": "dpo", "micro_batch": 2, "sft_weight": 0.2, "resident": True},
}
RUNS = {name: {**how, "beta": BETA, "eta": ETA} for name, how in RUNS.items()}


@cache
def expected(name: str, tied: bool) -> Expected:
    architecture, how = architecture_of(tied), RUNS[name]
    rows = rows_of(draw_answers(architecture.vocab_size))
    loss = formula(how["method"], how.get("averages", False), how.get("sft_weight", 0.0))
    return dense_preference(architecture, rows, loss, rewards_of())


def architecture_of(tied: bool) -> Any:
    return tiny("llama", untie_embeddings_and_output_weights=not tied)


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        ("TP2-SP", True),
        ("PP2", True),
        ("CP2", False),
        # Which test_trl.py has of the other losses, and no gradient of tied heads has to cross.
        *(pytest.param(layout, False, marks=pytest.mark.slow) for layout in ("1", "PP2-VPP2", MIXED)),
    ],
)
def test_against_float64(layout: str, tied: bool) -> None:
    world_size, parallel = LAYOUTS[layout]
    architecture = architecture_of(tied)
    ranks = run_on_ranks(first_steps, world_size, architecture, parallel, world_size, [*RUNS.values()], "fp32")
    answers = draw_answers(architecture.vocab_size)
    counts = rows_of(answers)["loss_mask"].sum(1)
    for place, name in enumerate(RUNS):
        exact, means = expected(name, tied), ranks[0][place]["means"]
        assert means["loss"] == pytest.approx(exact.means["loss"], rel=TOLERANCE), name
        assert means["num_tokens"] == len(counts) // 2
        assert means["mean length chosen"] == pytest.approx(float(counts[0::2].mean()))
        assert means["mean length rejected"] == pytest.approx(float(counts[1::2].mean()))
        share = float(counts.sum()) / sum(len(ids) - 1 for ids, _ in answers)
        assert means["share of counted tokens"] == pytest.approx(share)
        gradients = assemble([rank[place]["gradients"] for rank in ranks], architecture)
        for key, value in exact.gradients.items():
            assert relative_error(gradients[key], value) <= TOLERANCE, (name, key)


STEPS = 10


@pytest.fixture(scope="module")
def single() -> dict[str, list[dict[str, float]]]:
    return {name: run_on_ranks(several_steps, 1, tiny("llama"), {}, 1, how, STEPS)[0] for name, how in TRAINED.items()}


TRAINED: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo", "beta": BETA, "micro_batch": 2, "resident": True},
    "answers": {"method": "sft", "micro_batch": 2},
}


def test_the_first_step_of_dpo(single: dict[str, list[dict[str, float]]]) -> None:
    """A resident reference runs as the model does: the same bits, so exactly no margin; then it learns."""
    history = single["dpo"]
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert history[0][f"rewards/{name}"] == 0
    assert history[-1]["loss"] < 0.6 < 0.9 < history[-1]["rewards/accuracies"]
    assert single["answers"][-1]["loss"] < 0.9 * single["answers"][0]["loss"]
    assert all(row["loss"] == row["lm loss"] and row["mean length"] > 1 for row in single["answers"])


def test_bf16() -> None:
    """Of 2^-9 of each number rounding leaves a few thousandths of log-probabilities of tens of nats."""
    how = {"method": "dpo", "beta": BETA, "resident": True}
    runs = {
        precision: run_on_ranks(first_steps, 2, tiny("llama"), {"tensor": 2}, 2, [how], precision)
        for precision in ("fp32", "bf16")
    }
    means = {precision: ranks[0][0]["means"] for precision, ranks in runs.items()}
    assert means["bf16"]["loss"] == pytest.approx(means["fp32"]["loss"], rel=0.05)
    gradients = {
        precision: assemble([rank[0]["gradients"] for rank in ranks], tiny("llama"))
        for precision, ranks in runs.items()
    }
    for name, value in gradients["fp32"].items():
        alike = torch.nn.functional.cosine_similarity(value.flatten(), gradients["bf16"][name].flatten(), dim=0)
        assert alike > 0.97, name


@pytest.mark.parametrize(("world_size", "context"), [(1, 1), (2, 2), (4, 4)])
def test_segments_are_found(world_size: int, context: int) -> None:
    for found in run_on_ranks(segments_found, world_size, context):
        assert found == [
            {"numbers": [6, 7, 6, 7], "sums": [1.0 + 2 + 3 + 4 + 5, 11.0 + 12, 21.0, 31.0 + 32 + 33]},
            {"numbers": [], "sums": []},
        ]


def test_one_segment_in_two_packed_rows() -> None:
    assert run_on_ranks(packed_segments_found, 1) == [([6, 6], [4.0, 4.0])]
