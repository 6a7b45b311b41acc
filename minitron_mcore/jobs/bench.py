"""`bench`: how fast `checkpoints` prefill and decode, in this project's engine and in others. Pure."""

from __future__ import annotations

import difflib
import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.bench.engines import LLAMA_CPP, OTHERS, OURS, key_of, lacks
from minitron_mcore.bench.figures import Case
from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.data.corpus import check_file
from minitron_mcore.errors import InputError
from minitron_mcore.jobs import export
from minitron_mcore.jobs.compared import Compared, find_compared
from minitron_mcore.jobs.inputs import refuse_context
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.runtime.world import World


@dataclass(frozen=True)
class Benched:
    """A model. folder: Hugging Face's, for the other engines; None: `exports` is done for it first. gguf: its file for
    llama.cpp; None: it is converted first."""

    compared: Compared
    architecture: Architecture
    folder: Path | None
    exports: export.ExportJob | None
    gguf: Path | None

    @property
    def name(self) -> str:
        return self.compared.name

    @property
    def made(self) -> export.ExportJob:
        """What makes the folder."""
        assert self.exports is not None
        return self.exports


@dataclass(frozen=True, kw_only=True)
class BenchJob(Job):
    """pairs: (engine, model), in the order of the table. place: a folder for what is converted, deleted at the end."""

    pairs: tuple[tuple[str, Benched], ...]
    cases: tuple[Case, ...]
    threads: int
    place: Path
    target: Path | None


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> BenchJob:
    """`checkpoints`, or the one `checkpoint`, in `bench.engines` -> the file `bench.output`. Raises InputError."""
    config = recipe.bench
    compared = find_compared(recipe, world, promises, reads_text=False)
    refuse_context(recipe, "bench")
    target = Path(config.output) if config.output else Path(recipe.output) / "bench.json" if recipe.output else None
    if target is not None:
        check_file(str(target), "bench.output")
    _check_names(recipe, [each.name for each in compared])
    sizes = [config.sizes(name) for name in ("batch_size", "prompt_tokens", "output_tokens")]
    cases = tuple(Case(*each) for each in itertools.product(*sizes))
    engines, notes = _engines(recipe, world, compared)
    place = (target.parent if target else Path(tempfile.gettempdir())) / f".bench-{os.getpid()}"
    needs_folder = any(engine != OURS for engine in engines)
    models = tuple(_model(recipe, world, each, place, needs_folder) for each in compared)
    for model in models:
        _check_length(model, cases)
    ours = [model for model in models if model.compared.model is not None]
    pairs = [(engine, model) for engine in engines for model in (ours if engine == OURS else models)]
    makes = (Item("bench.output", str(target), "measured speeds"),) if target else ()
    reads = tuple(each.model or Item(each.key, str(each.folder), "Hugging Face") for each in compared)
    threads = config.threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or _cores() // world.local_size or 1
    return BenchJob(
        recipe, reads, makes, notes, pairs=tuple(pairs), cases=cases, threads=threads, place=place, target=target
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_names(recipe: Recipe, models: list[str]) -> None:
    """Raise InputError where a dictionary of `bench` names a model or an engine that there is none of."""
    config = recipe.bench
    if config.converter is not None and not Path(config.converter).is_file():
        remedy = "name convert_hf_to_gguf.py in llama.cpp's source"
        raise InputError("bench.converter", config.converter, "is not a file", remedy)
    for key, given, known, what in (
        ("hf", config.hf, models, "a model of checkpoints"),
        ("gguf", config.gguf, models, "a model of checkpoints"),
        ("python", config.python, [*map(key_of, OTHERS)], "an engine with a Python of its own"),
    ):
        for name, path in given.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
                raise InputError(f"bench.{key}.{name}", path, f"is of {name}, which is not {what}", remedy)
            if not (Path(path) / "config.json" if key == "hf" else Path(path)).is_file():
                rule = "is no Hugging Face folder" if key == "hf" else "is not a file"
                raise InputError(f"bench.{key}.{name}", path, rule, "name another, or leave it out")


def _engines(recipe: Recipe, world: World, compared: tuple[Compared, ...]) -> tuple[list[str], tuple[str, ...]]:
    """The engines that are measured, and notes on what is left out. Raises InputError."""
    config, theirs = recipe.bench, [each for each in compared if each.model is None]
    if not config.engines:
        ours = [OURS] if len(theirs) < len(compared) else []
        here = [name for name in OTHERS if world.size == 1 and not _hindrance(recipe, name, compared)]
        notes = [_not_ours(each) for each in theirs] if ours else []
        if not ours + here:
            raise InputError("bench.engines", None, "finds no engine for these checkpoints", "see docs/bench.md")
        return ours + here, tuple(notes)
    for number, name in enumerate(config.engines):
        key = f"bench.engines[{number}]"
        if name == OURS:
            if theirs:
                raise InputError(key, name, f"reads no Hugging Face folder, and {_not_ours(theirs[0])}")
        elif world.size > 1:
            layout = next(
                (f"parallel.{axis}={size}" for axis in ("tensor", "pipeline") if (size := _size(recipe, axis)) > 1),
                "data parallelism",
            )
            rule = f"is measured in one process, and {layout} lays the model over {world.size} ranks"
            raise InputError(key, name, rule, "leave it out, or start one rank without parallel.*")
        elif hindrance := _hindrance(recipe, name, compared):
            raise InputError(key, name, *hindrance)
    return list(config.engines), ()


def _size(recipe: Recipe, axis: str) -> int:
    return int(getattr(recipe.parallel, axis))


def _not_ours(compared: Compared) -> str:
    into = "convert it with `minitron import` to measure it in minitron too"
    return f"{compared.key}={compared.folder} is one: {into}"


def _hindrance(recipe: Recipe, name: str, compared: tuple[Compared, ...]) -> tuple[str, str] | None:
    """(rule, remedy) where an engine cannot be started here, else None. Raises InputError for a Python that is none."""
    key = f"bench.python.{key_of(name)}"
    python = recipe.bench.python.get(key_of(name))
    try:
        if lacks(OTHERS[name], python):
            where = f"in {python}" if python else "here"
            remedy = f"pip install {OTHERS[name].install}"
            return f"is not installed {where}", f"{remedy}, or name the Python that has it as {key}"
    except OSError as error:
        raise InputError(key, python, f"is no Python: {error}") from error
    ready = all(each.name in recipe.bench.gguf for each in compared)
    if name == LLAMA_CPP and not ready and recipe.bench.converter is None:
        remedy = "name llama.cpp's convert_hf_to_gguf.py as bench.converter, or the files as bench.gguf.MODEL"
        return "needs GGUF files", remedy
    return None


def _model(recipe: Recipe, world: World, compared: Compared, place: Path, needs_folder: bool) -> Benched:
    """A model with what the other engines read of it. Raises InputError."""
    name, config = compared.name, recipe.bench
    gguf = Path(config.gguf[name]) if name in config.gguf else None
    if compared.model is None:
        return Benched(compared, read_config(compared.folder), compared.folder, None, gguf)
    architecture = compared.model.architecture
    if name in config.hf:
        folder = Path(config.hf[name])
        theirs = read_config(folder)
        if theirs.vocab_size == architecture.vocab_size:
            theirs = theirs.replace(padded_vocab_size=architecture.padded_vocab_size)
        if difference := architecture.difference(theirs):
            remedy = f"name the export of {compared.key}, or leave it out"
            raise InputError(f"bench.hf.{name}", folder, f"is another model: {difference}", remedy)
        return Benched(compared, architecture, folder, None, gguf)
    if not needs_folder:
        return Benched(compared, architecture, None, None, gguf)
    keys = {"checkpoints": {}, "checkpoint": str(compared.folder), "hf": str(place / name)}
    return Benched(compared, architecture, None, export.resolve(with_keys(recipe, keys), world), gguf)


def _check_length(model: Benched, cases: tuple[Case, ...]) -> None:
    """Raise InputError for a case that does not fit into the model's context."""
    longest = model.architecture.max_position_embeddings
    for case in cases:
        if (length := case.prompt_tokens + case.output_tokens) > longest:
            rule = (
                f"with bench.output_tokens={case.output_tokens} makes {length} tokens, and {model.compared.key} "
                f"has max_position_embeddings={longest}"
            )
            raise InputError("bench.prompt_tokens", case.prompt_tokens, rule, "shorten one of them")
