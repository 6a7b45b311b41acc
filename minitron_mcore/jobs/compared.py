"""The models that one command looks at, under the names that its tables show. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.checkpoint.folder import is_hugging_face, latest_iteration
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import find_reader, require
from minitron_mcore.jobs.job import Model, Promises, absolute
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World

ONE_OR_MORE = "the folder of a checkpoint, or several as checkpoints.NAME=FOLDER"


@dataclass(frozen=True)
class Compared:
    """A model by the name that tables show. key: of the recipe, that names it. model: a checkpoint's, with its
    tokenizer; None: `folder` is Hugging Face's."""

    name: str
    key: str
    folder: Path
    model: Model | None = None


def find_compared(
    recipe: Recipe, world: World, promises: Promises, *, reads_text: bool = True, reads_samples: bool = True
) -> tuple[Compared, ...]:
    """`checkpoints`, else the one `checkpoint`, in the recipe's order: the first is what others are compared with.

    reads_text: each needs a tokenizer; reads_samples: and room for data.sequence_length. Raises InputError where there
    is none, where both are given, where a name is no folder's, or where a layout or a tokenizer does not suit one.
    """

    def find(name: str, folder: str, key: str) -> Compared:
        path = Path(folder)
        if path.is_dir() and is_hugging_face(path) and latest_iteration(path) is None:
            return Compared(name, key, path)
        model = find_reader(recipe, world, promises, key, folder, reads_text=reads_text, reads_samples=reads_samples)
        return Compared(name, key, model.folder, model)

    if recipe.checkpoints and recipe.checkpoint:
        remedy = "name it among them, as checkpoints.student=FOLDER, or leave them out"
        raise InputError("checkpoint", recipe.checkpoint, "is given beside checkpoints", remedy)
    if recipe.checkpoint:
        return (find(absolute(recipe.checkpoint).name, recipe.checkpoint, "checkpoint"),)
    require(recipe, {} if recipe.checkpoints else {"checkpoint": ONE_OR_MORE})
    if unfit := [name for name in recipe.checkpoints if "/" in name or name.startswith(".")]:
        rule = "names folders of results, and can hold no slash nor begin with a dot"
        raise InputError("checkpoints", unfit[0], rule, "name the model otherwise")
    return tuple(find(name, folder, f"checkpoints.{name}") for name, folder in recipe.checkpoints.items())


def titled(verb: str, name: str, models: Sequence[object]) -> str:
    """The work on one of `models`, where it is shown how far it is: by name where there are several."""
    return f"{verb}: {name}" if len(models) > 1 else verb
