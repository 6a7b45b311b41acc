"""An estimate: all that is said of a recipe on a cluster. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.cost import Cost, cost_of
from minitron_mcore.estimate.layouts import Layout, best_layouts, is_possible, nearest, smallest
from minitron_mcore.estimate.loss_points import Outlook
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.work import Beside, Limits, Training
from minitron_mcore.runtime.devices import Machine


@dataclass(frozen=True)
class Estimate:
    """All that is said of a recipe called `name` on `gpus` GPUs of `machine`.

    where: what says the teacher's shape; None: nothing does, as for `align` alone. aligned: the shape that
    `align` is of, and what says it. costs: of each training in the recipe's layout; None: that is not possible;
    (): no times are known. layouts: in which all trainings fit, the best first, of which `shown` are shown. fewest:
    those of the fewest GPUs. twice: the best of twice the GPUs. outlooks: what the student's loss may become. left_out:
    titles of steps of which nothing is said. on_cpu: the `gpus` are ranks of this machine's CPU.
    """

    name: str
    gpus: int
    machine: Machine
    limits: Limits
    teacher: Architecture | None
    where: str
    trainings: tuple[Training, ...]
    beside: tuple[Beside, ...]
    costs: tuple[Cost | None, ...] = ()
    layouts: tuple[Layout, ...] = ()
    shown: int = 8
    fewest: tuple[Layout, ...] = ()
    twice: Layout | None = None
    outlooks: tuple[Outlook, ...] = ()
    left_out: tuple[str, ...] = ()
    on_cpu: bool = False
    aligned: tuple[Architecture, str] | None = None

    @property
    def rank(self) -> str:
        """What each of `gpus` is, in words."""
        return "CPU rank" if self.on_cpu else "GPU"

    @property
    def problems(self) -> list[tuple[str, str]]:
        """(title, why it is not possible) of all that the recipe's layout cannot do."""
        found = [(each.title, each.problem) for each in self.trainings]
        found += [(each.title, each.problem) for each in self.beside]
        return [(title, problem) for title, problem in found if problem]

    @property
    def fits(self) -> bool | None:
        """Whether everything fits as the recipe lays it out; None where the GPU's memory is not known."""
        needs = [(found.total, found.host) for each in self.trainings if (found := each.forecast) is not None]
        needs += [(each.total, each.host) for each in self.beside]
        if self.problems or False in [self.limits.hold(*need) for need in needs]:
            return False
        return None if self.limits.usable is None else True

    @property
    def is_whole(self) -> bool:
        """Whether it is known of all trainings how long they are."""
        return not any(each.unknown for each in self.trainings)

    @property
    def fastest(self) -> Layout | None:
        return self.layouts[0] if self.layouts and self.costs else None


def estimate_of(
    name: str,
    gpus: int,
    machine: Machine,
    limits: Limits,
    teacher: Architecture | None,
    where: str,
    trainings: tuple[Training, ...],
    beside: tuple[Beside, ...],
    shown: int,
    *,
    is_timed: bool,
    on_cpu: bool = False,
) -> Estimate:
    """Looks for the layouts, and works out times where `is_timed`.

    Raises InputError where `machine` lacks a figure that a time needs, and where no layout of so many GPUs can hold the
    trainings, whatever their memory.
    """
    per_node = machine.gpus_per_node
    told = Estimate(name, gpus, machine, limits, teacher, where, trainings, beside, shown=shown, on_cpu=on_cpu)
    if not trainings:
        return told
    if not is_possible(trainings, gpus, per_node):
        raise _no_layout(trainings, gpus, per_node)

    def seconds(training: Training, settings: Sequence[Setting]) -> float:
        return cost_of(training.timetable, settings, machine, referenced=training.referenced).seconds

    how = seconds if is_timed else None
    costs = [
        None if each.problem else cost_of(each.timetable, each.settings, machine, each.side_by_side, each.referenced)
        for each in trainings
        if how
    ]
    twice = best_layouts(trainings, 2 * gpus, per_node, limits, how)[:1] if is_timed else []
    return replace(
        told,
        costs=tuple(costs),
        layouts=tuple(best_layouts(trainings, gpus, per_node, limits, how)),
        fewest=tuple(smallest(trainings, per_node, limits)),
        twice=twice[0] if twice else None,
    )


def _no_layout(trainings: Sequence[Training], gpus: int, per_node: int) -> InputError:
    """What is said where batch sizes, heads and layers allow no layout; it names the nearest numbers that do."""
    near = nearest(trainings, gpus, per_node)
    sizes = {f"{each.sizes}.global_batch_size={each.setting.global_batch_size}" for each in trainings}
    rule = f"can be laid out in no way: {' and '.join(sorted(sizes))} must be whole on the data-parallel ranks, and "
    rule += "heads, layers and sequences must divide over the others"
    apart = any(each.setting.teacher_parallel for each in trainings)
    remedy = f"change the batch size{' or teacher.parallel' if apart else ''}"
    if near:
        remedy = f"the nearest that can be {'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}"
    return InputError("cluster.gpus", gpus, rule, remedy)
