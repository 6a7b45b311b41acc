"""Whether products can be in fp8 and an optimizer's state narrow: what is installed, which GPU, which sizes. Pure."""

from __future__ import annotations

import re

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.layout import axis_sizes
from minitron_mcore.model.fp8 import NEEDS, OF_TEACHER, Fp8, Needs, fp8_of
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ClusterConfig, ParallelConfig
from minitron_mcore.runtime.devices import find_device
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import Timetable, size_keys
from minitron_mcore.training.config import TrainConfig

# What Transformer Engine's products take, in and out, and megatron-core pads tokens to.
MULTIPLE = 16
# What megatron-core asks for before it gives Adam's state types of their own; the device does not matter to it.
OF_ADAM = Needs((2, 1), (0, 0), (0, 0))
BF16_MOMENTS = Needs((2, 3), (0, 0), (0, 0))


def check_narrow(
    recipe: Recipe, section: str, architecture: Architecture, world: World, timetable: Timetable, sizes: str = ""
) -> None:
    """Raise InputError where a training of `architecture` by the recipe's `section` cannot have the narrow types that
    the section asks for. sizes: the section that says its batch sizes, where that is another."""
    train: TrainConfig = getattr(recipe, section)
    fp8, parallel = fp8_of(train), recipe.parallel
    asked = {"fp8_format": fp8 is not None, "use_precision_aware_optimizer": train.use_precision_aware_optimizer}
    for name in (name for name, is_asked in asked.items() if is_asked):
        if recipe.precision != "bf16":
            rule = f"needs bf16 weights, and precision={recipe.precision}"
            raise InputError(f"{section}.{name}", getattr(train, name), rule, "set precision=bf16, or leave it out")
    if train.use_precision_aware_optimizer:
        key = f"{section}.use_precision_aware_optimizer"
        check_engine(key, True, OF_ADAM, world, recipe.cluster, "leave it out")
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(train, name) == "bf16":
                check_engine(f"{section}.{name}", "bf16", BF16_MOMENTS, world, recipe.cluster, "leave it out")
    if fp8 is None:
        return
    key = f"{section}.fp8_format"
    check_here(key, fp8.format, world, "leave it out")
    check_engine(f"{section}.fp8_recipe", fp8.recipe, NEEDS[fp8.recipe], world, recipe.cluster, _instead(fp8, section))
    check_widths(key, fp8.format, architecture, parallel.tensor, "leave it out, or change parallel.tensor or the shape")
    check_layers(fp8, section, architecture, parallel)
    if train.tp_comm_overlap:
        rule = f"does not go with {section}.tp_comm_overlap=true, whose buffers are of bf16 states"
        raise InputError(key, fp8.format, rule, "leave one of the two out")
    sizes = sizes or section
    for shape in dict.fromkeys(start.shape for start in timetable.starts):
        ranks = parallel.context * (parallel.tensor if parallel.sequence else 1)
        tokens = shape.micro_batch_size * shape.sequence_length / ranks
        if tokens % MULTIPLE:
            rule = f"gives a rank {tokens:g} tokens at a time, and {key}={fp8.format} takes multiples of {MULTIPLE}"
            named = size_keys(getattr(recipe, sizes), shape, sizes)["micro_batch_size"]
            raise InputError(named, shape.micro_batch_size, rule, "raise it, or change the sequence length")


def check_teacher(architecture: Architecture, tensor: int, world: World, cluster: ClusterConfig) -> None:
    """Raise InputError where the products of a teacher at tensor-parallel size `tensor` cannot be in fp8."""
    key, remedy = "teacher.precision", "set teacher.precision=bf16"
    check_here(key, "fp8", world, remedy)
    check_engine(key, "fp8", NEEDS[OF_TEACHER.recipe], world, cluster, remedy)
    check_widths(key, "fp8", architecture, tensor, remedy)


def _instead(fp8: Fp8, section: str) -> str:
    others = {"blockwise": "tensorwise", "tensorwise": "delayed"}
    other = f", or set {section}.fp8_recipe={others[fp8.recipe]}" if fp8.recipe in others else ""
    return f"leave {section}.fp8_format out{other}"


def check_here(key: str, value: object, world: World, remedy: str) -> None:
    """Raise InputError for what Transformer Engine does, where it is not, or no GPU is."""
    if world.device == "cpu":
        raise InputError(key, value, "needs Transformer Engine and a CUDA device, which are not here", remedy)
    if world.engine == "":
        raise InputError(key, value, "needs Transformer Engine, which is not installed", f"install it, or {remedy}")


def check_engine(key: str, value: object, needs: Needs, world: World, cluster: ClusterConfig, remedy: str) -> None:
    """Raise InputError where Transformer Engine, the GPU or CUDA is older than what is asked for `needs`, as far as
    they are known: all of them once the ranks are started, of a planned machine the device's name."""
    check_here(key, value, world, remedy)
    if (installed := version_of(world.engine)) and installed < needs.engine:
        rule = f"needs Transformer Engine {_dotted(needs.engine)} or newer, and {world.engine} is installed"
        raise InputError(key, value, rule, remedy)
    planned = find_device(cluster.device) if cluster.device and world.engine is None else None
    if planned is not None and planned.fp8 is None and needs.capability > (0, 0) and cluster.peak_tflops_fp8 is None:
        rule = f"needs a GPU that multiplies in fp8, and cluster.device={cluster.device} does not"
        raise InputError(key, value, rule, remedy)
    if world.capability is not None and world.capability < needs.capability:
        least = f"{_dotted(needs.capability)} ({'Hopper' if needs.capability >= (9, 0) else 'Ada'}) or newer"
        rule = f"needs a GPU of compute capability {least}, and a rank's has {_dotted(world.capability)}"
        raise InputError(key, value, rule, remedy)
    if world.cuda is not None and world.cuda < needs.cuda:
        rule = f"needs CUDA {_dotted(needs.cuda)} or newer, and this torch was built with {_dotted(world.cuda)}"
        raise InputError(key, value, rule, remedy)


def check_widths(key: str, value: object, architecture: Architecture, tensor: int, remedy: str) -> None:
    """Raise InputError where a product of a layer has an input or output that fp8 does not take."""
    names = {"hidden_size": "hidden", "ffn_hidden_size": "ffn", "query heads' width": "heads"}
    names["width of queries, keys and values"] = "qkv"
    for name, axis in names.items():
        width, share = axis_sizes(architecture)[axis], 1 if axis == "hidden" else tensor
        if width % (MULTIPLE * share):
            rule = f"needs multiples of {MULTIPLE} on every rank, and {name}={width} at tensor={share} is none"
            raise InputError(key, value, rule, remedy)


def check_layers(fp8: Fp8, section: str, architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raise InputError where so many first or last layers cannot stay in bf16: Megatron wants them on one stage."""
    most, total = architecture.num_layers // parallel.pipeline, architecture.num_layers
    counts = {"num_layers_at_start_in_bf16": fp8.at_start, "num_layers_at_end_in_bf16": fp8.at_end}
    for name, count in counts.items():
        if count > most:
            rule = (
                f"is more than the {most} layers of a pipeline stage ({total} at parallel.pipeline={parallel.pipeline})"
            )
            raise InputError(f"{section}.{name}", count, rule, "lower it")
    if fp8.at_start + fp8.at_end >= total:
        rule = f"leaves none of the {total} layers in fp8"
        raise InputError(f"{section}.first_last_layers_bf16", True, rule, f"leave {section}.fp8_format out")


def version_of(text: str | None) -> tuple[int, int] | None:
    """(major, minor) of a version as 2.3.0+5fdd7bb; None where it says none."""
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
