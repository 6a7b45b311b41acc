"""The recipes of alignment in configs/, with a model that is there: `estimate` says what `align --dry-run` says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from minitron_mcore import cli

ROOT = Path(__file__).parents[2]
CHAT = {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]}
PAIR = {"prompt": "one", "chosen": "two", "rejected": "three", "chosen_reward": 2.0, "rejected_reward": 1.0}
# recipe -> its model, the GPUs of its head, and what each round reads
RECIPES: dict[str, tuple[str, int, dict[str, str]]] = {
    "align-quickstart": ("quickstart-width", 2, {"sft": "chats", "dpo": "pairs"}),
    "align-zephyr": ("mistral-7b", 8, {"sft": "chats", "dpo": "pairs"}),
    "align-minitron": (
        "llama-3.1-minitron-4b-width",
        32,
        {"code": "chats", "instructions": "chats", "rpo-1": "pairs", "rpo-2": "pairs"},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_estimate_says_what_a_dry_run_says(
    name: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Iterations and memory of each round, from the shape alone and from a checkpoint with data and tokenizer."""
    shape, gpus, rounds = RECIPES[name]
    for kind, record in (("chats", CHAT), ("pairs", PAIR)):
        (tmp_path / f"{kind}.jsonl").write_text(f"{json.dumps(record)}\n" * 100)
    load = tmp_path / "model"
    (load / "iter_0000001").mkdir(parents=True)
    (load / "iter_0000001" / "metadata.json").write_text("{}")
    (load / "latest_checkpointed_iteration.txt").write_text("1")
    shutil.copy(ROOT / "configs" / "models" / shape / "architecture.yaml", load)

    recipe = ["--config", str(ROOT / "configs" / f"{name}.yaml"), f"cluster.gpus={gpus}", "cluster.gpu_memory=80Gi"]
    data = [f"align.stages.{each}.chat.train={tmp_path}/{kind}.jsonl" for each, kind in rounds.items()]
    if name == "align-quickstart":
        data += [f"align.stages.{each}.chat.valid={tmp_path}/{kind}.jsonl" for each, kind in rounds.items()]
    there = [f"align.load={load}", f"align.checkpoint={tmp_path}/aligned", f"tokenizer.model={words}/tokenizer.model"]
    assert cli.main(["align", *recipe, *data, *there, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    trains = [int(each.replace(",", "")) for each in re.findall(r"trains ([\d,]+) iterations", shown)]
    forecasts = re.findall(r"memory of a rank: forecast ([\d.]+ [GM]iB)", shown)
    assert len(trains) == len(rounds) and not (tmp_path / "aligned").exists()

    target = tmp_path / "estimate.json"
    alone = [f"align.load={ROOT}/configs/models/{shape}", f"estimate.output={target}"]
    if name == "align-quickstart":  # its epochs are of files that are there
        alone += data
    assert cli.main(["estimate", *recipe, *alone]) == 0
    trainings = json.loads(target.read_text())["trainings"]
    assert [each["iterations"] for each in trainings] == trains
    units = [(each.split()[1], {"GiB": 2**30, "MiB": 2**20}[each.split()[1]]) for each in forecasts]
    totals = [each["memory"]["total"] for each in trainings]
    assert [f"{total / size:.1f} {unit}" for total, (unit, size) in zip(totals, units, strict=True)] == forecasts
