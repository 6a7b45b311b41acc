"""Which activations a training pass recomputes in backward instead of keeping; Megatron's choices. Pure.

full        of layers in a row their input alone is kept: by method "uniform" of every `num_layers` in a row of a
            pipeline chunk, by "block" of each of its first `num_layers`, the others keeping everything
selective   of each layer's MLP its input alone. (Attention keeps no scores: of it there is little to save.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.layout import split_layers
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.config import TrainConfig


@dataclass(frozen=True)
class Recompute:
    """granularity: "" for no recomputation, full or selective. method, num_layers: with full alone."""

    granularity: str = ""
    method: str = "uniform"
    num_layers: int = 1

    def megatron_fields(self) -> dict[str, Any]:
        """Of TransformerConfig."""
        if not self.granularity:
            return {}
        fields: dict[str, Any] = {"recompute_method": self.method, "recompute_num_layers": self.num_layers}
        if self.granularity == "selective":
            fields = {"recompute_modules": ["mlp"]}
        return {"recompute_granularity": self.granularity, **fields}


KEEP_ALL = Recompute()


def recompute_of(train: TrainConfig) -> Recompute:
    """As a recipe's section has it, with Megatron's finest grain where it leaves the method out."""
    if train.recompute_granularity is None:
        return KEEP_ALL
    return Recompute(train.recompute_granularity, train.recompute_method or "uniform", train.recompute_num_layers or 1)


def check_recompute(train: TrainConfig, architecture: Architecture, parallel: ParallelConfig, section: str) -> None:
    """Raise InputError where the recomputed layers of the recipe's `section` do not suit those of the model."""
    found = recompute_of(train)
    stages = split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    chunks = sorted({len(chunk) for stage in stages for chunk in stage})
    if found.granularity == "full" and found.method == "uniform" and any(size % found.num_layers for size in chunks):
        held = f"{' or '.join(map(str, chunks))} layer{'s' * (chunks != [1])} that a pipeline stage runs at a time"
        rule = f"does not divide the {held}, as recompute_method=uniform needs"
        remedy = f"choose a divisor, or set {section}.recompute_method=block"
        raise InputError(f"{section}.recompute_num_layers", found.num_layers, rule, remedy)
