"""Hidden-state losses in a run that is cut off: projection and dynamic weight go on; the model in the checkpoint is the
student alone.

At the same layout bit for bit; at another to rounding (1e-5 on losses and the weight, as in test_resume.py).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import (
    LAYOUTS,
    assemble,
    gather_named,
    global_batch,
    my_batch,
    start_layout,
    steady,
)
from tests.distributed.ranks import run_on_ranks
from tests.distributed.state_loss_problem import CASES, build
from tests.distributed.training.test_resume import CUT, STEPS, cut_off

CASE = CASES["all-dynamic"]
ALPHA = "hidden states alpha"


def fit_on_rank(parallel: dict[str, Any], world_size: int, folder: str) -> dict[str, Any]:
    """`fit` in `folder`, resuming if it holds a checkpoint: what it logged, final weights and projection."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.config import LogConfig, TrainConfig
    from minitron_mcore.training.job import Job, TrainingData
    from minitron_mcore.training.loop import fit

    layout = start_layout(parallel, world_size)
    models, objective = build(CASE, layout)

    def read(timetable: Any, iteration: int) -> Any:
        for step in timetable.steps(iteration):
            yield step, my_batch(global_batch(CASE.student.vocab_size, step.iteration))

    def held_out(first: int, number: int) -> Any:
        return iter([my_batch(global_batch(CASE.student.vocab_size, 99))])

    train = TrainConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=2, global_batch_size=8, save_interval=CUT)
    target = Path(folder)
    fit(
        Job(
            chunks=models,
            architecture=CASE.student,
            objective=objective,
            train=train,
            log=LogConfig(interval=1, tensorboard=False, wandb="disabled"),
            runtime=start(),
            data=TrainingData({}, read, {"": held_out}, {}),
            timetable=steady(train, STEPS),
            precision="fp32",
            folder=target,
            describe=lambda progress: write_description(
                target, CASE.student, lineage={}, recipe="name: states\n", save_tokenizer=None
            ),
            recipe={},
            name="states",
        )
    )
    lines = (target / "metrics.jsonl").read_text().splitlines() if start().is_main else []
    rows = [row for row in map(json.loads, lines) if "grad-norm" in row]
    names = [name for name in rows[0] if name.endswith("loss")] if rows else []
    return {
        "history": {row["iteration"]: [row[name] for name in (*names, ALPHA, "grad-norm")] for row in rows},
        "weights": gather_named([row for model in models for row in named_parameters(model)]),
        "projection": models[0].state_projection.weight.detach().clone(),
    }


def run(layout: str, folder: Path) -> tuple[dict[int, Any], dict[Any, torch.Tensor], torch.Tensor]:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(fit_on_rank, world_size, parallel, world_size, str(folder))
    for rank in ranks:
        torch.testing.assert_close(rank["projection"], ranks[0]["projection"], rtol=0, atol=0)
    weights = assemble([rank["weights"] for rank in ranks], CASE.student)
    return ranks[0]["history"], weights, ranks[0]["projection"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("TP2-SP")
    return folder, *run("TP2-SP", folder)


def test_same_layout_is_bit_for_bit(whole: Any, tmp_path: Path) -> None:
    folder, history, weights, projection = whole
    cut_off(folder, tmp_path / "cut")
    resumed_history, resumed_weights, resumed_projection = run("TP2-SP", tmp_path / "cut")
    assert sorted(resumed_history) == list(range(CUT + 1, STEPS + 1))
    for step, row in resumed_history.items():
        assert row == history[step]
    # The first step's weight is of its own batch, the second's of the step before: that batch again, the same weights.
    assert history[1][-2] == history[2][-2]
    assert len({row[-2] for row in history.values()}) == STEPS - 1, "the weight must be worked out anew each step"
    torch.testing.assert_close(resumed_projection, projection, rtol=0, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(resumed_weights[name], value, rtol=0, atol=0, msg=str(name))


@pytest.mark.parametrize("after", ["PP2"])
def test_another_layout_agrees(after: str, whole: Any, tmp_path: Path) -> None:
    folder, history, _, _ = whole
    cut_off(folder, tmp_path / "cut")
    resumed_history, _, _ = run(after, tmp_path / "cut")
    for step, row in resumed_history.items():
        assert row[:-1] == pytest.approx(history[step][:-1], rel=1e-5)
        assert row[-1] == pytest.approx(history[step][-1], rel=1e-3)


def read_as_a_model(parallel: dict[str, Any], world_size: int, folder: str, target: str) -> dict[str, Any]:
    """The checkpoint loaded at a layout, exported, and described."""
    from safetensors.torch import load_file

    from minitron_mcore.checkpoint.export import export_checkpoint
    from minitron_mcore.checkpoint.inspection import inspect_checkpoint
    from minitron_mcore.checkpoint.integrity import verify_checkpoint
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.runtime.start import start

    layout = start_layout(parallel, world_size)
    models = build_model(CASE.student, layout, "fp32")
    load_weights(Path(folder), STEPS, as_chunks(models), CASE.student)
    runtime = start()
    export_checkpoint(Path(folder), STEPS, Path(target), runtime)
    description = runtime.on_main(partial(inspect_checkpoint, Path(folder)))
    verify_checkpoint(Path(folder))
    return {
        "weights": gather_named([row for model in models for row in named_parameters(model)]),
        "description": description,
        "exported": {name: tuple(tensor.shape) for name, tensor in load_file(f"{target}/model.safetensors").items()},
    }


def test_the_checkpoint_is_the_student_alone(whole: Any, tmp_path: Path) -> None:
    folder, _, weights, projection = whole
    world_size, parallel = LAYOUTS["PP2"]
    ranks = run_on_ranks(read_as_a_model, world_size, parallel, world_size, str(folder), str(tmp_path / "hf"))
    loaded = assemble([rank["weights"] for rank in ranks], CASE.student)
    for name, value in weights.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, msg=str(name))
    assert ranks[0]["description"]["parameters"] == CASE.student.num_parameters
    assert ranks[0]["description"]["warnings"] == []
    shapes = ranks[0]["exported"]
    assert not any("projection" in name for name in shapes) and tuple(projection.shape) not in shapes.values()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == CASE.student.num_parameters
