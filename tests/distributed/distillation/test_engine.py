"""The distillation engine does not depend on how it is run: layout, micro-batch, chunks, windows, where the teacher is.

Everything starts from two checkpoints written by one rank. Against one rank with a resident teacher, fp32, over four
steps through both pipeline schedules and three of what is unlike otherwise (ten of all in the slow suite): losses agree
to 1e-5 and gradient norms to 1e-3 (relative); the first step's gradients to 1e-5 by relative Frobenius norm. The same
numbers are summed in other orders, which leaves about 1e-6; a wrong factor leaves 0.5 or more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.models import (
    assemble,
    gather_named,
    global_batch,
    my_batch,
    relative_error,
    start_layout,
    steady,
    tiny,
)
from tests.distributed.ranks import run_on_ranks

STEPS, SAMPLES = 10, 8
# The first, at the start of the warm-up, moves nothing; what the others move shows in the steps after them.
LONGER, FEWER_STEPS = 4, 3
LONG = ("PP2-VPP2", "TP2-PP2")
TP2, PP2, SP = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence": True}
VPP = {"pipeline": 2, "virtual_pipeline": 2}

# name -> (world size, the student's layout, what else is unlike the base)
VARIANTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2": (2, TP2, {}),
    "PP2": (2, PP2, {}),
    "PP2-VPP2": (2, VPP, {}),
    "TP2-SP": (2, SP, {}),
    "DP2": (2, {}, {}),
    "CP2": (2, {"context": 2}, {}),
    "TP2-PP2": (4, {**TP2, **PP2}, {}),
    "micro-batch 1": (1, {}, {"micro_batch": 1}),
    "micro-batch 4": (1, {}, {"micro_batch": 4}),
    "micro-batch 1, DP2": (2, {}, {"micro_batch": 1}),
    "chunks of 5": (1, {}, {"chunk_tokens": 5}),
    "chunks of 512, TP2": (2, TP2, {"chunk_tokens": 512}),
    "recomputed loss": (1, {}, {"recompute": True}),
    "recomputed loss, TP2-SP": (2, SP, {"recompute": True}),
    "masks of thousandths, PP2-VPP2": (2, VPP, {"mask_scale": 1e-3}),
    "recomputed layers": (1, {}, {"layers": Recompute("full")}),
    "recomputed in pairs, TP2-PP2": (4, {**TP2, **PP2}, {"layers": Recompute("full", "uniform", 2)}),
    "recomputed in part, PP2-VPP2": (2, VPP, {"layers": Recompute("full", "block", 1), "window": 2}),
    "recomputed in part, CP2": (2, {"context": 2}, {"layers": Recompute("full", "block", 3)}),
    "recomputed MLPs, TP2-SP": (2, SP, {"layers": Recompute("selective")}),
    "window 1": (1, {}, {"window": 1}),
    "window 2, PP2-VPP2": (2, VPP, {"window": 2}),
    "window 3, TP2": (2, TP2, {"window": 3}),
    "teacher DP2 beside TP2": (2, TP2, {"teacher": {}}),
    "teacher TP2 beside DP2": (2, {}, {"teacher": TP2}),
    "teacher PP2-VPP2 beside TP2-SP": (2, SP, {"teacher": VPP}),
    "teacher TP2-SP beside PP2, window 2": (2, PP2, {"teacher": SP, "window": 2}),
    "sharded, DP2": (2, {}, {"placement": "sharded"}),
    "offloaded": (1, {}, {"placement": "offloaded"}),
    "offloaded, PP2-VPP2": (2, VPP, {"placement": "offloaded"}),
    "cached": (1, {}, {"cached": True}),
    "cached, TP2-SP, micro-batch 1": (2, SP, {"cached": True, "micro_batch": 1}),
    "cached, PP2-VPP2": (2, VPP, {"cached": True}),
    "cached, DP2": (2, {}, {"cached": True}),
}
# A variant of `make test` splits so too, and differs from the base in one thing more.
COVERED = ("TP2", "PP2", "TP2-SP", "micro-batch 1", "recomputed layers", "window 1", "cached", "cached, DP2")


def architectures() -> tuple[Any, Any]:
    """(student, teacher)."""
    student = tiny("llama")
    return student, student.replace(hidden_size=64, num_layers=8, ffn_hidden_size=128)


def write_on_rank(folder: str) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start

    layout = start_layout({}, 1)
    for seed, (name, architecture) in enumerate(zip(("student", "teacher"), architectures(), strict=True)):
        chunks = build_model(architecture, layout, "fp32")
        initialize(chunks, architecture, seed=11 + seed)
        target = Path(folder) / name
        write_description(target, architecture, lineage={}, recipe="", save_tokenizer=None)
        save_state(target, 0, model_state(as_chunks(chunks)), start())


def cache_on_rank(folder: str) -> None:
    """All logits of the teacher on every step's samples, at temperature 1."""
    from megatron.core import parallel_state

    from minitron_mcore.checkpoint.store import as_chunks
    from minitron_mcore.distillation.cache.draw import make_targets
    from minitron_mcore.distillation.cache.file import encode_targets, token_checksum, write_settings, write_shard
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.schedule import final_hidden_states

    layout = start_layout({}, 1)
    group = parallel_state.get_tensor_model_parallel_group()
    wide = architectures()[1]
    teacher = Teacher.load(Path(folder) / "teacher", 0, wide, layout, "fp32")
    vocab = wide.vocab_size
    settings = {
        "method": "top_k",
        "top_k": vocab,
        "temperature": 1.0,
        "vocab_size": vocab,
        "dtype": "fp32",
        "num_samples": STEPS * SAMPLES,
        "shard_samples": SAMPLES,
        "teacher": {"architecture": wide.to_dict()},
    }
    target = Path(folder) / "cache"
    write_settings(target, settings)
    for step in range(STEPS):
        (batch,) = read_batch(vocab, step, SAMPLES)
        (hidden,) = final_hidden_states(as_chunks(teacher.chunks), [batch])
        targets, _ = make_targets(hidden, teacher.head_weight(), batch.samples, settings, tp_group=group)
        blocks = [
            (encode_targets(of_sample, settings), token_checksum(tokens.numpy()))
            for of_sample, tokens in zip(targets, batch.tokens.cpu(), strict=True)
        ]
        write_shard(target, settings, step, blocks)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("engine"))
    run_on_ranks(write_on_rank, 1, folder)
    run_on_ranks(cache_on_rank, 1, folder)
    return folder


