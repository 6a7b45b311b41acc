"""What leaving layers out costs, at every layout and micro-batch size, against a dense float64 model without them.

Tolerance 1e-5 of the largest entry, in fp32, as for the other scores (1e-6 was seen); accuracies are equal.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.importance.scores import TOLERANCE
from tests.distributed.dense_reference import EMBEDDING, FC2, HEAD, PROJ, DenseModel, draw_weights, fill
from tests.distributed.models import LAYOUTS, global_batch, start_layout, tiny
from tests.distributed.ranks import run_on_ranks

METRICS = ("lm_loss", "logit_mse", "normalized_logit_mse", "accuracy", "normalized_accuracy")
LENGTHS = (1, 3)
SEED = 11
# By world size, so that one call of the ranks serves many cases: (family, layout, micro-batch size). One microbatch of
# all eight samples has to be filled up for the interleaved schedule.
CASES = {
    1: [("llama", "1", 1), ("llama", "1", 8), ("nemotron", "1", 2)],
    2: [
        ("llama", "TP2", 2),
        ("narrow", "TP2", 4),
        ("nemotron", "PP2", 2),
        ("llama", "TP2-SP", 2),
        ("llama", "PP2-VPP2", 8),
        ("llama", "PP2-VPP2", 2),
        ("nemotron", "DP2", 4),
    ],
    4: [("llama", "TP2-PP2", 4)],
}
# Dead: its output projections are zero, so that it is an identity.
DEAD = 2


def model_of(family: str) -> Architecture:
    """`narrow`: the second tensor-parallel rank's part of the head is all padding."""
    return tiny("llama", vocab_size=40) if family == "narrow" else tiny(family)


def weights_of(family: str) -> dict[Any, torch.Tensor]:
    """Layers that say so much that choices change without them, but for DEAD, which adds nothing."""
    weights = draw_weights(model_of(family), SEED)
    for (key, layer), value in weights.items():
        if key in (PROJ, FC2):
            weights[key, layer] = 6 * value
    for name in (PROJ, FC2):
        weights[name, DEAD] = torch.zeros_like(weights[name, DEAD])
    return weights


