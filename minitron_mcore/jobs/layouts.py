"""Whether a model can be laid over the ranks as the recipe asks, and read its sequences. Pure."""

from __future__ import annotations

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.job import Model
from minitron_mcore.layout import axis_sizes, check_tensor_parallel, split_layers
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.targets import student_shape
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ParallelConfig, check_layout, check_sequence
from minitron_mcore.runtime.world import World


def refuse_context(recipe: Recipe, verb: str) -> None:
    """Raise InputError where sequences are cut over ranks, for a verb that needs a whole one on a rank."""
    if recipe.parallel.context > 1:
        raise InputError(
            "parallel.context",
            recipe.parallel.context,
            f"is not possible in `{verb}`, which needs a whole sequence on a rank",
            "set parallel.context=1 and raise parallel.tensor",
        )


def asked_shape(recipe: Recipe, student: StudentConfig, teacher: Architecture) -> Architecture:
    """The teacher cut to what `student`, a section, asks for. Raises InputError naming student.<field>."""
    return student_shape(teacher, student, recipe.prune.divisible_by, recipe.parallel.tensor, recipe.parallel.pipeline)


def check_model(
    architecture: Architecture,
    recipe: Recipe,
    world: World,
    section: str | None = None,
    parallel: ParallelConfig | None = None,
    key: str = "parallel",
    *,
    reads_text: bool = True,
) -> None:
    """Raise InputError where the layout does not suit the ranks or the model, or the sequence length either of them.

    section: that of a training, whose phases may have lengths of their own.
    parallel: the layout, which the recipe names by `key`; None: the recipe's own. reads_text: lengths count.
    """
    parallel, lengths = parallel or recipe.parallel, {"data.sequence_length": recipe.data.sequence_length}
    check_layout(parallel, world.size, key)
    check_tensor_parallel(architecture, parallel.tensor, f"{key}.tensor")
    split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline, key)
    for number, phase in enumerate(getattr(recipe, section).phases if section else []):
        if phase.sequence_length is not None:
            lengths[f"{section}.phases[{number}].sequence_length"] = phase.sequence_length
    longest = architecture.max_position_embeddings
    for name, length in lengths.items() if reads_text else ():
        if length > longest and "long_sequences" not in recipe.allow:
            raise InputError(
                name,
                length,
                f"is longer than the model's max_position_embeddings={longest}",
                "shorten it, or use a model of longer context (allow=[long_sequences] goes beyond it)",
            )
        check_sequence(length, parallel, name, key)


def teacher_layout(recipe: Recipe, teacher: Model, world: World) -> ParallelConfig:
    """How the teacher lies over the ranks beside the student of `distill`: `teacher.parallel`, else as the student.

    Raises InputError, naming the key, where it cannot lie so.
    """
    own, key, architecture = recipe.teacher.parallel, "teacher.parallel", teacher.architecture
    if own is None or own == recipe.parallel:
        own, key = recipe.parallel, "parallel"
    if recipe.teacher.precision == "fp8":
        check_fp8(architecture, own.tensor, world)
    check_model(architecture, recipe, world, "distill", own, key)
    if own.context != recipe.parallel.context:
        raise InputError(
            "teacher.parallel.context",
            own.context,
            f"is not parallel.context={recipe.parallel.context}",
            "teacher and student read the same parts of a sequence, so give both one number",
        )
    return own


def check_fp8(architecture: Architecture, tensor: int, world: World) -> None:
    """Raise InputError where the products of a teacher at tensor-parallel size `tensor` cannot be in fp8."""
    key = "teacher.precision"
    if world.device == "cpu":
        rule = "needs Transformer Engine and a CUDA device, which are not here"
        raise InputError(key, "fp8", rule, f"set {key}=bf16")
    sizes = axis_sizes(architecture)
    widths = {"hidden_size": sizes["hidden"], "ffn_hidden_size": sizes["ffn"], "query heads' width": sizes["heads"]}
    for name, width in widths.items():
        share = 1 if name == "hidden_size" else tensor
        if width % (16 * share):
            rule = f"needs multiples of 16 on every rank, and {name}={width} at tensor={share} is none"
            raise InputError(key, "fp8", rule, f"set {key}=bf16")
