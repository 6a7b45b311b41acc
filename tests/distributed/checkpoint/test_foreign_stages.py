"""Every verb that reads a checkpoint, given one that Megatron-LM wrote: the same numbers as from our own copy of it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

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
    from minitron_mcore.checkpoint.stated import stating
    from minitron_mcore.jobs.job import resolve, stated_by
    from minitron_mcore.runtime.start import start
    from minitron_mcore.runtime.world import read_world

    recipe = recipe_of(root, *overrides)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), stating(stated_by(recipe)):
        job = resolve(verb, recipe, read_world(os.environ))
        importlib.import_module(f"minitron_mcore.stages.{verb}").run(job, start())
    return printed.getvalue()


def recipe_of(root: Path, *overrides: str) -> Any:
    from minitron_mcore.recipe import load_recipe

    return load_recipe(None, [text.replace("@", str(root)) for text in [*COMMON, *overrides]])


def copy_without_vocabulary(root: Path) -> None:
    """The folder `unsaid`: as Megatron-LM writes it, whose arguments name the tokenizer, and the padded size alone."""
    from minitron_mcore.checkpoint.unpickle import read_common
    from minitron_mcore.runtime.start import start

    def copy() -> None:
        shutil.copytree(root / "foreign", root / "unsaid")
        place = root / "unsaid" / f"iter_{ITERATION:07d}"
        common = read_common(place)
        common["args"].vocab_size = None
        common["args"].make_vocab_size_divisible_by = 512  # 600 ids at TP2: 1,024 rows
        common["args"].tensor_model_parallel_size = 2
        common["args"].tokenizer_model = str(root / "tokenizer.model")
        torch.save(common, place / "common.pt")  # which counts, wherever the version that wrote it keeps them

    start().on_main(copy)


def loss_of_transformers(root: Path, folder: str) -> float:
    """Mean next-token loss of the exported `folder` over the sequences that `evaluate` reads; float32."""
    from transformers import AutoModelForCausalLM

    from minitron_mcore.data.tokenizer import load_tokenizer
    from minitron_mcore.evaluation.held_out import held_out

    recipe = recipe_of(root, "precision=fp32")
    dataset = held_out(recipe.data, load_tokenizer(recipe.tokenizer), recipe.evaluate.samples, seed=recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(root / folder, dtype=torch.float32, local_files_only=True)
    samples = [dataset[index] for index in range(recipe.evaluate.samples)]
    tokens, labels = (torch.stack([torch.as_tensor(each[name]) for each in samples]) for name in ("tokens", "labels"))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()))


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
    copy_without_vocabulary(root)
    teacher = f"teacher.checkpoint={FOREIGN}"
    return {
        "evaluate": run_verb("evaluate", root, "checkpoint=@/foreign", "results=@/foreign.json"),
        "evaluate ours": run_verb("evaluate", root, "checkpoint=@/ours", "results=@/ours.json"),
        "evaluate unsaid": run_verb("evaluate", root, "checkpoint=@/unsaid", "results=@/unsaid.json", "precision=fp32"),
        "evaluate all rows": run_verb(
            "evaluate", root, "checkpoint=@/unsaid", "results=@/rows.json", "precision=fp32", "model.vocab_size=1024"
        ),
        "export unsaid": run_verb("export", root, "checkpoint=@/unsaid", "hf=@/unsaid-hf"),
        "loss of transformers": str(loss_of_transformers(root, "unsaid-hf")),
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
    names = ("foreign", "ours", "unsaid", "rows")
    results: dict[str, Any] = {name: json.loads((root / f"{name}.json").read_text()) for name in names}
    assert results["foreign"]["lm loss"] == results["ours"]["lm loss"] > 1
    assert results["foreign"]["iteration"] == ITERATION
    # Padding rows count as no words: the loss is transformers' over the tokenizer's 600 ids, not that over 1,024 rows.
    expected = float(printed["loss of transformers"])
    assert abs(results["unsaid"]["lm loss"] - expected) <= 1e-5 * expected  # the same sums in another order
    assert results["rows"]["lm loss"] > expected + 0.05
    assert json.loads((root / "unsaid-hf" / "config.json").read_text())["vocab_size"] == 600
    assert read_architecture(root / "student").num_layers == 3
    teacher = read_lineage(root / "student")["teacher"]
    assert teacher["checkpoint"].endswith(f"iter_{ITERATION:07d}") and teacher["iteration"] == ITERATION
    assert read_architecture(root / "distilled").hidden_size == 32
    assert read_architecture(root / "on") == read_architecture(root / "foreign")
    assert json.loads((root / "hf" / "config.json").read_text())["model_type"] == "llama"
    for verb in ("inspect", "inspect its iteration"):
        found = json.loads(printed[verb])
        assert found["newest_finished"] == ITERATION and found["architecture"]["family"] == "llama"