def read_batch(vocab_size: int, step: int, micro_batch: int) -> Any:
    """This rank's part of the step's eight samples, cut into microbatches of the given size."""
    from minitron_mcore.model.microbatch import on_this_context_rank

    parts = global_batch(vocab_size, step)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    whole["samples"] = torch.arange(step * SAMPLES, (step + 1) * SAMPLES)
    cut = [
        {name: value[start : start + micro_batch].contiguous() for name, value in whole.items()}
        for start in range(0, SAMPLES, micro_batch)
    ]
    return [on_this_context_rank(microbatch) for microbatch in my_batch(cut)]


def distil_on_rank(
    parallel: dict[str, Any], world_size: int, folder: str, options: dict[str, Any], loss: dict[str, Any], steps: int
) -> dict[str, Any]:
    """First step's gradients, then `steps` steps from the start: what each reports."""
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.distillation.cache.teacher import CachedTeacher
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.states.projection import finalize_gradients
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    layout = start_layout(parallel, world_size)
    architecture, wide = architectures()
    own = ParallelConfig(**options["teacher"]) if "teacher" in options else None
    placement, precision = options.get("placement", "resident"), options.get("precision", "fp32")
    teacher: Any = (
        CachedTeacher(Path(folder) / "cache", loss["temperature"])
        if "cached" in options
        else Teacher.load(Path(folder) / "teacher", 0, wide, layout, precision, layout=own, placement=placement)
    )
    objective = Objective(
        LossSettings(
            vocab_size=architecture.vocab_size,
            chunk_tokens=options.get("chunk_tokens", 24),
            recompute=options.get("recompute", False),
            **loss,
        ),
        window=options.get("window", 0),
        teacher=teacher,
    )
    micro_batch = options.get("micro_batch", 2)
    train = TrainConfig(
        lr=1e-2, min_lr=1e-3, lr_warmup_iters=1, global_batch_size=SAMPLES, micro_batch_size=micro_batch
    )
    timetable = steady(train, iterations=20)

    def batch(step: int) -> Any:
        parts = read_batch(architecture.vocab_size, step, micro_batch)
        return [replace(part, loss_mask=part.loss_mask * options.get("mask_scale", 1)) for part in parts]

    def build() -> Any:
        models = build_model(architecture, layout, precision, recompute=options.get("layers", KEEP_ALL))
        load_weights(Path(folder) / "student", 0, as_chunks(models), architecture)
        chunks = wrap_model(models)
        optimizer = build_optimizer(chunks, train, precision)
        return models, chunks, optimizer, build_scheduler(optimizer, train, timetable)

    models, chunks, _, _ = build()

    # All-reduced, not reduce-scattered, so that every rank holds whole gradients to compare.
    def finalize(*args: Any, force_all_reduce: bool = False, **kwargs: Any) -> None:
        finalize_gradients(*args, force_all_reduce=True, **kwargs)

    for model in models:
        model.config.finalize_model_grads_func = finalize
    objective.run(chunks, batch(0))
    named: Any = [row for model in models for row in named_parameters(model)]
    rows = [(key, layer, tensor.main_grad) for key, layer, tensor in named]
    gradients = gather_named(rows)

    _, chunks, optimizer, scheduler = build()
    history = [
        train_step(Trained(chunks, optimizer, scheduler), objective, timetable.at(step).shape, batch(step))
        for step in range(steps)
    ]
    return {"gradients": gradients, "history": history}


