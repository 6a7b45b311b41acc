"""The whole road on two ranks, as a user starts it: killed in the middle, started again, started once more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.training.charts import charted
from tests.e2e.launchers import ROOT, environment, start_ranks

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def write_recipe(folder: Path) -> Path:
    """Everything of the quickstart, tiny: real source text, a teacher of two layers."""
    sections: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "run"),
        "parallel": {"tensor": 2},
        "input": [str(STDLIB / "json"), str(STDLIB / "email")],
        "tokenizer": {"vocab_size": 400, "extensions": [".py"]},
        "preprocess": {"extensions": [".py"], "valid_fraction": 0.2, "workers": 1},
        "data": {"sequence_length": 32, "num_workers": 0},
        "model": {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6}
        | {"num_query_groups": 2, "kv_channels": 8, "max_position_embeddings": 64, "rotary_base": 10000},
        "importance": {"num_samples": 8, "micro_batch_size": 4},
        "train": {"tokens": 5120, "global_batch_size": 8, "micro_batch_size": 4, "lr": 3e-3, "save_interval": 5},
        "distill": {"tokens": 1280, "global_batch_size": 8, "micro_batch_size": 4, "lr": 1e-3},
        "evaluate": {"samples": 16, "micro_batch_size": 4},
        "run": {
            "students": {"width": {"hidden_size": 36, "ffn_hidden_size": 64}, "depth": {"num_layers": 2}},
            "baselines": ["next_token", "random"],
            "prompts": ["def loads(", "import re\n"],
        },
        "generate": {"max_new_tokens": 8},
        "log": {"interval": 5, "wandb": "disabled", "peak_tflops": 1.0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


def verb(recipe: Path, *overrides: str) -> list[str]:
    return ["run", "--config", str(recipe), *overrides]


def start(recipe: Path, log: Path, *overrides: str, ranks: int = 2, **variables: str) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "minitron_mcore", *verb(recipe, *overrides)],
        cwd=ROOT,
        env=environment(**variables),
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Killed once the teacher has a first checkpoint, run to the end by torchrun, and run again."""
    folder = tmp_path_factory.mktemp("road")
    recipe = write_recipe(folder)
    killed = start_ranks(verb(recipe), folder / "killed", 2)
    tracker = folder / "run" / "teacher" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 200
    while not tracker.exists() and killed[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in killed:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    at_kill = {path.stem for path in (folder / "run" / "done").glob("*.json")}
    log = folder / "finished.log"
    assert start(recipe, log).wait(timeout=280) == 0, log.read_text()
    again = start_ranks(verb(recipe), folder / "again", 2)
    assert [process.wait(timeout=280) for process in again] == [0, 0], read_logs(folder / "again")
    return {
        "folder": folder,
        "recipe": recipe,
        "at_kill": at_kill,
        "finished": log.read_text(),
        "again": read_logs(folder / "again"),
        "results": json.loads((folder / "run" / "results.json").read_text()),
    }


def names_in(metrics: Path) -> set[str]:
    return {name for line in metrics.read_text().splitlines() for name in json.loads(line)}


def read_logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("rank*.log")))


def test_goes_on_where_it_was_killed(road: dict[str, Any]) -> None:
    assert {"tokenizer", "preprocess"} <= road["at_kill"]
    assert "evaluate-teacher" not in road["at_kill"], "killed too late to show anything"
    assert "train the tokenizer: done before" in road["finished"]
    assert "resumed" in road["finished"] or "train-teacher" in road["at_kill"]
    steps = [line for line in road["again"].splitlines() if line.startswith("[")]
    assert len(steps) == 20
    assert all(line.endswith("done before") for line in steps)


def test_closing_table(road: dict[str, Any]) -> None:
    names = [
        "teacher",
        "width pruned",
        "width distilled",
        "depth pruned",
        "depth distilled",
        "width next-token loss",
        "width random weights",
    ]
    assert list(road["results"]) == names
    for name, row in road["results"].items():
        assert f"{row['lm loss']:.4f}" in road["finished"].split("held-out LM loss")[1], name
    assert road["results"]["width distilled"]["lm loss"] < road["results"]["width pruned"]["lm loss"]
    assert road["results"]["width distilled"]["tokens"] == road["results"]["width random weights"]["tokens"] == 1280


def test_the_charts_of_dashboards_are_of_what_trainings_log(road: dict[str, Any]) -> None:
    """All of them; those of an alignment: test_align.py."""
    files = [road["folder"] / "run" / name / "metrics.jsonl" for name in ("teacher", "students/width/distilled")]
    assert charted("Losses", "Health", "Speed") <= set().union(*map(names_in, files))


