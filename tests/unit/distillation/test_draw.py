"""Targets drawn from a distribution: unbiased, with the variance of draws with replacement; top-k exact.

Compared with dense float64 softmax. Statistics are over fixed seeds, so that they cannot fail by chance on another day:
a z-score beyond 5 of any id, or a chi-square per degree of freedom away from 1 by more than 5 standard deviations, is a
fault of the drawing.
"""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from minitron_mcore.distillation.cache.draw import draw, most_probable, poisson, token_keys
from minitron_mcore.distillation.cache.file import Targets
from minitron_mcore.distillation.cache.teacher import log_weights
from minitron_mcore.model.vocab_parallel import VocabularyShard

V = 300
SHARD = VocabularyShard.of(V, V, None)


def some_logits(tokens: int = 1, scale: float = 2.0) -> torch.Tensor:
    """A peaked distribution with a long tail: from 0.7 down to 1e-7."""
    generator = torch.Generator().manual_seed(4)
    logits = scale * torch.randn(tokens, V, generator=generator)
    logits[:, 7] += 4 * scale
    return logits


def weights_of(kept, row_count: int) -> torch.Tensor:
    """Dense weights [C, V] of the drawn ids, float64, through what a cache is read with."""
    used = kept.ids >= 0
    targets = Targets(
        used.sum(1).numpy(),
        kept.ids[used].numpy(),
        kept.counts[used].numpy(),
        None if kept.values is None else kept.values[used].numpy(),
    )
    dense = torch.zeros(row_count, V, dtype=torch.float64)
    rows = torch.arange(row_count).unsqueeze(1).expand(kept.ids.shape)[used]
    dense[rows, kept.ids[used]] = torch.from_numpy(numpy.exp(log_weights(targets)).astype(numpy.float64))
    return dense


@pytest.mark.parametrize("proposal_temperature", [1.0, 1.4])
@pytest.mark.parametrize("draws", [2, 12, 60])
def test_drawn_targets_are_unbiased(draws: int, proposal_temperature: float) -> None:
    trials = 6000
    logits = some_logits().expand(trials, V).contiguous()
    kept = draw(logits, SHARD, draws, proposal_temperature, token_keys(3, 5, 0, trials, logits.device))
    weights = weights_of(kept, trials)
    p = logits[0].double().softmax(-1)
    q = (logits[0].double() / proposal_temperature).softmax(-1)

    # Given n draws, a weight has mean p and variance p (p / q - p) / n.
    assert kept.counts is not None
    drawn = torch.where(kept.ids >= 0, kept.counts, 0).sum(1).double()
    assert drawn.min() >= 1
    spread = (p * (p / q - p) * (1 / drawn).mean() / trials).sqrt()
    seen_often = q * draws * trials > 20  # where a normal distribution is near enough
    z = ((weights.mean(0) - p) / spread)[seen_often]
    assert z.abs().max() < 5 and abs(z.mean()) * math.sqrt(len(z)) < 5
    variance = (weights.var(0) / (p * (p / q - p) * (1 / drawn).mean()))[seen_often]
    assert abs(variance[q[seen_often] * draws * trials > 2000] - 1).max() < 0.35
    if proposal_temperature == 1.0:
        torch.testing.assert_close(weights.sum(1), torch.ones(trials, dtype=torch.float64), rtol=0, atol=1e-6)


def test_number_of_draws_is_poisson() -> None:
    """Also where every id of the token is improbable: their sum has the mean and variance of a Poisson variate."""
    trials, draws = 4000, 30
    logits = torch.zeros(trials, V)
    kept = draw(logits, SHARD, draws, 1.0, token_keys(1, 1, 0, trials, logits.device))
    assert kept.counts is not None
    total = kept.counts.sum(1).double()
    assert abs(total.mean() - draws) < 5 * math.sqrt(draws / trials)
    assert abs(total.var() / draws - 1) < 5 * math.sqrt(2 / trials)


@pytest.mark.parametrize("mean", [1e-9, 0.003, 0.7, 8.0, 49.0])
def test_poisson_counts(mean: float) -> None:
    """Against the mass function, computed here; chi-square over the counts that are to be expected."""
    trials = 400_000
    means = torch.full((400, 1000), mean)
    _, _, counts = poisson(means, token_keys(9, 0, 0, 400, means.device), 0, most=50)
    seen = numpy.bincount(counts.numpy(), minlength=200)
    seen[0] = trials - len(counts)
    expected = numpy.array([math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)) for k in range(200)]) * trials
    enough = expected > 10
    chi = float(((seen - expected)[enough] ** 2 / expected[enough]).sum())
    freedom = max(int(enough.sum()) - 1, 1)
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 10
    assert seen[~enough].sum() < 200


def test_draws_of_tokens_samples_and_seeds_are_independent() -> None:
    """Uniform counts of neighbours do not correlate: |r| is below 5 / sqrt(count) for independent ones."""
    means = torch.full((1, 20000), 1.0)

    def counts(seed: int, sample: int, position: int) -> torch.Tensor:
        keys = token_keys(seed, sample, position, 1, means.device)
        _, columns, drawn = poisson(means, keys, 0, most=50)
        dense = torch.zeros(20000, dtype=torch.float64)
        dense[columns] = drawn.double()
        return dense

    first = counts(1, 1, 1)
    for other in [counts(2, 1, 1), counts(1, 2, 1), counts(1, 1, 2), counts(1, 0, 2), first.roll(1), first.roll(64)]:
        assert abs(float(torch.corrcoef(torch.stack((first, other)))[0, 1])) < 5 / math.sqrt(20000)


def test_draws_depend_on_the_position_alone() -> None:
    """In whatever chunks a sample's tokens come, and whatever else lies in the chunk."""
    logits = some_logits(tokens=40)
    whole = draw(logits, SHARD, 20, 1.0, token_keys(3, 8, 0, 40, logits.device))
    part = draw(logits[25:31].contiguous(), SHARD, 20, 1.0, token_keys(3, 8, 25, 6, logits.device))
    assert torch.equal(weights_of(part, 6), weights_of(whole, 40)[25:31])


def test_a_token_without_draws_is_drawn_for_again() -> None:
    """With a mean of one draw, a third of the tokens get none at first."""
    logits = some_logits(tokens=500, scale=0.1)
    kept = draw(logits, SHARD, 1, 1.0, token_keys(3, 8, 0, 500, logits.device))
    assert (kept.ids >= 0).any(1).all()
    again = draw(logits[100:101], SHARD, 1, 1.0, token_keys(3, 8, 100, 1, logits.device))
    assert torch.equal(weights_of(again, 1), weights_of(kept, 500)[100:101])


@pytest.mark.parametrize("k", [1, 10, V])
def test_top_k(k: int) -> None:
    logits = some_logits(tokens=6)
    kept = most_probable(logits, SHARD, k)
    expected = logits.double().log_softmax(-1)
    best = expected.topk(k, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(kept.ids, best)
    assert kept.values is not None
    torch.testing.assert_close(kept.values.double(), expected.gather(1, best), rtol=1e-6, atol=1e-6)


def test_nan_logits_end() -> None:
    logits = some_logits(tokens=3)
    logits[1, 4] = math.nan
    kept = draw(logits, SHARD, 5, 1.0, token_keys(1, 1, 0, 3, logits.device))
    assert (kept.ids >= 0).any(1).tolist() == [True, False, True]
