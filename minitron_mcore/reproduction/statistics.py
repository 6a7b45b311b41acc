"""How far two arms differ, with an interval over documents and seeds, and what that says of an order. Pure.

Every arm is measured on the same documents with every seed. A document is worth much the same to all models, and a
seed's teacher to all its students, so that differences are taken document by document and seed by seed. What is left
of noise has two sources that do not vanish together: other documents, and other seeds. The means over seeds of each
document, and the means over documents of each seed, give an interval each, of half-widths

    t(D − 1) S_documents / √D,    t(S − 1) S_seeds / √S,

t being Student's quantile; the squares of both are added up. Each holds a part of what a document and a seed are worth
together, so that the interval is a little too wide rather than too narrow (the tests draw worlds with a known truth).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy

HOLDS, DOES_NOT, UNDECIDED = "holds", "does not hold", "undecided"
_STEPS = 20_001  # of the integral that Student's quantile takes


@dataclass(frozen=True)
class Difference:
    """Nats a token: left less right, and the ends of its interval. seed_means: of each seed alone."""

    mean: float
    low: float
    high: float
    seed_means: tuple[float, ...]


def losses(nats: numpy.ndarray, tokens: numpy.ndarray) -> numpy.ndarray:
    """Mean loss of each seed, nats a token, float64 [seeds]. nats: sums, float64 [seeds, documents]; tokens:
    [documents]."""
    return nats.sum(axis=1) / tokens.sum()  # type: ignore[no-any-return]


def difference(
    left: numpy.ndarray, right: numpy.ndarray, tokens: numpy.ndarray, confidence: float = 0.95
) -> Difference:
    """Of two arms, whose documents lose `left` and `right` nats, float64 [seeds, documents], over `tokens` [documents].

    The loss is a ratio of sums, nats to tokens; its variance over documents is that of what they add to it beyond their
    share. With one seed the interval is over documents alone.
    """
    apart = left - right
    count, total = len(tokens), tokens.sum()
    seed_means = losses(apart, tokens)
    mean = float(seed_means.mean())
    shares = (apart - mean * tokens) * (count / total)  # [seeds, documents]
    parts = [(float(shares.mean(axis=0).var(ddof=1)) / count, count - 1)]
    if (seeds := len(seed_means)) > 1:
        parts.append((float(seed_means.var(ddof=1)) / seeds, seeds - 1))
    half = sum(students_quantile(confidence, free) ** 2 * variance for variance, free in parts) ** 0.5
    return Difference(mean, mean - half, mean + half, tuple(map(float, seed_means)))


@cache
def students_quantile(confidence: float, degrees: int) -> float:
    """t such that |T| < t with the probability `confidence`; T is Student's, with `degrees` of freedom.

    With T = √degrees tan(a) the density of a is proportional to cos(a) ** (degrees − 1).
    """
    angles = numpy.linspace(0, numpy.pi / 2, _STEPS)
    density = numpy.cos(angles) ** (degrees - 1)
    below = numpy.concatenate([[0.0], numpy.cumsum(density[1:] + density[:-1])])
    return float(degrees**0.5 * numpy.tan(numpy.interp(confidence * below[-1], below, angles)))


def verdict(relation: str, found: Difference, margin: float) -> str:
    """Whether `left < right`, or `left = right` within `margin`, by the interval: it holds where the whole interval
    says so, and does not where the whole of it says the opposite."""
    if relation == "<":
        return HOLDS if found.high < 0 else DOES_NOT if found.low > 0 else UNDECIDED
    if -margin < found.low and found.high < margin:
        return HOLDS
    return DOES_NOT if found.low > margin or found.high < -margin else UNDECIDED


def together(verdicts: list[str]) -> str:
    """Of a claim that is several orders: it holds where all do, and does not where one does not."""
    if DOES_NOT in verdicts:
        return DOES_NOT
    return HOLDS if verdicts and all(each == HOLDS for each in verdicts) else UNDECIDED
