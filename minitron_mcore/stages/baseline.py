"""Next-token training of a student's shape: what distillation is compared with, and what may stand between steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.model.config import ModelConfig
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages import train
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Progress


def train_baseline(recipe: Recipe, runtime: Runtime, baseline: str, pruned: Path, target: Path) -> Progress:
    """Next-token training with the distillation's own budget and schedule, from the pruned weights or random ones."""
    shared = {field.name: getattr(recipe.distill, field.name) for field in dataclasses.fields(TrainConfig)}
    shared |= {"checkpoint": str(target), "load": str(pruned) if baseline == "next_token" else None}
    shape = read_architecture(pruned).to_dict()
    fields = [field.name for field in dataclasses.fields(ModelConfig) if field.name in shape]
    # The student's own padding, whatever multiple the recipe names.
    padding = {"make_vocab_size_divisible_by": shape["padded_vocab_size"]}
    model = ModelConfig(**{name: shape[name] for name in fields}, **padding)
    name = f"{recipe.name}-{baseline}"
    return train.run(dataclasses.replace(recipe, name=name, train=TrainConfig(**shared), model=model), runtime)
