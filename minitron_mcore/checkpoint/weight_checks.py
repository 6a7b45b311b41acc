"""Checks of every tensor that an import reads: it has all its numbers, they are finite, and they are not all zero.

Computed part by part while tensors stream through memory, and judged for whole Hugging Face tensors, so that a k_proj
of zeros is found even though it becomes part of a fused tensor that is sharded over ranks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.conversion import Unit
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.agree import gathered

# Word of `allow` that lets it through -> what is wrong, and what that means.
FAULTS = {
    "non_finite_tensors": ("holds NaN or Inf", "the file is damaged, so get it again"),
    "zero_tensors": ("is all zero", "its weights were never filled in, or were set to zero on purpose"),
}


@dataclass(frozen=True)
class Seen:
    """Of one tensor, or of the parts of it seen so far."""

    num_elements: int = 0
    finite: bool = True
    zero: bool = True

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.num_elements + other.num_elements, self.finite and other.finite, self.zero and other.zero)


@dataclass(frozen=True)
class CheckedWeights:
    """What an import read: parameters, tensors, and how many tensors are legitimately all zero."""

    num_parameters: int
    num_tensors: int
    num_zero: int
    allowed: tuple[str, ...] = ()  # matrices of zeros, and tensors that hold NaN or Inf, which were let through

    def __str__(self) -> str:
        fresh = f"; all zero, as in a fresh model: {self.num_zero} biases or zero-centred norms"
        zeros = fresh if self.num_zero else ""
        none = f"let through: {len(self.allowed)} tensors" if self.allowed else "no NaN, no Inf, no matrix all zero"
        return f"{self.num_parameters:,} parameters in {self.num_tensors:,} tensors, as the config says; {none}{zeros}"


class WeightChecks:
    """One per rank: `look` at every part that is read, then `judge` on all ranks together."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self._lock = threading.Lock()

    def look(self, name: str, part: torch.Tensor) -> None:
        """`part` of the Hugging Face tensor `name`; each element must be seen once, on one rank.

        Any thread may call.
        """
        found = Seen()
        if part.numel():
            found = Seen(part.numel(), *(_look_at_bits(part) if part.is_cpu else _look_at_values(part)))
        with self._lock:
            self.seen[name] = self.seen.get(name, Seen()) + found

    def judge(
        self,
        wanted: Iterable[Unit],
        architecture: Architecture,
        path: Callable[[str], Path],
        allow: Iterable[str] = (),
    ) -> CheckedWeights:
        """All ranks call once all parts were seen; either all raise InputError for the same tensor, or none does.

        `path(name)` is the file of a tensor, for messages; `allow` is the recipe's.
        """
        ranks = gathered(self.seen)
        zeros, allowed = 0, []
        totals: dict[str, Seen] = {}
        for unit in wanted:
            for name in unit.names:
                total = sum((seen[name] for seen in ranks if name in seen), Seen())
                totals[name] = total
                is_lost = total.zero and unit.parameter.initial != "zero"
                for word, fault in (("non_finite_tensors", not total.finite), ("zero_tensors", is_lost)):
                    if fault and word not in allow:
                        found, meaning = FAULTS[word]
                        remedy = f"{meaning}; allow=[{word}] takes it as it is"
                        raise InputError("", path(name), f"holds {name}, which {found}", remedy)
                    allowed += [name] if fault else []
                zeros += total.zero and not is_lost
        count = sum(total.num_elements for total in totals.values())
        if count != architecture.num_parameters:
            rule = f"parameters were read, but the architecture in config.json has {architecture.num_parameters:,}"
            raise InputError("", f"{count:,}", rule)
        return CheckedWeights(count, len(totals), zeros, tuple(allowed))


def _look_at_values(part: torch.Tensor) -> tuple[bool, bool]:
    """Whether all elements are finite, and whether all are zero."""
    low, high = (float(edge) for edge in torch.aminmax(part))  # NaN where there is one anywhere
    return math.isfinite(low) and math.isfinite(high), low == high == 0


def _look_at_bits(part: torch.Tensor) -> tuple[bool, bool]:
    """The same by the bits of floating-point numbers on the host, several times as fast and on one thread.

    As integers with a sign the positive numbers are ordered by their size, and above all negative ones; as integers
    without, so are the negative ones, above all positive ones. NaN and Inf are the largest of either.
    """
    size = 8 * part.dtype.itemsize
    signed = part.detach().contiguous().view(_INTEGERS[size]).numpy()
    sign, infinite = 1 << (size - 1), int(part.new_tensor(math.inf).view(_INTEGERS[size]))
    largest, negative = int(signed.max()), int(signed.view(f"u{size // 8}").max())
    finite = largest < infinite and negative < sign + infinite
    return finite, largest <= 0 and negative in (0, sign)


_INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
