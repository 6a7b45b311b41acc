"""`bench`: how fast `checkpoints` prefill and decode, in this project's engine and in others. Pure."""

from __future__ import annotations

import difflib
import itertools
import os
import tempfile
from dataclasses import dataclass, replace
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

NEEDS_GGUF = "needs GGUF files"


@dataclass(frozen=True)
class Benched:
    """A model. folder: Hugging Face's, for the other engines; None: `exports` is done for it first. gguf: its file for
    llama.cpp; None: it is converted first. refused: why there can be no folder."""

    compared: Compared
    architecture: Architecture
    folder: Path | None = None
    exports: export.ExportJob | None = None
    gguf: Path | None = None
    refused: InputError | None = None

    @property
    def name(self) -> str:
        return self.compared.name

    @property
    def made(self) -> export.ExportJob:
        """What makes the folder."""
        assert self.exports is not None
        return self.exports

    def needs_folder(self, engine: str) -> bool:
        return engine != OURS and not (engine == LLAMA_CPP and self.gguf is not None)


@dataclass(frozen=True, kw_only=True)
class BenchJob(Job):
    """pairs: (engine, model), in the order of the table. first: the model that others are compared with. place: a
    folder for what is converted, deleted at the end."""

    first: str
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
    models = tuple(_model(recipe, world, each, place, engines) for each in compared)
    for model in models:
        _check_length(model, cases)
    pairs, left_out = _pairs(engines, models)
    makes = (Item("bench.output", str(target), "measured speeds"),) if target else ()
    reads = tuple(each.model or Item(each.key, str(each.folder), "Hugging Face") for each in compared)
    threads = config.threads or _omp_threads() or _cores() // world.local_size or 1
    return BenchJob(
        recipe,
        reads,
        makes,
        (*notes, *left_out),
        pairs=pairs,
        first=compared[0].name,
        cases=cases,
        threads=threads,
        place=place,
        target=target,
    )


def _pairs(engines: list[str], models: tuple[Benched, ...]) -> tuple[tuple[tuple[str, Benched], ...], tuple[str, ...]]:
    """Who is measured, and notes on who is not, for want of a form that an engine reads. Raises InputError where that
    is everybody."""
    pairs, left_out = [], dict[str, list[str]]()
    for engine in engines:
        for model in models:
            if engine == OURS and model.compared.model is None:
                continue
            if model.refused is not None and model.needs_folder(engine):
                left_out.setdefault(model.name, []).append(engine)
            else:
                pairs.append((engine, model))
    refused = {model.name: model.refused for model in models if model.refused is not None}
    if not pairs:
        raise next(iter(refused.values()))
    return tuple(pairs), tuple(
        f"{', '.join(names)}: {model} is left out, since it cannot be exported: {refused[model]}"
        for model, names in left_out.items()
    )


def _omp_threads() -> int:
    """OMP_NUM_THREADS, of a list for nested regions the outermost; 0 where it says none."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


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
        hindrances = {name: _hindrance(recipe, name, compared) for name in OTHERS if world.size == 1}
        here = [name for name, hindrance in hindrances.items() if hindrance is None]
        notes = [_not_ours(each) for each in theirs] if ours else []
        # What is not installed is not missed.
        if (hindrance := hindrances.get(LLAMA_CPP)) is not None and hindrance[0] == NEEDS_GGUF:
            notes.append(f"{LLAMA_CPP} is installed and left out: it {NEEDS_GGUF}: {hindrance[1]}")
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
        return NEEDS_GGUF, remedy
    return None


def _model(recipe: Recipe, world: World, compared: Compared, place: Path, engines: list[str]) -> Benched:
    """A model with what the other engines read of it. Raises InputError."""
    name, config = compared.name, recipe.bench
    gguf = Path(config.gguf[name]) if name in config.gguf else None
    if compared.model is None:
        return Benched(compared, read_config(compared.folder), compared.folder, gguf=gguf)
    architecture = compared.model.architecture
    if name in config.hf:
        folder = Path(config.hf[name])
        theirs = read_config(folder)
        if theirs.vocab_size == architecture.vocab_size:
            theirs = theirs.replace(padded_vocab_size=architecture.padded_vocab_size)
        if difference := architecture.difference(theirs):
            remedy = f"name the export of {compared.key}, or leave it out"
            raise InputError(f"bench.hf.{name}", folder, f"is another model: {difference}", remedy)
        return Benched(compared, architecture, folder, gguf=gguf)
    model = Benched(compared, architecture, gguf=gguf)
    if not any(map(model.needs_folder, engines)):
        return model
    keys = {"checkpoints": {}, "checkpoint": str(compared.folder), "hf": str(place / name)}
    try:
        return replace(model, exports=export.resolve(with_keys(recipe, keys), world))
    except InputError as error:
        rule = error.rule.replace(f"hf={place / name}", f"{compared.key}={compared.folder}")
        return replace(model, refused=type(error)(error.key, error.value, rule, error.remedy))


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