LOSS = {"lm_weight": 0.3, "kd_weight": 1.0, "temperature": 2.0}


@cache
def base(folder: str) -> dict[str, Any]:
    return collect(run_on_ranks(distil_on_rank, 1, {}, 1, folder, {}, LOSS, STEPS))


def collect(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    for rank in ranks:
        assert rank["history"] == ranks[0]["history"], "every rank must report the same"
    return {**ranks[0], "gradients": assemble([rank["gradients"] for rank in ranks], architectures()[0])}


def assert_same_run(run: dict[str, Any], single: dict[str, Any]) -> None:
    assert set(run["gradients"]) == set(single["gradients"])
    for name, value in single["gradients"].items():
        assert float(value.norm()) > 0, name
        assert relative_error(run["gradients"][name], value) <= 1e-5, name
    for ours, theirs in zip(run["history"], single["history"], strict=False):  # which may have more steps
        for name in ("lm loss", "logits distillation loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("variant", "steps"),
    [
        *((name, LONGER if name in LONG else FEWER_STEPS) for name in VARIANTS if name not in COVERED),
        *(pytest.param(name, STEPS, marks=pytest.mark.slow) for name in VARIANTS),
    ],
)
def test_steps_are_those_of_one_rank(variant: str, steps: int, checkpoints: str) -> None:
    world_size, parallel, options = VARIANTS[variant]
    run = collect(run_on_ranks(distil_on_rank, world_size, parallel, world_size, checkpoints, options, LOSS, steps))
    assert len(run["history"]) == steps <= len(base(checkpoints)["history"])
    assert_same_run(run, base(checkpoints))


def test_it_learns(checkpoints: str) -> None:
    """Equal runs of an engine that does nothing would prove nothing."""
    history = base(checkpoints)["history"]
    assert history[-1]["logits distillation loss"] < 0.9 * history[0]["logits distillation loss"]
