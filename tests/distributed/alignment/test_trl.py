"""Losses, rewards and gradients against `trl` and transformers: the same weights, the same pairs, fp32 on both sides.

Means agree to 1e-5 relative, gradients to 1e-5 by relative Frobenius norm, at every layout and micro-batch size; of
rewards, differences of log-probabilities of tens of nats, to 1e-5 absolute too. All that asks `trl` stands in this
file, since it takes seconds to import.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron_mcore.alignment.losses import PreferenceSettings
from tests.distributed.alignment.problems import Expected, draw_answers, transformers_answers, trl_dpo, trl_simpo
from tests.distributed.alignment.runs import LAYOUTS, MIXED, first_steps, quick
from tests.distributed.models import assemble, relative_error, tiny
from tests.distributed.ranks import run_on_ranks
from tests.unit.alignment.test_losses import found, inputs

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.timeout(900)  # the first test to run imports it

TOLERANCE = 1e-5
COMPARED = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
COMPARED += ["logps/chosen", "logps/rejected"]
RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo", "beta": 0.3},
    "answers, by sample": {"method": "sft", "mean": "samples"},
    "simpo": {"method": "simpo", "beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1, "averages": True},
    "dpo, averaged": {"method": "dpo", "beta": 2.0, "averages": True},
    "ipo": {"method": "ipo", "beta": 0.4, "averages": True},
    "answers, by token": {"method": "sft", "mean": "tokens"},
}
PAIRED = [name for name, how in RUNS.items() if how["method"] != "sft"]


@cache
def expected(folder: Path) -> dict[str, Expected]:
    architecture = tiny("llama")
    answers = draw_answers(architecture.vocab_size)
    return {
        "dpo": trl_dpo(folder, architecture, answers, beta=0.3),
        "dpo, averaged": trl_dpo(folder, architecture, answers, beta=2.0, loss_type="sigmoid_norm"),
        "ipo": trl_dpo(folder, architecture, answers, beta=0.4, loss_type="ipo"),
        "simpo": trl_simpo(architecture, answers, beta=2.0, simpo_gamma=1.0, label_smoothing=0.1),
        "answers, by token": transformers_answers(architecture, answers, "tokens"),
        "answers, by sample": transformers_answers(architecture, answers, "samples"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.mark.parametrize("layout", ["1", *quick("PP2-VPP2", "CP2", MIXED)])
def test_trl_agrees_at_every_layout(layout: str, folder: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    # Each at one of the two sizes, the first at both; the reference beside, or worked out beforehand, in turn.
    sizes = {name: (1, 4) if place == 0 else ((4, 1)[(place + len(layout)) % 2],) for place, name in enumerate(RUNS)}
    every = [
        (name, size, bool((place + size) % 2) and RUNS[name]["method"] in ("dpo", "ipo"))
        for place, name in enumerate(RUNS)
        for size in sizes[name]
    ]
    runs = [{**RUNS[name], "micro_batch": size, "resident": resident} for name, size, resident in every]
    ranks = run_on_ranks(first_steps, world_size, tiny("llama"), parallel, world_size, runs, "fp32", timeout=300)
    for place, (name, size, resident) in enumerate(every):
        case, theirs = f"{name}, micro-batch {size}, resident {resident}", expected(folder)[name]
        means = ranks[0][place]["means"]
        assert all(rank[place]["means"] == means for rank in ranks), case
        for metric in COMPARED:
            if metric in theirs.means:
                near = pytest.approx(theirs.means[metric], rel=TOLERANCE, abs=TOLERANCE)
                assert means[metric] == near, (case, metric)
        assert means["loss"] == pytest.approx(theirs.means["loss"], rel=TOLERANCE), case
        held_out, count = ranks[0][place]["held_out"], means.pop("num_tokens")
        samples = 8 if name in PAIRED else 16
        assert count == pytest.approx(theirs.means["tokens"] if name == "answers, by token" else samples, rel=1e-6), (
            case
        )
        assert held_out.pop("ppl", 0) == (0 if name in PAIRED else pytest.approx(math.exp(means["loss"]), rel=1e-6))
        assert held_out == pytest.approx(means, rel=1e-6), case
        gradients = assemble([rank[place]["gradients"] for rank in ranks], tiny("llama"))
        assert set(gradients) == set(theirs.gradients)
        for key, value in theirs.gradients.items():
            assert float(value.norm()) > 0, key
            assert relative_error(gradients[key], value) <= TOLERANCE, (case, key)


def test_the_supervised_term(folder: Path) -> None:
    """trl's is the mean over the chosen answers' tokens of a batch; ours, of sums, over its pairs."""
    architecture, weight = tiny("llama"), 0.3
    answers = draw_answers(architecture.vocab_size)
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]}
    theirs = trl_dpo(folder, architecture, answers, beta=0.3, **both)
    tokens = sum(sum(counted[1:]) for _, counted in answers[0::2])
    how = {"method": "dpo", "beta": 0.3, "sft_weight": weight * (len(answers) // 2) / tokens, "micro_batch": 4}
    ((found,),) = run_on_ranks(first_steps, 1, architecture, {}, 1, [how], "fp32")
    assert found["means"]["loss"] == pytest.approx(theirs.means["loss"], rel=TOLERANCE)
    assert abs(theirs.means["loss"] - expected(folder)["dpo"].means["loss"]) > 1
    gradients = assemble([found["gradients"]], architecture)
    for key, value in theirs.gradients.items():
        assert relative_error(gradients[key], value) <= TOLERANCE, key


def trl_losses(kind: str, of_P2: torch.Tensor, numbers: dict[str, float]) -> Any:
    """(losses, rewards of the chosen, of the rejected) by trl's CPO trainer, whose losses know of no reference: given
    log-ratios they are those of DPO and IPO."""
    from trl.experimental import cpo

    given = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, **numbers}
    stand_in: Any = SimpleNamespace(alpha=0.0, loss_type=kind, accelerator=SimpleNamespace(device="cpu"), **given)
    trainer: Any = cpo.CPOTrainer
    return trainer.cpo_loss(stand_in, *of_P2.unbind(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize(("method", "kind"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("simpo", "simpo")])
def test_trl_agrees_on_the_same_log_probabilities(method: str, kind: str, averages: bool, smoothing: float) -> None:
    """Both in float64."""
    smoothing = 0.0 if method == "ipo" else smoothing
    given = inputs()
    of_P2 = given["log_probs_P2"] - (0 if method == "simpo" else given["reference_P2"])
    of_P2 = of_P2 / given["counts_P2"] if averages else of_P2
    numbers = {"beta": 0.7, "label_smoothing": smoothing}
    losses, chosen, rejected = trl_losses(kind, of_P2, {**numbers, "simpo_gamma": 0.4})
    ours = found(PreferenceSettings(method, gamma=0.4, averages=averages, **numbers))
    torch.testing.assert_close(ours["loss"], losses, rtol=1e-12, atol=0)
    if method == "simpo" or not averages:  # with a reference they are of sums
        torch.testing.assert_close(ours["rewards/chosen"], chosen, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours["rewards/rejected"], rejected, rtol=1e-12, atol=0)
        assert ours["rewards/accuracies"].tolist() == (chosen > rejected).double().tolist()
