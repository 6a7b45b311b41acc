"""What is estimated of a recipe: its trainings, and the stages beside them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minitron_mcore.estimate.forecast import Forecast, fullest, stage_parts
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.stages import Parts
from minitron_mcore.training.budget import Timetable

# Of a GPU's memory, what is left to the CUDA context, the buffers of NCCL and cuBLAS, and fragmentation, none of which
# is forecast. An assumption, stated in docs/estimate.md.
RESERVE = 0.08


@dataclass(frozen=True)
class Limits:
    """What a rank's device and a node's host have, in bytes; None: not known."""

    device: int | None = None
    host: int | None = None

    @property
    def usable(self) -> int | None:
        return None if self.device is None else int(self.device * (1 - RESERVE))

    def hold(self, device: int, host: int) -> bool | None:
        """Whether so much fits; None where nothing is known that says no."""
        if (self.usable is not None and device > self.usable) or (self.host is not None and host > self.host):
            return False
        return None if self.usable is None else True


@dataclass(frozen=True)
class Training:
    """A training of the recipe, in the recipe's own layout.

    section: by which it is trained. sizes: the section that says its batch sizes, which for a baseline is another.
    settings: one for each shape of the timetable. problem: why the layout is not possible; "": it is. side_by_side: so
    many trainings by this timetable run at a time, each on its share of the GPUs. note: what its title does not say.
    referenced: so many sequences' log-probabilities are worked out before, by the model that training starts from.
    unknown: why nobody knows how many iterations there are, of which `timetable` has one; "": it has all.
    """

    title: str
    section: str
    sizes: str
    timetable: Timetable
    settings: tuple[Setting, ...]
    problem: str = ""
    side_by_side: int = 1
    note: str = ""
    referenced: int = 0
    unknown: str = ""

    @property
    def setting(self) -> Setting:
        """Of the shape that the training ends with."""
        last = self.timetable.starts[-1].shape
        sizes = last.sequence_length, last.global_batch_size
        return next(each for each in self.settings if (each.sequence_length, each.global_batch_size) == sizes)

    @cached_property
    def forecast(self) -> Forecast | None:
        """Of the fullest pipeline stage; None where the layout is not possible."""
        return None if self.problem else fullest(self.settings)

    def stages(self) -> list[Parts]:
        """Bytes by part on a rank of each pipeline stage, of the shape that needs most."""
        if self.forecast is None:
            return []
        setting = self.forecast.setting
        return [stage_parts(setting, stage) for stage in range(setting.parallel.pipeline)]


@dataclass(frozen=True)
class Beside:
    """A stage that is no training.

    stages: bytes by part on a rank of each pipeline stage. host: bytes of a node's host memory beside that.
    """

    title: str
    verb: str
    stages: tuple[Parts, ...] = ()
    host: int = 0
    problem: str = ""

    @property
    def parts(self) -> Parts:
        """Of the fullest pipeline stage."""
        return max(self.stages, key=lambda parts: sum(parts.values()), default={})

    @property
    def total(self) -> int:
        return sum(self.parts.values())
