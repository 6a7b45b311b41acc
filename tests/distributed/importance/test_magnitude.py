"""Magnitude scores of checkpoints saved and scored at several layouts, against norms taken structure by structure.

Tolerance 1e-12: both sides sum float64 squares of the same float32 weights, in another order.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from tests.distributed.dense_reference import EMBEDDING, FC1, FC2, HEAD, PROJ, QKV, draw_weights, fill
from tests.distributed.models import start_layout, tiny
from tests.distributed.ranks import run_on_ranks
from tests.plans import make_plan

MODELS = {"llama": tiny("llama"), "nemotron": tiny("nemotron"), "qwen": tiny("qwen3", add_qkv_bias=True)}
SAVED = {"llama": {"tensor": 2}, "nemotron": {"pipeline": 2, "virtual_pipeline": 2}, "qwen": {"tensor": 2}}
SEED = 3


def save(root: Path, broken: bool = False) -> None:
    """Every model at its layout; broken: one weight of a llama's layer 2 is NaN."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.runtime.start import start

    for name in ["llama"] if broken else list(MODELS):
        architecture, layout, runtime = MODELS[name], start_layout(SAVED[name], 2), start()
        chunks = build_model(architecture, layout, "fp32")
        weights = draw_weights(architecture, SEED)
        if broken:
            weights[FC2, 2][3, 4] = float("nan")
        fill(chunks, architecture, weights)
        folder = root / ("broken" if broken else name)
        save_state(folder, 1, model_state(as_chunks(chunks)), runtime)
        if runtime.is_main:
            write_description(folder, architecture, lineage={"stage": "train"}, recipe="", save_tokenizer=None)
        runtime.barrier()


def score(root: Path, names: list[str]) -> dict[str, Any]:
    from minitron_mcore.importance.magnitude import magnitude_scores

    result: dict[str, Any] = {}
    for name in names:
        try:
            result[name] = magnitude_scores(root / name, 1, MODELS.get(name, MODELS["llama"]))
        except InputError as error:
            result[name] = str(error)
    return result


def norm(*parts: torch.Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in parts) ** 0.5


@lru_cache
def expected(a: Architecture) -> dict[str, numpy.ndarray]:
    """Each structure's norm from slices of its own; qkv lies as [g, (q + 2) d], a gated fc1 as gate, then up."""
    w, q, d, f = draw_weights(a, SEED), a.heads_per_group, a.kv_channels, a.ffn_hidden_size
    layers = range(a.num_layers)

    def channel(c: int) -> float:
        parts = [w[key, layer][:, c] for key in (QKV, FC1) for layer in layers]
        parts += [w[key, layer][c] for key in (PROJ, FC2) for layer in layers]
        parts.append(w[EMBEDDING, None][: a.vocab_size, c])
        if a.untie_embeddings_and_output_weights:
            parts.append(w[HEAD, None][: a.vocab_size, c])
        return norm(*parts)

    def neuron(layer: int, n: int) -> float:
        rows = (n, f + n) if a.gated_linear_unit else (n,)
        return norm(*(w[FC1, layer][row] for row in rows), w[FC2, layer][:, n])

    def head(layer: int, n: int) -> float:
        group, place = divmod(n, q)
        row = (group * (q + 2) + place) * d
        return norm(w[QKV, layer][row : row + d], w[PROJ, layer][:, n * d : (n + 1) * d])

    def group(layer: int, g: int) -> float:
        rows = w[QKV, layer][g * (q + 2) * d : (g + 1) * (q + 2) * d]
        return norm(rows, w[PROJ, layer][:, g * q * d : (g + 1) * q * d])

    return {
        "hidden": numpy.array([channel(c) for c in range(a.hidden_size)]),
        "ffn": numpy.array([[neuron(layer, n) for n in range(f)] for layer in layers]),
        "heads": numpy.array([[head(layer, n) for n in range(a.num_attention_heads)] for layer in layers]),
        "groups": numpy.array([[group(layer, g) for g in range(a.num_query_groups)] for layer in layers]),
        "layers": numpy.array([norm(*(w[key, layer] for key in (QKV, PROJ, FC1, FC2))) for layer in layers]),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("magnitude")
    run_on_ranks(save, 2, folder)
    run_on_ranks(save, 2, folder, True)
    return folder


def test_against_norms_of_slices_on_one_two_and_four_ranks(root: Path) -> None:
    for world_size in (1, 2, 4):
        for rank in run_on_ranks(score, world_size, root, list(MODELS)):
            for name, scores in rank.items():
                arrays = dict(scores.arrays())
                for axis, wanted in expected(MODELS[name]).items():
                    error = abs(arrays[axis] - wanted).max() / wanted.max()
                    assert error <= 1e-12, f"{name} on {world_size} ranks, {axis}: {error}"


def test_they_make_a_plan_and_broken_weights_are_named(root: Path) -> None:
    scores = run_on_ranks(score, 1, root, ["llama"])[0]["llama"]
    plan = make_plan(scores, {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 3})
    assert plan.hidden == sorted(numpy.argsort(-scores.hidden, kind="stable")[:32].tolist())
    assert plan.settings["scores"]["importance"]["method"] == "magnitude"
    for rank in run_on_ranks(score, 2, root, ["broken"]):
        assert "mlp.linear_fc2.weight of layer 2 " in rank["broken"] and "\n" not in rank["broken"]
