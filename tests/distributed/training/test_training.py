"""The trained model does not depend on the layout: loss, every gradient, the optimizer, training.

From one model (same seed, same global parameters), fp32, one kind of block at seven layouts and the others at two;
three steps, one of them after the warm-up (ten, and every kind at every layout, in the slow suite). Tolerances: layouts
sum the same numbers in another order, which in fp32 leaves about 1e-7 in a loss and 1e-6 in a gradient's norm; a wrong
factor of TP, PP or DP leaves 0.5 or more. Elementwise comparison of gradients is meaningless near zero.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from minitron_mcore.layout import parameter_table
from tests.distributed.alignment.problems import gradients_of, transformers_model
from tests.distributed.dense_reference import DenseModel
from tests.distributed.models import (
    LAYOUTS,
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

FAMILIES = ("llama", "nemotron", "qwen", "llama-tied", "llama-distill", "nemotron-distill")
OTHERS = [name for name in LAYOUTS if name != "1"]
STEPS, FEWER_STEPS = 10, 3
# 5 layers: 3 + 2 over two stages, 2, 1, 1, 1 over two stages of two chunks each.
QUICK = [
    *(("llama", name) for name in OTHERS),
    # What differs between kinds is how weights are cut, and, of a tied head, that two stages hold it.
    *((family, name) for family in ("nemotron", "qwen") for name in ("TP2-SP", "TP2-PP2")),
    *(("llama-tied", name) for name in ("TP2-PP2", "PP2-VPP2")),
    ("nemotron-distill", "TP2-PP2"),
    *(("llama-uneven", f"PP2{v}") for v in ("", "-VPP2")),
]
# test_engine.py distils at every layout.
SLOW = [
    *((family, name) for family in FAMILIES if family != "llama-distill" for name in OTHERS),
    *(("llama-uneven", f"PP2{v}") for v in ("", "-VPP2")),
]
CASES = [
    *((family, name, FEWER_STEPS) for family, name in QUICK),
    *(pytest.param(*pair, STEPS, marks=pytest.mark.slow) for pair in SLOW),
]


def architecture_of(family: str) -> Any:
    name, _, variant = family.partition("-")
    if name == "qwen":  # Qwen3's norms of queries and keys, and Qwen2's biases besides
        return tiny("qwen3", add_qkv_bias=True)
    if variant == "uneven":
        return tiny(name, num_layers=5)
    return tiny(name, untie_embeddings_and_output_weights=variant != "tied")


def teacher_architecture(student: Any) -> Any:
    return student.replace(hidden_size=64, num_layers=8, ffn_hidden_size=128)


def draw_plain_weights(architecture: Any, seed: int) -> dict[Any, torch.Tensor]:
    """What `initialize` fills in, globally."""
    from minitron_mcore.model.initialize import draw

    return {
        (parameter.key, layer): draw(parameter, architecture, seed, layer)
        for parameter in parameter_table(architecture)
        for layer in (range(architecture.num_layers) if parameter.per_layer else [None])
    }


def objective_of(family: str, layout: Any) -> Any:
    """Next-token loss, or both losses at temperature 2 under a wider teacher of the other depth."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize

    student = architecture_of(family)
    if not family.endswith("-distill"):
        return Objective(LossSettings(vocab_size=student.vocab_size, chunk_tokens=24))
    architecture = teacher_architecture(student)
    chunks = build_model(architecture, layout, "fp32", trainable=False)
    initialize(chunks, architecture, seed=5)
    return Objective(
        LossSettings(vocab_size=student.vocab_size, chunk_tokens=24, lm_weight=0.3, kd_weight=1.0, temperature=2.0),
        teacher=Teacher(chunks, architecture),
    )


def train_on_rank(family: str, parallel: dict[str, Any], world_size: int, steps: int) -> dict[str, Any]:
    """First step's loss and gradients, an optimizer step on given gradients, then `steps` of training."""
    from megatron.core.distributed import finalize_model_grads

    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import draw, initialize, named_parameters, take_shard
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    layout = start_layout(parallel, world_size)
    architecture = architecture_of(family)
    objective = objective_of(family, layout)
    train = TrainConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=2, global_batch_size=8, micro_batch_size=2)
    timetable = steady(train, iterations=20)

    def build() -> tuple[Any, Any, Any, Any]:
        models = build_model(architecture, layout, "fp32")
        initialize(models, architecture, seed=11)
        chunks = wrap_model(models)
        optimizer = build_optimizer(chunks, train, "fp32")
        return models, chunks, optimizer, build_scheduler(optimizer, train, timetable)

    models, chunks, optimizer, scheduler = build()
    rows: Any = [row for model in models for row in named_parameters(model)]
    weights = gather_named(rows)

    # All-reduced, not reduce-scattered, so that every rank holds whole gradients to compare.
    def finalize(*args: Any, force_all_reduce: bool = False, **kwargs: Any) -> None:
        finalize_model_grads(*args, force_all_reduce=True, **kwargs)

    for model in models:
        model.config.finalize_model_grads_func = finalize
    batch = my_batch(global_batch(architecture.vocab_size))
    sums = objective.run(chunks, batch)
    gradients = gather_named([(key, layer, tensor.main_grad) for key, layer, tensor in rows])

    # The optimizer, fed the same gradients everywhere.
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    table = {parameter.key: parameter for parameter in parameter_table(architecture)}
    for key, layer, tensor in rows:
        parameter = table[key]
        whole = draw(parameter, architecture, 99, layer) + 0.01
        tensor.main_grad.copy_(take_shard(whole, parameter, architecture, rank, size))
    scheduler.step(increment=timetable.at(0).shape.tokens)
    _, fed_norm, _ = optimizer.step()
    stepped = gather_named(rows)

    # `steps` from the start.
    _, chunks, optimizer, scheduler = build()
    history = [
        train_step(
            Trained(chunks, optimizer, scheduler),
            objective,
            timetable.at(step).shape,
            my_batch(global_batch(architecture.vocab_size, step)),
        )
        for step in range(steps)
    ]
    return {
        "sums": sums,
        "weights": weights,
        "gradients": gradients,
        "fed_norm": float(fed_norm),
        "stepped": stepped,
        "history": history,
    }


