"""The rounds of `align` from shapes alone: rows, tokens and FLOPs by hand, and what cannot be known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture, save_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.estimate import Estimate
from minitron_mcore.estimate.record import record
from minitron_mcore.estimate.words import report
from minitron_mcore.jobs.estimate import resolve
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.world import World

MODEL = build_architecture(
    {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 384}
)
LENGTH = 128


def estimated(folder: Path, *words: str) -> Estimate:
    """Of a model whose shape alone is there, on two H100."""
    save_architecture(MODEL, folder / "architecture.yaml")
    own = [f"align.load={folder}", f"data.sequence_length={LENGTH}", "align.global_batch_size=8", "precision=bf16"]
    return resolve(load_recipe(None, [*own, "cluster.gpus=2", "cluster.device=H100", *words]), World()).estimate


def forward_flops(length: int) -> int:
    """Of a token: two operations for each number of each matrix, and for each of the scores and of what they weigh."""
    h, f, v = 64, 128, 384
    return 2 * (4 * (4 * h * h + 3 * h * f + 2 * length * h) + h * v)


def test_chats_are_rows_of_a_sequence(tmp_path: Path) -> None:
    """100 samples in global batches of 8 are 13 iterations; each of the 104 rows has 128 tokens."""
    found = estimated(tmp_path, "align.samples=100")
    (training,), (cost,) = found.trainings, found.costs
    assert found.teacher is None and found.aligned == (MODEL, f"align.load={tmp_path}")
    assert training.title == "align sft" and training.referenced == 0 and not training.note
    assert (training.timetable.iterations, training.timetable.tokens) == (13, 104 * LENGTH)
    assert cost is not None and cost.before is None
    assert cost.last.student_flops == 3 * 8 * LENGTH * forward_flops(LENGTH)


def test_a_pair_is_two_sequences(tmp_path: Path) -> None:
    """Attention sees one side alone; the reference reads both sides of 100 pairs, forward only."""
    found = estimated(tmp_path, "align.samples=100", "align.method=dpo")
    (training,), (cost,) = found.trainings, found.costs
    assert training.timetable.tokens == 104 * 2 * LENGTH and training.referenced == 200
    assert "its reference reads as many pairs as are trained on" in training.note
    assert cost is not None and cost.before is not None
    assert cost.last.student_flops == 3 * 8 * 2 * LENGTH * forward_flops(LENGTH)
    assert cost.before.tokens == 200 * LENGTH and cost.before.flops == 200 * LENGTH * forward_flops(LENGTH)
    assert cost.seconds == pytest.approx(13 * cost.last.total + cost.before.seconds)
    (beside,) = found.beside
    assert beside.parts["weights"] == 2 * MODEL.num_parameters
    held = training.forecast
    assert held is not None and beside.total < held.total and "teacher weights" not in held.parts


def test_packed_rows_and_a_resident_reference(tmp_path: Path) -> None:
    """A row for each pair is the most; what stays beside needs its weights, and no pass before."""
    packed = ["chat.packing=true", "align.reference=resident"]
    found = estimated(tmp_path, "align.samples=100", "align.method=dpo", *packed)
    (training,), (cost,) = found.trainings, found.costs
    assert training.timetable.tokens == 104 * LENGTH and training.referenced == 0 and found.beside == ()
    assert training.note == "packed, it takes at most a row for each sample, and fewer the shorter they are"
    assert training.forecast is not None and training.forecast.parts["teacher weights"] == 2 * MODEL.num_parameters
    assert cost is not None and cost.last.teacher_flops == 8 * LENGTH * forward_flops(LENGTH)


def test_tokens_are_a_budget_of_rows(tmp_path: Path) -> None:
    """10,000 tokens are 39.06 rows of two sides, and 5 global batches; the reference reads 40 pairs, and a fifth of the
    data that is held out besides."""
    words = ["align.tokens=10000", "align.method=dpo", "chat.valid_fraction=0.2"]
    (training,) = estimated(tmp_path, *words).trainings
    assert training.timetable.iterations == 5 and training.referenced == 2 * 50
    (training,) = estimated(tmp_path, "align.tokens=10000", "align.method=simpo").trainings
    assert training.referenced == 0, "simpo has none"


def test_epochs_of_files_that_are_there(tmp_path: Path) -> None:
    """30 records, a third of them held out: 20 rows of training, three passes over which are 60."""
    rows = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"chat.train={tmp_path}/pairs.jsonl", "align.method=dpo", "align.epochs=3"]
    (training,) = estimated(tmp_path, *words, f"chat.valid_fraction={1 / 3}").trainings
    assert training.timetable.iterations == math.ceil(60 / 8) and training.referenced == 60
    assert training.note.startswith("about 20 samples")


def test_epochs_of_files_elsewhere_are_not_guessed(tmp_path: Path) -> None:
    """Memory and speed are told; hours are not, nor what follows from them."""
    stages = "align.stages={sft: {epochs: 2}, dpo: {method: dpo, samples: 80}}"
    found = estimated(tmp_path, stages, "chat.train=/nowhere/chats")
    sft, dpo = found.trainings
    assert "align.stages.sft.epochs counts passes over chat.train=/nowhere/chats, which is not on this" in sft.unknown
    assert sft.forecast is not None and found.fits is True and not found.is_whole and not dpo.unknown
    assert dpo.timetable.iterations == 10
    shown = report(found)
    assert "align sft: how long it takes is not known, since align.stages.sft.epochs counts passes" in shown
    assert "align sft: iterations of 8 x 128 tokens\n" in shown and "all trainings but align sft: " in shown
    assert "takes  GPU-hours" not in shown and "twice the" not in shown
    written = record(found)
    assert written["trainings"][0]["tokens"] is None and written["trainings"][0]["cost"]["gpu_hours"] is None
    assert written["layouts"][0]["seconds"] is None and written["trainings"][1]["cost"]["reference"]["tokens"] > 0


def test_rounds_go_by_their_own_keys(tmp_path: Path) -> None:
    stages: dict[str, Any] = {"sft": {"samples": 64, "micro_batch_size": 2}, "rpo": {"method": "rpo_sq", "samples": 64}}
    found = estimated(tmp_path, f"align.stages={json.dumps(stages)}", "cluster.gpu_memory=80Gi")
    assert [each.title for each in found.trainings] == ["align sft", "align rpo"]
    assert [each.setting.micro_batch_key for each in found.trainings] == [
        "align.stages.sft.micro_batch_size",
        "align.stages.rpo.micro_batch_size",
    ]
    assert [each.parts["weights"] for each in found.beside] == [2 * MODEL.num_parameters]


def test_a_student_that_the_road_makes(tmp_path: Path) -> None:
    """Where it is not there yet: by its folder in the run, or by the name that the recipe has for it."""
    (tmp_path / "teacher").mkdir()
    save_architecture(MODEL, tmp_path / "teacher" / "architecture.yaml")
    own = [f"teacher.checkpoint={tmp_path}/teacher", "student.num_layers=2", f"output={tmp_path}/run"]
    own += ["align.samples=8", "distill.checkpoint=distilled", "cluster.gpus=2"]
    for load in ("distilled", f"{tmp_path}/run/students/student/distilled"):
        found = resolve(load_recipe(None, [*own, f"align.load={load}", "data.sequence_length=64"]), World()).estimate
        assert found.teacher == MODEL and found.trainings[-1].setting.student.num_layers == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["align.stages={sft: {lr: 1e-5}}"], "align.stages.sft.tokens, align.stages.sft.samples"),
        (["align.samples=8", "align.load=null"], "align.load is not given"),
        (["align.samples=8", "align.load=/nowhere"], "align.load=/nowhere is not there"),
        (["align.samples=8", "align.phases=[{tokens: 64}]"], "align.phases does not go with chats"),
        (["align.samples=8", "align.lr_warmup_iters=9"], "less than the 1 iteration of the budget, 1024 tokens"),
    ],
)
def test_wrong_input(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        estimated(tmp_path, *words)
    assert said in str(refused.value)
