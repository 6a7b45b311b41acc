"""What `evaluate` found on tasks, `bench` of speed, and what `generate` wrote. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minitron_mcore.report.gather.place import BENCH, METRICS, RESULTS, Place, read_json, read_lines
from minitron_mcore.report.gather.trainings import number
from minitron_mcore.report.journal import JOURNAL

SIZES = ("batch_size", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Score:
    """Of a model on a task. published: what the paper of the model reports. difference: to the first model of the
    evaluation, with its own standard error, which is smaller where both answer the same questions."""

    model: str
    task: str
    metric: str
    shots: int | None
    value: float
    error: float | None
    published: float | None
    difference: float | None
    difference_error: float | None


@dataclass(frozen=True)
class Speed:
    """Of a model in an engine, at sizes. latency: seconds to the first token. decode: tokens a second, spread: half the
    distance of its quartiles. speed_up: decode over that of the first model in the same engine. memory: bytes."""

    engine: str
    model: str
    batch_size: int
    prompt_tokens: int
    output_tokens: int
    latency: float | None
    prefill: float | None
    decode: float | None
    spread: float | None
    speed_up: float | None
    memory: float | None


@dataclass(frozen=True)
class Speeds:
    """rows: in the order measured. device: what they were measured on. failures: engine and model -> what it said.
    papers: the speed-ups that the paper reports, by what was pruned; said: in whole words."""

    rows: tuple[Speed, ...]
    device: str
    failures: Mapping[str, str]
    papers: Mapping[str, float]
    said: str


@dataclass(frozen=True)
class Written:
    """A prompt, or the last message of a chat, and how each model went on."""

    prompt: str
    texts: Mapping[str, str]


def find_scores(place: Place) -> tuple[Score, ...]:
    """Of every results.json that holds tasks; of a model and task that stand in several, the first."""
    found: dict[tuple[str, str, str], Score] = {}
    for part in place.holding(RESULTS):
        results = read_json(part / RESULTS)
        for label, row in models_of(results, place.label(part)).items():
            for score in _scores(label, row, _inner(results, "differences", label, "tasks")):
                found.setdefault((score.model, score.task, score.metric), score)
    return tuple(found.values())


def models_of(results: Any, label: str) -> dict[str, Mapping[str, Any]]:
    """What `evaluate` wrote of each model, by name: of one model the file itself, of several those in `models`; the
    table of a run."""
    if not isinstance(results, dict):
        return {}
    if "checkpoint" in results:
        return {label: results}
    rows = results["models"] if isinstance(results.get("models"), dict) else results
    return {str(name): row for name, row in rows.items() if isinstance(row, dict)}


def _scores(label: str, row: Mapping[str, Any], differences: Mapping[str, Any]) -> Iterator[Score]:
    for task, told in _inner(row, "tasks").items():
        shots = number(told.get("shots")) if isinstance(told, dict) else None
        for metric, score in _inner(told, "metrics").items():
            value = number(score.get("value")) if isinstance(score, dict) else None
            if value is None:
                continue
            beside = _inner(differences, task, metric)
            yield Score(
                model=label,
                task=str(task),
                metric=str(metric).removesuffix(",none"),
                shots=None if shots is None else int(shots),
                value=value,
                error=number(score.get("stderr")),
                published=number(score.get("published")),
                difference=number(beside.get("difference")),
                difference_error=number(beside.get("stderr")),
            )


def _inner(found: Any, *names: str) -> dict[str, Any]:
    """The mapping at a path of names in a file; {} where there is none."""
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def find_speeds(place: Place) -> Speeds | None:
    """The first bench.json of the folder."""
    for part in place.holding(BENCH):
        found = read_json(part / BENCH)
        rows = found.get("rows") if isinstance(found, dict) else None
        if not isinstance(rows, list):
            continue
        told = [row for row in rows if isinstance(row, dict) and {"engine", "model"} <= row.keys()]
        failures = [each for each in found.get("failures") or () if isinstance(each, dict)]
        said = {_who_failed(each): str(each.get("said")) for each in failures}
        papers = found["papers"] if isinstance(found.get("papers"), dict) else {}
        ups = papers["speed_up"] if isinstance(papers.get("speed_up"), dict) else {}
        reference = {str(name): value for name, up in ups.items() if (value := number(up)) is not None}
        device = str(told[0].get("device", "")) if told else ""
        return Speeds(tuple(map(_speed, told)), device, said, reference, str(papers.get("said", "")))
    return None


def _who_failed(failure: Mapping[str, Any]) -> str:
    """Engine and model, and the sizes where it failed at these alone."""
    batch, prompt, output = (int(number(failure.get(name)) or 0) for name in SIZES)
    sizes = f", {batch} × {prompt:,} + {output:,}" if batch else ""
    return f"{failure.get('engine')}, {failure.get('model')}{sizes}"


def _speed(row: Mapping[str, Any]) -> Speed:
    spread, ups = (row[name] if isinstance(row.get(name), dict) else {} for name in ("spread", "speed_up"))
    batch, prompt, output = (int(number(row.get(name)) or 0) for name in SIZES)
    return Speed(
        engine=str(row["engine"]),
        model=str(row["model"]),
        batch_size=batch,
        prompt_tokens=prompt,
        output_tokens=output,
        latency=number(row.get("prefill_latency")),
        prefill=number(row.get("prefill_throughput")),
        decode=number(row.get("decode_throughput")),
        spread=number(spread.get("decode_throughput")),
        speed_up=number(ups.get("decode")),
        memory=number(row.get("memory")),
    )


def find_written(place: Place) -> tuple[Written, ...]:
    """Of every file of JSON lines in the folder that `generate` wrote."""
    files = sorted(place.folder.glob("*.jsonl"))
    rows = [row for file in files if file.name not in (METRICS, JOURNAL) for row in read_lines(file)]
    return tuple(_written(row) for row in rows if isinstance(row.get("continuations"), dict))


def _written(row: Mapping[str, Any]) -> Written:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else {}
    prompt = row.get("prompt") or (last.get("content") if isinstance(last, dict) else None)
    said = {str(name): told for name, told in row["continuations"].items() if isinstance(told, dict)}
    return Written(str(prompt or ""), {name: str(told.get("text", "")) for name, told in said.items()})
