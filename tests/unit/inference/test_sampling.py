"""What is drawn, against the softmax in float64.

Chi-square: with 11 degrees of freedom a right generator exceeds 37.4 once in ten thousand seeds; these seeds do not.
"""

from __future__ import annotations

import numpy
import pytest
import torch

from minitron_mcore.inference.sampling import draw, uniform

DRAWS, LIMIT = 6000, 37.4
LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5, 1.5, -0.5, 0.25, 1.0, -0.25, 0.75, 1.25])


def probabilities(temperature: float, top_p: float) -> numpy.ndarray:
    """Of the smallest set of likeliest tokens that has `top_p`, one token after another."""
    weights = numpy.exp(LOGITS.double().numpy() / temperature)
    weights /= weights.sum()
    kept: list[int] = []
    for token in sorted(range(len(weights)), key=lambda token: (-weights[token], token)):
        if sum(weights[other] for other in kept) < top_p:
            kept.append(token)
    inside = numpy.isin(numpy.arange(len(weights)), kept)
    return numpy.where(inside, weights, 0) / weights[inside].sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.6, 0.8), (1.0, 0.05), (0.5, 0.95)])
def test_draws_are_distributed_as_the_softmax(temperature: float, top_p: float) -> None:
    expected = probabilities(temperature, top_p) * DRAWS
    draws = [uniform(7, prompt, step) for prompt in range(DRAWS // 10) for step in range(10)]
    tokens = draw(LOGITS.expand(DRAWS, -1), [(temperature, top_p)] * DRAWS, draws)
    counts = numpy.bincount(tokens.numpy(), minlength=len(LOGITS))
    inside = expected > 0
    assert not counts[~inside].any()
    assert ((counts - expected)[inside] ** 2 / expected[inside]).sum() < LIMIT


def test_a_row_is_drawn_whatever_stands_beside_it() -> None:
    rows, settings = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)), [(1.0, 1.0), (0.8, 0.5)] * 2
    settings.append((1.2, 0.9))
    draws = [uniform(3, number, 4) for number in range(5)]
    together = draw(rows, settings, draws).tolist()
    assert together == [draw(rows[n : n + 1], settings[n : n + 1], draws[n : n + 1]).item() for n in range(5)]


def test_numbers_are_uniform_and_of_their_own() -> None:
    numbers = [uniform(seed, prompt, step) for seed in range(4) for prompt in range(20) for step in range(50)]
    assert len({*numbers}) == len(numbers) and min(numbers) > 0 and max(numbers) < 1
    counts = numpy.histogram(numbers, bins=12, range=(0, 1))[0]
    assert ((counts - len(numbers) / 12) ** 2 / (len(numbers) / 12)).sum() < LIMIT
