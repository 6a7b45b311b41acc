"""Checkpoints that megatron-core 0.19.2 wrote under Python 3.13, read whichever version is installed here.

They lie in megatron_0_19.tar.xz, made by megatron_writer.py. Everything is compared bit for bit with what that put
there, since it is only moved.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
from minitron_mcore.checkpoint.integrity import verify_checkpoint
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.unpickle import read_common
from minitron_mcore.layout import parameter_table
from tests.distributed.checkpoint.test_foreign import plan_of
from tests.distributed.foreign_models import value_of
from tests.distributed.megatron_writer import ITERATION, MODEL, SIZES, sample
from tests.distributed.models import start_layout
from tests.distributed.pruning.test_prune import sliced
from tests.distributed.ranks import run_on_ranks

WRITTEN = "MINITRON_WRITTEN_ELSEWHERE"  # names a folder that megatron_writer.py has just made, instead
KINDS: tuple[str, ...] = ("gpt", "gpt-optimizer", "hybrid")
if WRITTEN in os.environ:
    KINDS = tuple(kind for kind in KINDS if (Path(os.environ[WRITTEN]) / kind).is_dir())
Whole = dict[tuple[str, int | None], torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written")
    if WRITTEN in os.environ:
        return shutil.copytree(os.environ[WRITTEN], path, dirs_exist_ok=True)
    with tarfile.open(Path(__file__).with_name("megatron_0_19.tar.xz")) as packed:
        packed.extractall(path, filter="data")
    return path


def expected_tensors(kind: str, architecture: Architecture) -> Whole:
    """By key and layer, bf16: as megatron_writer.py filled them, by the names that its megatron-core gave them."""
    whole: Whole = {}
    for parameter in parameter_table(architecture):
        shape = parameter.shape(architecture)
        for layer in range(SIZES["num_layers"]) if parameter.per_layer else [None]:
            named = parameter.key
            if kind == "hybrid":
                named = named.replace("decoder.final_layernorm.", "decoder.final_norm.")
            if layer is not None:
                position = layer if kind != "hybrid" else 2 * layer + ("mlp." in named)
                named = named.replace("decoder.layers.", f"decoder.layers.{position}.")
            whole[parameter.key, layer] = value_of(named, shape).bfloat16()
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_read(root: Path, kind: str) -> None:
    folder, iteration = find_checkpoint(root / kind, "checkpoint")
    architecture = read_architecture(folder)
    assert (architecture.family, architecture.rotary_base, architecture.vocab_size) == ("llama", 500000.0, 20)
    assert {name: getattr(architecture, name) for name in SIZES} == SIZES
    reader = TensorReader(folder, iteration)
    for (key, layer), expected in expected_tensors(kind, architecture).items():
        assert torch.equal(reader.read(key, layer, tuple(expected.shape)), expected), (key, layer)
    assert verify_checkpoint(folder).faults == []
    if kind == "gpt-optimizer":
        assert sum(name.startswith("optimizer.state.exp_avg.") for name in reader.tensors) == 9


def test_the_arguments_are_read_whole(root: Path) -> None:
    """Among Megatron-LM's 811, values of a class that megatron-core 0.16 has not."""
    common = read_common(root / "gpt" / f"iter_{ITERATION:07d}")
    assert common["iteration"] == ITERATION and common["args"].padded_vocab_size == MODEL["padded_vocab_size"]
    if WRITTEN in os.environ:
        return  # 0.16 comes without Megatron-LM
    assert len(vars(common["args"])) > 800
    assert type(common["args"].inference_cuda_graph_scope).__name__ == "InferenceCudaGraphScope"


def logits_on_rank(root: Path) -> dict[str, torch.Tensor]:
    """Of each of KINDS, this project's [2, 16, V], in float32."""
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model, unwrap
    from minitron_mcore.model.microbatch import Microbatch
    from minitron_mcore.model.schedule import final_hidden_states

    config, found = start_layout({}, 1), {}
    tokens, positions = sample()
    for kind in KINDS:
        architecture = read_architecture(root / kind)
        chunks = as_chunks(build_model(architecture, config, "fp32", trainable=False))
        load_weights(root / kind, ITERATION, chunks, architecture)
        (hidden,) = final_hidden_states(chunks, [Microbatch.unlabelled(tokens, positions)])
        with torch.no_grad():
            found[kind] = unwrap(chunks[0]).logits(hidden).transpose(0, 1)
    return found


def test_logits_are_those_of_its_own_model(root: Path) -> None:
    """1e-5 of the largest: the same sums, in another order."""
    for kind, found in run_on_ranks(logits_on_rank, 1, root)[0].items():
        expected = torch.load(root / kind / "logits.pt", weights_only=True)
        assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5, kind


def convert_all(root: Path) -> None:
    """Prune and export each of KINDS."""
    from minitron_mcore.checkpoint.export import export_checkpoint
    from minitron_mcore.pruning.apply import prune_checkpoint
    from minitron_mcore.runtime.start import start

    start_layout({}, 1)
    for kind in KINDS:
        source = find_checkpoint(root / kind, "checkpoint")
        prune_checkpoint(source, plan_of(read_architecture(source[0]), HALF), root / f"{kind}-student", start())
        export_checkpoint(*source, root / f"{kind}-hf", start(), bos=1, eos=2)


HALF: dict[str, int | None] = {"num_layers": 1, "hidden_size": 4, "ffn_hidden_size": 6}


def test_pruned_and_exported(root: Path) -> None:
    from safetensors.torch import load_file

    run_on_ranks(convert_all, 1, root)
    for kind in KINDS:
        architecture = read_architecture(root / kind)
        whole, plan = expected_tensors(kind, architecture), plan_of(architecture, HALF)
        stacked = {
            parameter.key: torch.stack([whole[parameter.key, layer] for layer in range(SIZES["num_layers"])])
            if parameter.per_layer
            else whole[parameter.key, None]
            for parameter in parameter_table(architecture)
        }
        reader = TensorReader(root / f"{kind}-student", 0)
        for key, expected in sliced(stacked, plan).items():
            if key.startswith("decoder.layers."):
                assert torch.equal(reader.read(key, 0, tuple(expected.shape[1:])), expected[0]), key
            else:
                assert torch.equal(reader.read(key, None, tuple(expected.shape)), expected), key
        exported = load_file(root / f"{kind}-hf" / "model.safetensors")
        for layer in range(SIZES["num_layers"]):
            projection = whole["decoder.layers.self_attention.linear_proj.weight", layer]
            assert torch.equal(exported[f"model.layers.{layer}.self_attn.o_proj.weight"], projection)
            gate_up = whole["decoder.layers.mlp.linear_fc1.weight", layer]
            assert torch.equal(exported[f"model.layers.{layer}.mlp.up_proj.weight"], gate_up[12:])
