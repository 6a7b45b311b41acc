"""Whether a stop in good order fits into the time between a signal and the end of the process: at worst a whole step, a
validation and a save. Pure.

The time is the grace: of SLURM's --signal=USR1@600, or a partition's GraceTime, or torchrun's --shutdown-timeout.
"""

from __future__ import annotations

from statistics import median

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.world import GRACE

WATCHED = 4  # steps; the first of them, in which kernels are compiled and buffers made, does not count
REMEDY = "a larger --signal=USR1@N or GraceTime, named here too, or a smaller global_batch_size mends it"


class Grace:
    """Of one training of this process. Fed with the same numbers on every rank, it raises on all or none."""

    def __init__(self, seconds: float | None, *, given: bool, resumes: bool = False) -> None:
        """seconds: None: not known, so nothing is said. given: the recipe's own `cluster.grace_seconds`.

        resumes: the run has steps behind it, and is not refused for a machine that happens to be slow.
        """
        self.seconds, self._given, self._refuses = seconds, given, given and not resumes
        self._parts = {"a step": 0.0, "a validation": 0.0, "a save": 0.0}
        self._steps: list[float] = []
        self._told = 0.0

    def step(self, seconds: float, growth: float = 1.0) -> str:
        """What is to be said after a step that took `seconds` on the slowest rank, 0: not known; "" for nothing.

        growth: how much more tokens than this one the largest step that is to come has.
        Raises InputError where even the fastest of the steps is longer than the grace that the recipe gives.
        """
        if self.seconds is None or not seconds or len(self._steps) == WATCHED:
            return ""
        self._steps.append(seconds)
        if len(self._steps) < WATCHED:
            return ""
        steps = self._steps[1:]
        if self._refuses and (fastest := min(steps)) > self.seconds:
            rule = f"is shorter than a step, which takes {fastest:.1f} s, so that no stop could save"
            raise InputError("cluster.grace_seconds", f"{self.seconds:g}", rule, REMEDY)
        return self._measured("a step", median(steps) * growth)

    def validation(self, seconds: float) -> str:
        return self._measured("a validation", seconds)

    def save(self, seconds: float) -> str:
        return self._measured("a save", seconds)

    def _measured(self, part: str, seconds: float) -> str:
        self._parts[part] = max(self._parts[part], seconds)
        needed = sum(self._parts.values())
        # Not before the steps are known, and again only where it got much worse.
        if self.seconds is None or not self._parts["a step"] or needed <= max(self.seconds, 1.5 * self._told):
            return ""
        self._told = needed
        *parts, last = (f"{name} of {seconds:.1f} s" for name, seconds in self._parts.items() if seconds)
        shown = f"{', '.join(parts)} and {last}" if parts else last
        name = "cluster.grace_seconds" if self._given else GRACE
        words = f"a stop by a signal may take {needed:.1f} s ({shown}), more than {name}={self.seconds:g}"
        return f"{words}: what follows the newest checkpoint could be lost; {REMEDY}"
