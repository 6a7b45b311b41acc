"""Aggregation of importance over the sequence, then over the batch (arXiv 2407.14679, section 2.2).

Of values S_1 … S_n:  mean = 1/n Σ|S_i|,  l2 = √(Σ S_i²),  var = 1/n Σ (S_i − S̄)².

Both steps go through sums, which add up over parts of a sequence, microbatches and ranks, so that the split and layout
of the samples do not change the result. They are formed in float32 over the sequence, and in float64 from there on.

Legend: s sequence (or this rank's part of it), b micro-batch, C channels, R rows (layers or norm sites), A sequence
aggregations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

# Which sums each aggregation is made from: abs = Σ|S|, sum = ΣS, square = ΣS².
SUMS = {"mean": ("abs",), "l2": ("square",), "var": ("sum", "square")}

CACHED = 2**18  # fp32 numbers of a thread that stay in its core's cache
ADDED = 16  # numbers that are added in fp32 before their sum goes on in float64


def sums_for(aggregations: Sequence[str]) -> tuple[str, ...]:
    """Names of the sums that `aggregations` need, each once."""
    return tuple(dict.fromkeys(name for aggregation in aggregations for name in SUMS[aggregation]))


def sequence_sums(values_SBC: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """The sums `names` of every sample and channel over this part of the sequence: [len(names), b, C].

    float64, except that Σ|S| alone on a GPU stays in its kernel's float32. Values may be of any floating type. With
    `sum`, squares are summed about the mean or near it, because the variance's ΣS² − (ΣS)²/n would cancel in float32;
    the two are put together in float64.
    """
    return (_sums_on_cuda if values_SBC.is_cuda else _sums_on_cpu)(values_SBC, names)


def _sums_on_cuda(values_SBC: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """A single kernel that reads the values once if one kind of sum is wanted: launches cost more than arithmetic."""

    def norm(values: torch.Tensor, power: int) -> torch.Tensor:
        return torch.linalg.vector_norm(values, power, dim=0, dtype=torch.float32)

    if names == ("abs",):
        return norm(values_SBC, 1)[None]
    result: dict[str, torch.Tensor] = {}
    if "abs" in names:
        result["abs"] = norm(values_SBC, 1).double()
    if "sum" in names:
        count = values_SBC.shape[0]
        mean = values_SBC.sum(0, dtype=torch.float32) / count
        result["sum"] = mean.double() * count
        result["square"] = norm(values_SBC - mean, 2).double().square().addcmul_(mean.double(), result["sum"])
    elif "square" in names:
        result["square"] = norm(values_SBC, 2).double().square()
    return torch.stack([result[name] for name in names])


def _sums_on_cpu(values_SBC: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """All sums over one piece of the sequence while it is in the cache.

    Token k of every piece is added to slot k, and the slots are added up at the end: elementwise passes alone, in which
    a thread meets the numbers that it wrote in the pass before. A reduction over the leading axis deals them out by
    channel instead, so that they travel between the cores.
    """
    if values_SBC.numel() <= CACHED // 2:  # a norm for each head, a number for each token: calls cost more than sums
        wide = values_SBC.double()
        exact = {"abs": wide.abs, "square": wide.square, "sum": wide.double}
        return torch.stack([exact[name]().sum(0) for name in names])
    numbers = (2 + len(names)) * values_SBC[0].numel()  # of one token: itself, a temporary, the slots
    size = max(1, min(len(values_SBC), CACHED * torch.get_num_threads() // numbers))
    wide, scratch = torch.empty(2, size, *values_SBC.shape[1:])
    slots = torch.zeros(len(names), size, *values_SBC.shape[1:])
    slot = dict(zip(names, slots, strict=True))
    totals = torch.zeros(len(names), *values_SBC.shape[1:], dtype=torch.float64)
    about = _near_mean(values_SBC) if "sum" in names else None
    for number, piece in enumerate(values_SBC.split(size), 1):
        if len(piece) < size:  # the last
            wide, scratch = wide[: len(piece)], scratch[: len(piece)]
            slot = {name: buffer[: len(piece)] for name, buffer in slot.items()}
        values = piece if piece.dtype == torch.float32 else wide.copy_(piece)
        if about is not None:
            slot["sum"] += torch.sub(values, about, out=scratch)
            slot["square"].addcmul_(scratch, scratch)
        elif "square" in slot:
            slot["square"].addcmul_(values, values)
        if "abs" in slot:
            slot["abs"] += torch.abs(values, out=scratch)
        if number % ADDED == 0:
            totals += slots.sum(1)
            slots.zero_()
    totals += slots.sum(1)
    if about is not None:
        total, center, count = dict(zip(names, totals, strict=True)), about.double(), len(values_SBC)
        total["square"].addcmul_(center, 2 * total["sum"] + count * center)
        total["sum"].add_(center, alpha=count)
    return totals


def _near_mean(values_SBC: torch.Tensor) -> torch.Tensor:
    """The mean of √s tokens, evenly spaced, fp32 [b, C]: near enough to keep a variance from cancelling.

    Of s tokens one that is M away from all others, as a text's first may be, leaves a variance of M² / s, and moves the
    mean of √s of them by M / √s at most, whose square is no more.
    """
    stride = math.isqrt(len(values_SBC))
    return values_SBC[stride // 2 :: stride].mean(0, dtype=torch.float32)


def from_sums(sums: Mapping[str, torch.Tensor], count: torch.Tensor | float, aggregation: str) -> torch.Tensor:
    """The aggregation from its float64 sums over `count` values; the sums' shape."""
    if aggregation == "mean":
        return sums["abs"] / count
    if aggregation == "l2":
        return sums["square"].sqrt()
    return (sums["square"] / count - (sums["sum"] / count).square()).clamp_min(0)


def over_sequence(
    sums_KRBC: torch.Tensor, names: Sequence[str], count: int, aggregations: Sequence[str]
) -> torch.Tensor:
    """Per-sample values [A, R, b, C] from whole-sequence sums (first axis: `names`) over `count` tokens."""
    sums = dict(zip(names, sums_KRBC, strict=True))
    return torch.stack([from_sums(sums, count, aggregation) for aggregation in aggregations])


class SampleSums:
    """Σ v and Σ v² over samples, v being a sample's value after aggregation over the sequence: [A, 2, R, C], float64.

    Every aggregation over the batch follows from these two, since v is not negative.
    """

    def __init__(self, sequence: Sequence[str], rows: int, channels: int, device: torch.device | str = "cpu") -> None:
        self.sequence = tuple(sequence)
        self.totals = torch.zeros(len(self.sequence), 2, rows, channels, dtype=torch.float64, device=device)

    def add(self, values_ARBC: torch.Tensor, valid_B: torch.Tensor | None, rows: torch.Tensor) -> None:
        """Add a microbatch's values of the given rows (int64 [R']); samples with `valid` 0 do not count; None: all."""
        weighted = values_ARBC if valid_B is None else values_ARBC * valid_B.to(values_ARBC)[:, None]
        self.totals[:, 0].index_add_(1, rows, weighted.sum(2))
        self.totals[:, 1].index_add_(1, rows, (weighted * values_ARBC).sum(2))

    def over_batch(self, batch: str, sequence: str, num_samples: float) -> torch.Tensor:
        """The score [R, C] after aggregating over the sequence, then over `num_samples` samples."""
        total, square = self.totals[self.sequence.index(sequence)]
        return from_sums({"abs": total, "sum": total, "square": square}, max(num_samples, 1.0), batch)
