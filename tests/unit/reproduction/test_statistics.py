"""Differences of arms against their definition written out, and intervals against how often they hold the truth."""

from __future__ import annotations

import numpy
import pytest

from minitron_mcore.reproduction.statistics import (
    DOES_NOT,
    HOLDS,
    UNDECIDED,
    Difference,
    difference,
    students_quantile,
    together,
    verdict,
)

# Two-sided quantiles of Student's t, from printed tables.
TABLE = {
    (0.95, 1): 12.706,
    (0.95, 2): 4.303,
    (0.95, 3): 3.182,
    (0.95, 10): 2.228,
    (0.95, 120): 1.980,
    (0.99, 2): 9.925,
    (0.9, 5): 2.015,
}


@pytest.mark.parametrize(("at", "value"), TABLE.items())
def test_students_quantile_is_the_tables(at: tuple[float, int], value: float) -> None:
    assert students_quantile(*at) == pytest.approx(value, abs=6e-4)


def test_a_difference_by_hand() -> None:
    """Two seeds, three documents of 1, 2 and 1 tokens."""
    left = numpy.array([[2.0, 4.0, 1.0], [3.0, 5.0, 2.0]])
    right = numpy.array([[1.0, 4.0, 1.0], [1.0, 4.0, 3.0]])
    found = difference(left, right, numpy.array([1.0, 2.0, 1.0]))
    assert found.seed_means == (1 / 4, 2 / 4) and found.mean == 3 / 8
    # What documents add beyond their share, of both seeds: [1, 0, 0] and [2, 1, -1] less 3/8 a token, times 3/4.
    shares = [(1.5 - 3 / 8) * 3 / 4, (0.5 - 6 / 8) * 3 / 4, (-0.5 - 3 / 8) * 3 / 4]
    centre = sum(shares) / 3
    documents = sum((each - centre) ** 2 for each in shares) / 2 / 3
    seeds = ((1 / 8) ** 2 + (1 / 8) ** 2) / 1 / 2
    half = (4.302653**2 * documents + 12.706205**2 * seeds) ** 0.5
    assert (found.low, found.high) == pytest.approx((3 / 8 - half, 3 / 8 + half))


@pytest.mark.parametrize(
    ("between_documents", "between_seeds", "rest"), [(1.0, 0.0, 0.0), (0.0, 0.1, 0.3), (1.0, 0.1, 1.0), (0.2, 0.3, 0.1)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    between_documents: float, between_seeds: float, rest: float
) -> None:
    """Documents of unequal length, each with a difference of its own; each seed moves all of them. Never much below
    95%; above it by what the sum of variances counts twice."""
    draw, held, repeats, truth = numpy.random.default_rng(5), 0, 400, 0.7
    for _ in range(repeats):
        tokens = draw.integers(50, 500, size=80).astype(float)
        of_documents = draw.normal(0, between_documents, size=80)
        of_seeds = draw.normal(0, between_seeds, size=(3, 1))
        per_token = truth + of_documents + of_seeds + draw.normal(0, rest, size=(3, 80))
        common = draw.normal(3, 2, size=(3, 80)) * tokens  # what a document is worth to both arms
        found = difference(common + per_token * tokens, common, tokens)
        held += found.low < truth < found.high
    assert held / repeats > 0.925


def test_alike_arms_and_one_seed() -> None:
    nats, tokens = numpy.array([[3.0, 4.0, 5.0]]), numpy.array([1.0, 1.0, 2.0])
    assert difference(nats, nats, tokens) == Difference(0.0, 0.0, 0.0, (0.0,))
    one = difference(nats, nats + numpy.array([1.0, 2.0, 4.0]), tokens)
    assert one.mean == -7 / 4 and one.low < one.mean < one.high


@pytest.mark.parametrize(
    ("relation", "low", "high", "said"),
    [
        ("<", -0.2, -0.1, HOLDS),
        ("<", 0.1, 0.2, DOES_NOT),
        ("<", -0.1, 0.2, UNDECIDED),
        ("=", -0.005, 0.008, HOLDS),
        ("=", -0.02, 0.005, UNDECIDED),
        ("=", 0.02, 0.03, DOES_NOT),
        ("=", -0.03, -0.02, DOES_NOT),
        ("=", -0.5, 0.5, UNDECIDED),
    ],
)
def test_the_verdict_is_the_intervals(relation: str, low: float, high: float, said: str) -> None:
    assert verdict(relation, Difference((low + high) / 2, low, high, ()), 0.01) == said


def test_a_claim_of_several_orders() -> None:
    assert together([HOLDS, HOLDS]) == HOLDS
    assert together([HOLDS, UNDECIDED]) == UNDECIDED
    assert together([HOLDS, UNDECIDED, DOES_NOT]) == DOES_NOT
    assert together([]) == UNDECIDED
