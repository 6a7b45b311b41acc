"""What a loss may become: L = E + A tokens^-alpha, fitted to a training's points, with its uncertainty. Pure.

For each alpha of a grid E and A follow by weighted least squares, so that the whole likelihood is known, and with it
the profile of any prediction y: over the points' variance, least over alpha of RSS(alpha) + (y - y_alpha)^2 / v_alpha.
An interval holds what is within Student's quantile of the least. Neighbouring points of a training are alike: many are
averaged over equal steps of log tokens, and the variance is multiplied by (1 + r) / (1 - r), r being the correlation of
residuals that follow one another, as for a first-order process.

The curve is one of a constant setting: it holds only as far as the learning rate, the data and the batch go on as they
did. A decaying rate ends below a curve that was fitted while it was high.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy

from minitron_mcore.tables import counted

ALPHAS = numpy.geomspace(0.02, 2.0, 200)
LEVEL = 0.95
LEAST_POINTS, LEAST_RANGE, MOST_AHEAD = 8, 4.0, 30.0
BINS = 40


class NoCurveError(ValueError):
    """The points do not carry a curve; `str` is the rule, as it goes on after the name of a file."""


@dataclass(frozen=True)
class LossCurve:
    """A fit. points: how many, averaged ones counted; residual: of one, in nats; first, last: tokens."""

    E: float
    A: float
    alpha: float
    alpha_interval: tuple[float, float]
    points: int
    residual: float
    first: float
    last: float
    _profile: tuple[numpy.ndarray, ...]  # feasible alphas, their E and A, what is left of the quantile, covariances

    def at(self, tokens: float) -> tuple[float, float, float]:
        """The loss after `tokens` tokens: best, and the ends of its 95% interval.

        Raises NoCurveError for tokens too far ahead, and where the interval is wider than all that the loss has fallen.
        """
        if tokens > MOST_AHEAD * self.last:
            most = f"more than {MOST_AHEAD:g} times as many"
            raise NoCurveError(f"ends at {self.last:,.0f} tokens, and {tokens:,.0f} are {most}")
        alphas, E, A, left, covariances = self._profile
        row = numpy.stack([numpy.ones_like(alphas), tokens**-alphas], axis=1)
        means = E + A * row[:, 1]
        spread = numpy.sqrt(numpy.einsum("ni,nij,nj->n", row, covariances, row).clip(0) * left)
        low, high = float((means - spread).min()), float((means + spread).max())
        best = float(self.E + self.A * tokens**-self.alpha)
        fall = self.A * (self.first**-self.alpha - self.last**-self.alpha)
        if high - low > fall:
            rule = f"leaves {low:.3f} to {high:.3f} for {tokens:,.0f} tokens, wider than the {fall:.3f} it has fallen"
            raise NoCurveError(rule)
        return best, low, high


def fit(tokens: numpy.ndarray, losses: numpy.ndarray) -> LossCurve:
    """The curve through points of one training, in rising order of tokens.

    Raises NoCurveError where they are too few, cover too short a range, do not fall, or leave alpha at an end.
    """
    tokens, losses, weights = averaged(numpy.asarray(tokens, float), numpy.asarray(losses, float))
    count = len(tokens)
    if count < LEAST_POINTS:
        raise NoCurveError(f"has {counted(count, 'point')} of a loss, and a curve needs {LEAST_POINTS}")
    if tokens[-1] < LEAST_RANGE * tokens[0]:
        rule = (
            f"goes from {tokens[0]:,.0f} to {tokens[-1]:,.0f} tokens, and a curve needs {LEAST_RANGE:g} times as many"
        )
        raise NoCurveError(rule)
    design = numpy.stack([numpy.broadcast_to(1.0, (len(ALPHAS), count)), tokens ** -ALPHAS[:, None]], axis=2)
    normal = numpy.einsum("kni,n,knj->kij", design, weights, design)
    inverse = numpy.linalg.inv(normal)
    found = numpy.einsum("kij,knj,n,n->ki", inverse, design, weights, losses)
    residuals = losses - numpy.einsum("kni,ki->kn", design, found)
    rss = (weights * residuals**2).sum(axis=1)
    feasible = (found[:, 1] > 0) & (found[:, 0] >= 0)
    constant = (weights * (losses - numpy.average(losses, weights=weights)) ** 2).sum()
    best = int(numpy.where(feasible, rss, numpy.inf).argmin())
    variance = rss[best] / (count - 3) * inflation(numpy.sqrt(weights) * residuals[best])
    quantile = student(count - 3) ** 2
    if not feasible.any() or constant - rss[best] < 2 * quantile * variance:
        raise NoCurveError("does not fall clearly")
    if best in (0, len(ALPHAS) - 1) or not (feasible[best - 1] and feasible[best + 1]):
        raise NoCurveError("does not fall as a power of its tokens, towards a loss above 0")
    left = quantile - (rss - rss[best]) / variance if variance else numpy.where(rss == rss[best], quantile, -1.0)
    held = feasible & (left >= 0)
    profile = ALPHAS[held], found[held, 0], found[held, 1], left[held], variance * inverse[held]
    return LossCurve(
        E=float(found[best, 0]),
        A=float(found[best, 1]),
        alpha=float(ALPHAS[best]),
        alpha_interval=(float(ALPHAS[held].min()), float(ALPHAS[held].max())),
        points=count,
        residual=float(numpy.sqrt(variance)),
        first=float(tokens[0]),
        last=float(tokens[-1]),
        _profile=profile,
    )


def averaged(tokens: numpy.ndarray, losses: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """(tokens, losses, weights): as they are, or of many points the means over equal steps of log tokens, each weighted
    by how many it is of."""
    if len(tokens) <= BINS:
        return tokens, losses, numpy.ones(len(tokens))
    edges = numpy.geomspace(tokens[0], tokens[-1], BINS + 1)[1:-1]
    bins = numpy.searchsorted(edges, tokens, side="right")
    counts = numpy.bincount(bins, minlength=BINS)
    sums = [numpy.bincount(bins, weights=values, minlength=BINS) for values in (numpy.log(tokens), losses)]
    used = counts > 0
    means = [values[used] / counts[used] for values in sums]
    return numpy.exp(means[0]), means[1], counts[used] / counts[used].mean()


def inflation(residuals: numpy.ndarray) -> float:
    """By how much correlated residuals raise the variance of what is fitted. From n points their correlation comes out
    low by (1 + 4 r) / n (Kendall 1954)."""
    squares = (residuals**2).sum()
    correlation = float((residuals[1:] * residuals[:-1]).sum() / squares) if squares else 0.0
    correlation = min(max(correlation + (1 + 4 * correlation) / len(residuals), 0.0), 0.9)
    return (1 + correlation) / (1 - correlation)


def student(degrees: int) -> float:
    """The two-sided quantile of Student's t at LEVEL, by its expansion in 1 / degrees (Abramowitz, Stegun 26.7.5)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
