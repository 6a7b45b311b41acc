"""What is written here loads in Megatron-LM and Megatron-Bridge, unchanged and at their default strictness.

The contract is megatron-core's: its own GPTModel, made from the checkpoint's `args` alone, asks for all it has, extra
states included. What both projects do above that, they do with the common part and run_config.yaml.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.checkpoint.foreign import infer_architecture
from minitron_mcore.checkpoint.unpickle import read_metadata
from minitron_mcore.layout import checkpoint_key, parameter_table
from tests.distributed.checkpoint.test_foreign import plan_of
from tests.distributed.foreign_models import expected_architecture, foreign_model, whole_tensors
from tests.distributed.models import start_layout
from tests.distributed.pruning.test_prune import sliced
from tests.distributed.ranks import run_on_ranks

NAMES = ("llama-bridge", "llama-tied-by-layer", "nemotron", "qwen3-bridge")
PLACE = "iter_0000000"
# What Transformer Engine's modules ask for, as megatron-core names it (its norms before a linear module are fused).
OF_TRANSFORMER_ENGINE = (
    "decoder.layers.self_attention.linear_qkv._extra_state",
    "decoder.layers.self_attention.linear_proj._extra_state",
    "decoder.layers.self_attention.core_attention._extra_state",
    "decoder.layers.mlp.linear_fc1._extra_state",
    "decoder.layers.mlp.linear_fc2._extra_state",
)
Weights = dict[tuple[str, int | None], torch.Tensor]


def write_all(root: Path) -> dict[str, Weights]:
    """`NAME`: a teacher as training saves it; `NAME-pruned`: its student. -> what Megatron's models load from them."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.pruning.apply import prune_checkpoint
    from minitron_mcore.runtime.start import start

    config = start_layout({}, 1)
    loaded = {}
    for name in NAMES:
        architecture = expected_architecture(name)
        chunks, whole = build_model(architecture, config, "bf16", trainable=False), whole_tensors(architecture)
        with torch.no_grad():
            for key, layer, tensor in named_parameters(chunks[0]):
                tensor.copy_(whole[key, layer])
        save_state(root / name, 0, model_state(as_chunks(chunks)), start(), architecture)
        write_description(root / name, architecture, lineage={}, recipe="", save_tokenizer=None)
        prune_checkpoint((root / name, 0), plan_of(architecture), root / f"{name}-pruned", start())
        for folder in (name, f"{name}-pruned"):
            loaded[folder] = load_as_megatron(root / folder / PLACE)
    return loaded


