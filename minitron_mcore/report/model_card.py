"""The model card of an exported model: what it is and where it comes from, as far as its checkpoint says.

Nothing is guessed: what neither the checkpoint nor the folder it was imported from states is left out.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.companions import source_card
from minitron_mcore.checkpoint.folder import beside, read_lineage
from minitron_mcore.errors import InputError
from minitron_mcore.pruning.plan_file import PruningPlan, load_plan
from minitron_mcore.report.evaluation_table import with_error
from minitron_mcore.tables import markdown

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
# A stage in the lineage -> its tag.
TAGS = {"prune": "pruned", "distill": "knowledge-distillation"}


def model_card(name: str, architecture: Architecture, folder: Path, iteration: int, has_tokenizer: bool = True) -> str:
    """Markdown, with the front matter that model hubs read; lineage and results are read from beside the weights."""
    lineage = read_lineage(folder)
    plan = _plan(folder, architecture, lineage)
    classes = {"model": "AutoModelForCausalLM", **({"tokenizer": "AutoTokenizer"} if has_tokenizer else {})}
    sections = [
        f"---\n{_front_matter(architecture, folder, lineage).to_yaml()}\n---",
        f"# {name}",
        f"A decoder-only language model of the {architecture.family} family, exported from iteration {iteration} of a "
        "Megatron checkpoint by minitron_mcore.",
        _shape_table(architecture, plan),
        *([f"Layers kept, of the teacher's {plan.teacher.num_layers}: {_ranges(plan.layers)}."] if plan else []),
        f"```python\nfrom transformers import {', '.join(classes.values())}\n\n"
        + "".join(f'{what} = {kind}.from_pretrained("{name}")\n' for what, kind in classes.items())
        + "```",
    ]
    if lineage:
        sections += ["## Lineage", f"```yaml\n{yaml.safe_dump(lineage, sort_keys=False).strip()}\n```"]
    if results := _results(folder, iteration):
        sections += ["## Evaluation", *_measures(results)]
    return "\n\n".join(sections) + "\n"


def _front_matter(architecture: Architecture, folder: Path, lineage: dict[str, Any]) -> ModelCardData:
    stages = {step.get("stage") for step in _past(lineage)}
    tags = [architecture.family, "minitron_mcore", *(tag for stage, tag in TAGS.items() if stage in stages)]
    pipeline = "text-generation"
    return ModelCardData(library_name="transformers", pipeline_tag=pipeline, tags=tags, **source_card(folder))


def _past(lineage: Any) -> list[dict[str, Any]]:
    """The lineages of the weights themselves, newest first, down to the pruning, without those of a teacher."""
    if not isinstance(lineage, dict):
        return []
    return [lineage, *_past(lineage.get("student")), *_past(lineage.get("lineage"))]


def _plan(folder: Path, architecture: Architecture, lineage: dict[str, Any]) -> PruningPlan | None:
    """The plan beside the weights, if the lineage names it and it made this shape."""
    try:
        plan = load_plan(beside(folder, "plan.json"))
    except InputError:
        return None
    plans = [step["plan"] for step in _past(lineage) if isinstance(step.get("plan"), dict)]
    same_shape = all(getattr(plan.student, field) == getattr(architecture, field) for field in SHAPE)
    return plan if same_shape and plans and plans[0].get("fingerprint") == plan.fingerprint else None


def _shape_table(architecture: Architecture, plan: PruningPlan | None) -> str:
    models = [architecture, *([plan.teacher] if plan else [])]
    rows = {
        "parameters": [f"{model.num_parameters:,}" for model in models],
        "non-embedding parameters": [f"{model.num_non_embedding_parameters:,}" for model in models],
        **{field: [str(getattr(model, field)) for model in models] for field in (*SHAPE, "vocab_size")},
    }
    head = ("", "this model", "its teacher") if plan else ("", "")
    return markdown([(field, *values) for field, values in rows.items()], head)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    # In a run every number is as far from its place in the list.
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _measures(results: dict[str, Any]) -> list[str]:
    """What was measured on held-out text, and on tasks."""
    tasks = results.pop("tasks", {})
    found = []
    if "lm loss" in results:
        found.append(f"On held-out text, by `minitron evaluate`.\n\n{markdown(list(results.items()), ('', ''))}")
    rows = [
        (task, scores["shots"], scores["documents"], metric.removesuffix(",none"), score["value"], score["stderr"])
        for task, scores in tasks.items()
        for metric, score in scores["metrics"].items()
    ]
    if rows:
        shown = markdown(
            [(*row[:4], with_error(*row[4:])) for row in rows], ("task", "shots", "documents", "metric", "score")
        )
        found.append(f"On tasks, by the LM Evaluation Harness.\n\n{shown}")
    return found


def _results(folder: Path, iteration: int) -> dict[str, Any]:
    """Numbers that `evaluate` left beside the weights, if they are this iteration's."""
    try:
        results = json.loads(beside(folder, "results.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(results, dict) or results.get("iteration") != iteration:
        return {}
    return {name: value for name, value in results.items() if name not in ("iteration", "checkpoint", "weights")}
