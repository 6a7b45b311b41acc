"""A run that was cut off and goes on is the run that was not: bit for bit at the same layout, to rounding at another.

Tolerance at another layout: 1e-5 on the loss (the sums run in another order; see test_training.py). Weights after Adam
are not compared there: on near-zero gradients rounding becomes a step of either sign.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import LAYOUTS, assemble, gather_named, global_batch, my_batch, start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks

STEPS, CUT = 6, 3


def fit_on_rank(
    parallel: dict[str, Any],
    world_size: int,
    folder: str,
    precision: str = "fp32",
    save_interval: int | None = CUT,
    validation: Any = None,
    identity: str = "",
    until: int | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """`fit` in `folder`, resuming if it holds a checkpoint: the losses it logged and the final weights. validation:
    what `read_valid` reads. identity: of its recipe. until: the iteration to stop after. keys: of the section,
    beside."""
    import json

    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize, named_parameters
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.config import LogConfig, TrainConfig
    from minitron_mcore.training.job import Job, TrainingData
    from minitron_mcore.training.loop import fit

    layout = start_layout(parallel, world_size)
    architecture = tiny("llama")
    models = build_model(architecture, layout, precision)
    initialize(models, architecture, seed=11)

    def read(timetable: Any, iteration: int) -> Any:
        for step in timetable.steps(iteration):
            yield step, my_batch(global_batch(architecture.vocab_size, step.iteration))

    keys = {"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_iters": 2, "global_batch_size": 8, **keys}
    train = TrainConfig(save_interval=save_interval, **keys)
    target = Path(folder)
    fit(
        Job(
            chunks=models,
            architecture=architecture,
            objective=Objective(LossSettings(vocab_size=architecture.vocab_size)),
            train=train,
            log=LogConfig(interval=1, tensorboard=False, wandb="disabled"),
            runtime=start(),
            data=TrainingData({}, read, {} if validation is None else {"": validation}, {}),
            timetable=steady(train, STEPS),
            precision=precision,
            folder=target,
            describe=lambda progress: write_description(
                target, architecture, lineage={"tokens": progress.consumed_tokens}, recipe="", save_tokenizer=None
            ),
            recipe={},
            name="resume",
            identity=lambda: identity,
            until=until,
        )
    )
    rows = [row for model in models for row in named_parameters(model)]
    lines = (target / "metrics.jsonl").read_text().splitlines() if start().is_main else []
    rows_of_training = (row for row in map(json.loads, lines) if row["kind"] == "train")
    history = {row["iteration"]: (row["lm loss"], row["grad-norm"]) for row in rows_of_training}
    return {"history": history, "weights": gather_named(rows)}


def run(layout: str, folder: Path, precision: str = "fp32") -> tuple[dict[int, Any], dict[Any, torch.Tensor]]:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(fit_on_rank, world_size, parallel, world_size, str(folder), precision)
    return ranks[0]["history"], assemble([rank["weights"] for rank in ranks], tiny("llama"))


def cut_off(folder: Path, target: Path, cut: int = CUT) -> None:
    """What a run killed after its checkpoint at `cut` leaves: later work half-written, and the tracker on `cut`."""
    shutil.copytree(folder, target)
    (target / f"iter_{STEPS:07d}" / "metadata.json").unlink()
    (target / f"iter_{STEPS:07d}").rename(target / f".unfinished_iter_{STEPS:07d}")
    (target / "latest_checkpointed_iteration.txt").write_text(str(cut))
    (target / "metrics.jsonl").unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted runs, made when first asked for."""
    runs: dict[str, Any] = {}

    def of(layout: str, precision: str = "fp32") -> Any:
        name = f"{layout}-{precision}"
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            runs[name] = (folder, *run(layout, folder, precision))
        return runs[name]

    return {"of": of}


@pytest.mark.parametrize(
    "layout",
    ["TP2", "DP2", "PP2-VPP2", "DP2-bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1", "1-bf16"))],
)
def test_same_layout_is_bit_for_bit(layout: str, whole: dict[str, Any], tmp_path: Path) -> None:
    name, _, precision = layout.partition("-bf16")
    precision = "bf16" if layout.endswith("bf16") else "fp32"
    folder, history, weights = whole["of"](name, precision)
    cut_off(folder, tmp_path / "cut")
    resumed_history, resumed_weights = run(name, tmp_path / "cut", precision)
    assert sorted(resumed_history) == list(range(CUT + 1, STEPS + 1))
    for step, row in resumed_history.items():
        assert row == history[step]
    for name, value in weights.items():
        torch.testing.assert_close(resumed_weights[name], value, rtol=0, atol=0, msg=str(name))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("TP2", "DP2"),
        ("PP2-VPP2", "TP2"),
        ("TP2", "PP2-VPP2"),
        ("DP2", "TP2-PP2"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("TP2", "1"), ("TP2", "PP2"), ("1", "TP2"), ("PP2", "TP2"), ("DP2", "TP2"))
        ),
    ],
)
def test_another_layout_agrees(before: str, after: str, whole: dict[str, Any], tmp_path: Path) -> None:
    folder, history, _ = whole["of"](before)
    cut_off(folder, tmp_path / "cut")
    resumed_history, _ = run(after, tmp_path / "cut")
    assert sorted(resumed_history) == list(range(CUT + 1, STEPS + 1))
    for step, (loss, norm) in resumed_history.items():
        assert loss == pytest.approx(history[step][0], rel=1e-5)
        assert norm == pytest.approx(history[step][1], rel=1e-3)
