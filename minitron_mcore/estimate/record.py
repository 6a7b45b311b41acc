"""An estimate as plain data: estimate.json. Bytes, seconds, FLOPs. Pure."""

from __future__ import annotations

import dataclasses
from itertools import zip_longest
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.estimate.cost import Cost
from minitron_mcore.estimate.estimate import Estimate
from minitron_mcore.estimate.layouts import Layout
from minitron_mcore.estimate.loss_points import Outlook
from minitron_mcore.estimate.work import Beside, Training

MARK = "minitron_estimate"  # the first key of the file, by which it is known
WHOLE = ("seconds", "gpu_hours", "cost", "kilowatt_hours")  # what is of a whole training


def record(estimate: Estimate) -> dict[str, Any]:
    """What the file holds; all that the console shows, and memory for every pipeline stage."""
    e = estimate
    return {
        MARK: 1,
        "name": e.name,
        "gpus": e.gpus,
        "on_cpu": e.on_cpu,
        "machine": dataclasses.asdict(e.machine),
        "memory": {"device": e.limits.device, "usable": e.limits.usable, "host": e.limits.host},
        "teacher": {**shape(e.teacher), "where": e.where} if e.teacher else None,
        "aligned": {**shape(e.aligned[0]), "where": e.aligned[1]} if e.aligned else None,
        "trainings": [training(each, cost) for each, cost in zip_longest(e.trainings, e.costs)],
        "stages": [beside(each) for each in e.beside],
        "left_out": list(e.left_out),
        "fits": e.fits,
        "layouts": [layout(each, e) for each in e.layouts[: e.shown]],
        "layouts_that_fit": len(e.layouts),
        "fewest": [layout(each, e) for each in e.fewest[: e.shown]],
        "twice": layout(e.twice, e) if e.twice else None,
        "loss": [outlook(each) for each in e.outlooks],
    }


def shape(architecture: Architecture) -> dict[str, Any]:
    counts = {
        "parameters": architecture.num_parameters,
        "non_embedding_parameters": architecture.num_non_embedding_parameters,
    }
    return counts | {"architecture": architecture.to_dict()}


def training(each: Training, cost: Cost | None) -> dict[str, Any]:
    found, setting = each.forecast, each.setting
    return {
        "title": each.title,
        "note": each.note or None,
        "section": each.section,
        "unknown": each.unknown or None,
        "tokens": None if each.unknown else each.timetable.tokens,
        "iterations": None if each.unknown else each.timetable.iterations,
        "model": shape(setting.student),
        "parallel": dataclasses.asdict(setting.parallel) | {"data": setting.data_parallel},
        "problem": each.problem or None,
        "memory": None if found is None else {"total": found.total, "parts": found.parts, "host": found.host},
        "memory_by_stage": each.stages(),
        "cost": None if cost is None else spent(cost) | dict.fromkeys(WHOLE if each.unknown else ()),
    }


def spent(cost: Cost) -> dict[str, Any]:
    """What a step takes by part, with its FLOPs, what came before all steps, and what the whole training costs."""
    step = cost.last
    return {
        "step": {"seconds": step.total, "parts": step.parts, "tokens": step.tokens},
        "student_flops": step.student_flops,
        "teacher_flops": step.teacher_flops,
        "tokens_per_second": step.tokens_per_second,
        "flops_per_gpu": step.flops_per_gpu,
        "mfu": step.utilization,
        "reference": dataclasses.asdict(cost.before) if cost.before else None,
        "seconds": cost.seconds,
        "gpu_hours": cost.gpu_hours,
        "cost": cost.cost,
        "kilowatt_hours": cost.energy,
    }


def layout(each: Layout, e: Estimate) -> dict[str, Any]:
    """A layout, with what to set for it."""
    seconds = each.seconds if e.is_whole else None
    return {
        "gpus": each.gpus,
        "parallel": dataclasses.asdict(each.parallel) | {"data": each.data_parallel},
        "keys": each.keys(e.trainings),
        "memory": each.memory,
        "seconds": seconds,
        "gpu_hours": None if seconds is None else each.gpus * seconds / 3600,
    }


def beside(each: Beside) -> dict[str, Any]:
    memory = {"total": each.total, "parts": each.parts, "host": each.host}
    words = {"title": each.title, "verb": each.verb, "problem": each.problem or None}
    return words | {"memory": memory, "memory_by_stage": [*each.stages]}


def outlook(each: Outlook) -> dict[str, Any]:
    """A fitted curve, and what it says of the budget's end."""
    names = ("E", "A", "alpha", "alpha_interval", "points", "residual", "first", "last")
    curve = {name: getattr(each.curve, name) for name in names}
    said = {"tokens": each.tokens, "best": each.best, "low": each.low, "high": each.high}
    return {"name": each.name, "what": each.what, "curve": curve, **said}
