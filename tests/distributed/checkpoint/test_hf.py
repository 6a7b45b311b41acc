"""Hugging Face folders in and out, against transformers itself, at several layouts and world sizes.

Logits: fp32, 1e-5 of the largest |logit|: the same products summed in another order leave about 1e-6, a head in the
wrong place or a wrong rotary frequency 1e-1. Tensors: bit for bit, since conversion only moves numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.export import export_checkpoint
from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.checkpoint.import_hf import import_checkpoint
from minitron_mcore.families.find import known_families
from minitron_mcore.model.initialize import draw
from tests.distributed.hf_cases import (
    CASES,
    SHAPE,
    alone,
    architecture_of,
    error,
    logits_of,
    save_with_transformers,
    tensors_of,
    transformers_logits,
    whole_logits,
)
from tests.distributed.models import LAYOUTS, start_layout
from tests.distributed.ranks import run_on_ranks

PLACES = ["1", "DP2", "TP2-PP2"]  # others: tests/e2e/test_families.py
SEED = 11
MAX_SHARD = 300_000  # bytes: several files


def source_tensor(parameter: Any, architecture: Architecture, layer: int | None) -> torch.Tensor:
    """The global parameter of the tests' model: as initialised, but norms and biases are all different."""
    drawn = draw(parameter, architecture, SEED, layer)
    if len(parameter.axes) > 1:
        return drawn
    digest = hashlib.sha256(f"{parameter.key}@{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return drawn + 0.3 * torch.randn(drawn.shape, generator=generator)


def tensor_parallel() -> tuple[int, int]:
    """Rank and size."""
    from megatron.core import parallel_state as state

    return state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()


def convert_on_rank(folder: str, name: str, parallel: dict[str, Any], world_size: int) -> dict[str, Any]:
    """For every case: our model's logits, its checkpoint and export; and the logits of transformers' model, imported.

    Logits [s, b, V / TP] are returned by the last stage.
    """
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, load_weights, model_state, save_state
    from minitron_mcore.layout import parameter_table
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize, named_parameters, take_shard
    from minitron_mcore.runtime.start import start

    layout = start_layout(parallel, world_size)
    runtime = start()
    logits: dict[str, Any] = {}
    for case in CASES:
        architecture = architecture_of(case)
        table = {parameter.key: parameter for parameter in parameter_table(architecture)}
        chunks = build_model(architecture, layout, "fp32", trainable=False)
        initialize(chunks, architecture, SEED)
        for chunk in chunks:
            for key, layer, tensor in named_parameters(chunk):
                if len(table[key].axes) == 1:
                    whole = source_tensor(table[key], architecture, layer)
                    tensor.data.copy_(take_shard(whole, table[key], architecture, *tensor_parallel()))
        ours = Path(folder, f"ours-{case}-{name}")
        if runtime.is_main:
            write_description(ours, architecture, lineage={"stage": "train"}, recipe="", save_tokenizer=None)
        save_state(ours, 7, model_state(as_chunks(chunks)), runtime)
        export_checkpoint(
            ours, 7, Path(folder, f"export-{case}-{name}"), runtime, bos=1, eos=2, max_shard_bytes=MAX_SHARD
        )
        logits[f"ours-{case}"] = logits_of(chunks)

        theirs, imported = Path(folder, f"theirs-{case}"), Path(folder, f"imported-{case}-{name}")
        architecture = read_config(theirs)
        import_checkpoint(theirs, imported, architecture, layout, runtime)
        if runtime.is_main:
            write_description(imported, architecture, lineage={}, recipe="", save_tokenizer=None)
        runtime.barrier()
        chunks = build_model(architecture, layout, "fp32", trainable=False)
        load_weights(imported, 0, as_chunks(chunks), architecture)
        logits[f"theirs-{case}"] = logits_of(chunks)
    return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`theirs-CASE`: models made and saved by transformers, in several files."""
    root = tmp_path_factory.mktemp("hf")
    for case in CASES:
        save_with_transformers(case, root / f"theirs-{case}")
    return root


@pytest.fixture(scope="module")
def converted(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Global logits [b, s, V] by layout and model."""
    results = {}
    for name in PLACES:
        world_size, parallel = LAYOUTS[name]
        ranks = run_on_ranks(convert_on_rank, world_size, str(folder), name, parallel, world_size, timeout=240)
        results[name] = whole_logits(ranks, parallel.get("tensor", 1))
    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLACES)
def test_exported_logits(folder: Path, converted: dict[str, Any], case: str, name: str) -> None:
    expected = transformers_logits(folder / f"export-{case}-{name}")
    assert error(converted[name][f"ours-{case}"], expected) <= 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLACES)
def test_imported_logits(folder: Path, converted: dict[str, Any], case: str, name: str) -> None:
    expected = transformers_logits(folder / f"theirs-{case}")
    assert error(converted[name][f"theirs-{case}"], expected) <= 1e-5


