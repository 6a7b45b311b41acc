"""Checkpoints as Megatron-LM and Megatron-Bridge leave them: what they are is inferred, and every way in reads them.

Written by megatron-core's own GPTModel (foreign_models.py); everything is compared bit for bit, since it is only moved.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
from minitron_mcore.checkpoint.inspection import inspect_checkpoint
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.errors import InputError
from minitron_mcore.importance.scores import Scores
from minitron_mcore.layout import parameter_table
from minitron_mcore.pruning.plan_file import PruningPlan
from tests.distributed.foreign_models import (
    CASES,
    CONTEXT,
    ITERATION,
    PP2,
    TP2,
    VOCAB,
    arguments,
    expected_architecture,
    foreign_model,
    whole_tensors,
    write_cases,
)
from tests.distributed.models import assemble, gather_named, start_layout
from tests.distributed.pruning.test_prune import sliced
from tests.distributed.ranks import run_on_ranks
from tests.plans import make_plan

LOADS = {"1": ({}, 1), "TP2": (TP2, 2), "PP2-VPP2": ({"pipeline": 2, "virtual_pipeline": 2}, 2)}
TARGET: dict[str, int | None] = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}


def plan_of(architecture: Architecture, target: dict[str, int | None] = TARGET) -> PruningPlan:
    draw = numpy.random.default_rng(5)
    a = architecture
    shapes = ((a.hidden_size,), (a.num_layers, a.ffn_hidden_size), (a.num_layers, a.num_attention_heads))
    hidden, ffn, heads = (draw.random(shape) + 1 for shape in shapes)
    scores = Scores(a, hidden, ffn, heads, numpy.array([0.3, 0.5, 0.1, 0.4])[: a.num_layers])
    return make_plan(scores, target)


# What runs on the ranks.


def load_all(root: Path, parallel: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Every rank's parameters of every case, as loaded into a model."""
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import named_parameters

    config = start_layout(parallel, world_size)
    result = {}
    for name in CASES:
        folder, iteration = find_checkpoint(root / name, "checkpoint")
        architecture = read_architecture(folder)
        chunks = build_model(architecture, config, "bf16", trainable=False)
        load_weights(folder, iteration, as_chunks(chunks), architecture)
        result[name] = gather_named([row for chunk in chunks for row in named_parameters(chunk)])
    return result


def convert_all(root: Path, parallel: dict[str, Any], world_size: int) -> None:
    """Prune in place, and export, what lies in the folder itself or in its iteration's."""
    from minitron_mcore.checkpoint.export import export_checkpoint
    from minitron_mcore.pruning.apply import prune_checkpoint
    from minitron_mcore.runtime.start import start

    start_layout(parallel, world_size)
    for name in CASES:
        source = find_checkpoint(root / name / f"iter_{ITERATION:07d}", "checkpoint")
        plan = plan_of(read_architecture(source[0]))
        target = root / f"{name}-student-{'-'.join(parallel)}"
        prune_checkpoint(source, plan, target, start())
        if "tensor" in parallel:
            export_checkpoint(*source, root / f"{name}-hf", start(), bos=1, eos=2)