def test_ends_with_what_the_models_write(road: dict[str, Any]) -> None:
    """Behind the table, also where all was done."""
    folder, models = road["folder"], ["teacher", "width distilled", "depth distilled"]
    rows = [json.loads(line) for line in (folder / "run" / "continuations.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["def loads(", "import re\n"]
    assert all([*row["continuations"]] == models for row in rows)
    for shown in (road["finished"], road["again"]):
        ending = shown.split("held-out LM loss")[1]
        assert ending.index("width random weights") < ending.index("\nprompt 1: def loads(") < ending.index("run: done")
        for name in models:
            text = rows[1]["continuations"][name]["text"].splitlines() or [""]
            assert f"\n  {name}: {text[0]}".rstrip() in ending, name


def test_ends_with_its_report(road: dict[str, Any]) -> None:
    """Also the command that found all done. Each command and the time of each step are noted, once."""
    target = road["folder"] / "run" / "report.html"
    for shown in (road["finished"], road["again"]):
        assert f"\nreport: {target}\n" in shown
    page = target.read_text()
    assert "20 of 20 steps are done" in page and f"{road['results']['depth distilled']['lm loss']:.4f}" in page
    lines = [json.loads(line) for line in (target.parent / "journal.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in lines if line["kind"] == "start"] == [2, 2, 2]
    steps = [line for line in lines if line["kind"] == "step"]
    assert {line["name"] for line in steps} == {path.stem for path in (target.parent / "done").glob("*.json")}
    assert len(steps) == 20 and all(line["seconds"] > 0 for line in steps)
    assert {line["name"] for line in steps if sum(line.get("forecast", {}).values()) > 0} == {
        *("train-teacher", "distill-width", "distill-depth", "baseline-next_token", "baseline-random")
    }


def test_exports_load_in_transformers(road: dict[str, Any]) -> None:
    """With as many parameters as were evaluated, and a card that shows the evaluation; logits: test_export.py."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for student in ("width", "depth"):
        folder = road["folder"] / "run" / "hf" / student
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).decode([5]) is not None
        stored = road["results"][f"{student} distilled"]
        assert sum(tensor.numel() for tensor in model.parameters()) == stored["parameters"]
        assert str(stored["lm loss"]) in (folder / "README.md").read_text(), "the model card shows the evaluation"
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_another_recipe_is_refused(road: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in (road["folder"] / "run").rglob("*") if path.is_file())
    first, second = start_ranks(verb(road["recipe"], "train.lr=0.5"), tmp_path / "other", 2)
    assert first.wait(timeout=120) == 2
    second.kill()  # as launchers do
    second.wait(timeout=10)
    sentences = [line for line in read_logs(tmp_path / "other").splitlines() if line.startswith("minitron run:")]
    assert len(sentences) == 1
    assert "holds another run: train.lr is 0.003 there and 0.5 here" in sentences[0]
    assert before == sorted(path.stat().st_mtime_ns for path in (road["folder"] / "run").rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_given_teacher_is_left_alone(road: dict[str, Any], tmp_path: Path) -> None:
    """A run from somebody's teacher and data writes into its own folder, and nothing into theirs. A chain besides: its
    second student is the first one, distilled, without the layers that are left out, and has learnt from it."""
    theirs, output, log = road["folder"] / "run", tmp_path / "run", tmp_path / "log"
    before = {path: path.stat().st_mtime_ns for path in theirs.rglob("*")}
    named = [f"teacher.checkpoint={theirs / 'teacher'}", f"tokenizer.model={theirs / 'tokenizer/tokenizer.model'}"]
    named += [
        f"data.{part}={theirs}/data/tokens{name}_text_document" for part, name in (("train", ""), ("valid", "_valid"))
    ]
    process = start(road["recipe"], log, f"output={output}", "run.baselines=[]", "run.chain=true", *named)
    assert process.wait(timeout=200) == 0, log.read_text()
    ours = json.loads((output / "teacher" / "results.json").read_text())
    assert ours["lm loss"] == road["results"]["teacher"]["lm loss"]
    assert before == {path: path.stat().st_mtime_ns for path in theirs.rglob("*")}
    first = output / "students" / "width" / "distilled"
    shape = yaml.safe_load((output / "students/depth/pruned/architecture.yaml").read_text())
    assert shape == {**yaml.safe_load((first / "architecture.yaml").read_text()), "num_layers": 2}
    lineage = yaml.safe_load((output / "students/depth/distilled/lineage.yaml").read_text())
    assert lineage["teacher"]["checkpoint"] == str(first)
