"""What a training that ran says of the machine it ran on: `estimate.measured`. Pure."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import read_architecture, read_lineage
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.calibrate import calibrated
from minitron_mcore.estimate.forecast import settings_of
from minitron_mcore.estimate.model import Setting
from minitron_mcore.files import reading
from minitron_mcore.jobs.shape import find_shape
from minitron_mcore.jobs.sketch import TRAININGS
from minitron_mcore.recipe import Recipe, load_recipe
from minitron_mcore.runtime.devices import Machine
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import plan_timetable

KEY = "estimate.measured"
STEP, RATE, EACH = "elapsed time per iteration (ms)", "tokens per second", "tokens per second per GPU"
LEAST = 2  # rows with a time, each the mean of `log.interval` steps, beyond the first
_REMEDY = "name the folder of a training of this project, or leave the key out"


def measured_machine(folder: str, machine: Machine, device: str) -> Machine:
    """`machine` at the efficiency with which the training in `folder` took the steps that its metrics.jsonl has.

    device: that it ran on, cpu or cuda. Raises InputError for a folder that says too little, and for steps that no
    efficiency explains.
    """
    try:
        return calibrated(machine, measured_steps(folder, device))
    except InputError as error:
        if error.key == KEY and error.value is None:
            raise InputError(KEY, folder, error.rule, error.remedy) from error
        raise


def measured_steps(folder: str, device: str) -> list[tuple[Setting, float]]:
    """(setting, seconds of a step) for each shape of the training's timetable that has enough of them.

    Seconds are the median over the rows whose steps are all of that shape, without the first row, which warms up.
    Raises InputError.
    """
    path = Path(folder)
    needed = [path / name for name in ("metrics.jsonl", "recipe.yaml", "architecture.yaml")]
    if missing := [file.name for file in needed if not file.is_file()]:
        raise InputError(KEY, folder, f"has no {missing[0]}", _REMEDY)
    rows = _rows(needed[0])
    if not rows:
        raise InputError(KEY, folder, "has no steps with their time in metrics.jsonl", _REMEDY)
    recipe, section = load_recipe(str(needed[1]), []), str(read_lineage(path).get("stage"))
    if section not in TRAININGS:
        what = "whose steps are not of texts" if section == "align" else "which is no training"
        raise InputError(KEY, folder, f"was made by {section}, {what}", _REMEDY)
    teacher = _teacher(recipe, folder) if section == "distill" and recipe.distill.teacher is None else None
    timetable = plan_timetable(getattr(recipe, section), recipe.data.sequence_length, section)
    size = round(statistics.median(row[RATE] / row[EACH] for row in rows))
    world = World(size=size, local_size=min(size, recipe.cluster.gpus_per_node), device=device)
    settings = settings_of(recipe, section, read_architecture(path), timetable, world, teacher)
    of_shape: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for before, row in pairwise(rows):
        shape = timetable.at(row["iteration"] - 1).shape
        if timetable.at(before["iteration"]).shape != shape:
            continue
        of_shape[shape.sequence_length, shape.global_batch_size, shape.micro_batch_size].append(row[STEP] / 1000)
    points = []
    for setting in settings:
        steps = of_shape.pop((setting.sequence_length, setting.global_batch_size, setting.micro_batch_size), [])
        if len(steps) >= LEAST:
            points.append((setting, statistics.median(steps)))
    if not points:
        rule = f"has fewer than {LEAST} times of one shape after the first, of {recipe.log.interval} steps each"
        raise InputError(KEY, folder, rule, "let it run on, or set log.interval lower")
    return points


def _teacher(recipe: Recipe, folder: str) -> Architecture:
    """The shape of whom a distillation learnt from. Raises InputError where it is not said, or not there any more."""
    try:
        return find_shape(recipe)[0]
    except InputError as error:
        remedy = "bring the teacher's architecture.yaml to where it was, or leave the key out"
        raise InputError(KEY, folder, f"was distilled, and its recipe's {error.key} {error.rule}", remedy) from error


def _rows(path: Path) -> list[dict[str, Any]]:
    """Of training steps, those that have the mean time of an interval; a last line that is cut off is left out."""
    with reading(str(path)):
        lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "train" and all(row.get(name) for name in (STEP, RATE, EACH)):
            rows.append(row)
    return rows