def logits_on_rank(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(megatron-core's own model and loader, ours): logits [s, b, V] in float32."""
    from megatron.core import dist_checkpointing

    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model, unwrap
    from minitron_mcore.model.microbatch import Microbatch
    from minitron_mcore.model.schedule import final_hidden_states

    config, place = start_layout({}, 1), root / name / f"iter_{ITERATION:07d}"
    tokens = torch.randint(0, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(CONTEXT).expand_as(tokens).contiguous()
    theirs = foreign_model(arguments(**CASES[name][0]), {}, torch.float32, per_layer="per_layer" in CASES[name][2])
    # Python 3.11.0 to 3.11.3 pickle the arguments' enums in a way that torch does not take without trust.
    with mock.patch.object(torch, "load", partial(torch.load, weights_only=False)):
        loaded = dist_checkpointing.load({"model": theirs.sharded_state_dict()}, str(place))
    theirs.load_state_dict(loaded["model"])
    masked = torch.ones(1, 1, CONTEXT, CONTEXT).triu(1).bool()
    with torch.no_grad():
        expected = theirs.eval()(tokens, positions, masked).transpose(0, 1)

    chunks = build_model(read_architecture(place), config, "fp32", trainable=False)
    load_weights(place, ITERATION, as_chunks(chunks), read_architecture(place))
    hidden = final_hidden_states(as_chunks(chunks), [Microbatch.unlabelled(tokens, positions)])
    with torch.no_grad():
        return expected, unwrap(chunks[0]).logits(hidden[0])


def refused_on_rank(folder: Path) -> str:
    """One rank alone finds its part damaged: all raise."""
    from minitron_mcore.checkpoint import reader
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model

    config, architecture = start_layout(PP2, 2), read_architecture(folder)
    chunks = build_model(architecture, config, "bf16", trainable=False)
    original = reader.TensorReader.fill_part
    if torch.distributed.get_rank() == 1:

        def broken(*arguments: Any) -> None:
            raise InputError("", "a part", "cannot be read")

        reader.TensorReader.fill_part = broken  # type: ignore[assignment]
    try:
        load_weights(folder, ITERATION, as_chunks(chunks), architecture)
    except InputError as error:
        return str(error)
    finally:
        reader.TensorReader.fill_part = original  # type: ignore[method-assign]
    return ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign")
    run_on_ranks(write_cases, 2, path, list(CASES))
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_architecture_is_inferred(root: Path, name: str) -> None:
    expected = expected_architecture(name)
    assert read_architecture(root / name) == expected
    assert read_architecture(root / name / f"iter_{ITERATION:07d}") == expected


@pytest.mark.parametrize("name", CASES)
def test_one_process_reads_whole_tensors(root: Path, name: str) -> None:
    reader, architecture = TensorReader(root / name, ITERATION), expected_architecture(name)
    for (key, layer), expected in whole_tensors(architecture).items():
        found = reader.read(key, layer, tuple(expected.shape))
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected), (key, layer)


@pytest.mark.parametrize("layout", LOADS)
def test_models_load_at_any_layout(root: Path, layout: str) -> None:
    parallel, world_size = LOADS[layout]
    ranks = run_on_ranks(load_all, world_size, root, parallel, world_size)
    for name in CASES:
        architecture = expected_architecture(name)
        loaded, expected = assemble([rank[name] for rank in ranks], architecture), whole_tensors(architecture)
        assert loaded.keys() == expected.keys()
        for key, tensor in loaded.items():
            assert torch.equal(tensor, expected[key].float()), (name, key)


@pytest.mark.parametrize("name", ["llama", "qwen3-bridge"])
def test_logits_are_those_of_megatrons_model(root: Path, name: str) -> None:
    """Scaled rotary frequencies, norms on the heads and all; 2e-5 of the largest: the same sums in another order, and
    norms and rotations that round elsewhere."""
    expected, found = run_on_ranks(logits_on_rank, 1, root, name)[0]
    assert float((found - expected).abs().max() / expected.abs().max()) <= 2e-5


def test_pruned_in_place_and_exported(root: Path) -> None:
    from safetensors.torch import load_file

    for parallel in (TP2, PP2):
        run_on_ranks(convert_all, 2, root, parallel, 2)
    for name in CASES:
        architecture = expected_architecture(name)
        a, plan, whole = architecture, plan_of(architecture), whole_tensors(architecture)
        stacked = {
            parameter.key: torch.stack([whole[parameter.key, layer] for layer in range(a.num_layers)])
            if parameter.per_layer
            else whole[parameter.key, None]
            for parameter in parameter_table(a)
        }
        for key, expected in sliced(stacked, plan).items():
            for layout in ("tensor", "pipeline"):
                reader = TensorReader(root / f"{name}-student-{layout}", 0)
                layers = range(plan.student.num_layers) if key.startswith("decoder.layers.") else [None]
                read = [reader.read(key, layer, tuple(expected.shape[layer is not None :])) for layer in layers]
                assert torch.equal(torch.stack(read) if layers != [None] else read[0], expected), (name, key, layout)

        exported = load_file(root / f"{name}-hf" / "model.safetensors")
        assert torch.equal(
            exported["model.embed_tokens.weight"], whole["embedding.word_embeddings.weight", None][:VOCAB]
        )
        assert ("lm_head.weight" in exported) == a.untie_embeddings_and_output_weights
        fc1 = whole["decoder.layers.mlp.linear_fc1.weight", 2]
        up = fc1[a.ffn_hidden_size :] if a.gated_linear_unit else fc1
        assert torch.equal(exported["model.layers.2.mlp.up_proj.weight"], up)
        # The second group's key: after its 3 query heads; 16 rows a head, 5 heads a group.
        qkv = whole["decoder.layers.self_attention.linear_qkv.weight", 3]
        assert torch.equal(exported["model.layers.3.self_attn.k_proj.weight"][16:], qkv[(5 + 3) * 16 : (5 + 4) * 16])


def test_a_rank_that_cannot_read_stops_all(root: Path) -> None:
    assert run_on_ranks(refused_on_rank, 2, root / "llama") == ["a part cannot be read"] * 2


def test_inspect_describes_them(root: Path) -> None:
    for name in CASES:
        found = inspect_checkpoint(root / name)
        assert found["architecture"] == expected_architecture(name).to_dict(), name
        assert found["dtypes"] == ["bfloat16"] and found["newest_finished"] == ITERATION
