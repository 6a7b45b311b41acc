"""Aggregation of importance over the sequence, then over the batch (arXiv 2407.14679, section 2.2).

Of values S_1 … S_n:  mean = 1/n Σ|S_i|,  l2 = √(Σ S_i²),  var = 1/n Σ (S_i − S̄)².

Both steps go through sums, which add up over parts of a sequence, microbatches and ranks alike: how the samples are
cut or laid out does not change the result. Over the sequence they are formed in float32, from there on in float64.

Legend: s sequence (or this rank's part of it), b micro-batch, C channels, R rows (layers or norm sites), A sequence
aggregations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

AGGREGATIONS = ("mean", "l2", "var")
# Which sums each aggregation is made from: abs = Σ|S|, sum = ΣS, square = ΣS².
SUMS = {"mean": ("abs",), "l2": ("square",), "var": ("sum", "square")}

CACHED = 2**18  # values


def sums_for(aggregations: Sequence[str]) -> tuple[str, ...]:
    """Names of the sums that `aggregations` need, each once."""
    return tuple(dict.fromkeys(name for aggregation in aggregations for name in SUMS[aggregation]))


def sequence_sums(values_SBC: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """The sums `names` of every sample and channel over this part of the sequence: [len(names), b, C], float64.

    Values may be of any floating type and are never copied in a wider one, but where `sum` is asked for: its variance
    is then taken about the mean, since ΣS² − (ΣS)²/n cancels in float32.
    """
    result: dict[str, torch.Tensor] = {}
    if "abs" in names:
        result["abs"] = _power_sum(values_SBC, 1).double()
    if "sum" in names:
        count = values_SBC.shape[0]
        mean = values_SBC.sum(0, dtype=torch.float32) / count
        around = _power_sum(values_SBC, 2, mean).double()
        result["sum"] = mean.double() * count
        result["square"] = around + mean.double().square() * count
    elif "square" in names:
        result["square"] = _power_sum(values_SBC, 2).double()
    return torch.stack([result[name] for name in names])


def _power_sum(values_SBC: torch.Tensor, power: int, centre_BC: torch.Tensor | None = None) -> torch.Tensor:
    """Σ|S − centre|^power over the sequence, float32 [b, C]; power is 1 or 2."""
    if values_SBC.is_cuda:
        # One kernel, which reads the values once.
        shifted = values_SBC if centre_BC is None else values_SBC - centre_BC
        return torch.linalg.vector_norm(shifted, power, dim=0, dtype=torch.float32).pow(power)
    # On the CPU that kernel is not vectorised over a leading axis. Two operations on pieces that stay in the cache are
    # five times as fast.
    total = torch.zeros(values_SBC.shape[1:], dtype=torch.float32)
    for piece in values_SBC.split(max(1, CACHED // max(1, total.numel()))):
        shifted = piece if centre_BC is None else piece - centre_BC
        powered = shifted.abs() if power == 1 else shifted.float().square()
        total += powered.sum(0, dtype=torch.float32)
    return total


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
    """Σ v and Σ v² over samples, v a sample's value after the sequence aggregation: [A, 2, R, C], float64.

    Every aggregation over the batch follows from these two, v being non-negative.
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
