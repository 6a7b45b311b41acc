"""The rounds of an alignment: what each was asked for, and the samples that it learnt from. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.alignment.config import PREFERENCES, REFERENCED, REWARDED, SMOOTHED, AlignConfig
from minitron_mcore.recipe import Recipe
from minitron_mcore.report.gather.place import Place, read_mapping_of, read_recipe
from minitron_mcore.report.gather.samples import find_samples
from minitron_mcore.report.gather.trainings import Curve, Training, number


@dataclass(frozen=True)
class Round:
    """load: the round before, by its label, else the folder of a model. settings: key of `align` -> value, of those
    that shape the loss. samples, files: part -> what became of its records (COUNTS in data/chat/prepare.py), and where
    those were; {} where nothing says it. pairs: they are preferences."""

    training: Training
    method: str
    load: str
    budget: str
    settings: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, float]]
    files: Mapping[str, tuple[str, ...]]

    @property
    def label(self) -> str:
        return self.training.label

    @property
    def pairs(self) -> bool:
        return self.method in PREFERENCES

    def ends(self) -> Iterator[tuple[str, Curve]]:
        """Of each name that is logged of held-out samples, its values, where there are some."""
        yield from ((name, curve) for name, curve in self.training.validation.items() if curve)


def find_rounds(place: Place, trainings: tuple[Training, ...]) -> tuple[Round, ...]:
    """Those of `trainings` that aligned a model, in their order."""
    found = (_round(place, training) for training in trainings if training.section == "align")
    return tuple(each for each in found if each is not None)


def _round(place: Place, training: Training) -> Round | None:
    recipe, lineage = read_recipe(training.part) or place.recipe, read_mapping_of(training.part / "lineage.yaml")
    if recipe is None:
        return None
    _, facts = find_samples(training.part, recipe)
    return Round(
        training=training,
        method=str(lineage.get("method", recipe.align.method)),
        load=_load(place, training.part, lineage),
        budget=_budget(recipe.align),
        settings=_settings(recipe),
        samples={name: _counts(part) for name, part in facts.get("parts", {}).items()},
        files={name: _files(given) for name, given in facts.get("sources", {}).items()},
    )


def _counts(part: Any) -> dict[str, float]:
    read = part.items() if isinstance(part, dict) else ()
    return {str(name): value for name, given in read if (value := number(given)) is not None}


def _files(given: Any) -> tuple[str, ...]:
    read = given if isinstance(given, list) else []
    return tuple(str(file.get("path")) for file in read if isinstance(file, dict))


def _load(place: Place, part: Path, lineage: Mapping[str, Any]) -> str:
    """The label of the round before, where it lies beside this one; though all of them may have been moved since."""
    load = str(lineage.get("load") or "")
    before = part.parent / Path(load).name
    if load and before != part and before in place.parts:
        return place.label(before)
    return load


def _budget(config: AlignConfig) -> str:
    if config.epochs:
        return f"{config.epochs:g} epoch{'' if config.epochs == 1 else 's'}"
    return f"{config.samples:,} samples" if config.samples else f"{config.tokens:,} tokens"


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Of `align` what the method makes use of, and packing."""
    config, method = recipe.align, recipe.align.method
    names = [] if method in PREFERENCES else ["mean"]
    names += ["beta"] if method in PREFERENCES else []
    names += ["eta"] if method in REWARDED else []
    names += ["gamma"] if method == "simpo" else []
    found = {name: getattr(config, name) for name in names}
    if method in PREFERENCES:
        found["log_probs"] = "mean" if config.averages else "sum"
        found |= {"sft_weight": config.sft_weight} if config.sft_weight else {}
    if method in SMOOTHED and config.label_smoothing:
        found["label_smoothing"] = config.label_smoothing
    found |= {"reference": config.reference} if method in REFERENCED else {}
    return {**found, "lr": config.lr, "packing": recipe.chat.packing}