def task_of(vocab_size: int) -> Any:
    """12 questions of 2 or 3 choices, of many lengths; every other question's choices are of one length."""
    from minitron_mcore.evaluation.questions import Question, Task

    generator = torch.Generator().manual_seed(4)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocab_size, (count,), generator=generator).tolist())

    questions = []
    for number in range(12):
        given = draw(1 + number % 5)
        # A context of its own for each choice of some questions, one longer than the other.
        contexts = [given + draw(number // 10 * choice) for choice in range(2 + number % 4 // 3)]
        sequences = tuple(each + draw(2 + number % 2 * choice) for choice, each in enumerate(contexts))
        questions.append(Question(sequences, tuple(map(len, contexts)), number % 2))
    return Task(tuple(questions), "")


def batches_of(vocab_size: int, size: int) -> Any:
    """This data-parallel rank's part of the global batch's eight samples, in microbatches of `size`, in Megatron's
    order; where they run out, uncounted ones stand in."""
    from megatron.core import parallel_state

    from minitron_mcore.model.microbatch import Microbatch

    whole = {name: torch.cat([part[name] for part in global_batch(vocab_size)]) for name in global_batch(vocab_size)[0]}
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    parts = [{name: value[first : first + size] for name, value in whole.items()} for first in range(0, 8, size)]
    while len(parts) % ranks:
        parts.append({**parts[-1], "loss_mask": torch.zeros_like(parts[-1]["loss_mask"])})
    return [Microbatch.of(part) for part in parts[rank::ranks]]


def build(family: str, parallel: Any) -> tuple[Any, Any]:
    from minitron_mcore.model.gpt import build_model

    architecture = model_of(family)
    chunks = build_model(architecture, parallel, "fp32")
    fill(chunks, architecture, weights_of(family))
    return architecture, chunks


def depth_on_rank(world_size: int) -> dict[Any, Any]:
    from minitron_mcore.evaluation.likelihood import log_likelihoods
    from minitron_mcore.importance.depth import measure_depth

    results = {}
    for family, layout, micro_batch_size in CASES[world_size]:
        architecture, chunks = build(family, start_layout(LAYOUTS[layout][1], world_size))
        task = task_of(architecture.vocab_size)
        told: list[tuple[int, int]] = []
        table = measure_depth(
            chunks,
            batches_of(architecture.vocab_size, micro_batch_size),
            architecture,
            METRICS,
            LENGTHS,
            task=task,
            micro_batch_size=micro_batch_size,
            report=lambda *progress, told=told: told.append(progress),  # type: ignore[misc]
        )
        assert told == [(done, 6) for done in range(1, 7)]
        assert all(chunk.training for chunk in chunks), "the model is left as it was"
        likelihoods = log_likelihoods(chunks, task.rows, architecture.vocab_size, micro_batch_size).sums
        # Every id as what follows one context: they share a pass.
        every = [((*task.rows[0][0], number), len(task.rows[0][0])) for number in range(architecture.vocab_size)]
        following = log_likelihoods(chunks, every, architecture.vocab_size, micro_batch_size)
        results[family, layout, micro_batch_size] = (table.whole, table.damage, likelihoods, following)
    return results


def dense_without(family: str, block: range) -> DenseModel:
    """A dense model that never had these layers."""
    architecture = model_of(family)
    kept = [layer for layer in range(architecture.num_layers) if layer not in block]
    weights = {}
    for (key, layer), value in weights_of(family).items():
        if layer is None or layer in kept:
            weights[key, None if layer is None else kept.index(layer)] = value
    return DenseModel(dataclasses.replace(architecture, num_layers=len(kept)), weights)


def dense_likelihoods(model: DenseModel, task: Any) -> list[list[torch.Tensor]]:
    """Log-likelihoods of the scored tokens of every choice of every question, one sequence at a time."""
    result = []
    for question in task.questions:
        rows = []
        for sequence, given in zip(question.sequences, question.given, strict=True):
            ids = torch.tensor([sequence])
            logits = model.forward(ids[:, :-1])["logits"][0, :, : model.architecture.vocab_size]
            chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            rows.append(chosen[given - 1 :])
        result.append(rows)
    return result


def share_right(task: Any, values: list[list[float]]) -> float:
    return sum(
        row.index(max(row)) == question.answer for row, question in zip(values, task.questions, strict=True)
    ) / len(task.questions)


def dense_numbers(family: str, block: range, reference: torch.Tensor | None) -> tuple[dict[str, float], torch.Tensor]:
    """Every metric's value of the model without `block`, by its definition, on whole logits; and these."""
    model = dense_without(family, block)
    vocab_size = model.architecture.vocab_size
    batch = {
        name: torch.cat([part[name] for part in global_batch(vocab_size)]) for name in ("tokens", "labels", "loss_mask")
    }
    mask = batch["loss_mask"].double()
    logits = model.forward(batch["tokens"])["logits"][..., :vocab_size]
    loss = -logits.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
    reference = logits if reference is None else reference
    change = (reference - logits).square().sum(-1)
    task = task_of(vocab_size)
    likelihoods = dense_likelihoods(model, task)
    sums = [[float(row.sum()) for row in rows] for rows in likelihoods]
    means = [[float(row.mean()) for row in rows] for rows in likelihoods]
    return {
        "lm_loss": float((loss * mask).sum() / mask.sum()),
        "logit_mse": float((change * mask).sum() / mask.sum() / vocab_size),
        "normalized_logit_mse": float((change * mask).sum() / (reference.square().sum(-1) * mask).sum()),
        "accuracy": share_right(task, sums),
        "normalized_accuracy": share_right(task, means),
    }, logits


@lru_cache(maxsize=2)
def dense_table(family: str) -> tuple[dict[str, float], dict[str, numpy.ndarray]]:
    whole, logits = dense_numbers(family, range(0), None)
    damage: dict[str, list[float]] = {}
    for length in LENGTHS:
        for start in range(model_of(family).num_layers - length + 1):
            values, _ = dense_numbers(family, range(start, start + length), logits)
            for metric in METRICS:
                sign = -1 if "accuracy" in metric else 1
                damage.setdefault(f"{metric}@{length}", []).append(sign * (values[metric] - whole[metric]))
    return whole, {name: numpy.array(values) for name, values in damage.items()}


@pytest.mark.parametrize("world_size", list(CASES))
def test_every_metric_at_every_layout_and_micro_batch_size(world_size: int) -> None:
    ranks = run_on_ranks(depth_on_rank, world_size, world_size)
    assert list(ranks[0]) == CASES[world_size] and {layout for cases in CASES.values() for _, layout, _ in cases} == {
        *LAYOUTS
    }
    for case, (whole, damage, likelihoods, following) in ranks[0].items():
        expected_whole, expected = dense_table(case[0])
        assert damage.keys() == expected.keys()
        for name, values in expected.items():
            assert damage[name].dtype == numpy.float64 and damage[name].shape == values.shape
            error = abs(damage[name] - values).max() / max(abs(values).max(), 1e-9)
            assert error <= (0 if "accuracy" in name else TOLERANCE["fp32"]), f"{case} {name}: {error}"
        for metric in ("lm_loss", "accuracy", "normalized_accuracy"):
            assert math.isclose(whole[metric], expected_whole[metric], rel_tol=1e-6), f"{case} {metric}"
        rows = dense_likelihoods(dense_without(case[0], range(0)), task_of(model_of(case[0]).vocab_size))
        assert numpy.allclose(
            likelihoods, [float(row.sum()) for question in rows for row in question], rtol=1e-5, atol=0
        )
        model, (context, _) = dense_without(case[0], range(0)), task_of(model_of(case[0]).vocab_size).rows[0]
        logits = model.forward(torch.tensor([context]))["logits"][0, -1, : len(following.sums)]
        assert numpy.allclose(following.sums, logits.log_softmax(-1), rtol=1e-5, atol=0)
        assert following.greedy.nonzero()[0].tolist() == [int(logits.argmax())], f"{case}: the likeliest, and no other"
        for other in ranks[1:]:
            assert other[case][0] == whole and all(
                numpy.array_equal(other[case][1][name], damage[name]) for name in damage
            )


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_the_reference_can_tell_metrics_and_layers_apart(family: str) -> None:
    """Else the comparison above would prove little: accuracies move, and no two layers but the dead one cost alike."""
    _, damage = dense_table(family)
    for metric in METRICS[:3]:
        assert len(set(damage[f"{metric}@1"].round(6))) == 4
    assert damage["accuracy@1"].any() and damage["normalized_accuracy@1"].any()
    assert not numpy.array_equal(damage["accuracy@1"], damage["normalized_accuracy@1"])


def identities_on_rank(parallel: dict[str, Any], world_size: int) -> dict[str, Any]:
    from minitron_mcore.importance.config import ImportanceConfig
    from minitron_mcore.importance.depth import measure_depth
    from minitron_mcore.model.schedule import final_hidden_states
    from minitron_mcore.model.sites import without_layers

    architecture, chunks = build("llama", start_layout(parallel, world_size))
    batch, task = batches_of(architecture.vocab_size, 2), task_of(architecture.vocab_size)

    def states(*blocks: list[int]) -> list[torch.Tensor]:
        with without_layers(chunks, blocks[0]), without_layers(chunks, blocks[-1]):
            return final_hidden_states(list(chunks), batch)

    def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))

    whole = states([])
    table = measure_depth(chunks, batch, architecture, METRICS, (1, 2), task=task)
    again = measure_depth(chunks, batch, architecture, METRICS, (2,), task=task)
    result = {
        "damage": table.damage,
        "nothing left out": same(whole, states([])),
        "dead layer": same(whole, states([DEAD])),
        "nested": same(states([0, 1, 3]), states([0, 1], [1, 3])),
        "alone or beside others": all(
            numpy.array_equal(again.damage[name], table.damage[name]) for name in again.damage
        ),
        "a stage without layers": not same(whole, states([0, 1])) or not whole,
        "no layer at all": len(states([0, 1, 2, 3])) == len(whole),
    }
    with pytest.raises(KeyError, match="mine"), without_layers(chunks, [0, 3]):
        raise KeyError("mine")
    result["whole after an error"] = same(whole, states([])) and not any(
        "forward" in vars(layer) for chunk in chunks for layer in chunk.decoder.layers
    )
    refused = {}
    nan = [dataclasses.replace(part, loss_mask=part.loss_mask * 0) for part in batch]
    for word, call in {
        "layer 4 cannot be left out": lambda: states([4]),
        "holds 4, but the model has": lambda: measure_depth(chunks, batch, architecture, ["lm_loss"], [4]),
        "holds 0": lambda: measure_depth(chunks, batch, architecture, ["lm_loss"], [0]),
        "block_lengths=[] is empty": lambda: measure_depth(chunks, batch, architecture, ["lm_loss"], []),
        "depth_metrics[0]=perplexity must be one of": lambda: ImportanceConfig(depth_metrics=["perplexity"]),
        "accuracy needs its questions": lambda: measure_depth(chunks, batch, architecture, ["accuracy"], [1]),
        "every loss mask is 0": lambda: measure_depth(chunks, nan, architecture, ["lm_loss"], [1]),
    }.items():
        with pytest.raises(InputError) as error:
            call()
        refused[word] = str(error.value)
    result["refused"] = refused
    return result


