"""Which products of a model are in fp8, by Transformer Engine, and by what they are scaled; Megatron's choices. Pure.

Of every layer but the first and last ones that stay in bf16, the four matrix products are in fp8, in forward and in
backward. Weights, norms, attention, the states between layers, the output head and the losses are in bf16 and fp32.

tensorwise  each tensor by its own largest number, for which it is read once more
delayed     by the largest number that the same tensor had in the last steps, on all tensor- and data-parallel ranks
blockwise   weights by blocks of 128 x 128, what they are multiplied with by rows of 128
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from minitron_mcore.model.recompute import recompute_of
from minitron_mcore.training.config import NarrowConfig, TrainConfig


class Needs(NamedTuple):
    """The least versions that a recipe runs on: of Transformer Engine, of compute capability, of CUDA."""

    engine: tuple[int, int]
    capability: tuple[int, int]
    cuda: tuple[int, int]


# What megatron-core asks of Transformer Engine, and that of the device: 8.9 is Ada, 9.0 Hopper.
NEEDS = {
    "delayed": Needs((1, 0), (8, 9), (12, 1)),
    "tensorwise": Needs((2, 2), (8, 9), (12, 1)),
    "blockwise": Needs((2, 3), (9, 0), (12, 9)),
}
# Of steps whose largest numbers delayed scaling goes by: Transformer Engine's own default, where Megatron's is one.
HISTORY = 1024


@dataclass(frozen=True)
class Fp8:
    """at_start, at_end: so many of the model's layers, all pipeline stages together, stay in bf16."""

    format: str = "hybrid"
    recipe: str = "tensorwise"
    at_start: int = 0
    at_end: int = 0

    def holds(self, layer: int, num_layers: int) -> bool:
        """Whether the products of `layer`, from 0, of so many are in fp8."""
        return self.at_start <= layer < num_layers - self.at_end

    def megatron_fields(self) -> dict[str, Any]:
        """Of TransformerConfig."""
        fields: dict[str, Any] = {"fp8": self.format, "fp8_recipe": self.recipe}
        if self.recipe == "delayed":
            fields |= {"fp8_amax_history_len": HISTORY, "fp8_amax_compute_algo": "max"}
        if self.at_start or self.at_end:
            at = {"num_layers_at_start_in_bf16": self.at_start, "num_layers_at_end_in_bf16": self.at_end}
            fields |= {"first_last_layers_bf16": True, **at}
        return fields


# Each tensor scaled by what it holds: no history to be kept over the ranks of a group, which Megatron takes from the
# global groups, and none to warm up.
OF_TEACHER = Fp8()


def fp8_of(train: NarrowConfig) -> Fp8 | None:
    """As a recipe's section has it; None: nothing is in fp8."""
    if train.fp8_format is None:
        return None
    counts = train.num_layers_at_start_in_bf16, train.num_layers_at_end_in_bf16
    return Fp8(train.fp8_format, train.fp8_recipe, *(counts if train.first_last_layers_bf16 else (0, 0)))


def passes_of(train: TrainConfig) -> dict[str, Any]:
    """How a section's training passes go, by the names of `build_model`."""
    return {"recompute": recompute_of(train), "fp8": fp8_of(train)}
