"""Aggregation of importance over the sequence, then over the batch (arXiv 2407.14679, section 2.2).

Of values S_1 … S_n:  mean = 1/n Σ|S_i|,  l2 = √(Σ S_i²),  var = 1/n Σ (S_i − S̄)².

Both steps go through sums, which add up over parts of a sequence, microbatches and ranks, so that the split and layout
of the samples do not change the result. They are formed in float32 over the sequence, and in float64 from there on.

Legend: s sequence (or this rank's part of it), b micro-batch, C channels, R rows (layers or norm sites), A sequence
aggregations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

# Which sums each aggregation is made from: abs = Σ|S|, sum = ΣS, square = ΣS².
SUMS = {"mean": ("abs",), "l2": ("square",), "var": ("sum", "square")}

CACHED = 2**17  # values that fit a core's cache


def sums_for(aggregations: Sequence[str]) -> tuple[str, ...]:
    """Names of the sums that `aggregations` need, each once."""
    return tuple(dict.fromkeys(name for aggregation in aggregations for name in SUMS[aggregation]))


def sequence_sums(values_SBC: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """The sums `names` of every sample and channel over this part of the sequence: [len(names), b, C].

    float64, except that Σ|S| alone on a GPU stays in its kernel's float32. Values may be of any floating type. With
    `sum`, squares are summed about the mean, because the variance's ΣS² − (ΣS)²/n would cancel in float32; the two are
    put together in float64.
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

    On the CPU vector_norm is not vectorised over a leading axis, and fresh memory costs more than the arithmetic in it:
    hence the scratch buffers, which are reused for every piece.
    """
    shape, num_channels = values_SBC.shape[1:], values_SBC[0].numel()
    values_SX = values_SBC.reshape(-1, num_channels)
    size = min(len(values_SX), max(1, CACHED * torch.get_num_threads() // max(1, num_channels)))
    wide, scratch = torch.empty(2, size, num_channels)
    result = {name: torch.zeros(num_channels, dtype=torch.float64) for name in {*names, "square"}}
    for piece in values_SX.split(size):
        count, into = len(piece), scratch[: len(piece)]
        values = piece if piece.dtype == torch.float32 else wide[:count].copy_(piece)
        if "sum" in names:
            total = values.sum(0)
            result["square"] += torch.sub(values, total / count, out=into).square_().sum(0)
            result["sum"] += total
            result["square"].addcmul_(total.double(), total.double(), value=1 / count)
        elif "square" in names:
            result["square"] += torch.mul(values, values, out=into).sum(0)
        if "abs" in names:
            result["abs"] += torch.abs(values, out=into).sum(0)
    return torch.stack([result[name] for name in names]).unflatten(1, shape)


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

    def add(self, values_ARBC: torch.Tensor, valid_B: torch.Tensor, rows: torch.Tensor) -> None:
        """Add a microbatch's values of the given rows (int64 [R']); samples with `valid` 0 do not count."""
        weighted = values_ARBC * valid_B.to(values_ARBC)[:, None]
        both = torch.stack([weighted.sum(2), (weighted * values_ARBC).sum(2)], dim=1)
        self.totals.index_add_(2, rows, both)

    def over_batch(self, batch: str, sequence: str, num_samples: float) -> torch.Tensor:
        """The score [R, C] after aggregating over the sequence, then over `num_samples` samples."""
        total, square = self.totals[self.sequence.index(sequence)]
        return from_sums({"abs": total, "sum": total, "square": square}, max(num_samples, 1.0), batch)
