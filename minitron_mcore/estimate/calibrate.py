"""The efficiency that a machine really has, from steps that were measured on it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log

from minitron_mcore.errors import InputError
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.step_time import step_time
from minitron_mcore.runtime.devices import Machine

LEAST, MOST = 1e-4, 4.0  # of an efficiency; above 1 where the peak is no limit, as of a CPU that was measured
HALVINGS = 60


def calibrated(machine: Machine, points: Sequence[tuple[Setting, float]]) -> Machine:
    """`machine` at the efficiency that makes the estimate equal the measured seconds of a step, of several (setting,
    seconds) in the geometric mean.

    Raises InputError where no efficiency does: the rest alone takes longer, or the steps are slower than any.
    """

    def too_slow(efficiency: float) -> float:
        """How much longer the estimate is, as the mean of logarithms."""
        now = replace(machine, efficiency=efficiency)
        return sum(log(step_time(setting, now).total / seconds) for setting, seconds in points) / len(points)

    low, high = LEAST, MOST
    if too_slow(high) > 0 or too_slow(low) < 0:
        slow = too_slow(high) > 0
        rule = (
            "holds steps that are shorter than their communication and memory traffic alone"
            if slow
            else ("holds steps that are longer than any efficiency explains")
        )
        remedy = "check cluster.*, whether it is the machine that they ran on, or leave the key out"
        raise InputError("estimate.measured", None, rule, remedy)
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if too_slow(middle) > 0 else (low, middle)
    return replace(machine, efficiency=(low * high) ** 0.5)
