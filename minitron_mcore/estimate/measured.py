"""Measured speeds of serving, and how they correct a roofline. Pure.

A file of measurements is JSON, such as `bench` writes:

    {"rows": [{
        "device": "NVIDIA H100 80GB HBM3",       as torch.cuda.get_device_name gives it
        "architecture": {"num_layers": 32, …},   as in architecture.yaml
        "batch_size": 8, "prompt_tokens": 1024, "output_tokens": 128,
        "weights": "bf16", "kv_cache": "bf16", "tensor": 1,      as in `serving`, whose defaults count where left out
        "engine": "vllm",                                        whose speed it is; may be left out
        "pipeline": 1, "data": 1,                                may be left out; rows of more do not count
        "prefill_latency": 0.21, "decode_latency": 0.011         seconds; or prefill_throughput, decode_throughput
    }, …]}

The correction of a phase is measured over worked-out seconds, a factor f. Between the points it is interpolated by
inverse distance (Shepard 1968): log f is the mean of the points' logarithms, weighted by 1 / d^2, where d is the
distance between the logarithms of parameters, layers, batch, prompt and output. So a point is met exactly, and far
from all of them the factor is their geometric mean. A row counts if its device, formats, `tensor` and engine are those
asked for; where no engine is asked for, the rows that count must be of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.config import ServingConfig
from minitron_mcore.files import first_line, reading
from minitron_mcore.runtime.devices import Machine, find_device

PHASES = ("prefill", "decode")
_KEY = "serving.measured"
_ASKED = ("weights", "kv_cache", "tensor", "engine")
_FORMATS, _SIZES = ("weights", "kv_cache", "tensor"), ("batch_size", "prompt_tokens", "output_tokens")
_BESIDE = {"engine": None, "pipeline": 1, "data": 1}  # what a row may say besides, and what counts where it does not
Roofline = Callable[[Architecture, ServingConfig, Machine], float]


def corrections(
    architecture: Architecture, serving: ServingConfig, machine: Machine, *, roofline: Sequence[Roofline]
) -> dict[str, float]:
    """Phase -> factor on its seconds, by the points of `serving.measured`. roofline: seconds of each of PHASES.

    Raises InputError for a file that is no such file, or has no point for what is asked.
    """
    assert serving.measured is not None
    rows = [_row(serving.measured, number, row) for number, row in enumerate(_rows(serving.measured))]
    suited = [row for row in rows if _suits(row, serving, machine)]
    if not suited:
        asked = ", ".join(f"{name}={getattr(serving, name)}" for name in _ASKED if getattr(serving, name) is not None)
        there = ", ".join(sorted({f"{row['device']} ({_formats(row)})" for row in rows})) or "nothing"
        rule = f"has no point for cluster.device={machine.device or 'null'} with {asked}"
        raise InputError(_KEY, serving.measured, rule, f"it holds {there}; measure it, or leave the key out")
    if len(engines := sorted({str(row["engine"]) for row in suited})) > 1:
        rule = f"is not given, and serving.measured={serving.measured} holds the speeds of {', '.join(engines)}"
        raise InputError("serving.engine", None, rule, "name one of them")
    here = _place(architecture, serving)
    factors = {}
    for phase, seconds in zip(PHASES, roofline, strict=True):
        points = []
        for row in suited:
            measured = row[phase]
            if measured is not None:
                expected = seconds(row["architecture"], row["serving"], machine)
                points.append((_place(row["architecture"], row["serving"]), log(measured / expected)))
        if not points:
            rule = f"has no {phase}_latency of cluster.device={machine.device or 'null'}"
            raise InputError(_KEY, serving.measured, rule, "measure it, or leave the key out")
        factors[phase] = exp(_interpolated(here, points))
    return factors


def _interpolated(here: Sequence[float], points: Sequence[tuple[Sequence[float], float]]) -> float:
    """Shepard's mean of the points' values, weighted by the inverse square of their distance from `here`."""
    weights = []
    for place, value in points:
        distance = sum((one - other) ** 2 for one, other in zip(here, place, strict=True))
        if distance == 0:
            return value
        weights.append(1 / distance)
    return sum(weight * value for weight, (_, value) in zip(weights, points, strict=True)) / sum(weights)


def _place(architecture: Architecture, serving: ServingConfig) -> tuple[float, ...]:
    sizes = [architecture.num_parameters, architecture.num_layers, *(getattr(serving, name) for name in _SIZES)]
    return tuple(map(log, sizes))


def _formats(row: dict[str, Any]) -> str:
    named = {name: getattr(row["serving"], name) for name in _FORMATS} | {
        name: row[name] for name, default in _BESIDE.items() if row[name] != default
    }
    return ", ".join(f"{name}={value}" for name, value in named.items())


def _suits(row: dict[str, Any], serving: ServingConfig, machine: Machine) -> bool:
    if any(getattr(row["serving"], name) != getattr(serving, name) for name in _FORMATS):
        return False
    if serving.engine not in (None, row["engine"]) or (row["pipeline"], row["data"]) != (1, 1):
        return False
    if machine.device is None:
        return find_device(row["device"]) is None
    return find_device(row["device"]) == find_device(machine.device) is not None


def _rows(path: str) -> list[Any]:
    if not Path(path).is_file():
        raise InputError(_KEY, path, "is not a file", "name one of measured speeds (docs/estimate.md), or leave it out")
    with reading(path):
        content = Path(path).read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:
        raise InputError(_KEY, path, "is not JSON", first_line(error)) from error
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(_KEY, path, "holds no list `rows` of measured speeds (docs/estimate.md)")
    return rows


def _row(path: str, number: int, given: dict[str, Any]) -> dict[str, Any]:
    """A row, checked: device, architecture, serving, and the seconds of each phase or None."""

    def refused(name: str, rule: str) -> InputError:
        return InputError(f"rows[{number}].{name}", given.get(name), f"in {path} {rule}")

    if not isinstance(given.get("device"), str):
        raise refused("device", "must be the name of a device")
    if not isinstance(given.get("architecture"), dict):
        raise refused("architecture", "must be a shape as in architecture.yaml")
    try:
        architecture = build_architecture(given["architecture"])
        named = {name: given[name] for name in (*_FORMATS, *_SIZES) if name in given}
        serving = replace(ServingConfig(), **named)
    except InputError as error:
        raise error.under(f"rows[{number}]").found_in(path) from error
    row: dict[str, Any] = {"device": given["device"], "architecture": architecture, "serving": serving}
    row |= {name: given.get(name, default) for name, default in _BESIDE.items()}
    tokens = {"prefill": serving.batch_size * serving.prompt_tokens, "decode": serving.batch_size}
    for phase in PHASES:
        latency, throughput = f"{phase}_latency", f"{phase}_throughput"
        for name in (latency, throughput):
            value = given.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise refused(name, "must be a number above 0")
        row[phase] = given.get(latency)
        if row[phase] is None and given.get(throughput) is not None:
            row[phase] = tokens[phase] / given[throughput]
    if row["prefill"] is None and row["decode"] is None:
        raise refused("prefill_latency", "is not given, nor is any other speed")
    return row
