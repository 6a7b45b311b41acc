"""Aggregation against its definition, written with numpy in float64.

Tolerance 2e-6 relative to the largest score: sums over a sequence are formed in float32 (2e-7 a sum at these lengths),
and the variance of a variance passes that on a few times.
"""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.importance import aggregate
from minitron_mcore.importance.aggregate import SampleSums, over_sequence, sequence_sums, sums_for
from minitron_mcore.importance.config import AGGREGATIONS

PAIRS = list(itertools.product(AGGREGATIONS, AGGREGATIONS))


def definition(aggregation: str, values: numpy.ndarray, axis: int) -> numpy.ndarray:
    if aggregation == "mean":
        return numpy.abs(values).mean(axis)
    if aggregation == "l2":
        return numpy.sqrt((values**2).sum(axis))
    return ((values - values.mean(axis, keepdims=True)) ** 2).mean(axis)


def scores(values_RNSC: torch.Tensor, cuts: list[int], parts: int = 1, fillers: int = 0) -> dict:
    """Every pair's score of R rows and N samples cut at `cuts`, each sequence in `parts`, some fillers at the end."""
    rows, _, length, channels = values_RNSC.shape
    names = sums_for(AGGREGATIONS)
    table = SampleSums(AGGREGATIONS, rows, channels)
    bounds = [0, *cuts, values_RNSC.shape[1]]
    for start, stop in itertools.pairwise(bounds):
        some = values_RNSC[:, start:stop]
        valid = torch.ones(stop - start)
        if stop == values_RNSC.shape[1] and fillers:
            some = torch.cat([some, 1000 * some[:, :1].expand(-1, fillers, -1, -1)], dim=1)
            valid = torch.cat([valid, torch.zeros(fillers)])
        pieces = [
            torch.stack([sequence_sums(piece.transpose(0, 1), names) for piece in row.chunk(parts, dim=1)]).sum(0)
            for row in some
        ]
        values = over_sequence(torch.stack(pieces, dim=1), names, length, AGGREGATIONS)
        table.add(values, valid, torch.arange(rows))
    return {(b, s): table.over_batch(b, s, values_RNSC.shape[1]).numpy() for b, s in PAIRS}


def expected(values_RNSC: torch.Tensor, batch: str, sequence: str) -> numpy.ndarray:
    return definition(batch, definition(sequence, values_RNSC.double().numpy(), axis=2), axis=1)


def assert_close(actual: numpy.ndarray, wanted: numpy.ndarray, tolerance: float = 2e-6) -> None:
    assert actual.shape == wanted.shape
    assert numpy.abs(actual - wanted).max() <= tolerance * numpy.abs(wanted).max()


@pytest.mark.parametrize(("batch", "sequence"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_definition(batch: str, sequence: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = (torch.randn(3, 10, 40, 7) * torch.rand(3, 10, 1, 7)).to(dtype)
    assert_close(scores(values, [4, 8])[batch, sequence], expected(values, batch, sequence))


def test_variance_survives_a_large_mean() -> None:
    """Head norms are positive with a small spread; E[S²] − E[S]² in float32 would be off by 1e-2 here."""
    torch.manual_seed(0)
    values = 100 + 0.1 * torch.randn(1, 8, 64, 5)
    for parts in (1, 4):
        assert_close(scores(values, [], parts)["mean", "var"], expected(values, "mean", "var"), tolerance=1e-5)


def test_variance_in_pieces_survives_large_means_and_a_token_far_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a text's first token is in some channels. Squares about zero would be off by 1e-3 and more."""
    torch.manual_seed(0)
    values = 300 + torch.randn(1500, 2, 4)
    values[0] += 5000
    monkeypatch.setattr(aggregate, "CACHED", 8 * 7 * 5)
    for channels in (values, values[1:]):
        names = ("square", "sum")
        sums = dict(zip(names, aggregate._sums_on_cpu(channels, names), strict=True))
        found = aggregate.from_sums(sums, len(channels), "var")
        torch.testing.assert_close(found, channels.double().var(0, correction=0), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cuts_parts_and_fillers_change_nothing(data: st.DataObject) -> None:
    """Micro-batches, parts of a sequence, fillers: float64 sums in another order, from float32 parts.

    The parts carry about 1e-7; the variance over samples of a variance over tokens loses up to two digits of it.
    """
    samples = data.draw(st.integers(2, 9))
    cuts = sorted(data.draw(st.sets(st.integers(1, samples - 1))))
    parts = data.draw(st.sampled_from([1, 2, 4]))
    fillers = data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    values = torch.randn(2, samples, 8, 3) + torch.randn(3)
    whole, cut = scores(values, []), scores(values, cuts, parts, fillers)
    for pair in PAIRS:
        assert_close(cut[pair], whole[pair], tolerance=1e-5)


def test_one_pass_keeps_only_what_is_asked_for() -> None:
    assert sums_for(["mean"]) == ("abs",)
    assert sums_for(["l2", "var"]) == ("square", "sum")
    assert sums_for(AGGREGATIONS) == ("abs", "square", "sum")
    values = torch.randn(6, 2, 3)
    for names in (("abs",), ("square",), ("square", "sum")):
        full = dict(zip(sums_for(AGGREGATIONS), sequence_sums(values, sums_for(AGGREGATIONS)), strict=True))
        for name, sums in zip(names, sequence_sums(values, names), strict=True):
            assert sums.dtype == torch.float64
            torch.testing.assert_close(sums, full[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("abs",), ("square",), ("sum", "square"), ("abs", "square", "sum")])
def test_what_runs_on_a_gpu_and_pieces_on_a_cpu_are_the_sums(
    dtype: torch.dtype, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways, the second in pieces that do not divide the sequence, on a view that is not contiguous."""
    torch.manual_seed(0)
    values = (3 + torch.randn(2, 50, 7).to(dtype)).transpose(0, 1)
    wide = values.double()
    whole = {"abs": wide.abs().sum(0), "square": wide.square().sum(0), "sum": wide.sum(0)}
    monkeypatch.setattr(aggregate, "CACHED", 3 * 14)
    for way in (aggregate._sums_on_cuda, aggregate._sums_on_cpu):
        for name, found in zip(names, way(values, names), strict=True):
            assert found.shape == (2, 7)
            torch.testing.assert_close(found.double(), whole[name], rtol=1e-6, atol=0)
