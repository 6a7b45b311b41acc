"""`distill` with hidden-state losses, as typed: logged, resumed, and a checkpoint like any other afterwards."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import yaml

from tests.e2e.test_bad_input import RECIPE
from tests.e2e.verbs import all_run_well, minitron, run_well

SITES = "distill.hidden_states.sites=[embedding,block_output,mlp_input,attention_relation]"
LOSSES = ("embedding loss", "block output loss", "mlp input loss", "attention relation loss")


def test_the_road_with_a_narrower_student(tmp_path: Path) -> None:
    lines = [" ".join(f"{word}{number % 7}" for word in ("prune", "distil", "score") * 20) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE).replace("@", str(tmp_path)))
    config = ["--config", str(recipe)]
    teacher, student = f"teacher.checkpoint={tmp_path / 'teacher'}", f"student.checkpoint={tmp_path / 'student'}"
    scores = f"scores={tmp_path / 'scores.safetensors'}"
    distilled = tmp_path / "distilled"
    distill = ["distill", *config, teacher, student, f"distill.checkpoint={distilled}", SITES]
    distill += ["distill.tokens=256", "distill.save_interval=2", "log.interval=1"]
    all_run_well(
        [
            ["tokenizer", *config, f"tokenizer.model={tmp_path / 'tokenizer.model'}"],
            [
                "preprocess",
                *config,
                f"input={tmp_path / 'text.jsonl'}",
                f"output_prefix={tmp_path / 'data' / 'tokens'}",
            ],
            ["train", *config, f"train.checkpoint={tmp_path / 'teacher'}"],
            ["score", *config, teacher, scores],
            ["prune", *config, teacher, scores, student, "student.hidden_size=24", "student.num_layers=1"],
            distill,
        ]
    )
    rows = [json.loads(line) for line in (distilled / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad-norm" in row]
    assert len(steps) == 4
    for row in steps:
        assert all(row[name] > 0 for name in (*LOSSES, "logits distillation loss"))
        assert row["hidden states alpha"] > 0
    for before, row in itertools.pairwise(steps):
        ratio = before["logits distillation loss"] / sum(before[name] for name in LOSSES)
        assert abs(row["hidden states alpha"] / ratio - 1) < 1e-9

    # Cut off after the second iteration, and on again: the same numbers.
    cut = tmp_path / "cut"
    shutil.copytree(distilled, cut)
    shutil.rmtree(cut / "iter_0000004")
    (cut / "latest_checkpointed_iteration.txt").write_text("2")
    (cut / "metrics.jsonl").unlink()
    (cut / "recipe.yaml").write_text((distilled / "recipe.yaml").read_text().replace(str(distilled), str(cut)))
    run_well(*distill, f"distill.checkpoint={cut}")
    again = [row for row in map(json.loads, (cut / "metrics.jsonl").read_text().splitlines()) if "grad-norm" in row]
    for row, expected in zip(again, steps[2:], strict=True):
        assert all(row[name] == expected[name] for name in (*LOSSES, "lm loss", "grad-norm", "hidden states alpha"))

    run_well("evaluate", *config, f"checkpoint={distilled}", f"output={tmp_path / 'evaluation'}")
    run_well("export", *config, f"checkpoint={distilled}", f"hf={tmp_path / 'hf'}")
    from safetensors.torch import load_file

    assert not any("projection" in name for name in load_file(tmp_path / "hf" / "model.safetensors"))
    code, shown = minitron("inspect", str(distilled))
    assert code == 0 and "projection" not in shown
