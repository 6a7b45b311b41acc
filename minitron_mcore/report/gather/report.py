"""All that a page shows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.report.gather.measured import Score, Speeds, Written, find_scores, find_speeds, find_written
from minitron_mcore.report.gather.models import Models, find_models
from minitron_mcore.report.gather.outcomes import (
    Estimated,
    Outcome,
    Search,
    find_estimate,
    find_outcomes,
    find_search,
)
from minitron_mcore.report.gather.place import Place, find_place
from minitron_mcore.report.gather.road import Road, find_road
from minitron_mcore.report.gather.rounds import Round, find_rounds
from minitron_mcore.report.gather.trainings import Training, find_trainings


@dataclass(frozen=True)
class Report:
    """None, and empty: the files that say it are not there."""

    place: Place
    road: Road | None
    models: Models
    trainings: tuple[Training, ...]
    rounds: tuple[Round, ...]
    outcomes: tuple[Outcome, ...]
    scores: tuple[Score, ...]
    speeds: Speeds | None
    written: tuple[Written, ...]
    search: Search | None
    estimated: Estimated | None

    @property
    def shades(self) -> dict[str, int]:
        """Label of a model, or name of a student -> its colour, the same in every figure: the teacher has the first,
        each student the next, before and after its training."""
        found = {"teacher": 0, "corrected teacher": 0}
        labels = [*(each.label for each in self.trainings), *(each.label for each in self.outcomes)]
        labels += [each.model for each in self.scores]
        labels += [each.model for each in self.speeds.rows] if self.speeds else []
        for label in [*self.models.plans, *labels]:
            student = label.removesuffix(" pruned").removesuffix(" distilled")
            found.setdefault(student, 1 + len({*found.values()} - {0}))
            found.setdefault(label, found[student])
        return found


def gather(folder: Path, planned: Sequence[tuple[str, str]] = ()) -> Report:
    """What lies in `folder`. planned: (name in done/, title) of every step of a run, where they are known. Raises
    InputError where `folder` is neither a run nor a part of one. One process calls."""
    place = find_place(folder)
    trainings = find_trainings(place)
    return Report(
        place,
        find_road(place, planned),
        find_models(place),
        trainings,
        find_rounds(place, trainings),
        find_outcomes(place),
        find_scores(place),
        find_speeds(place),
        find_written(place),
        find_search(place),
        find_estimate(place),
    )
