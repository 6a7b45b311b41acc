"""The verbs as functions: what `minitron VERB` does, from Python, alone or under torchrun, with what comes of it.

    import minitron_mcore.commands as minitron

    minitron.import_(hf="Llama-3.1-8B", checkpoint="teacher")
    progress = minitron.distill("recipe.yaml", distill={"tokens": "94B", "lr": 1e-4}, parallel={"tensor": 8})
    results = minitron.evaluate(checkpoint="distilled", data={"valid": "corpus_valid_text_document"})

The first argument is a recipe's file, or none. The others are a recipe's keys, sections as dictionaries, values as in
YAML or as Python's own; they count as a command's do, over the file. Under a launcher every rank calls with the same
arguments, and every rank gets the result, but of verbs that need no ranks, as `report`, the first rank alone. What is
printed and written is what the verb prints and writes, and the same call goes on where it was cut off. Wrong input
raises `InputError`, in one sentence; a training that is stopped by a signal or by a limit of its own raises
SystemExit, as the command's exit code says. docs/api.md has examples.

`perform` does every verb; the functions below, those of the road.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.libraries import set_aside
from minitron_mcore.runtime.world import World, on_this_machine, read_world

if TYPE_CHECKING:
    from minitron_mcore.importance.scores import Scores
    from minitron_mcore.jobs.job import Job
    from minitron_mcore.pruning.plan_file import PruningPlan
    from minitron_mcore.recipe import Recipe
    from minitron_mcore.training.job import Progress

Config = str | os.PathLike[str] | None


def recipe(config: Config = None, /, **keys: Any) -> Recipe:
    """The recipe that a function here goes by, with all defaults; reads the file alone. Raises InputError."""
    from minitron_mcore.recipe import load_recipe, refuse_code

    file = None if config is None else os.fspath(config)
    said = {name: _as_read(value) for name, value in keys.items()}
    found = load_recipe(file, said)
    refuse_code(found, file, said)
    return found


def perform(verb: str, config: Config = None, /, **keys: Any) -> Any:
    """Do `verb`, by its name on the command line, and return what its stage gives, or None. Every rank calls.

    Raises InputError.
    """
    from minitron_mcore.verbs import VERBS

    if verb not in VERBS:
        raise InputError("verb", verb, "is not a verb", f"choose one of {', '.join(VERBS)}")
    return carry_out(verb, recipe(config, **keys))


def carry_out(verb: str, recipe: Recipe) -> Any:
    """`perform`, of a recipe that is read. Every rank calls."""
    with _within(recipe) as world:
        job = _resolved(verb, recipe, world)
        from minitron_mcore.stages.act import act

        if not job.needs_ranks:
            return act(verb, job, None) if world.rank == 0 else None
        from minitron_mcore.runtime.start import start

        return act(verb, job, start())


def leave() -> None:
    """Leave the process group, if this process is in one; safe to call twice. Models in memory end with it."""
    if "minitron_mcore.runtime.start" in sys.modules:
        from minitron_mcore.runtime.start import stop

        stop()


def foresee(verb: str, recipe: Recipe) -> str:
    """What `--dry-run` prints: what `verb` would read, make and need of memory. Any rank calls. Raises InputError."""
    from minitron_mcore.jobs.dry_run import dry_run, planned_world
    from minitron_mcore.jobs.job import resolve

    with _within(recipe) as world:
        world = planned_world(recipe.cluster, world)
        return dry_run(verb, resolve(verb, recipe, world), world)


def tokenizer(config: Config = None, /, **keys: Any) -> None:
    """Train the SentencePiece model `tokenizer.model` on the text files `input`."""
    perform("tokenizer", config, **keys)


def preprocess(config: Config = None, /, **keys: Any) -> list[str]:
    """Text to Megatron's `.bin` / `.idx`; returns their prefixes, held-out ones last."""
    prefixes: list[str] = perform("preprocess", config, **keys)
    return prefixes


def import_(config: Config = None, /, **keys: Any) -> Path:
    """The Hugging Face folder `hf` as the sharded checkpoint `checkpoint`, whose folder is returned."""
    folder: Path = perform("import", config, **keys)
    return folder


def train(config: Config = None, /, **keys: Any) -> Progress:
    """Next-token training; returns how far it got, with the means of its last validation in `metrics`, if any."""
    progress: Progress = perform("train", config, **keys)
    return progress


def score(config: Config = None, /, **keys: Any) -> Scores:
    """Importance of every axis of `teacher.checkpoint`, written to the file `scores` and returned: float64 arrays of
    the whole model, larger being more important (arXiv 2407.14679, section 2.2)."""
    file: Path = perform("score", config, **keys)
    from minitron_mcore.importance.scores import load_scores

    return load_scores(file)


def plan(config: Config = None, /, **keys: Any) -> PruningPlan:
    """What stays of every axis for the shape `student.*`, written to the file `plan` and returned."""
    found: PruningPlan = perform("plan", config, **keys)
    return found


def prune(config: Config = None, /, **keys: Any) -> Path:
    """The student's checkpoint `student.checkpoint`, cut out of the teacher's; its folder is returned."""
    folder: Path = perform("prune", config, **keys)
    return folder


def distill(config: Config = None, /, **keys: Any) -> Progress:
    """Train the student from its teacher to `distill.tokens` (arXiv 2407.14679, section 3); returns as `train` does."""
    progress: Progress = perform("distill", config, **keys)
    return progress


def evaluate(config: Config = None, /, **keys: Any) -> dict[str, Any]:
    """Loss on held-out text, perplexity and tasks, as the file `results` holds them: of `checkpoint`, or of each of
    `checkpoints` in `models`, by its name, with `differences` to the first."""
    results: dict[str, Any] = perform("evaluate", config, **keys)
    return results


def generate(config: Config = None, /, **keys: Any) -> list[dict[str, Any]]:
    """What checkpoints write to each prompt: `continuations` by the checkpoint's name, of `text`, number of `tokens`
    and `finish_reason`."""
    rows: list[dict[str, Any]] = perform("generate", config, **keys)
    return rows


def export(config: Config = None, /, **keys: Any) -> Path:
    """The checkpoint `checkpoint`, of any pruned shape, as the Hugging Face folder `hf`, which is returned."""
    folder: Path = perform("export", config, **keys)
    return folder


def run(config: Config = None, /, **keys: Any) -> dict[str, Any]:
    """The whole road of a recipe; returns the held-out results by model."""
    results: dict[str, Any] = perform("run", config, **keys)
    return results


def _resolved(verb: str, recipe: Recipe, world: World) -> Job:
    """Every rank looks before any of them acts: at the first call they meet when the process group is made, then
    here."""
    from minitron_mcore.jobs.job import resolve

    if "minitron_mcore.runtime.start" not in sys.modules:
        return resolve(verb, recipe, world)
    from minitron_mcore.runtime.agree import all_or_none

    return all_or_none(lambda: resolve(verb, recipe, world))


@contextmanager
def _within(recipe: Recipe) -> Iterator[World]:
    """Where a recipe is resolved and acted upon: libraries' warnings aside, and what it says of foreign checkpoints
    known. Gives this process's place in the world."""
    from minitron_mcore.checkpoint.stated import stating
    from minitron_mcore.jobs.job import stated_by

    world = read_world(os.environ)
    with set_aside(recipe.log.libraries, world.rank == 0), stating(stated_by(recipe)):
        yield on_this_machine(world)


def _as_read(value: Any) -> Any:
    """A value of Python's as a recipe's file would give it."""
    if isinstance(value, Mapping):
        return {str(name): _as_read(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | range):
        return [_as_read(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
