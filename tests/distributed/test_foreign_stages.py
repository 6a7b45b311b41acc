"""Every verb that reads a checkpoint, given one that Megatron-LM wrote: the same numbers as from our own copy of it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.checkpoint.folder import read_architecture, read_lineage
from tests.distributed.foreign_models import ITERATION, LLAMA, arguments, save_foreign
from tests.distributed.models import start_layout
from tests.distributed.ranks import run_on_ranks
from tests.unit.text_data import small_data, small_tokenizer

COMMON = [
    "tokenizer.model=@/tokenizer.model",
    "data.train=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "precision=bf16",
    "parallel.tensor=2",
    "importance.num_samples=8",
    "student.num_layers=3",
    "student.hidden_size=32",
    "evaluate.samples=4",
    "distill.tokens=256",
    "distill.global_batch_size=4",
    "log.tensorboard=false",
    "log.wandb=disabled",
    "scores=@/scores",
    "plan=@/plan.json",
]
FOREIGN = f"@/foreign/iter_{ITERATION:07d}"


def run_verb(verb: str, root: Path, *overrides: str) -> str:
    """What the first rank printed; `@` stands for the folder of the test."""
    from minitron_mcore.recipe import load_recipe
    from minitron_mcore.runtime.start import start

    recipe = load_recipe(None, [text.replace("@", str(root)) for text in [*COMMON, *overrides]])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(f"minitron_mcore.stages.{verb}").run(recipe, start())
    return printed.getvalue()


def copy_as_ours(root: Path) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, load_weights, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.runtime.start import start

    config, architecture = start_layout({"pipeline": 2}, 2), read_architecture(root / "foreign")
    chunks = as_chunks(build_model(architecture, config, "bf16", trainable=False))
    load_weights(root / "foreign", ITERATION, chunks, architecture)
    save_state(root / "ours", 0, model_state(chunks), start())
    if start().is_main:
        write_description(root / "ours", architecture, lineage={}, recipe="", save_tokenizer=None)
    start().barrier()


def walk(root: Path) -> dict[str, str]:
    save_foreign(str(root / "foreign"), arguments(**LLAMA), {"pipeline": 2}, 2, per_layer=True, prefix="module.")
    copy_as_ours(root)
    teacher = f"teacher.checkpoint={FOREIGN}"
    return {
        "evaluate": run_verb("evaluate", root, "checkpoint=@/foreign", "results=@/foreign.json"),
        "evaluate ours": run_verb("evaluate", root, "checkpoint=@/ours", "results=@/ours.json"),
        "score": run_verb("score", root, teacher),
        "plan": run_verb("plan", root, teacher),
        "prune": run_verb("prune", root, teacher, "student.checkpoint=@/student"),
        "distill": run_verb("distill", root, teacher, "student.checkpoint=@/student", "distill.checkpoint=@/distilled"),
        "train": run_verb(
            "train",
            root,
            "train.load=@/foreign",
            "train.checkpoint=@/on",
            "train.tokens=256",
            "train.global_batch_size=4",
        ),
        "export": run_verb("export", root, f"checkpoint={FOREIGN}", "hf=@/hf"),
        "inspect": run_verb("inspect", root, "path=@/foreign", "json=true"),
        "inspect its iteration": run_verb("inspect", root, f"path={FOREIGN}", "json=true", "verify=true"),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign_stages")
    small_data(folder / "json", small_tokenizer(folder / "tokenizer.model"))
    return folder


def test_the_whole_road_from_a_foreign_teacher(root: Path) -> None:
    printed = run_on_ranks(walk, 2, root)[0]
    results: dict[str, Any] = {name: json.loads((root / f"{name}.json").read_text()) for name in ("foreign", "ours")}
    assert results["foreign"]["lm loss"] == results["ours"]["lm loss"] > 1
    assert results["foreign"]["iteration"] == ITERATION
    assert read_architecture(root / "student").num_layers == 3
    teacher = read_lineage(root / "student")["teacher"]
    assert teacher["checkpoint"].endswith(f"iter_{ITERATION:07d}") and teacher["iteration"] == ITERATION
    assert read_architecture(root / "distilled").hidden_size == 32
    assert read_architecture(root / "on") == read_architecture(root / "foreign")
    assert json.loads((root / "hf" / "config.json").read_text())["model_type"] == "llama"
    for verb in ("inspect", "inspect its iteration"):
        found = json.loads(printed[verb])
        assert found["newest_finished"] == ITERATION and found["architecture"]["family"] == "llama"
