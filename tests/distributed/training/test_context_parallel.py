"""Sequences cut over ranks: attention, loss, gradients and training are those of whole sequences.

Attention against dense float64. Models in fp32 against one rank that holds everything; the same numbers summed in
another order leave about 1e-7 in a loss and 1e-6 in a gradient's norm, a wrong factor of the context size or a chunk
in the wrong place 0.1 and more. At 4 ranks per sequence and more the layouts of the issue: with TP, PP, SP and DP.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig, check_sequence
from minitron_mcore.runtime.groups import context_part, held_chunks, in_order
from tests.distributed.models import (
    SEQUENCE,
    assemble,
    gather_named,
    global_batch,
    relative_error,
    start_layout,
    tiny,
)
from tests.distributed.ranks import run_on_ranks
from tests.distributed.state_loss_problem import CASES, solve_on_rank

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "CP2": (2, {"context": 2}),
    "CP2-TP2": (4, {"context": 2, "tensor": 2}),
    "CP2-TP2-SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "CP2-PP2": (4, {"context": 2, "pipeline": 2}),
    "CP2-DP2": (4, {"context": 2}),
}
STEPS = 3


def test_every_token_is_held_once_and_order_comes_back() -> None:
    for size in (1, 2, 3, 4):
        whole = torch.arange(24)
        parts = [context_part(whole, 0, rank, size) for rank in range(size)]
        assert sorted(torch.cat(parts).tolist()) == whole.tolist()
        assert sorted(chunk for rank in range(size) for chunk in held_chunks(rank, size)) == list(range(2 * size))
        if size > 1:
            assert in_order(torch.cat(parts), size).tolist() == whole.tolist()
            # Causal work, the sum of positions, is shared evenly.
            assert len({int(part.sum()) for part in parts}) == 1


@pytest.mark.parametrize(
    ("length", "parallel", "words"),
    [
        (18, {"context": 2}, "data.sequence_length=18 is not a multiple of 2 x parallel.context=2 = 4 (18 / 4 = 4.5)"),
        (
            12,
            {"context": 2, "tensor": 2, "sequence": True},
            "not a multiple of 2 x parallel.context=2 x parallel.tensor=2 = 8 (12 / 8 = 1.5), as parallel.sequence=",
        ),
    ],
)
def test_a_length_that_does_not_divide_is_refused(length: int, parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_sequence(length, ParallelConfig(**parallel))
    assert words in str(caught.value)
    check_sequence(16, ParallelConfig(**parallel))


def attend_on_rank(size: int, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's part of the output, and of the gradients of query, key and value, for the given output gradient."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType

    from minitron_mcore.model.gpt import transformer_config
    from minitron_mcore.model.specs import SDPACoreAttention

    layout = start_layout({"context": size}, size)
    rank = parallel_state.get_context_parallel_rank()
    attention = SDPACoreAttention(transformer_config(tiny("llama"), layout, "fp32"), attn_mask_type=AttnMaskType.causal)
    *inputs, gradient = (context_part(part, 0, rank, size).float() for part in parts)
    query, key, value = (part.requires_grad_() for part in inputs)
    output = attention(query, key, value, None)
    output.backward(gradient)
    assert query.grad is not None and key.grad is not None and value.grad is not None
    return [output, query.grad, key.grad, value.grad]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_attention_against_dense_float64(size: int) -> None:
    """Grouped queries, s 24, b 2, 6 heads on 2 groups, d 16: output and gradients, each rank its part."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((24, 2, 6, 16), (24, 2, 2, 16), (24, 2, 2, 16), (24, 2, 6 * 16))
    query, key, value, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    ranks = run_on_ranks(attend_on_rank, size, size, [query, key, value, gradient])

    query, key, value = (part.requires_grad_() for part in (query, key, value))
    scores = torch.einsum("sbgqd,tbgd->bgqst", query.unflatten(2, (2, 3)), key) / math.sqrt(16)
    future = torch.ones(24, 24, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    output = torch.einsum("bgqst,tbgd->sbgqd", weights, value).flatten(2)
    output.backward(gradient)
    assert query.grad is not None and key.grad is not None and value.grad is not None
    for number, expected in enumerate((output.detach(), query.grad, key.grad, value.grad)):
        for rank, parts in enumerate(ranks):
            assert relative_error(parts[number], context_part(expected, 0, rank, size)) <= 1e-6, (number, rank)


def build_on_rank(parallel: dict[str, Any], world_size: int, teacher: bool) -> tuple[Any, Any, Any]:
    """(models, objective, training section); the objective distils from a deeper, wider teacher where asked."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.config import TrainConfig

    layout = start_layout(parallel, world_size)
    student = tiny("llama")
    objective = Objective(LossSettings(vocab_size=student.vocab_size, chunk_tokens=24))
    if teacher:
        wide = student.replace(hidden_size=64, num_layers=6, ffn_hidden_size=128)
        chunks = build_model(wide, layout, "fp32", trainable=False)
        initialize(chunks, wide, seed=5)
        objective = Objective(
            LossSettings(vocab_size=student.vocab_size, chunk_tokens=24, lm_weight=0.3, kd_weight=1.0),
            teacher=Teacher(chunks, wide),
        )
    models = build_model(student, layout, "fp32")
    initialize(models, student, seed=11)
    return models, objective, TrainConfig(lr=1e-2, min_lr=1e-3, tokens=20 * 8 * SEQUENCE)


def read_batch(seed: int = 3) -> Any:
    """This rank's part of the global batch, as the readers give it."""
    from megatron.core import parallel_state

    from minitron_mcore.model.microbatch import to_device

    mine = global_batch(tiny("llama").vocab_size, seed)[parallel_state.get_data_parallel_rank() :]
    return [to_device(part) for part in mine[:: parallel_state.get_data_parallel_world_size()]]


def train_on_rank(parallel: dict[str, Any], world_size: int, teacher: bool, save: str | None = None) -> dict[str, Any]:
    """Loss and gradients of a first batch, then STEPS of training; saved to `save` after the first, where given."""
    from megatron.core.distributed import finalize_model_grads

    from minitron_mcore.checkpoint.store import save_state, training_state
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    models, objective, train = build_on_rank(parallel, world_size, teacher)
    chunks = wrap_model(models)
    optimizer = build_optimizer(chunks, train, "fp32")
    timetable = plan_timetable(train, SEQUENCE, "train")
    scheduler = build_scheduler(optimizer, train, timetable)
    result: dict[str, Any] = {}
    if save is None:

        def finalize(*args: Any, force_all_reduce: bool = False, **kwargs: Any) -> None:
            finalize_model_grads(*args, force_all_reduce=True, **kwargs)

        for model in models:  # all-reduced, so that every rank holds whole gradients to compare
            model.config.finalize_model_grads_func = finalize
        result["sums"] = objective.run(chunks, read_batch())
        rows: Any = [row for model in models for row in named_parameters(model)]
        result["gradients"] = gather_named([(key, layer, tensor.main_grad) for key, layer, tensor in rows])
        for model in models:
            model.config.finalize_model_grads_func = finalize_model_grads
    result["history"] = []
    for step in range(STEPS):
        result["history"].append(
            train_step(Trained(chunks, optimizer, scheduler), objective, timetable.at(step).shape, read_batch(step))
        )
        if save is not None and step == 0:
            state = training_state(chunks, optimizer, scheduler, {"iteration": 1}, is_loading=False)
            save_state(Path(save), 1, state, start())
    return result


@cache
def trained(layout: str, teacher: bool) -> dict[str, Any]:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(train_on_rank, world_size, parallel, world_size, teacher)
    for rank in ranks:
        assert rank["sums"] == ranks[0]["sums"], "every rank must report the same loss"
    return {**ranks[0], "gradients": assemble([rank["gradients"] for rank in ranks], tiny("llama"))}


@pytest.mark.parametrize(
    ("layout", "teacher"),
    [
        *((layout, False) for layout in ("CP2-PP2", "CP2-DP2")),
        *((layout, True) for layout in ("CP2", "CP2-TP2-SP")),
        # With a teacher it is as above, and more.
        *(pytest.param(layout, False, marks=pytest.mark.slow) for layout in ("CP2", "CP2-TP2", "CP2-TP2-SP")),
    ],
)
def test_cut_sequences_train_alike(layout: str, teacher: bool) -> None:
    single, other = trained("1", teacher), trained(layout, teacher)
    assert other["sums"]["num_tokens"] == single["sums"]["num_tokens"]
    for name, mean in single["sums"].items():
        assert other["sums"][name] == pytest.approx(mean, rel=1e-5), name
    assert set(other["gradients"]) == set(single["gradients"])
    for name, value in single["gradients"].items():
        assert float(value.norm()) > 0
        assert relative_error(other["gradients"][name], value) <= 1e-5, name
    compare_steps(other["history"], single["history"])


def compare_steps(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["lm loss"] == pytest.approx(other["lm loss"], rel=1e-5)
        assert mine["grad-norm"] == pytest.approx(other["grad-norm"], rel=1e-3)


@pytest.mark.parametrize(("before", "after"), [("CP2", "1"), ("1", "CP2")])
def test_a_checkpoint_resumes_at_another_context_size(before: str, after: str, tmp_path: Path) -> None:
    """Two more steps after the first, as if never stopped; the optimizer's moments travel too."""
    folder = str(tmp_path / "run")
    (wide, there), (other, here) = LAYOUTS[before], LAYOUTS[after]
    whole = run_on_ranks(train_on_rank, wide, there, wide, False, save=folder)[0]["history"]
    resumed = run_on_ranks(resume_on_rank, other, here, other, folder)[0]
    compare_steps(resumed, whole[1:])


def resume_on_rank(parallel: dict[str, Any], world_size: int, folder: str) -> list[dict[str, float]]:
    from minitron_mcore.checkpoint.store import load_training_state
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    models, objective, train = build_on_rank(parallel, world_size, teacher=False)
    chunks = wrap_model(models)
    optimizer = build_optimizer(chunks, train, "fp32")
    timetable = plan_timetable(train, SEQUENCE, "train")
    scheduler = build_scheduler(optimizer, train, timetable)
    load_training_state(Path(folder), 1, chunks, optimizer, scheduler)
    return [
        train_step(Trained(chunks, optimizer, scheduler), objective, timetable.at(step).shape, read_batch(step))
        for step in range(1, STEPS)
    ]


def test_hidden_state_losses_of_cut_sequences() -> None:
    """With a wider teacher and the learned projection between: means, all gradients, the gradient norm."""
    names = ["embedding-mse", "block_output-mse", "mlp_input-mse"]
    (single,) = run_on_ranks(solve_on_rank, 1, names, {}, 1)
    ranks = run_on_ranks(solve_on_rank, 2, names, {"context": 2}, 2)
    for name in names:
        one, student = single[name], CASES[name].student
        for rank in ranks:
            assert rank[name]["means"] == pytest.approx(one["means"], rel=1e-5), name
            assert rank[name]["norm"] == pytest.approx(one["norm"], rel=1e-5), name
            assert relative_error(rank[name]["projection_gradient"], one["projection_gradient"]) <= 1e-5, name
        ours = assemble([rank[name]["gradients"] for rank in ranks], student)
        for key, gradient in assemble([one["gradients"]], student).items():
            assert relative_error(ours[key], gradient) <= 1e-5, (name, key)
