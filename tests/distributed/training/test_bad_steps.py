"""A step whose loss or gradients are no numbers is skipped: nothing changes by it on any rank, and the run goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.models import LAYOUTS, global_batch, my_batch, start_layout, tiny
from tests.distributed.ranks import RankError, run_on_ranks

STEPS = 6


def digest(tensors: list[torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    main = [
        value
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for value in group["params"]
    ]
    return [tensor for state in states for tensor in state.values() if torch.is_tensor(tensor)] + main


def watching(train_step: Any, damage: dict[str, Any], digests: list[Any]) -> Any:
    """`train_step`, with a gradient spoiled where the batch says so; weights and optimizer are digested after it."""

    def watched(trained: Any, *args: Any) -> Any:
        objective, batch = args[0], args[2]
        run = objective.run
        if any(getattr(part, "damage", None) == "gradient" for part in batch):

            def run_and_spoil(chunks: Any, *given: Any, **options: Any) -> Any:
                means = run(chunks, *given, **options)
                chunks[0].buffers[0].grad_data[7] = damage["value"]
                return means

            objective.run = run_and_spoil
        row = train_step(trained, *args)
        objective.run = run
        weights = [tensor for chunk in trained.chunks for tensor in chunk.parameters()]
        digests.append((digest(weights), digest(optimizer_tensors(trained.optimizer))))
        return row

    return watched


def damaged_teacher(damage: dict[str, Any]) -> Any:
    """A teacher in training whose gradient norm is none at the iterations `damage["at"]`."""
    steps_taught = itertools.count(1)

    def teach(tokens: int) -> dict[str, float]:
        return {"teacher grad-norm": damage["value"] if next(steps_taught) in damage["at"] else 1.0}

    return SimpleNamespace(step=teach, save=lambda *arguments: None, folder=Path("of the teacher"))


def fit_with_damage(
    parallel: dict[str, Any], world_size: int, folder: str, settings: dict[str, Any], damage: dict[str, Any]
) -> dict[str, Any]:
    """`fit`, with a gradient or a loss that is none at the iterations `damage["at"]`, on rank `damage["rank"]` alone.

    Returns the rows logged, and the digest of weights and optimizer after each step of this rank."""
    from megatron.core import parallel_state

    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training import loop
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.config import LogConfig, TrainConfig
    from minitron_mcore.training.job import Job, TrainingData

    layout = start_layout(parallel, world_size)
    architecture = tiny("llama")
    models = build_model(architecture, layout, settings.get("precision", "fp32"))
    initialize(models, architecture, seed=11)
    runtime, target = start(), Path(folder)
    digests: list[Any] = []
    mine = runtime.rank == damage["rank"]

    class Damaged(Objective):
        """Its loss is NaN where the microbatch says so."""

        def loss(self, model: Any, hidden: torch.Tensor, microbatch: Any) -> Any:
            factor = float("nan" if getattr(microbatch, "damage", None) == "loss" else 1)
            return super().loss(model, hidden * factor, microbatch)

    def describe(progress: Any) -> None:
        write_description(target, architecture, lineage={}, recipe="", save_tokenizer=None)

    def read(timetable: Any, iteration: int) -> Any:
        for step in timetable.steps(iteration):
            batch = my_batch(global_batch(architecture.vocab_size, step.iteration))
            place, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
            for number, part in enumerate(batch):
                first = step.first_sample + 2 * (number * size + place)
                part.samples = torch.arange(first, first + 2)
                if mine and number == 1 and step.iteration + 1 in damage["at"]:
                    part.damage = damage["what"]  # type: ignore[attr-defined]
            yield step, batch

    train_step = loop.train_step
    train = TrainConfig(
        tokens=STEPS * 128, lr=1e-2, min_lr=1e-3, global_batch_size=8, micro_batch_size=2, **settings.get("train", {})
    )
    loop.train_step = watching(train_step, damage, digests)
    try:
        loop.fit(
            Job(
                chunks=models,
                architecture=architecture,
                objective=Damaged(LossSettings(architecture.vocab_size)),
                train=train,
                log=LogConfig(interval=2, tensorboard=False, wandb="disabled", timing_log_level=2),
                runtime=runtime,
                timetable=plan_timetable(train, 16, "train"),
                data=TrainingData({}, read, {}, {}),
                precision=settings.get("precision", "fp32"),
                folder=target,
                describe=describe,
                recipe={},
                name="damaged",
                teaching=damaged_teacher(damage) if damage["what"] == "teacher" else None,
            )
        )
    finally:
        loop.train_step = train_step
    lines = (target / "metrics.jsonl").read_text().splitlines() if runtime.is_main else []
    return {"rows": [json.loads(line) for line in lines], "digests": digests}


def run(layout: str, folder: Path, damage: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    world_size, parallel = LAYOUTS[layout]
    return run_on_ranks(fit_with_damage, world_size, parallel, world_size, str(folder), settings, damage)


@pytest.mark.parametrize(
    ("layout", "precision", "damage"),
    [
        ("DP2", "fp32", {"what": "loss", "rank": 1, "at": [3, 4]}),
        ("DP2", "bf16", {"what": "loss", "rank": 0, "at": [3, 4]}),
        ("PP2", "fp32", {"what": "gradient", "rank": 0, "at": [3, 4], "value": float("inf")}),
        pytest.param(
            "1", "fp32", {"what": "gradient", "rank": 0, "at": [3, 4], "value": float("nan")}, marks=pytest.mark.slow
        ),
    ],
)
def test_nothing_changes_by_a_bad_step(layout: str, precision: str, damage: dict[str, Any], tmp_path: Path) -> None:
    """Weights and optimizer are the same to the last bit after the two bad steps as before them, on every rank."""
    ranks = run(layout, tmp_path, damage, precision=precision)
    for rank in ranks:
        digests = rank["digests"]
        assert len(digests) == STEPS
        assert digests[1] == digests[2] == digests[3], "two skipped steps"
        for before, after in [(0, 1), (3, 4), (4, 5)]:
            assert digests[before][0] != digests[after][0] and digests[before][1] != digests[after][1]
    rows = [row for row in ranks[0]["rows"] if row["kind"] == "train"]
    assert [row["number of skipped iterations"] for row in rows] == [0, 0, 1, 2, 2, 2]
    losses = damage["what"] == "loss"
    assert [row["number of nan iterations"] for row in rows] == ([0, 0, 1, 2, 2, 2] if losses else [0] * 6)
    assert [row["consumed samples"] for row in rows] == [8, 16, 24, 32, 40, 48]
    assert [("lm loss" in row) for row in rows] == ([True, True, False, False, True, True] if losses else [True] * 6)
    assert all(("grad-norm" in row) == (index not in (2, 3)) for index, row in enumerate(rows))
    # The schedule follows the tokens: a cosine from 1e-2 to 1e-3 over six iterations, whatever was skipped.
    rates = [row["learning-rate"] for row in rows]
    assert all(one > other for one, other in itertools.pairwise(rates))

    skipped = [row for row in ranks[0]["rows"] if row["kind"] == "skipped"]
    assert [row["iteration"] for row in skipped] == [3, 4]
    assert [row["samples"] for row in skipped] == [list(range(16, 24)), list(range(24, 32))]
    wanted = {"lm loss", "grad-norm"} if losses else {"grad-norm"}
    assert set(skipped[0]["reason"]) == wanted
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text, "every line is JSON to any reader"


def test_a_teacher_that_is_trained_and_cannot_step_counts(tmp_path: Path) -> None:
    """Its gradient norm alone is none: the step is written down, no loss was bad, and every line is JSON."""
    damage = {"what": "teacher", "rank": 0, "at": [3, 4], "value": float("inf")}
    rows = run("1", tmp_path, damage)[0]["rows"]
    assert [row["number of skipped iterations"] for row in rows if row["kind"] == "train"] == [0, 0, 1, 2, 2, 2]
    assert not any(row["number of nan iterations"] for row in rows if row["kind"] == "train")
    assert [row["reason"] for row in rows if row["kind"] == "skipped"] == [{"teacher grad-norm": "inf"}] * 2
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


def test_so_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """The third of three; two before it, with a good one between, do not count."""
    damage = {"what": "loss", "rank": 1, "at": [1, 3, 4, 5]}
    with pytest.raises(
        RankError, match=r"DivergedError: iteration 5, samples 32-39: lm loss is nan, .*3 iterations in a row"
    ):
        run("DP2", tmp_path, damage, train={"max_skipped_iterations": 3, "save_interval": 2})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["kind"] == "skipped"] == [1, 3, 4, 5]


@pytest.mark.parametrize("layout", [pytest.param("1", marks=pytest.mark.slow), "DP2"])
def test_a_save_before_the_first_good_step(layout: str, tmp_path: Path) -> None:
    """Saved after each of two skipped steps that are the first of all; what goes on from there is the whole run."""
    damage = {"what": "loss", "rank": 0, "at": [1, 2]}
    settings = {"train": {"save_interval": 1}}
    whole = run(layout, tmp_path / "whole", damage, **settings)
    with pytest.raises(RankError, match="iteration 2"):
        run(layout, tmp_path / "cut", damage, train={"save_interval": 1, "max_skipped_iterations": 2})
    resumed = run(layout, tmp_path / "cut", {**damage, "at": [2]}, **settings)
    for one, other in zip(whole, resumed, strict=True):
        assert one["digests"][2:] == other["digests"][1:]
    rows = [row for row in whole[0]["rows"] if row["kind"] == "train"]
    assert [row["number of skipped iterations"] for row in rows] == [1, 2, 2, 2, 2, 2]


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    """Saved within a row of skipped steps, stopped, and started again: the counts and the row go on."""
    settings = {"train": {"max_skipped_iterations": 3, "save_interval": 2}}
    with pytest.raises(RankError, match="iteration 5"):
        run("1", tmp_path, {"what": "loss", "rank": 0, "at": [3, 4, 5]}, **settings)
    # From iteration 4, two skipped steps behind it: one more ends it, none more does not.
    with pytest.raises(RankError, match="iteration 5, samples 32-39"):
        run("1", tmp_path, {"what": "loss", "rank": 0, "at": [5]}, **settings)
    rows = run("1", tmp_path, {"what": "loss", "rank": 0, "at": [6]}, **settings)[0]["rows"]
    assert [(row["iteration"], row["number of skipped iterations"]) for row in rows if row["kind"] == "train"][-2:] == [
        (5, 2),
        (6, 3),
    ]
