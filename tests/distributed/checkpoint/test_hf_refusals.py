"""What export and import refuse: in one sentence, on every rank, and with nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from minitron_mcore.architecture import build_architecture
from minitron_mcore.checkpoint.conversion import units
from minitron_mcore.checkpoint.export import export_checkpoint
from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.checkpoint.import_hf import SafetensorsFolder, import_checkpoint
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.hf_cases import SHAPE, alone, architecture_of, save_with_transformers, tensors_of
from tests.distributed.models import start_layout
from tests.distributed.ranks import RankError, run_on_ranks

CASE = "llama-tied"


def import_on_rank(source: str, target: str) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.runtime.start import start

    layout = start_layout({}, 1)
    architecture = read_config(Path(source))
    import_checkpoint(Path(source), Path(target), architecture, layout, start())
    write_description(Path(target), architecture, lineage={}, recipe="", save_tokenizer=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`theirs`, a model of transformers', and `checkpoint`, the same imported."""
    root = tmp_path_factory.mktemp("hf")
    save_with_transformers(CASE, root / "theirs")
    run_on_ranks(import_on_rank, 1, str(root / "theirs"), str(root / "checkpoint"))
    return root


def refuse_on_rank(folder: str, target: str, world_size: int) -> None:
    from minitron_mcore.runtime.start import start

    start_layout({"tensor": 2}, world_size)
    export_checkpoint(Path(folder), 0, Path(target), start())


def test_a_target_that_cannot_be_written_is_refused_on_every_rank(folder: Path, tmp_path: Path) -> None:
    """That one which is there is refused is known before: tests/e2e/bad_input_cases.py."""
    (tmp_path / "precious").write_text("1")
    target = tmp_path / "precious" / "hf"
    with pytest.raises(RankError) as caught:
        run_on_ranks(refuse_on_rank, 2, str(folder / "checkpoint"), str(target), 2)
    assert isinstance(caught.value.__cause__, InputError) and f"hf={target} cannot be written" in str(
        caught.value.__cause__
    )
    assert f"then rank {1 - (caught.value.rank or 0)}" in str(caught.value), "the other rank was left waiting"
    assert [entry.name for entry in tmp_path.rglob("*")] == ["precious"]


def test_a_shape_without_an_equal_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder / "checkpoint", checkpoint)
    changes: dict[str, dict[str, object]] = {
        "hidden_size=100 of .* is not a multiple of num_attention_heads=6": {"hidden_size": 100},
        "rotary_percent=0.5": {"rotary_percent": 0.5},
        "but its architecture.yaml means": {"ffn_hidden_size": 134},
        "holds no tensor output_layer.weight": {"untie_embeddings_and_output_weights": True},
    }
    fields = yaml.safe_load((checkpoint / "architecture.yaml").read_text())
    for words, change in changes.items():
        (checkpoint / "architecture.yaml").write_text(yaml.safe_dump({**fields, **change}))
        with pytest.raises(InputError, match=words):
            export_checkpoint(checkpoint, 0, tmp_path / "target", alone())
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("name", "words"), [(".metadata", "no readable .metadata"), ("__0_0.distcp", "is damaged")])
def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path, name: str, words: str) -> None:
    """Cut off after the first files of the export were written, or missing."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder / "checkpoint", checkpoint)
    path = checkpoint / "iter_0000000" / name
    for damage in (lambda: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), path.unlink):
        damage()
        with pytest.raises(InputError, match=words):
            export_checkpoint(checkpoint, 0, tmp_path / "target", alone(), max_shard_bytes=1)
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def damaged(folder: Path, tmp_path: Path, kind: str) -> Path:
    """A copy of transformers' tied Llama in one file, with one thing wrong."""
    source = tmp_path / kind
    source.mkdir()
    shutil.copy(folder / "theirs" / "config.json", source)
    tensors = tensors_of(folder / "theirs")
    config = json.loads((source / "config.json").read_text())
    if kind == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif kind == "left over":
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(120)
    elif kind == "shape":
        tensors["model.norm.weight"] = torch.zeros(97)
    elif kind == "model_type":
        config["model_type"] = "gpt2"
    elif kind == "bias":
        config["attention_bias"] = True
    elif kind == "rope":
        config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors")
    if kind == "cut off":
        data = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(data[:-100])
    elif kind == "no weights":
        (source / "model.safetensors").unlink()
    elif kind == "no shard":
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
        (source / "model.safetensors").unlink()
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "no config":
        (source / "config.json").unlink()
    return source


DAMAGES = {
    "missing": "holds no tensor model.layers.1.mlp.up_proj.weight",
    "left over": "model.safetensors holds a tensor model.layers.1.self_attn.q_proj.bias",
    "shape": r"model.safetensors holds model.norm.weight of shape \(97,\), but config.json means \(96,\)",
    "model_type": "model_type=gpt2 in .* is not known: choose one of llama, mistral, nemotron, qwen2, qwen3",
    "bias": "attention_bias=true in .* is not supported",
    "rope": "rope_type=linear in .* is not supported",
    "cut off": "model.safetensors is not a whole safetensors file",
    "no weights": "holds neither model.safetensors nor model.safetensors.index.json",
    "no shard": "model-00001-of-00002.safetensors is missing",
    "no config": "holds no config.json",
}


def import_damaged_on_rank(sources: dict[str, str], target: str) -> dict[str, str]:
    """What import says about each source, by kind."""
    from minitron_mcore.runtime.start import start

    layout = start_layout({"tensor": 2}, 2)
    said = {}
    for kind, source in sources.items():
        try:
            import_checkpoint(Path(source), Path(target), read_config(Path(source)), layout, start())
        except InputError as error:
            said[kind] = str(error)
    return said


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    sources = {kind: str(damaged(folder, tmp_path, kind)) for kind in DAMAGES}
    for said in run_on_ranks(import_damaged_on_rank, 2, sources, str(tmp_path / "target")):
        assert said.keys() == DAMAGES.keys()
        for kind, words in DAMAGES.items():
            assert re.search(words, said[kind]), said[kind]
    assert not (tmp_path / "target").exists()


def test_a_rank_whose_vocabulary_is_padding_alone(tmp_path: Path) -> None:
    """100 ids padded to 256: at TP 4 the last two ranks hold zeros, and read nothing."""
    a = build_architecture({**SHAPE, "vocab_size": 100, "make_vocab_size_divisible_by": 256})
    table = torch.randn(100, 96)
    save_file({"model.embed_tokens.weight": table}, tmp_path / "model.safetensors")
    unit = units(a)[0]
    source = SafetensorsFolder(tmp_path)
    whole = torch.cat([source.part(unit, a, rank, 4).read() for rank in range(4)])
    assert torch.equal(whole, torch.cat([table, torch.zeros(156, 96)]))


def test_parallel_config_is_checked(folder: Path) -> None:
    with pytest.raises(InputError, match=r"parallel\.tensor=4 does not divide num_query_groups=2"):
        import_checkpoint(folder / "theirs", folder / "x", architecture_of(CASE), ParallelConfig(tensor=4), alone())
