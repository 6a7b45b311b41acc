"""The folder of a small run, written file by file, without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import yaml

from minitron_mcore.architecture import Architecture, build_architecture, save_architecture
from minitron_mcore.checkpoint.folder import TRACKER
from minitron_mcore.importance.scores import Scores, random_scores, save_scores
from minitron_mcore.pruning.plan_file import PruningPlan, save_plan
from minitron_mcore.recipe import Recipe, load_recipe, to_yaml
from tests.plans import make_plan

TEACHER = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6, "num_query_groups": 2}
STUDENTS: dict[str, dict[str, int]] = {
    "width": {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4},
    "depth": {"num_layers": 2},
}
LOSSES = {"teacher": 3.25, "width pruned": 4.5, "width distilled": 3.5, "depth pruned": 4.25, "depth distilled": 3.625}
LENGTH, BATCH, ITERATIONS = 32, 4, 20


def teacher() -> Architecture:
    return build_architecture({**TEACHER, "kv_channels": 8, "vocab_size": 64, "max_position_embeddings": 64})


def scores() -> Scores:
    settings = {"importance": {"method": "activation", "batch_aggregation": "l2", "sequence_aggregation": "mean"}}
    settings["importance"] |= {"neuron_site": "down_projection_input"}
    return random_scores(teacher(), 7, {**settings, "tolerance": 1e-5})


def plan(student: str) -> PruningPlan:
    return make_plan(scores(), STUDENTS[student])


def recipe(folder: Path) -> Recipe:
    words = [f"output={folder}", f"data.sequence_length={LENGTH}"]
    for section in ("train", "distill"):
        words += [f"{section}.tokens={LENGTH * BATCH * ITERATIONS}", f"{section}.global_batch_size={BATCH}"]
    students = {
        f"run.students.{name}.{size}": value for name, sizes in STUDENTS.items() for size, value in sizes.items()
    }
    return load_recipe(None, [*words, "name=small", *(f"{key}={value}" for key, value in students.items())])


def write_run(folder: Path) -> Path:
    """A run that has ended, with everything but tasks, speeds and a search."""
    (folder / "done").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(recipe(folder)))
    save_scores(scores(), folder / "scores.safetensors")
    write_training(folder / "teacher", teacher(), "train", start=4.2)
    rows = {}
    for name in STUDENTS:
        own = folder / "students" / name
        save_plan(plan(name), own / "pruned" / "plan.json")
        describe(own / "pruned", plan(name).student, "prune")
        save_plan(plan(name), own / "distilled" / "plan.json")
        write_training(own / "distilled", plan(name).student, "distill", start=4.0)
    shapes = {"teacher": teacher()} | {name: plan(name).student for name in STUDENTS}
    for label, loss in LOSSES.items():
        size = shapes[label.partition(" ")[0]].num_parameters
        counts = {
            "parameters": size,
            "tokens": 0 if "pruned" in label else 2560,
            "samples": 16,
            "sequence_length": LENGTH,
        }
        rows[label] = {"lm loss": loss, "ppl": 2.0, "checkpoint": label, "iteration": 20, **counts}
        write_json(folder / "done" / f"evaluate-{label.replace(' ', '-')}.json", rows[label])
    write_json(folder / "results.json", rows)
    versions = {"minitron_mcore": "0.1.0", "torch": "2.9"}
    start = {"kind": "start", "time": 1.7e9, "command": "minitron run --config r.yaml", "ranks": 2, "device": "cpu"}
    step = {"kind": "step", "time": 1.7e9, "name": "evaluate-teacher", "title": "evaluate teacher", "seconds": 2.5}
    trained = {"kind": "step", "time": 1.7e9, "name": "distill-width", "title": "distil width", "seconds": 90.0}
    lines = [{**start, "versions": versions}, step, {**trained, "forecast": {"weights": 2**29, "gradients": 2**29}}]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = {"seconds": 36.0, "gpu_hours": 0.02, "cost": 0.06, "kilowatt_hours": 0.01}
    row = {
        "title": "distil width",
        "tokens": 2560,
        "cost": spent,
        "memory": {"total": 2**30, "parts": {"weights": 2**30}},
    }
    estimate = {"minitron_estimate": 1, "gpus": 2, "machine": {"device": "H100"}, "trainings": [row]}
    write_json(folder / "estimate.json", estimate)
    return folder


def write_training(folder: Path, architecture: Architecture, verb: str, start: float, until: int = ITERATIONS) -> None:
    describe(folder, architecture, verb)
    lines = []
    for iteration in range(1, until + 1):
        row: dict[str, Any] = {"lm loss": start - iteration / 32, "learning-rate": 1e-3, "grad-norm": 0.5}
        if verb == "distill":
            row |= {"logits distillation loss": 1 / iteration, "top-1 agreement": iteration / 40}
        if iteration % 10 == 0:
            row |= {"elapsed time per iteration (ms)": 80.0 + iteration, "tokens per second": 1500.0}
            row |= {"peak memory (GiB)": 0.75, "throughput per GPU (TFLOP/s/GPU)": 0.02}
            row |= {"forward-backward-share": 0.75, "optimizer-share": 0.25, "teacher-forward-share": 0.0}
        facts = {"consumed samples": iteration * BATCH, **row, "number of skipped iterations": 0}
        lines.append({"iteration": iteration, "kind": "train", "time": 1.7e9 + iteration, **facts})
    validation = {"lm loss validation": start - 0.5, "ppl validation": 20.0}
    lines.append({"iteration": until, "kind": "validation", "time": 1.7e9 + until, **validation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def describe(folder: Path, architecture: Architecture, verb: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_architecture(architecture, folder / "architecture.yaml")
    (folder / TRACKER).write_text(str(ITERATIONS))
    (folder / f"iter_{ITERATIONS:07d}").mkdir(exist_ok=True)
    (folder / f"iter_{ITERATIONS:07d}" / "metadata.json").write_text("{}")
    (folder / "lineage.yaml").write_text(yaml.safe_dump({"stage": verb, "tokens": 2560}))
    (folder / "recipe.yaml").write_text(to_yaml(recipe(folder.parent)))


def write_search(folder: Path) -> Path:
    """A search of three candidates, one of which diverged."""
    folder.mkdir(parents=True)
    rows = []
    for rank, (loss, layers) in enumerate(((3.5, 3), (3.75, 2), (None, 1)), start=1):
        name = f"l{layers}-h48-f96-q6-g2"
        sizes = {**TEACHER, "num_layers": layers, "total_parameters": 20_000 * layers}
        curve = [[0, 4.5], [512, 4.0], [1024, loss]]
        found = {"rank": rank, "zero_shot_rank": 4 - rank, "zero_shot": 4.5, "loss": loss, "tokens": 1024}
        rows.append(
            {"name": name, **sizes, **found, "on_front": rank == 1, "curve": curve, "validation": [[256, 4.25]]}
        )
    rows.append({"name": "l4-h32-f96-q6-g2", **TEACHER, "hidden_size": 32, "total_parameters": 50_000})
    budgets = {"tolerance": 0.05, "total_parameters": [10_000, None]}
    write_json(folder / "candidates.json", {"budgets": budgets, "correlation": -1.0, "shapes": 4, "candidates": rows})
    return folder


# Of an alignment, in the order of its rounds, which is not that of their names.
ROUNDS: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 2},
    "rpo-1": {"method": "rpo_bwd_kl", "epochs": 1.5, "eta": 2, "reference": "resident"},
    "again": {"method": "dpo", "tokens": 10 * 2 * LENGTH * BATCH, "label_smoothing": 0.1},
}
SAMPLES = 20  # that train, of 24 records


def write_rounds(folder: Path) -> Path:
    """Three rounds of an alignment, of which the last was cut off half-way."""
    lineage: dict[str, Any] = {"stage": "train", "tokens": 640}
    load = "/models/distilled"
    for name, keys in ROUNDS.items():
        own, method = folder / name, keys.get("method", "sft")
        lineage = {"stage": "align", "method": method, "load": load, "samples": name, "lineage": lineage, "tokens": 0}
        write_round(own, method, until=10 if method == "sft" else 5)
        given = [f"align.{key}={value}" for key, value in keys.items()]
        given += [f"align.global_batch_size={BATCH}", f"align.load={load}", f"align.checkpoint={own}"]
        (own / "recipe.yaml").write_text(to_yaml(load_recipe(None, [f"data.sequence_length={LENGTH}", *given])))
        (own / "lineage.yaml").write_text(yaml.safe_dump(lineage))
        load = str(own)
        for digest in (name, "older"):  # what another command has left there
            write_samples(own / "chats" / digest, digest, sides=1 if method == "sft" else 2)
    return folder


def write_round(folder: Path, method: str, until: int) -> None:
    describe(folder, teacher(), "align")
    lines = []
    for iteration in range(1, until + 1):
        row: dict[str, Any] = {"loss": 2.0 - iteration / 16, "learning-rate": 1e-5, "grad-norm": 0.5}
        row["share of counted tokens"] = 0.5
        if method == "sft":
            row |= {"lm loss": row["loss"], "mean length": 12.0}
        else:
            margin = iteration / 8
            row |= {"rewards/chosen": margin - 1, "rewards/rejected": -1.0, "rewards/margins": margin}
            row |= {"rewards/accuracies": iteration / 10, "logps/chosen": -20.0, "logps/rejected": -20.0 - margin}
            row |= {"mean length chosen": 12.0, "mean length rejected": 10.0, "sft loss": 20.0}
        for kind in ("train", *(["validation"] if iteration in (1, until) else [])):
            told = {f"{name} validation": value for name, value in row.items() if "-" not in name}
            facts = {"consumed samples": iteration * BATCH, **row} if kind == "train" else told
            lines.append({"iteration": iteration, "kind": kind, "time": 1.7e9 + iteration, **facts})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(folder: Path, digest: str, sides: int) -> None:
    """As `prepare` writes them: 20 samples that train, 3 held out, 1 left out."""
    counts = {"read": SAMPLES + 1, "kept": SAMPLES, "cut": 2, "too_long": 1, "skipped": 0}
    counts |= {"tokens": 8 * sides * SAMPLES, "learnt": 2 * sides * SAMPLES}
    parts = {"train": counts, "valid": {**counts, "read": 3, "kept": 3, "cut": 0, "too_long": 0}}
    files = [{"path": f"/data/{digest}.jsonl", "xxh3_128": "0"}]
    facts = {"kind": "pairs" if sides == 2 else "chats", "digest": digest, "padding": 0}
    for name in parts:
        (folder / name).mkdir(parents=True)
        starts = numpy.arange(sides * int(parts[name]["kept"]) + 1) * 8
        numpy.save(folder / name / "starts.npy", starts)
        numpy.save(folder / name / "tokens.npy", numpy.zeros(starts[-1], dtype=numpy.int32))
        numpy.save(folder / name / "counted.npy", numpy.ones(starts[-1], dtype=bool))
    write_json(folder / "facts.json", {**facts, "parts": parts, "sources": {"train": files}})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def write_evaluation(folder: Path) -> Path:
    """What `evaluate` writes of two models and two tasks."""
    folder.mkdir(parents=True, exist_ok=True)

    def scores(right: float) -> dict[str, Any]:
        question = {"acc,none": {"value": right, "stderr": 0.02, "published": 0.75}, "acc_norm,none": {"value": 0.5}}
        tasks = {"arc_easy": {"shots": 25, "metrics": question}}
        tasks["passages"] = {"shots": 0, "metrics": {"word_perplexity,none": {"value": 12.5, "stderr": None}}}
        return {"checkpoint": "c", "tasks": tasks}

    rows = {"teacher": scores(0.8), "width distilled": scores(0.6)}
    tasks = {"arc_easy": {"acc,none": {"difference": -0.2, "stderr": 0.0125}}}
    write_json(folder / "results.json", {"models": rows, "differences": {"width distilled": {"tasks": tasks}}})
    return folder


def write_bench(folder: Path) -> Path:
    """What `bench` writes of two models in two engines, one of which failed with the second."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"batch_size": 4, "prompt_tokens": 128, "output_tokens": 64, "device": "a CPU"}
    rows = []
    for engine, model, rate in (
        ("minitron", "teacher", 100.0),
        ("minitron", "width", 180.0),
        ("vllm", "teacher", 90.0),
    ):
        rates = {"prefill_latency": 0.0125, "prefill_throughput": 40_960.0, "decode_throughput": rate}
        more = {
            "spread": {"decode_throughput": 2.5},
            "speed_up": {"decode": rate / 100, "prefill": 1.0},
            "memory": 2**21,
        }
        rows.append({"engine": engine, "model": model, **sizes, **rates, **more})
    failures: list[dict[str, Any]] = [{"engine": "vllm", "model": "width", "said": "head_dim 8 is too small"}]
    large = {"batch_size": 64, "prompt_tokens": 2048, "output_tokens": 16}
    failures += [{"engine": "minitron", "model": "width", **large, "said": "out of memory"}]
    papers = {"speed_up": {"depth": 2.7, "width": 1.8}, "said": "depth 2.7x, width 1.8x"}
    write_json(folder / "bench.json", {"rows": rows, "failures": failures, "papers": papers})
    return folder