def expected_tensors(case: str) -> dict[str, torch.Tensor]:
    """The export of the tests' model, head by head and by hand."""
    from minitron_mcore.layout import parameter_table

    a = architecture_of(case)
    table = {parameter.key: parameter for parameter in parameter_table(a)}
    source = {
        (key, layer): source_tensor(parameter, a, layer)
        for key, parameter in table.items()
        for layer in (range(a.num_layers) if parameter.per_layer else [None])
    }
    result = {"model.embed_tokens.weight": source["embedding.word_embeddings.weight", None][: a.vocab_size]}
    if a.untie_embeddings_and_output_weights:
        result["lm_head.weight"] = source["output_layer.weight", None][: a.vocab_size]
    d, q = a.kv_channels, a.num_attention_heads // a.num_query_groups
    kinds = ("weight", "bias") if a.family == "nemotron" else ("weight",)
    for kind in kinds:
        result[f"model.norm.{kind}"] = source[f"decoder.final_layernorm.{kind}", None]
    for layer in range(a.num_layers):
        ours, theirs = "decoder.layers.", f"model.layers.{layer}."
        for kind in ("weight", "bias") if a.family == "qwen2" else ("weight",):
            rows = iter(source[f"{ours}self_attention.linear_qkv.{kind}", layer].split(d))
            heads: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
            for _ in range(a.num_query_groups):
                heads["q"] += [next(rows) for _ in range(q)]
                heads["k"].append(next(rows))
                heads["v"].append(next(rows))
            for part, tensors in heads.items():
                result[f"{theirs}self_attn.{part}_proj.{kind}"] = torch.cat(tensors)
        if a.family == "qwen3":
            for part in "qk":
                norm = source[f"{ours}self_attention.{part}_layernorm.weight", layer]
                result[f"{theirs}self_attn.{part}_norm.weight"] = norm
        result[theirs + "self_attn.o_proj.weight"] = source[ours + "self_attention.linear_proj.weight", layer]
        fc1 = source[ours + "mlp.linear_fc1.weight", layer]
        if a.family != "nemotron":
            result[theirs + "mlp.gate_proj.weight"] = fc1[: a.ffn_hidden_size]
        result[theirs + "mlp.up_proj.weight"] = fc1[-a.ffn_hidden_size :]
        result[theirs + "mlp.down_proj.weight"] = source[ours + "mlp.linear_fc2.weight", layer]
        for kind in kinds:
            before_attention = source[f"{ours}self_attention.linear_qkv.layer_norm_{kind}", layer]
            result[f"{theirs}input_layernorm.{kind}"] = before_attention
            result[f"{theirs}post_attention_layernorm.{kind}"] = source[
                f"{ours}mlp.linear_fc1.layer_norm_{kind}", layer
            ]
    return result


@pytest.mark.parametrize("case", CASES)
def test_exported_tensors_are_the_source(folder: Path, converted: dict[str, Any], case: str) -> None:
    expected = expected_tensors(case)
    for name in PLACES:
        path = folder / f"export-{case}-{name}"
        exported = tensors_of(path)
        assert exported.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(exported[key], tensor), (name, key)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        files = sorted(path.glob("*.safetensors"))
        assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
        assert all(key in load_file(path / file) for key, file in index["weight_map"].items())
        largest = max(tensor.nbytes for tensor in expected.values())
        sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
        assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= max(MAX_SHARD, largest)


@pytest.mark.parametrize("case", CASES)
def test_imported_and_exported_again(folder: Path, converted: dict[str, Any], case: str, tmp_path: Path) -> None:
    """Imported at any layout, exported by one process: every tensor as transformers saved it; the config as well."""
    original = tensors_of(folder / f"theirs-{case}")
    for name in PLACES:
        target = tmp_path / name
        export_checkpoint(folder / f"imported-{case}-{name}", 0, target, alone())
        again = tensors_of(target)
        assert again.keys() == original.keys()
        assert all(torch.equal(again[key], original[key]) for key in original)
        assert read_config(target) == read_config(folder / f"theirs-{case}")
        assert (target / "model.safetensors").is_file() and not (target / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("case", CASES)
def test_configs(folder: Path, converted: dict[str, Any], case: str) -> None:
    """transformers reads the same config from what we write as from what it was made with; and so do we."""
    from transformers import AutoConfig

    exported, made = (
        AutoConfig.from_pretrained(folder / f"{kind}").to_dict() for kind in (f"export-{case}-1", f"theirs-{case}")
    )
    marks = {"bos_token_id": 1, "eos_token_id": 2}
    skipped = {*marks, "_name_or_path", "transformers_version"}
    assert {k: v for k, v in exported.items() if k not in skipped} == {
        k: v for k, v in made.items() if k not in skipped
    }
    assert {k: exported[k] for k in marks} == marks
    assert read_config(folder / f"theirs-{case}") == architecture_of(case)


def test_every_family_has_a_row_for_every_parameter() -> None:
    from minitron_mcore.layout import parameter_table

    assert set(known_families()) == {"llama", "mistral", "nemotron", "qwen2", "qwen3"}
    for name, family in known_families().items():
        parameters = parameter_table(build_architecture({**SHAPE, "family": name}))
        assert {row.key for row in family.tensors} == {parameter.key for parameter in parameters}
