"""A step of a run, and the recipe that each stage of it gets. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.jobs.job import Job, Promises, resolve
from minitron_mcore.model.config import ModelConfig
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.training.config import TrainConfig


@dataclass(frozen=True)
class Step:
    """One job of a run, skipped once it is done. name: of its mark in done/; title: for the console."""

    name: str
    title: str
    verb: str
    recipe: Recipe
    options: Mapping[str, Any] = field(default_factory=dict)  # of the verb's `resolve`

    def mark(self, folder: Path) -> Path:
        """The file that says that it is done, and what it gave."""
        return folder / "done" / f"{self.name.replace(' ', '-')}.json"

    def resolve(self, world: World, promises: Promises) -> Job:
        return resolve(self.verb, self.recipe, world, promises, **self.options)


def with_baseline(recipe: Recipe, baseline: str, shape: Architecture, pruned: Path, target: Path) -> Recipe:
    """Next-token training of a student's shape with the distillation's own budget and schedule, from the pruned weights
    (next_token) or random ones: what distillation is compared with, and what may stand between pruning steps."""
    shared = {entry.name: getattr(recipe.distill, entry.name) for entry in dataclasses.fields(TrainConfig)}
    shared |= {"checkpoint": str(target), "load": str(pruned) if baseline == "next_token" else None}
    stored = shape.to_dict()
    fields = {entry.name: stored[entry.name] for entry in dataclasses.fields(ModelConfig) if entry.name in stored}
    # The student's own padding, whatever multiple the recipe names.
    fields["make_vocab_size_divisible_by"] = stored["padded_vocab_size"]
    name = f"{recipe.name}-{baseline}"
    return dataclasses.replace(recipe, name=name, train=TrainConfig(**shared), model=ModelConfig(**fields))
