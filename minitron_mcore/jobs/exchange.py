"""Whether tensor-parallel ranks can exchange states while products go on (`tp_comm_overlap`). Pure."""

from __future__ import annotations

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.user_buffers import Exchange
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import Timetable
from minitron_mcore.training.config import TrainConfig


def exchange_of(
    recipe: Recipe, section: str, architecture: Architecture, world: World, timetable: Timetable
) -> Exchange | None:
    """What a training of `architecture` by the recipe's `section` exchanges states through; None: nothing is asked for.

    Raises InputError where it cannot be: in other layers than Transformer Engine's, or without sequence parallelism.
    """
    train: TrainConfig = getattr(recipe, section)
    key, parallel, remedy = f"{section}.tp_comm_overlap", recipe.parallel, "leave it out"
    if not train.tp_comm_overlap:
        return None
    if parallel.tensor == 1:
        rule = "has no effect with parallel.tensor=1, at which nothing is exchanged"
        raise InputError(key, True, rule, remedy)
    if not parallel.sequence:
        rule = "needs sequence parallelism, whose gathers and scatters it overlaps"
        raise InputError(key, True, rule, f"set parallel.sequence=true, or {remedy}")
    if recipe.precision != "bf16":
        rule = f"needs Transformer Engine's layers, which are in bf16, and precision={recipe.precision}"
        raise InputError(key, True, rule, f"set precision=bf16, or {remedy}")
    if world.device == "cpu":
        raise InputError(key, True, "needs Transformer Engine and a CUDA device, which are not here", remedy)
    tokens = {start.shape.micro_batch_size * start.shape.sequence_length for start in timetable.starts}
    if train.phases:
        tokens.add(train.micro_batch_size * recipe.data.sequence_length)  # of a validation
    if len(tokens) > 1:
        sizes = " and ".join(f"{size:,}" for size in sorted(tokens))
        rule = f"has buffers for microbatches of one size, but those of {section}.phases have {sizes} tokens"
        raise InputError(key, True, rule, f"give all phases one product of micro batch size and length, or {remedy}")
    return Exchange(key, tokens.pop() // parallel.context, architecture.hidden_size, parallel.tensor)
