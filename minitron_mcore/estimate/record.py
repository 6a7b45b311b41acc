"""An estimate as plain data: estimate.json. Bytes, seconds, FLOPs. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.estimate.work import Beside, Estimate, Training

MARK = "minitron_estimate"  # the first key of the file, by which it is known


def record(estimate: Estimate) -> dict[str, Any]:
    """What the file holds; all that the console shows, and memory for every pipeline stage."""
    e = estimate
    return {
        MARK: 1,
        "name": e.name,
        "gpus": e.gpus,
        "machine": dataclasses.asdict(e.machine),
        "memory": {"device": e.limits.device, "usable": e.limits.usable, "host": e.limits.host},
        "teacher": {**shape(e.teacher), "where": e.where},
        "trainings": [training(each) for each in e.trainings],
        "stages": [beside(each) for each in e.beside],
        "fits": e.fits,
    }


def shape(architecture: Architecture) -> dict[str, Any]:
    counts = {
        "parameters": architecture.num_parameters,
        "non_embedding_parameters": architecture.num_non_embedding_parameters,
    }
    return counts | {"architecture": architecture.to_dict()}


def training(each: Training) -> dict[str, Any]:
    found, setting = each.forecast, each.setting
    return {
        "title": each.title,
        "section": each.section,
        "tokens": each.timetable.tokens,
        "iterations": each.timetable.iterations,
        "model": shape(setting.student),
        "parallel": dataclasses.asdict(setting.parallel) | {"data": setting.data_parallel},
        "problem": each.problem or None,
        "memory": None if found is None else {"total": found.total, "parts": found.parts, "host": found.host},
        "memory_by_stage": each.stages(),
    }


def beside(each: Beside) -> dict[str, Any]:
    memory = {"total": each.total, "parts": each.parts, "host": each.host}
    words = {"title": each.title, "verb": each.verb, "problem": each.problem or None}
    return words | {"memory": memory, "memory_by_stage": [*each.stages]}
