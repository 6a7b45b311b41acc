"""`generate`: what checkpoints write to the same prompts. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from minitron_mcore.data.corpus import check_file
from minitron_mcore.errors import InputError
from minitron_mcore.inference.prompts import Prompt, prompt_ids, read_prompts, stop_ids
from minitron_mcore.jobs.compared import Compared, find_compared
from minitron_mcore.jobs.inputs import model_tokenizer, refuse_context
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True)
class Writer:
    """A model that writes. ids: of each prompt, by its own tokenizer. stop_ids: those that end a text."""

    name: str
    model: Model
    ids: tuple[tuple[int, ...], ...]
    stop_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class GenerateJob(Job):
    """target: None where only the console shows it. shows: whether it does."""

    prompts: tuple[Prompt, ...]
    writers: tuple[Writer, ...]
    target: Path | None
    shows: bool = True


def resolve(
    recipe: Recipe, world: World, promises: Promises = NOTHING, *, prompts: tuple[str, ...] = (), shows: bool = True
) -> GenerateJob:
    """`checkpoint`, or every one of `checkpoints`, on `prompts`, else generate.prompts -> `generate.output`. Raises
    InputError."""
    config = recipe.generate
    compared = find_compared(recipe, world, promises, reads_text=False)
    refuse_context(recipe, "generate")
    asked = read_prompts(config, prompts)
    if config.output:
        check_file(config.output, "generate.output")
    writers = tuple(_writer(each, asked, recipe, promises) for each in compared)
    makes = (Item("generate.output", config.output, "continuations"),) if config.output else ()
    reads = tuple(writer.model for writer in writers)
    target = Path(config.output) if config.output else None
    return GenerateJob(recipe, reads, makes, prompts=asked, writers=writers, target=target, shows=shows)


def _writer(each: Compared, prompts: tuple[Prompt, ...], recipe: Recipe, promises: Promises) -> Writer:
    if each.model is None:
        remedy = f"make a checkpoint of it (minitron import hf={each.folder} checkpoint=FOLDER) and name that"
        raise InputError(each.key, each.folder, "is a Hugging Face folder", remedy)
    tokenizer = model_tokenizer(recipe, each.model, promises)
    if tokenizer is None:
        return Writer(each.name, each.model, (), frozenset())
    limit = each.model.architecture.max_position_embeddings
    ids = prompt_ids(prompts, tokenizer, limit, each.name)
    model = replace(each.model, tokenizer=tokenizer)
    return Writer(each.name, model, ids, stop_ids(tokenizer, model.folder))
