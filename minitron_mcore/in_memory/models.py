"""Models in memory, and the folders they come from and go to."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from minitron_mcore import commands
from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.companions import carry_companions
from minitron_mcore.checkpoint.folder import (
    find_checkpoint,
    read_architecture,
    read_lineage,
    tokenizer_folder,
    write_description,
)
from minitron_mcore.checkpoint.store import as_chunks, load_model, model_state, save_state
from minitron_mcore.errors import InputError
from minitron_mcore.in_memory.process import started
from minitron_mcore.model.gpt import DTYPES, LanguageModel, build_model, layout_of
from minitron_mcore.model.initialize import initialize
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.whole_folder import whole_folder


@dataclass
class Model:
    """A model in memory: this rank's `chunks` (one, or one a virtual stage; torch modules) and what it is.

    `source`: the checkpoint folder that it, or the teacher it was cut from, was loaded from; None for random weights.
    `history`: of a model that was trained here, the means of each step, under the names that metrics.jsonl has.
    """

    chunks: list[LanguageModel]
    architecture: Architecture
    precision: str = "fp32"
    source: Path | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def check_layout(model: Model) -> None:
    """Raise InputError for what is no model of this module, or one that was made at another layout."""
    if not isinstance(model, Model):
        raise InputError("model", type(model).__name__, "is no model", "give what load, build or import_hf returned")
    there, here = layout_of(model.chunks[0].config), started()[1]
    if there != here:
        raise InputError("model", None, f"was made at {there}, and the layout is {here}", "load or build it again")


def _check_precision(precision: str) -> None:
    if precision not in DTYPES:
        raise InputError("precision", precision, "is not allowed", f"choose one of {', '.join(DTYPES)}")


def load(folder: str | Path, precision: str = "fp32") -> Model:
    """The newest iteration of the sharded checkpoint in `folder`, saved at any layout; precision fp32 or bf16.

    The model is frozen and in evaluation mode. Every rank calls.
    """
    _check_precision(precision)
    path, iteration = find_checkpoint(folder, "folder")
    architecture = read_architecture(path)
    chunks = load_model((path, iteration), architecture, started()[1], precision)
    lineage = {"checkpoint": str(path), "iteration": iteration, "lineage": read_lineage(path)}
    return Model(chunks, architecture, precision, path, lineage)


def import_hf(hf: str | Path, checkpoint: str | Path, precision: str = "fp32", **keys: Any) -> Model:
    """The Hugging Face folder `hf` as the sharded checkpoint `checkpoint`, a new folder, and the model in memory.

    keys: others of the verb `import`, as verify=True, which compares logits with those of transformers first. Every
    rank calls.
    """
    _check_precision(precision)
    return load(commands.import_(hf=hf, checkpoint=checkpoint, parallel=_layout(), **keys), precision)


def build(architecture: Architecture | Mapping[str, Any], seed: int = 1234, precision: str = "fp32") -> Model:
    """A model of random weights, the same at every layout. `architecture`: Megatron's field names, as in
    {"family": "llama", "num_layers": 4, "hidden_size": 64, …}; what the family fixes may be left out."""
    _check_precision(precision)
    if not isinstance(architecture, Architecture):
        architecture = build_architecture(dict(architecture))
    chunks = build_model(architecture, started()[1], precision, trainable=False)
    initialize(chunks, architecture, seed)
    return Model(chunks, architecture, precision, None, {"seed": seed})


def export(model: Model, hf: str | Path, **keys: Any) -> Path:
    """The Hugging Face folder `hf`, new, of a model of any pruned shape; returns it.

    Beside it a checkpoint is written first, and removed. keys: others of the verb `export`, as max_shard_size="500MB".
    Every rank calls.
    """
    runtime, _ = started()
    target = Path(hf).resolve()
    if not all_or_none(target.parent.is_dir):
        raise InputError("hf", hf, "lies in no folder", f"make {target.parent} first")
    if not all_or_none(lambda: not target.exists()):
        raise InputError("hf", hf, "exists already", "name another folder")
    commands.recipe(hf=target, parallel=_layout(), **keys)  # what is wrong with them is said before anything is written
    with _scratch(target, runtime) as scratch:
        save(model, scratch / "checkpoint")
        folder = commands.export(checkpoint=scratch / "checkpoint", hf=target, parallel=_layout(), **keys)
    return folder


@contextmanager
def _scratch(beside: Path, runtime: Runtime) -> Iterator[Path]:
    """A folder next to `beside`, the same on every rank, that is gone afterwards."""
    made = Path(runtime.on_main(lambda: tempfile.mkdtemp(prefix=f".{beside.name}.", dir=beside.parent)))
    try:
        yield made
    finally:
        if runtime.is_main:  # alone: a rank that has failed does not wait for the others
            shutil.rmtree(made, ignore_errors=True)


def _layout() -> dict[str, Any]:
    """That of the models in memory, as the verbs take it."""
    return dataclasses.asdict(started()[1])


def save(model: Model, folder: str | Path) -> Path:
    """Write a checkpoint that every verb reads: weights, architecture, lineage, the source's tokenizer if it has one.

    `folder` must be new or empty, and appears only when it is complete. Every rank calls.
    """
    runtime, _ = started()
    target = Path(folder).resolve()

    def refuse() -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError("folder", folder, "exists already", "name another folder")

    def describe(unfinished: Path) -> None:
        source = model.source
        inherited = read_lineage(source).get("tokenizer") if source else None
        lineage = {"stage": "api", "tokens": 0, "tokenizer": inherited, **model.lineage}
        tokenizer = tokenizer_folder(source) if source else None
        save = partial(shutil.copytree, tokenizer) if tokenizer else None
        recipe = f"precision: {model.precision}\n"
        write_description(unfinished, model.architecture, lineage=lineage, recipe=recipe, save_tokenizer=save)
        if source:
            carry_companions(source, unfinished)

    runtime.on_main(refuse)
    with whole_folder(target, f"folder={folder}") as unfinished:
        save_state(unfinished, 0, model_state(as_chunks(model.chunks)), runtime, model.architecture)
        runtime.on_main(partial(describe, unfinished))
    return target
