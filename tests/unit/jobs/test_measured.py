"""A training's own steps say how fast its machine is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.architecture import build_architecture, save_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.forecast import settings_of
from minitron_mcore.estimate.step_time import step_time
from minitron_mcore.jobs.estimate import resolve
from minitron_mcore.jobs.measured import EACH, RATE, STEP, measured_machine
from minitron_mcore.recipe import load_recipe, to_yaml
from minitron_mcore.runtime.config import ClusterConfig
from minitron_mcore.runtime.devices import machine_of
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import plan_timetable

SIZES = {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 2048, "num_attention_heads": 8, "vocab_size": 8192}
STUDENT, TEACHER = build_architecture(SIZES), build_architecture({**SIZES, "hidden_size": 1024})
MACHINE = machine_of(ClusterConfig(device="H100"))
TRUE = replace(MACHINE, efficiency=0.31)


def training(folder: Path, *words: str, steps: int = 40, section: str = "distill", factor: float = 1.0) -> str:
    """A folder as a training on 8 GPUs leaves it, whose steps took what is estimated at 31%, the first five longer: the
    mean time of five steps every five."""
    (folder / "teacher").mkdir(parents=True)
    save_architecture(TEACHER, folder / "teacher" / "architecture.yaml")
    save_architecture(STUDENT, folder / "architecture.yaml")
    sizes = [f"{section}.tokens=1000000", f"{section}.global_batch_size=16", f"{section}.micro_batch_size=1"]
    given = [f"teacher.checkpoint={folder / 'teacher'}", "data.sequence_length=256", "precision=bf16", *sizes, *words]
    recipe = load_recipe(None, given)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "lineage.yaml").write_text(yaml.safe_dump({"stage": section}))
    timetable = plan_timetable(getattr(recipe, section), 256, section)
    teacher = TEACHER if section == "distill" else None
    settings = settings_of(recipe, section, STUDENT, timetable, World(size=8, local_size=8, device="cuda"), teacher)
    times = {(each.sequence_length, each.global_batch_size): step_time(each, TRUE).total for each in settings}
    lines: list[dict[str, Any]] = [{"iteration": 1, "kind": "validation", "lm loss validation": 2.0}]
    spent: list[float] = []
    for iteration in range(1, steps + 1):
        shape = timetable.at(iteration - 1).shape
        spent.append(factor * times[shape.sequence_length, shape.global_batch_size] * (3 if iteration <= 5 else 1))
        row = {"iteration": iteration, "kind": "train", "time": 0.0, "lm loss": 2.0}
        if iteration % 5 == 0:
            seconds = sum(spent[-5:]) / 5
            row |= {STEP: 1000 * seconds, RATE: shape.tokens / seconds, EACH: shape.tokens / seconds / 8}
        lines.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 4')
    return str(folder)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("distill", []),
        ("train", ["parallel.tensor=2"]),
        ("distill", ["distill.rampup_batch_size=[8,8,184]"]),
    ],
)
def test_the_efficiency_of_a_training(tmp_path: Path, section: str, words: list[str]) -> None:
    found = measured_machine(training(tmp_path, *words, section=section), MACHINE, "cuda")
    assert found.efficiency == pytest.approx(0.31, rel=1e-5)
    assert replace(found, efficiency=MACHINE.efficiency) == MACHINE, "nothing else is another"


def test_estimate_goes_by_it(tmp_path: Path) -> None:
    given = [f"estimate.measured={training(tmp_path / 'before')}", f"teacher.checkpoint={tmp_path / 'before/teacher'}"]
    given += ["cluster.gpus=8", "cluster.device=H100", "student.hidden_size=512", "distill.tokens=1000000"]
    given += [f"output={tmp_path / 'run'}"]
    job = resolve(load_recipe(None, given), World())
    assert job.estimate.machine.efficiency == pytest.approx(0.31, rel=1e-5)


def test_what_says_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^estimate\.measured=.*nothing has no metrics\.jsonl: name the folder"):
        measured_machine(str(tmp_path / "nothing"), MACHINE, "cuda")
    with pytest.raises(InputError, match=r"has fewer than 2 times of one shape after the first, .*: let it run on"):
        measured_machine(training(tmp_path / "short", steps=14), MACHINE, "cuda")
    with pytest.raises(InputError, match=r"has no steps with their time"):
        measured_machine(training(tmp_path / "none", steps=4), MACHINE, "cuda")
    folder = training(tmp_path / "pruned")
    (Path(folder) / "lineage.yaml").write_text("stage: prune\n")
    with pytest.raises(InputError, match=r"was made by prune, which is no training"):
        measured_machine(folder, MACHINE, "cuda")


def test_a_teacher_that_is_gone_is_told(tmp_path: Path) -> None:
    folder = training(tmp_path)
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    with pytest.raises(
        InputError, match=r"^estimate\.measured=.* was distilled, and its recipe's teacher\.checkpoint is"
    ):
        measured_machine(folder, MACHINE, "cuda")


def test_steps_of_another_machine_are_refused(tmp_path: Path) -> None:
    """A hundred times faster than the links of the machine allow."""
    folder = training(tmp_path, factor=0.01)
    with pytest.raises(InputError, match=rf"^estimate\.measured={folder} holds steps that are shorter"):
        measured_machine(folder, MACHINE, "cuda")