@cache
def trained(family: str, layout: str, steps: int) -> dict[str, Any]:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(train_on_rank, world_size, family, parallel, world_size, steps)
    architecture = architecture_of(family)
    for rank in ranks:
        assert rank["sums"] == ranks[0]["sums"], "every rank must report the same loss"
    return {
        **ranks[0],
        **{
            part: assemble([rank[part] for rank in ranks], architecture) for part in ("weights", "gradients", "stepped")
        },
    }


@pytest.mark.parametrize(("family", "layout", "steps"), CASES)
def test_layout_does_not_matter(family: str, layout: str, steps: int) -> None:
    single, other = trained(family, "1", steps), trained(family, layout, steps)
    assert len(other["history"]) == len(single["history"]) == steps
    for name, value in single["weights"].items():
        torch.testing.assert_close(other["weights"][name], value, rtol=0, atol=0, msg=f"initial {name}")

    assert other["sums"]["num_tokens"] == single["sums"]["num_tokens"]
    for name, mean in single["sums"].items():
        assert mean > 0 or name == "top-1 agreement"  # of random models, it may well be none
        assert other["sums"][name] == pytest.approx(mean, rel=1e-5), name
    assert set(other["gradients"]) == set(single["gradients"])
    for name, value in single["gradients"].items():
        assert relative_error(other["gradients"][name], value) <= 1e-5, name

    assert other["fed_norm"] == pytest.approx(single["fed_norm"], rel=1e-6)
    for name, value in single["stepped"].items():
        assert relative_error(other["stepped"][name], value) <= 1e-6, name

    for ours, theirs in zip(other["history"], single["history"], strict=True):
        for name in single["sums"].keys() - {"num_tokens"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-3)
        assert ours["learning-rate"] == theirs["learning-rate"]


@pytest.mark.parametrize("family", FAMILIES)
def test_against_dense_float64(family: str) -> None:
    """Loss and every gradient of the first step against formulas written out on the global weights, in float64."""
    single, student = trained(family, "1", FEWER_STEPS), architecture_of(family)
    model = DenseModel(student, single["weights"]).requires_grad()
    teacher = None
    if family.endswith("-distill"):
        wide = teacher_architecture(student)
        teacher = DenseModel(wide, draw_plain_weights(wide, seed=5))
    sums = dict.fromkeys(("lm loss", "logits distillation loss", "teacher lm loss", "top-1 agreement"), 0.0)
    total = torch.zeros((), dtype=torch.float64)
    batch = global_batch(student.vocab_size)
    count = sum(float(part["loss_mask"].sum()) for part in batch)
    for part in batch:
        mask = part["loss_mask"].double()
        logits = model.forward(part["tokens"])["logits"][..., : student.vocab_size]
        lm_loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part["labels"], reduction="none")
        sums["lm loss"] += float((lm_loss.detach() * mask).sum()) / count
        loss = lm_loss
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher.forward(part["tokens"])["logits"][..., : student.vocab_size]
            of_teacher = torch.nn.functional.cross_entropy(
                teacher_logits.transpose(1, 2), part["labels"], reduction="none"
            )
            sums["teacher lm loss"] += float((of_teacher * mask).sum()) / count
            agree = logits.argmax(-1) == teacher_logits.argmax(-1)
            sums["top-1 agreement"] += float((agree * mask).sum()) / count
            target = (teacher_logits / 2).log_softmax(-1)
            kl = (target.exp() * (target - (logits / 2).log_softmax(-1))).sum(-1) * 4
            sums["logits distillation loss"] += float((kl.detach() * mask).sum()) / count
            loss = 0.3 * lm_loss + kl
        total = total + (loss * mask).sum() / count
    total.backward()
    for name, value in single["sums"].items():
        assert value == pytest.approx(sums.get(name, count), rel=1e-5), name
    for name, gradient in single["gradients"].items():
        expected = model.weights[name].grad
        assert expected is not None
        assert relative_error(gradient, expected) <= 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns(family: str) -> None:
    """A test above that compares nothing with nothing would pass on a model that does not train."""
    single = trained(family, "1", FEWER_STEPS)
    assert all(row["grad-norm"] > 0 for row in single["history"])
    assert all(float(value.norm()) > 0 for value in single["gradients"].values())


@pytest.mark.parametrize("layout", ["1", "TP2", "TP2-SP", "PP2"])
def test_against_transformers(layout: str) -> None:
    """Loss and every gradient of the first step, by chunks of tokens here, from whole logits there."""
    ours, student = trained("llama", layout, FEWER_STEPS), architecture_of("llama")
    model = transformers_model(student, ours["weights"])
    batch = global_batch(student.vocab_size)
    count = sum(float(part["loss_mask"].sum()) for part in batch)
    total = torch.zeros(())
    for part in batch:
        logits = model(part["tokens"]).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part["labels"], reduction="none")
        total = total + (loss * part["loss_mask"]).sum() / count
    total.backward()
    assert ours["sums"]["lm loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, expected in gradients_of(model, student).items():
        assert relative_error(ours["gradients"][name], expected) <= 1e-5, name
