"""Overlapped reductions and gathers give the training that there is without them.

Gradients and weights to 1e-6, by norm, of the largest: sums over two ranks are the same in any order, those over more
ranks or of a bucket cut elsewhere are not. The ranks' parts of the reduced gradients are gathered for that. Buckets are
small, so that each model has several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from tests.distributed.models import global_batch, my_batch, start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks
from tests.distributed.state_loss_problem import CASES, build

INSTANCES = "num_distributed_optimizer_instances"
BUCKET = 5000  # parameters: less than a layer
TIMEOUT = 600.0  # seconds, on a busy machine


@dataclass(frozen=True)
class Problem:
    """A distillation: `states` one of state_loss_problem.CASES, or "" for logits alone."""

    states: str = ""
    window: int = 0
    tied: bool = False
    teaching: bool = False  # the teacher is trained too
    recompute: Recompute = KEEP_ALL
    recompute_loss: bool = False
    bad: tuple[int, ...] = (1, 2)  # steps in which a loss is NaN on one rank
    microbatches: int = 4
    resumes: int = 0  # instances of the optimizer to go on with at the end
    steps: int = 10


def models_of(problem: Problem, layout: Any, train: Any, timetable: Any, folder: Path) -> tuple[Any, Any]:
    """(the student's chunks, the objective), not yet wrapped."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.config import CorrectConfig
    from minitron_mcore.training.teaching import TrainedTeacher

    if problem.states:
        return build(CASES[problem.states], layout, recompute=problem.recompute)
    student = tiny("llama", untie_embeddings_and_output_weights=not problem.tied)
    wide = student.replace(hidden_size=64, ffn_hidden_size=128)
    frozen = build_model(wide, layout, "fp32", trainable=False)
    initialize(frozen, wide, seed=5)
    teacher = Teacher(frozen, wide)
    if problem.teaching:
        own = {
            name: getattr(train, name) for name in ("overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size")
        }
        correct = CorrectConfig(lr=2e-3, min_lr=1e-3, global_batch_size=train.global_batch_size, **own)
        teacher = TrainedTeacher(teacher, correct, timetable, folder, lambda tokens: None)
    models = build_model(student, layout, "fp32", recompute=problem.recompute)
    initialize(models, student, seed=11)
    settings = LossSettings(
        student.vocab_size, lm_weight=0.3, kd_weight=1.0, chunk_tokens=24, recompute=problem.recompute_loss
    )
    return models, Objective(settings, teacher)


def gather_gradients(chunks: Any) -> None:
    """Put every rank's part of the gradients in place of what it has of the others': the optimizer reads its own."""
    for bucket in (bucket for chunk in chunks for group in chunk.bucket_groups for bucket in group.buckets):
        group = chunks[0].intra_dp_cp_group
        part = bucket.grad_data.chunk(group.size())[group.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, part, group=group)


class Watched:
    """A training whose steps keep their gradients, and record in what order they reduce and run backward passes."""

    def __init__(self, trained: Any, models: list[Any], overlapped: bool) -> None:
        from minitron_mcore.distillation.states.projection import finalize_gradients

        self.trained, self.models = trained, models
        self.events: list[str] = []
        self.gradients: list[list[torch.Tensor]] = []

        def finalize(chunks: Any, *args: Any, **kwargs: Any) -> None:
            finalize_gradients(chunks, *args, **kwargs)
            gather_gradients(chunks)
            self.gradients.append([p.main_grad.clone() for model in models for p in model.parameters()])

        config = models[0].config
        config.finalize_model_grads_func = finalize
        assert (config.grad_sync_func is not None) == overlapped

    def record(self, patch: pytest.MonkeyPatch, owner: Any, name: str, begins: str, ends: str = "") -> None:
        original = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.events.append(begins)
            found = original(*args, **kwargs)
            self.events += [ends] if ends else []
            return found

        patch.setattr(owner, name, recorded)

    def under_way(self) -> list[bool]:
        """Of each bucket, whether its weights are on their way."""
        return [group.param_gather_handle is not None for c in self.trained.chunks for group in c.bucket_groups]

    def weights(self) -> list[torch.Tensor]:
        from minitron_mcore.runtime.overlap import finish_gathering

        finish_gathering(self.trained.chunks)
        return [parameter.detach().clone() for model in self.models for parameter in model.parameters()]


def batch_on_rank(problem: Problem, step: int) -> list[Any]:
    from megatron.core import parallel_state

    from minitron_mcore.model.microbatch import on_this_context_rank

    parts = my_batch(global_batch(1003, seed=step, microbatches=problem.microbatches))
    batch = [on_this_context_rank(part) for part in parts]
    if step in problem.bad and parallel_state.get_data_parallel_rank() == 0:
        batch[-1] = replace(batch[-1], loss_mask=batch[-1].loss_mask * float("nan"))
    return batch


def train_on_rank(
    problem: Problem, parallel: dict[str, Any], world_size: int, folder: str, overlapped: bool
) -> dict[str, Any]:
    """Rows, gradients, weights now and then, and the order of what a step does."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.pipeline_parallel import schedules

    from minitron_mcore.runtime.overlap import finish_gathering
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    layout = start_layout(parallel, world_size)
    shape: dict[str, Any] = {"global_batch_size": 2 * problem.microbatches, "micro_batch_size": 2}
    keys: dict[str, Any] = {"overlap_grad_reduce": overlapped, "overlap_param_gather": overlapped}
    # With a small eps a gradient of nothing but rounding would move its weight as far as any other.
    adam: dict[str, Any] = {"lr": 2e-3, "min_lr": 1e-3, "clip_grad": 0.5, "adam_eps": 1e-2}
    train = TrainConfig(**shape, **keys, **adam, ddp_bucket_size=BUCKET if overlapped else None)
    timetable = steady(train, problem.steps)
    models, objective = models_of(problem, layout, train, timetable, Path(folder))
    objective.window = problem.window
    trained = Trained.of(models, train, timetable)
    watched = Watched(trained, models, overlapped)
    rows, weights, orders, under_way = [], [], [], []
    with pytest.MonkeyPatch.context() as patch:
        watched.record(patch, _ParamAndGradBucketGroup, "start_grad_sync", "reduce")
        watched.record(patch, schedules, "backward_step", "backward", "end")
        if problem.teaching:
            watched.record(patch, objective.teacher, "run_ahead", "teacher", "student")
        for step in range(problem.steps):
            watched.events.clear()
            rows.append(train_step(trained, objective, timetable.at(step).shape, batch_on_rank(problem, step)))
            if problem.teaching:
                rows[-1] |= objective.teacher.step(timetable.at(step).shape.tokens)
            orders.append(list(watched.events))
            under_way.append(watched.under_way())
            if step % 3 == 2:  # as a save does; in the other steps the next forward pass waits
                weights.append(watched.weights())
    weights.append(watched.weights())
    if problem.teaching:
        finish_gathering(objective.teacher.trained.chunks)
        weights.append([p.detach().clone() for chunk in objective.teacher.chunks for p in chunk.parameters()])
    resumed = 0.0
    if problem.resumes:
        resumed = resume_on_rank(trained, problem, objective, parallel, train, timetable, Path(folder))
    return {
        "rows": rows,
        "gradients": watched.gradients,
        "weights": weights,
        "orders": [order[order.index("student") + 1 :] if problem.teaching else order for order in orders],
        "under way": under_way,
        "resumed": resumed,
    }


def resume_on_rank(
    trained: Any, problem: Problem, objective: Any, parallel: dict[str, Any], train: Any, timetable: Any, folder: Path
) -> float:
    """Saved while the weights are on their way, and loaded where nothing is overlapped, at `resumes` instances of the
    optimizer: how far the weights differ by, at most, after another step of both."""
    from minitron_mcore.checkpoint.store import load_training_state
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.overlap import finish_gathering
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.step import Trained, train_step

    student, at, runtime = tiny("llama"), problem.steps - 1, start()
    folder = folder / f"{trained.chunks[0].ddp_config.num_distributed_optimizer_instances}"
    trained.save(folder, {"iteration": at}, runtime, student, lambda: None)
    train = replace(train, overlap_grad_reduce=False, overlap_param_gather=False, ddp_bucket_size=None)
    weights = []
    for is_fresh in (False, True):
        if is_fresh:
            layout = start_layout({**parallel, INSTANCES: problem.resumes}, runtime.world_size)
            models, objective = models_of(problem, layout, train, timetable, folder)
            initialize(models, student, seed=99)
            trained = Trained.of(models, train, timetable)
            load_training_state(folder, at, *trained)
        batch = my_batch(global_batch(1003, seed=99, microbatches=problem.microbatches))
        train_step(trained, objective, timetable.at(at).shape, batch)
        finish_gathering(trained.chunks)
        weights.append([parameter.detach() for parameter in trained.chunks[0].parameters()])
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(*weights, strict=True))


def compare_on_rank(problems: dict[str, Problem], parallel: dict[str, Any], world_size: int, folder: str) -> Any:
    return {
        name: [train_on_rank(problem, parallel, world_size, folder, overlapped) for overlapped in (False, True)]
        for name, problem in problems.items()
    }


def assert_equal_runs(plain: dict[str, Any], overlapped: dict[str, Any], problem: Problem) -> None:
    for number, (ours, theirs) in enumerate(zip(overlapped["rows"], plain["rows"], strict=True)):
        for name, value in theirs.items():  # a norm of fp32 numbers is summed by parts of buckets
            rel = 1e-5 if name.endswith("grad-norm") else 1e-6
            assert ours[name] == pytest.approx(value, rel=rel, abs=1e-9, nan_ok=True), (number, name)
        assert any(value != value for value in ours.values()) == (number in problem.bad), ours
    for kind in ("gradients", "weights"):
        assert len(overlapped[kind]) == len(plain[kind]) > 1
        for number, (ours, theirs) in enumerate(zip(overlapped[kind], plain[kind], strict=True)):
            if kind == "gradients" and number in problem.bad:
                continue
            # By norm: ranks add up parts of buckets in another order, which single elements of small ones show.
            scale = max((float(tensor.norm()) for tensor in theirs), default=1.0)
            for our, their in zip(ours, theirs, strict=True):
                assert float((our - their).norm()) <= 1e-6 * scale, (kind, number)


def reduced_early(order: list[str]) -> int:
    """Reductions started before the last backward pass has ended."""
    last = len(order) - 1 - order[::-1].index("end")
    return order[:last].count("reduce")


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP4": {},
    "TP2-DP2": {"tensor": 2},
    "TP2-SP-DP2": {"tensor": 2, "sequence": True},
    "CP2-DP2": {"context": 2},
    "PP2-DP2": {"pipeline": 2},
    "PP2-VPP2-DP2": {"pipeline": 2, "virtual_pipeline": 2},
}
PROBLEMS = {
    "states, windows, recomputed": Problem("all-mse", window=1, recompute=Recompute("selective")),
    "tied, a teacher in training": Problem(tied=True, teaching=True),
    "loss swept in backward, resumed": Problem(recompute_loss=True, window=1, resumes=1),
}


def check(problems: dict[str, Problem], parallel: dict[str, Any], world_size: int, folder: Path) -> None:
    for rank in run_on_ranks(compare_on_rank, world_size, problems, parallel, world_size, str(folder), timeout=TIMEOUT):
        for name, (plain, overlapped) in rank.items():
            assert_equal_runs(plain, overlapped, problems[name])
            assert overlapped["resumed"] <= 1e-6 and plain["resumed"] <= 1e-6
            assert not any(map(any, plain["under way"])) and all(map(all, overlapped["under way"])), name
            if "pipeline" in parallel:
                continue
            assert not any(map(reduced_early, plain["orders"])), name
            # In the first step Megatron counts which gradients there are.
            assert all(reduced_early(order) > 3 for order in overlapped["orders"][1:]), name
            for order in overlapped["orders"]:
                assert "reduce" not in order[: len(order) - 1 - order[::-1].index("backward")], name


@pytest.mark.parametrize("steps", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_training_is_the_same_at_two_ranks(steps: int, tmp_path: Path) -> None:
    check({name: replace(problem, steps=steps) for name, problem in PROBLEMS.items()}, {}, 2, tmp_path)


def compare_instances_on_rank(problem: Problem, parallel: dict[str, Any], folder: str) -> list[Any]:
    """One instance of the optimizer, then two, then two that are overlapped."""
    runs = [(1, False), (2, False), (2, True)]
    return [train_on_rank(problem, {**parallel, INSTANCES: count}, 4, folder, each) for count, each in runs]


def check_instances(problem: Problem, parallel: dict[str, Any], folder: Path) -> None:
    found = run_on_ranks(compare_instances_on_rank, 4, problem, parallel, str(folder), timeout=TIMEOUT)
    for one, two, overlapped in found:
        for run in (two, overlapped):
            assert_equal_runs(one, run, problem)
            assert run["resumed"] <= 1e-6
        assert not any(map(any, two["under way"])) and all(map(all, overlapped["under way"]))
        assert "pipeline" in parallel or all(reduced_early(order) > 3 for order in overlapped["orders"][1:])


@pytest.mark.parametrize("resumes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_instances_of_the_optimizer_train_as_one(resumes: int, tmp_path: Path) -> None:
    """DP 4: saved at two instances, and gone on with at `resumes`."""
    check_instances(Problem(bad=(1,), steps=3, resumes=resumes), {}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["CP2-DP2", "PP2-DP2", "PP2-VPP2-DP2"])
def test_instances_train_as_one_at_other_layouts(layout: str, tmp_path: Path) -> None:
    states = "block_output-mse" if layout == "CP2-DP2" else "all-mse"  # attention relations need whole sequences
    check_instances(Problem(states, window=2, microbatches=8), LAYOUTS[layout], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PROBLEMS)[:2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_at_other_layouts(layout: str, name: str, tmp_path: Path) -> None:
    problem = replace(PROBLEMS[name], microbatches=8)
    if "pipeline" in LAYOUTS[layout]:
        problem = replace(problem, window=problem.window and 2)
    if "context" in LAYOUTS[layout] and problem.states:  # attention relations need whole sequences
        problem = replace(problem, states="block_output-mse")
    check({name: problem}, LAYOUTS[layout], 4, tmp_path)