# Every metric is compared at every layout above.
@pytest.mark.parametrize(
    "layout", ["PP2-VPP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("PP2", "TP2-SP"))]
)
def test_layers_that_add_nothing_cost_nothing(layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    for result in run_on_ranks(identities_on_rank, world_size, parallel, world_size):
        damage, refused = result.pop("damage"), result.pop("refused")
        assert all(result.values()), result
        for metric in METRICS:
            assert damage[f"{metric}@1"][DEAD] == 0, "exactly: the layer's output is its input"
            # A block of the dead layer and a neighbour costs what the neighbour does.
            assert damage[f"{metric}@2"][DEAD - 1] == damage[f"{metric}@1"][DEAD - 1]
            assert damage[f"{metric}@2"][DEAD] == damage[f"{metric}@1"][DEAD + 1]
        for word, message in refused.items():
            assert word in message, f"{word!r} is not in: {message!r}"


def counting_on_rank(parallel: dict[str, Any], world_size: int) -> Any:
    """A model that counts: its layers add nothing, and the head's row t + 1 is the embedding's row t."""
    from minitron_mcore.evaluation.questions import Question, Task
    from minitron_mcore.importance.depth import measure_depth
    from minitron_mcore.model.gpt import build_model

    architecture = tiny("llama", num_layers=2)
    weights = draw_weights(architecture, SEED)
    for key, layer in weights:
        if key in (PROJ, FC2):
            weights[key, layer] = torch.zeros_like(weights[key, layer])
    rows = torch.nn.functional.normalize(torch.randn(weights[EMBEDDING, None].shape[0], 48), dim=-1)
    weights[EMBEDDING, None], weights[HEAD, None] = rows, 10 * rows.roll(1, dims=0)
    chunks = build_model(architecture, start_layout(parallel, world_size), "fp32")
    fill(chunks, architecture, weights)
    counts = [((5, 6, 7, 8), (5, 6, 7, 9)), ((90, 91, 80), (90, 91, 92), (90, 91, 93)), ((3, 5, 6), (3, 4, 5, 6, 7))]
    answers = (0, 1, 1)
    found = {}
    for name, given in {"right": answers, "one wrong": (0, 1, 0), "all wrong": (1, 2, 0)}.items():
        questions = [Question(each, (1,) * len(each), answer) for each, answer in zip(counts, given, strict=True)]
        task = Task(tuple(questions), "")
        table = measure_depth(chunks, [], architecture, ["accuracy"], [1], task=task, micro_batch_size=2)
        found[name] = (table.whole, table.damage["accuracy@1"].tolist())
    return found


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_a_model_that_counts_knows_the_answers(layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    for found in run_on_ranks(counting_on_rank, world_size, parallel, world_size):
        assert found == {
            "right": ({"accuracy": 1.0}, [0.0, 0.0]),
            "one wrong": ({"accuracy": 2 / 3}, [0.0, 0.0]),
            "all wrong": ({"accuracy": 0.0}, [0.0, 0.0]),
        }


def gradients_on_rank(parallel: dict[str, Any], world_size: int) -> dict[int, float | None]:
    """Norm of each layer's gradient after a training pass without the layers of the second half."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.schedule import run_schedule
    from minitron_mcore.model.sites import without_layers

    architecture, chunks = build("llama", start_layout(parallel, world_size))
    batch = batches_of(architecture.vocab_size, 2)
    with without_layers(chunks, [2, 3]):
        run_schedule(list(chunks), batch, Objective(LossSettings(architecture.vocab_size)).loss)
    gradients = {
        layer.layer_number - 1: layer.mlp.linear_fc2.weight.grad for chunk in chunks for layer in chunk.decoder.layers
    }
    return {layer: None if gradient is None else float(gradient.norm()) for layer, gradient in gradients.items()}


def test_a_model_trains_without_layers_even_where_a_stage_has_none_left() -> None:
    expected = run_on_ranks(gradients_on_rank, 1, {}, 1)[0]
    assert expected[0] and expected[1] and expected[2] is expected[3] is None
    for layout in ("PP2", "PP2-VPP2"):
        world_size, parallel = LAYOUTS[layout]
        first, second = run_on_ranks(gradients_on_rank, world_size, parallel, world_size)
        found = {**first, **second}
        assert {layer for layer in found if found[layer] is None} == {2, 3}
        assert [found[0], found[1]] == pytest.approx([expected[0], expected[1]], rel=1e-5)


def bf16_on_rank() -> Any:
    from minitron_mcore.importance.depth import measure_depth
    from minitron_mcore.model.gpt import build_model

    architecture = tiny("llama")
    chunks = build_model(architecture, start_layout({"tensor": 2}, 2), "bf16")
    fill(chunks, architecture, weights_of("llama"))
    table = measure_depth(chunks, batches_of(architecture.vocab_size, 2), architecture, METRICS[:3], [1])
    return table.damage


def test_bf16_ranks_the_layers_as_exact_arithmetic() -> None:
    """Rounding of the activations is some 4e-3; a difference of losses of 7 may then be off by 0.02 and no more."""
    damage = run_on_ranks(bf16_on_rank, 2)[0]
    _, expected = dense_table("llama")
    for name, values in damage.items():
        assert values[DEAD] == 0
        assert abs(values - expected[name]).max() <= 0.02 * max(1, abs(expected[name]).max()), name
        assert list(values.argsort()) == list(expected[name].argsort()), name
