"""Whether a run can go on in a folder that another run began. Pure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import latest_iteration, read_lineage
from minitron_mcore.distillation.cache.file import DESCRIPTION
from minitron_mcore.distillation.cache.serving import PREFIX
from minitron_mcore.errors import InputError
from minitron_mcore.files import read_mapping
from minitron_mcore.model.config import LEFT_OUT
from minitron_mcore.recipe import Recipe
from minitron_mcore.training.budget import SIZES
from minitron_mcore.training.config import PhaseConfig, TrainConfig
from minitron_mcore.training.learning_rate import check_continuation

# Keys that may change between a run and its continuation: where and how it runs, not what it computes.
MAY_CHANGE = {
    "checkpoint",
    "save_interval",
    "eval_interval",
    "eval_iters",
    "micro_batch_size",
    "num_workers",
    "cache_path",
    "loss_chunk_tokens",
    "recompute_loss",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "teacher_window",
    "max_skipped_iterations",
    "check_teacher",
    "parallel",
    "placement",
}

# Of the section of a training: what may change with what is left of its budget.
BUDGET = {"tokens", "phases", "lr_wsd_decay_tokens"}


def refuse_other_run(
    folder: Path,
    recipe: Recipe,
    sections: tuple[str, ...],
    key: str,
    stage: str | None = None,
    *,
    keeps_budget: bool = False,
) -> None:
    """Raise InputError where `folder` holds a run of another recipe: it would be overwritten or mixed.

    Compared are `sections` of the recipe and the seed, but for keys that do not change what is computed; and, where
    `stage`, a section of training, is given, that a checkpoint there is of that stage. Its budget may change where what
    is done, and the learning rate so far, would have been the same; not at all where it `keeps_budget`.
    """
    stored_file = folder / "recipe.yaml"
    if not stored_file.is_file():
        if folder.is_dir() and any(folder.glob("iter_*")):
            raise InputError(f"{key}={folder} holds checkpoints but no recipe.yaml: name another folder")
        if (folder / DESCRIPTION).is_file():
            raise InputError(f"{key}={folder} holds a cache of a teacher's targets: name another folder")
        return
    made_by = read_lineage(folder).get("stage")
    if stage and made_by and made_by != stage:
        raise InputError(f"{key}={folder} holds a checkpoint that `{made_by}` made, not `{stage}`: name another folder")
    stored = read_mapping(stored_file)
    for section in (*sections, "seed", "precision"):
        here: Any = getattr(recipe, section)
        there = stored.get(section, {})
        if dataclasses.is_dataclass(here) and there:
            # A key that an older version did not have was then as it is by default now.
            defaults = dataclasses.asdict(getattr(Recipe(), section))
            there = {**there, **{name: value for name, value in defaults.items() if name not in there}}
        here = dataclasses.asdict(here) if dataclasses.is_dataclass(here) else {"": here}  # type: ignore[arg-type]
        there = there if isinstance(there, dict) else {"": there}
        if section == "model":
            here, there = ({**said, **_meant(said)} for said in (here, there))
        may_change = MAY_CHANGE | BUDGET if section == stage and not keeps_budget else MAY_CHANGE
        for name in filter(here.__contains__, there):
            path, value = f"{section}.{name}".rstrip("."), here[name]
            if path == "distill.teacher" and all(str(each).startswith(PREFIX) for each in (there[name], value)):
                continue  # a cache is known by what it holds, not by where it lies
            if _settled(there[name]) != _settled(value) and (name not in may_change or path == "teacher.checkpoint"):
                may_phase = stage and not keeps_budget and name in SIZES
                hint = f"; to change it on the way, give {stage}.phases" if may_phase else ""
                raise InputError(
                    f"{key}={folder} holds another run: {path} is {there[name]!r} there and {value!r} here; "
                    f"name another folder, or delete that one{hint}"
                )
    if stage is not None and not keeps_budget:
        refuse_other_budget(folder, recipe, stored, stage)


def _meant(model: dict[str, Any]) -> dict[str, Any]:
    """What the keys that a recipe's section `model` leaves out mean, which once stood there as defaults."""
    return {name: value for name, value in LEFT_OUT.items() if model.get(name) is None}


def _settled(value: Any) -> Any:
    """A key's value without what may change at any time: the micro-batch sizes of phases."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return [{name: part for name, part in entry.items() if name not in MAY_CHANGE} for entry in value]
    return value


def refuse_other_budget(folder: Path, recipe: Recipe, stored: dict[str, Any], section: str) -> None:
    """Raise InputError where a run in `folder`, of the recipe `stored`, cannot go on to the budget of `section`."""
    iteration = latest_iteration(folder)
    if iteration is None or section not in stored:
        return
    train: TrainConfig = getattr(recipe, section)
    if all(stored[section].get(name, getattr(train, name)) == value for name, value in _budget(train).items()):
        return
    fields = {name: value for name, value in stored[section].items() if name in BUDGET}
    fields["phases"] = [PhaseConfig(**phase) for phase in fields.get("phases", [])]
    before = dataclasses.replace(train, **fields)
    length = recipe.data.sequence_length
    check_continuation((before, length), (train, length), iteration, section)


def _budget(train: TrainConfig) -> dict[str, Any]:
    return {name: dataclasses.asdict(train)[name] for name in BUDGET}
