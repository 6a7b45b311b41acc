"""What a training costs, in time, GPU-hours, money and energy, for its token budget. Pure.

Steps alone count: start-up, validation and saving do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.step_time import ForwardPass, StepTime, reference_pass, step_times
from minitron_mcore.runtime.devices import Machine
from minitron_mcore.training.budget import Shape, Timetable


@dataclass(frozen=True)
class Cost:
    """Of a whole training on `gpus` GPUs. price: of a GPU for an hour; power: watts of a GPU; None: not known."""

    gpus: int
    iterations: int
    tokens: int
    seconds: float
    last: StepTime  # of the shape that the training ends with
    price: float | None = None
    power: float | None = None
    before: ForwardPass | None = None  # of the reference, before training; `seconds` has its own

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def days(self) -> float:
        return self.hours / 24

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours

    @property
    def cost(self) -> float | None:
        """In the price's currency."""
        return None if self.price is None else self.price * self.gpu_hours

    @property
    def energy(self) -> float | None:
        """Kilowatt-hours."""
        return None if self.power is None else self.power / 1000 * self.gpu_hours

    @property
    def tokens_per_second(self) -> float:
        """The mean over all steps."""
        return self.tokens / (self.seconds - (self.before.seconds if self.before else 0.0))


def cost_of(
    timetable: Timetable, settings: Sequence[Setting], machine: Machine, side_by_side: int = 1, referenced: int = 0
) -> Cost:
    """Of every iteration of `timetable`.

    settings: one for each of its shapes, in any order; of another micro batch size where all its shapes have one.
    side_by_side: so many such trainings run at a time, each on GPUs of its own: the time is that of one. referenced: so
    many sequences' log-probabilities are worked out before.

    Raises InputError where `machine` lacks a figure that the time of a step needs.
    """
    is_one = len({start.shape.micro_batch_size for start in timetable.starts}) == 1

    def sizes(of: Setting | Shape) -> tuple[int, ...]:
        return of.sequence_length, of.global_batch_size, 0 if is_one else of.micro_batch_size

    times = dict(zip(map(sizes, settings), step_times(settings, machine), strict=True))
    seconds = 0.0
    for first, then in pairwise([*timetable.starts, timetable.end]):
        seconds += (then.iteration - first.iteration) * times[sizes(first.shape)].total
    last = times[sizes(timetable.starts[-1].shape)]
    before = reference_pass(settings[-1], machine, referenced) if referenced else None
    return Cost(
        side_by_side * settings[0].world_size,
        timetable.iterations,
        timetable.tokens,
        seconds + (before.seconds if before else 0.0),
        last,
        machine.price,
        machine.power,
        before,
    )
