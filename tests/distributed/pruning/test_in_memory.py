"""A student cut out of a model in memory, or of a checkpoint into memory: at every layout the bits of plain slicing,
also where layers change stage."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.importance.scores import Scores
from minitron_mcore.layout import Parameter
from minitron_mcore.pruning.plan_file import PruningPlan
from tests.distributed.models import assemble, gather_named, start_layout, tiny
from tests.distributed.plain_slicing import sliced, teacher_tensors
from tests.distributed.ranks import run_on_ranks
from tests.plans import make_plan

SHAPE = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
# name -> (family, changes, precision, student, options of the plan)
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, "fp32", SHAPE, {}),
    "tied-bf16": ("llama", {"untie_embeddings_and_output_weights": False}, "bf16", SHAPE, {}),
    "groups": (
        "qwen3",
        {"add_qkv_bias": True, "num_attention_heads": 12, "num_query_groups": 6},
        "fp32",
        {**SHAPE, "num_query_groups": 4},
        {"head_residual": "paper"},
    ),
}
PP2, VPP2 = {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"tensor": 2}, {"tensor": 2, "sequence": True}, PP2, VPP2],
    4: [{"tensor": 2, **PP2}],
}


def plan_of(model: str) -> PruningPlan:
    """Of eight layers 1, 5, 6 and 7 stay, so that two of them come to lie on another stage than they were."""
    family, changes, _, student, options = MODELS[model]
    a = tiny(family, num_layers=8, **changes)
    draw = numpy.random.default_rng(3)
    shapes: dict[str, Any] = {
        "hidden": a.hidden_size,
        "ffn": (8, a.ffn_hidden_size),
        "heads": (8, a.num_attention_heads),
    }
    arrays: dict[str, Any] = {name: draw.random(shape) + 1 for name, shape in shapes.items()}
    groups = draw.random((8, a.num_query_groups)) + 1
    layers = numpy.array([0.1, 0.5, 0.2, 0.1, 0.2, 0.6, 0.7, 0.8])
    return make_plan(Scores(a, **arrays, layers=layers, groups=groups), student, **options)


def dense_teacher(plan: PruningPlan, precision: str) -> dict[str, torch.Tensor]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {key: value.to(dtype) for key, value in teacher_tensors(plan.teacher).items()}


def whole_of(tensors: dict[str, torch.Tensor], parameter: Parameter, layer: int | None) -> torch.Tensor:
    return tensors[parameter.key] if layer is None else tensors[parameter.key][layer]


def prune_here(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """For every layout of the world and every model: this rank's part of the student, and how the teacher fared."""
    from minitron_mcore.architecture import save_architecture
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import fill, named_parameters
    from minitron_mcore.pruning.apply import load_pruned, prune_chunks
    from minitron_mcore.runtime.start import start

    found = []
    for parallel in LAYOUTS[world_size]:
        for model, (_, _, precision, *_) in MODELS.items():
            config, plan = start_layout(parallel, world_size), plan_of(model)
            tensors = dense_teacher(plan, precision)
            chunks = build_model(plan.teacher, config, precision, trainable=False)
            fill(chunks, plan.teacher, partial(whole_of, tensors))
            before = [tensor.clone() for chunk in chunks for tensor in chunk.parameters()]
            student = prune_chunks(chunks, plan)
            after = [tensor for chunk in chunks for tensor in chunk.parameters()]
            part = gather_named([row for chunk in student for row in named_parameters(chunk)])
            # Whatever layout the checkpoint was saved at: the first one.
            if parallel == LAYOUTS[world_size][0]:
                save_state(folder / model, 0, model_state(as_chunks(chunks)), start())
                start().on_main(partial(save_architecture, plan.teacher, folder / model / "architecture.yaml"))
            loaded = build_model(plan.student, config, precision)
            load_pruned((folder / model, 0), plan, as_chunks(loaded))
            theirs, ours = ([each for chunk in chunks for each in chunk.parameters()] for chunks in (student, loaded))
            part["loaded"] = all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)
            part["trainable"] = all(tensor.requires_grad for tensor in ours)
            part["unchanged"] = all(map(torch.equal, before, after))
            part["dtypes"] = {tensor.dtype for chunk in student for tensor in chunk.parameters()}
            found.append(part)
    return found


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_the_bits_are_those_of_plain_slicing(world_size: int, tmp_path: Path) -> None:
    ranks = run_on_ranks(prune_here, world_size, world_size, tmp_path)
    cases = [(parallel, model) for parallel in LAYOUTS[world_size] for model in MODELS]
    for number, (parallel, model) in enumerate(cases):
        plan, precision = plan_of(model), MODELS[model][2]
        assert plan.layers == [1, 5, 6, 7]
        teacher = dense_teacher(plan, precision)
        expected = sliced(teacher, plan)
        parts = [rank[number] for rank in ranks]
        actual = assemble(parts, plan.student)
        assert all(part["unchanged"] and part["loaded"] and part["trainable"] for part in parts), (parallel, model)
        assert {dtype for part in parts for dtype in part["dtypes"]} == {next(iter(teacher.values())).dtype}
        names = {(key, layer) for key in expected for layer in (range(4) if "layers." in key else [None])}
        assert actual.keys() == names
        for key, layer in names:
            whole = expected[key] if layer is None else expected[key][layer]
            assert torch.equal(actual[key, layer], whole.float()), (parallel, model, key, layer)


def refused(world_size: int) -> str:
    from minitron_mcore.errors import InputError
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.pruning.apply import prune_chunks

    config = start_layout(VPP2, world_size)
    a = tiny("llama", num_layers=8)
    plan = make_plan(
        Scores(a, numpy.ones(48), numpy.ones((8, 96)), numpy.ones((8, 6)), numpy.arange(8.0)), {"num_layers": 3}
    )
    with pytest.raises(InputError) as raised:
        prune_chunks(build_model(a, config, "fp32", trainable=False), plan)
    return str(raised.value)


def test_a_student_that_the_layout_cannot_hold_is_refused() -> None:
    for said in run_on_ranks(refused, 2, 2):
        assert "num_layers=3 is fewer than the 4 stages of parallel.pipeline=2" in said
