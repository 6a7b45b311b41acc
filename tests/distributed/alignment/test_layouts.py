"""Training steps at every layout, packed and unpacked, at micro-batches of one and of four: those of one rank that has
a row for each answer.

fp32: what is reported agrees to 1e-5 (relative; of rewards, differences of log-probabilities of tens of nats, to 1e-5
absolute too), the gradients of every step to 1e-5 by relative Frobenius norm. Sums in another order leave about 1e-6; a
position, a boundary or a factor that is wrong 0.01 and more. The quick tests take two steps of packed rows, at one of
the two sizes (test_trl.py has the gradients of unpacked ones); the slow suite takes ten of every combination.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.distributed.alignment.runs import LAYOUTS as THE_FIRST
from tests.distributed.alignment.runs import trained_on_rank
from tests.distributed.models import assemble, relative_error, tiny
from tests.distributed.ranks import run_on_ranks

TOLERANCE = 1e-5
STEPS, FEWER_STEPS = 10, 2
# Those that training and distillation are tested at, and mixes of them.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **THE_FIRST,
    "TP2-DP2": (4, {"tensor": 2}),
    "PP2-DP2": (4, {"pipeline": 2}),
    "TP2-SP-PP2-VPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}),
    "CP2-TP2": (4, {"context": 2, "tensor": 2}),
    "CP2-TP2-SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "CP2-PP2": (4, {"context": 2, "pipeline": 2}),
    "CP2-DP2": (4, {"context": 2}),
}
QUICK = ("DP2", "CP2", "PP2-VPP2", "TP2-SP-PP2-VPP2")
METHODS = ("sft", "dpo")
BASE = {"packed": False, "micro_batch": 2}


def run(layout: str, runs: list[dict[str, Any]], steps: int) -> list[list[dict[str, Any]]]:
    """Of each run each step's means, equal on all ranks, and whole gradients."""
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(trained_on_rank, world_size, tiny("llama"), parallel, world_size, runs, steps, timeout=1200)
    found = []
    for of_ranks in zip(*ranks, strict=True):
        history = []
        for step in zip(*of_ranks, strict=True):
            assert all(each["means"] == step[0]["means"] for each in step), layout
            gradients = assemble([each["gradients"] for each in step], tiny("llama"))
            history.append({"means": step[0]["means"], "gradients": gradients})
        found.append(history)
    return found


@cache
def base(steps: int) -> dict[str, list[dict[str, Any]]]:
    return dict(zip(METHODS, run("1", [{"method": method, **BASE} for method in METHODS], steps), strict=True))


def assert_is_base(history: list[dict[str, Any]], how: dict[str, Any]) -> None:
    for number, (ours, theirs) in enumerate(zip(history, base(len(history))[how["method"]], strict=True)):
        assert ours["means"] == pytest.approx(theirs["means"], rel=TOLERANCE, abs=TOLERANCE), (how, number)
        assert ours["means"]["loss"] == pytest.approx(theirs["means"]["loss"], rel=TOLERANCE), (how, number)
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        for key, value in theirs["gradients"].items():
            assert relative_error(ours["gradients"][key], value) <= TOLERANCE, (how, number, key)


def assert_all_are_base(layout: str, runs: list[dict[str, Any]], steps: int) -> None:
    # Packed sequences are not cut (runtime.config.check_packing).
    runs = [how for how in runs if not (how["packed"] and "context" in LAYOUTS[layout][1])]
    for how, history in zip(runs, run(layout, runs, steps), strict=True):
        assert_is_base(history, how)


@pytest.mark.parametrize("layout", QUICK)
def test_steps_are_those_of_one_rank(layout: str) -> None:
    packed, first = "context" not in LAYOUTS[layout][1], len(layout) % 2
    runs = [
        {"method": method, "packed": packed, "micro_batch": (1, 4)[(place + first) % 2], "resident": bool(first)}
        for place, method in enumerate(METHODS)
    ]
    assert_all_are_base(layout, runs, FEWER_STEPS)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight runs of ten steps, and the first test to run has those of one rank to do
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_those_of_one_rank(layout: str) -> None:
    every = [(method, packed, size) for method in METHODS for packed in (True, False) for size in (1, 4)]
    runs = [{"method": method, "packed": packed, "micro_batch": size} for method, packed, size in every]
    assert_all_are_base(layout, runs, STEPS)


def test_it_learns() -> None:
    """Equal steps of what does nothing would prove nothing."""
    for method, history in base(FEWER_STEPS).items():
        first, second = (step["gradients"]["embedding.word_embeddings.weight", None] for step in history)
        assert relative_error(first, second) > 0.02, method
    assert base(FEWER_STEPS)["dpo"][1]["means"]["rewards/margins"] != 0