def load_as_megatron(place: Path) -> Weights:
    """Into megatron-core's own model of the checkpoint's `args`, by its own loader, strictly."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    # Python 3.11.0 to 3.11.3 pickle enums in a way that torch does not take without trust; there are none here.
    args = dist_checkpointing.load_common_state_dict(str(place))["args"]
    assert isinstance(args, argparse.Namespace)
    model = foreign_model(args, {}, torch.bfloat16)
    asked = {"model": model.sharded_state_dict()}
    assert any(key.endswith("_extra_state") for key in asked["model"])
    found = dist_checkpointing.load(asked, str(place), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    model.load_state_dict(found["model"], strict=True)
    return {checkpoint_key(name): tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("way_back")


@pytest.fixture(scope="module")
def loaded(root: Path) -> dict[str, Weights]:
    return run_on_ranks(write_all, 1, root)[0]


@pytest.mark.parametrize("name", NAMES)
def test_megatron_cores_model_loads_teacher_and_student(loaded: dict[str, Weights], name: str) -> None:
    a, whole = expected_architecture(name), whole_tensors(expected_architecture(name))
    assert loaded[name].keys() == whole.keys()
    assert all(torch.equal(loaded[name][key], whole[key]) for key in whole)
    stacked = {
        parameter.key: torch.stack([whole[parameter.key, layer] for layer in range(a.num_layers)])
        if parameter.per_layer
        else whole[parameter.key, None]
        for parameter in parameter_table(a)
    }
    student = loaded[f"{name}-pruned"]
    for key, expected in sliced(stacked, plan_of(a)).items():
        layers = range(3) if key.startswith("decoder.layers.") else [None]
        found = [student[key, layer] for layer in layers]
        assert torch.equal(torch.stack(found) if len(found) > 1 else found[0], expected), (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_transformer_engines_extra_states_are_there(root: Path, loaded: Any, name: str) -> None:
    stored = read_metadata(root / name / PLACE).state_dict_metadata
    heads = ("self_attention.q_layernorm", "self_attention.k_layernorm") if name.startswith("qwen3") else ()
    wanted = [*OF_TRANSFORMER_ENGINE, *(f"decoder.layers.{head}._extra_state" for head in heads)]
    missing = [
        f"{key}/shard_{layer}_4" for key in wanted for layer in range(4) if f"{key}/shard_{layer}_4" not in stored
    ]
    assert not missing and "decoder.final_layernorm._extra_state/shard_0_1" in stored


@pytest.mark.parametrize("name", NAMES)
def test_both_descriptions_say_everything(root: Path, loaded: Any, tmp_path: Path, name: str) -> None:
    """An iteration that is moved alone; then without our own file, as another project's; nothing is asked for."""
    for folder in (name, f"{name}-pruned"):
        place = tmp_path / folder
        shutil.copytree(root / folder / PLACE, place)
        expected: Architecture = read_architecture(place)
        assert expected == (
            plan_of(expected_architecture(name)).student if "pruned" in folder else expected_architecture(name)
        )
        (place / "architecture.yaml").unlink()
        # There the vocabulary is the padded one, which the provider must make at any tensor parallelism.
        assert infer_architecture(place) == expected.replace(vocab_size=expected.padded_vocab_size)
        (place / "run_config.yaml").unlink()
        fixed = expected.rope_scaling and expected.rope_scaling.factor != 8.0  # Megatron-LM fixes three of its numbers
        found = infer_architecture(place)
        assert found.replace(rope_scaling=None) == expected.replace(rope_scaling=None)
        assert found.rope_scaling == expected.rope_scaling or fixed


def load_in_megatron_lm(folder: Path, flags: list[str]) -> tuple[Any, Weights]:
    """Megatron-LM's own `load_checkpoint`, with its own parser; its validation looks at the device."""
    start_layout({}, 1)
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import checkpointing, global_vars
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    device = SimpleNamespace(major=9, minor=0, multi_processor_count=1, total_memory=1 << 34)
    with (
        mock.patch.object(sys, "argv", ["pretrain_gpt.py", "--load", str(folder), *flags]),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_, **__: device),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_, **__: (9, 0)),
    ):
        args = parse_args()
        args.rank, args.world_size = 0, 1
        checkpointing.load_args_from_checkpoint(args)
        validate_args(args, {})
    global_vars.set_args(args)
    assert str(args.dist_ckpt_strictness).lower().endswith("assume_ok_unexpected")
    config = core_transformer_config_from_args(args)
    config.use_cpu_initialization = True
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )
    result = checkpointing.load_checkpoint([model], None, None)
    return result, {checkpoint_key(name): tensor.detach().clone() for name, tensor in model.named_parameters()}


HAS_MEGATRON_LM = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.training")
# The flags of docs/checkpoints.md, and what a machine without a GPU needs in addition.
FLAGS = (
    "--use-checkpoint-args --ckpt-format torch_dist --finetune --no-load-optim --no-load-rng --bf16 --seq-length 64",
    "--norm-epsilon 1e-5 --micro-batch-size 1 --train-iters 1 --lr 1e-4 --tokenizer-type NullTokenizer",
    "--vocab-size 1002 --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion --no-rope-fusion",
)


@pytest.mark.slow  # the contract above is what it rests on
@pytest.mark.skipif(not HAS_MEGATRON_LM, reason="megatron.training comes with megatron-core 0.17 and newer")
@pytest.mark.parametrize("name", NAMES)
def test_megatron_lms_own_loader(root: Path, loaded: dict[str, Weights], name: str) -> None:
    flags = " ".join([*FLAGS, "--qk-layernorm" if name.startswith("qwen3") else ""]).split()
    for folder in (name, f"{name}-pruned"):
        (iteration, _), found = run_on_ranks(load_in_megatron_lm, 1, root / folder, flags)[0]
        assert iteration == 0 and found.keys() == loaded[folder].keys()
        assert all(torch.equal(found[key], loaded[folder][key]) for key in found), folder
