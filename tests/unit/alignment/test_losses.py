"""Preference losses against their formulas in plain floats; tests/distributed/alignment/test_trl.py asks `trl`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.alignment.config import METHODS, PREFERENCES, AlignConfig
from minitron_mcore.alignment.losses import FORMULAS, METRICS, PreferenceSettings, pair_losses
from minitron_mcore.alignment.objective import LENGTH, SHARE
from minitron_mcore.errors import InputError

PAIRS = 6


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Answers of one to nine tokens, as a model and a reference not far from it would see them."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(PAIRS, 2, generator=generator, dtype=torch.float64)

    counts = torch.randint(1, 10, (PAIRS, 2), generator=generator).double()
    log_probs = counts * (0.3 * normal() - 3)
    return {
        "log_probs_P2": log_probs,
        "counts_P2": counts,
        "reference_P2": log_probs + normal(),
        "rewards_P2": 2 * normal(),
    }


def found(settings: PreferenceSettings, **changes: Any) -> dict[str, torch.Tensor]:
    return pair_losses(**{**inputs(), **changes}, settings=settings)


def coin(logit: float) -> tuple[float, float]:
    heads = 1 / (1 + math.exp(-logit))
    return heads, 1 - heads


def kl(p: tuple[float, float], q: tuple[float, float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# From β times the margin; of ipo with β = 0.3.
PLAIN = {
    "dpo": lambda scaled, e: (1 - e) * softplus(-scaled) + e * softplus(scaled),
    "ipo": lambda scaled, e: (scaled / 0.3 - 1 / 0.6) ** 2,
    "simpo": lambda scaled, e: (1 - e) * softplus(0.4 - scaled) + e * softplus(scaled - 0.4),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("method", PLAIN)
def test_a_choice_is_preferred(method: str, averages: bool, smoothing: float) -> None:
    given = {name: value.tolist() for name, value in inputs().items()}
    ours = found(PreferenceSettings(method, beta=0.3, gamma=0.4, label_smoothing=smoothing, averages=averages))
    for pair in range(PAIRS):
        of = [
            (given["log_probs_P2"][pair][side] - (method != "simpo") * given["reference_P2"][pair][side])
            / (given["counts_P2"][pair][side] if averages else 1)
            for side in range(2)
        ]
        expected = PLAIN[method](0.3 * (of[0] - of[1]), smoothing)
        assert float(ours["loss"][pair]) == pytest.approx(expected, rel=1e-10)


# NeMo-Aligner's definitions, from the scaled margin of the policy and the scaled gap of the rewards.
RPO = {
    "rpo_sq": lambda policy, rewards: (policy - rewards) ** 2,
    "rpo_fwd_kl": lambda policy, rewards: kl(coin(policy), coin(rewards)),
    "rpo_bwd_kl": lambda policy, rewards: kl(coin(rewards), coin(policy)),
}


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("method", RPO)
def test_rewards_are_matched_as_nemo_aligner_does(method: str, averages: bool) -> None:
    ours = found(PreferenceSettings(method, beta=0.3, eta=0.6, averages=averages))
    rows = {name: value.tolist() for name, value in inputs().items()}
    for pair in range(PAIRS):
        ratios = [
            (rows["log_probs_P2"][pair][side] - rows["reference_P2"][pair][side])
            / (rows["counts_P2"][pair][side] if averages else 1)
            for side in range(2)
        ]
        policy = 0.3 * (ratios[0] - ratios[1])
        rewards = 0.6 * (rows["rewards_P2"][pair][0] - rows["rewards_P2"][pair][1])
        assert float(ours["loss"][pair]) == pytest.approx(RPO[method](policy, rewards), rel=1e-10)


@pytest.mark.parametrize("method", RPO)
def test_matched_rewards_have_no_loss(method: str) -> None:
    """Where β times the margin is η times the gap, there is nothing to learn."""
    log_probs = inputs()["log_probs_P2"].requires_grad_()
    rewards = 0.3 / 0.6 * (log_probs.detach() - inputs()["reference_P2"])
    ours = found(PreferenceSettings(method, beta=0.3, eta=0.6), log_probs_P2=log_probs, rewards_P2=rewards)
    ours["loss"].sum().backward()
    assert log_probs.grad is not None
    assert float(ours["loss"].detach().abs().max()) < 1e-12 and float(log_probs.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("method", PREFERENCES)
def test_gradients_are_those_of_differences(method: str, averages: bool) -> None:
    settings = PreferenceSettings(method, beta=0.3, sft_weight=0.2, averages=averages)

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        return found(settings, log_probs_P2=log_probs)["loss"]

    assert torch.autograd.gradcheck(loss, inputs()["log_probs_P2"].requires_grad_())


def test_a_model_that_is_its_reference() -> None:
    ours = found(PreferenceSettings("dpo"), reference_P2=inputs()["log_probs_P2"])
    assert ours["loss"].tolist() == pytest.approx([math.log(2)] * PAIRS, rel=1e-15)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert ours[name].tolist() == [0.0] * PAIRS


@pytest.mark.parametrize("averages", [False, True])
def test_the_supervised_term_is_the_chosen_answers(averages: bool) -> None:
    plain, given = PreferenceSettings("dpo", averages=averages), inputs()
    expected = -given["log_probs_P2"][:, 0] / (given["counts_P2"][:, 0] if averages else 1)
    without = found(plain)
    torch.testing.assert_close(without["sft loss"], expected, rtol=1e-14, atol=0)
    weighed = found(PreferenceSettings("dpo", averages=averages, sft_weight=0.25))
    torch.testing.assert_close(weighed["loss"], without["loss"] + 0.25 * expected, rtol=1e-14, atol=0)


def test_far_margins_stay_finite() -> None:
    """exp of a margin of a thousand would overflow; and a pair without tokens divides by nothing."""
    for method in PREFERENCES:
        for sign in (-1, 1):
            far = sign * torch.tensor([[1e4, -1e4]], dtype=torch.float64)
            ours = pair_losses(
                far.requires_grad_(),
                torch.zeros(1, 2, dtype=torch.float64),
                torch.zeros_like(far),
                torch.tensor([[3.0, -900.0]], dtype=torch.float64),
                PreferenceSettings(method, averages=True),
            )
            assert all(bool(torch.isfinite(value).all()) for value in ours.values()), method


def test_every_method_has_a_formula() -> None:
    assert set(FORMULAS) == set(PREFERENCES) == set(METHODS) - {"sft"}
    assert list(found(PreferenceSettings("dpo"))) == [*METRICS]
    with pytest.raises(InputError, match="method=kto must be one of dpo, ipo"):
        PreferenceSettings("kto")


def test_settings_follow_the_section() -> None:
    for method, averages in (("dpo", False), ("rpo_sq", False), ("ipo", True), ("simpo", True)):
        assert PreferenceSettings.of(AlignConfig(method=method)).averages == averages
    assert PreferenceSettings.of(AlignConfig(method="ipo", log_probs="sum")).averages is False
    assert PreferenceSettings.of(AlignConfig(method="dpo", log_probs="mean", beta=0.01, sft_weight=0.5)) == (
        PreferenceSettings("dpo", beta=0.01, sft_weight=0.5, averages=True)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "orpo"}, "method=orpo must be one of sft, dpo"),
        ({"beta": 0.2}, "beta=0.2 has no effect with align.method=sft"),
        ({"method": "dpo", "eta": 2.0}, "eta=2.0 has no effect with align.method=dpo"),
        ({"method": "dpo", "gamma": 1.0}, "gamma=1.0 has no effect with align.method=dpo"),
        ({"method": "dpo", "mean": "samples"}, "mean=samples has no effect with align.method=dpo"),
        ({"method": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect with align.method=ipo"),
        ({"method": "simpo", "reference": "resident"}, "reference=resident has no effect with align.method=simpo"),
        ({"method": "dpo", "label_smoothing": 0.5}, "label_smoothing=0.5 must"),
        ({"method": "dpo", "beta": 0.0}, "beta=0.0 must be"),
        ({"tokens": 5, "epochs": 2.0}, "tokens=5 and align.epochs=2.0 both give the budget"),
        ({"samples": 5, "epochs": 2.0}, "samples=5 and align.epochs=2.0 both give the budget"),
        ({"lr": 1e-7}, "min_lr=1e-06 must lie between 0 and lr=1e-07"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AlignConfig(**given)


def test_the_documentation_has_the_name_of_all_that_is_logged() -> None:
    """What pairs and answers report beside the step's own numbers."""
    text = (Path(__file__).parents[3] / "docs" / "alignment.md").read_text(encoding="utf-8")
    _, _, logged = text.partition("## What is logged\n")
    named = {*re.findall(r"`([^`]+)`", logged.partition("\n## ")[0])}
    assert {*METRICS, SHARE, LENGTH, "lm loss"} <= named
