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
from safetensors.torch import load_file, save_file

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.export import export_checkpoint
from minitron_mcore.checkpoint.families.find import known_families
from minitron_mcore.checkpoint.import_hf import import_checkpoint, read_config
from minitron_mcore.errors import InputError
from minitron_mcore.model.initialize import draw
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.start import Runtime
from tests.distributed.models import LAYOUTS, start_layout
from tests.distributed.ranks import RankError, run_on_ranks

# head_dim is not hidden / heads, nothing is a power of two, and the vocabulary ends inside the last rank's part.
SHAPE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 96, "ffn_hidden_size": 136, "num_attention_heads": 6, "num_query_groups": 2,
    "kv_channels": 20, "vocab_size": 1003, "max_position_embeddings": 64, "init_method_std": 0.08,
}
SCALING = {"factor": 6.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 24}
CASES: dict[str, dict[str, Any]] = {
    "llama-scaled": {"family": "llama", "rope_scaling": SCALING, "layernorm_epsilon": 3e-4},
    "llama-tied": {"family": "llama", "untie_embeddings_and_output_weights": False, "rotary_base": 10000.0},
    "nemotron": {"family": "nemotron"},
}
PLACES = ["1", "TP2", "PP2", "DP2", "TP2-PP2"]
SEED = 11
MAX_SHARD = 300_000  # bytes: several files


def architecture_of(case: str) -> Architecture:
    return build_architecture({**SHAPE, **CASES[case]})


def source_tensor(parameter: Any, architecture: Architecture, layer: int | None) -> torch.Tensor:
    """The global parameter of the tests' model: as initialised, but for norms, which are all different here."""
    drawn = draw(parameter, architecture, SEED, layer)
    if parameter.axes != ("hidden",):
        return drawn
    digest = hashlib.sha256(f"{parameter.key}@{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return drawn + 0.3 * torch.randn(drawn.shape, generator=generator)


def token_ids() -> torch.Tensor:
    """[b, s]"""
    return torch.randint(0, SHAPE["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(3))


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
                if table[key].axes == ("hidden",):
                    tensor.data.copy_(take_shard(source_tensor(table[key], architecture, layer), table[key],
                                                 architecture, 0, 1))
        ours = Path(folder, f"ours-{case}-{name}")
        if runtime.is_main:
            write_description(ours, architecture, lineage={"stage": "train"}, recipe="", save_tokenizer=None)
        save_state(ours, 7, model_state(as_chunks(chunks)), runtime)
        export_checkpoint(ours, 7, Path(folder, f"export-{case}-{name}"), runtime, bos=1, eos=2,
                          max_shard_bytes=MAX_SHARD)
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


def logits_of(chunks: list[Any]) -> torch.Tensor | None:
    from minitron_mcore.model.gpt import unwrap
    from minitron_mcore.model.schedule import final_hidden_states

    tokens = token_ids()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    hidden = final_hidden_states(chunks, [{"tokens": tokens, "position_ids": positions}])
    with torch.no_grad():
        return unwrap(chunks[-1]).logits(hidden[0]) if hidden else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`theirs-CASE`: models made and saved by transformers, in several files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("hf")
    for case in CASES:
        a = architecture_of(case)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rotary_base}
        if a.rope_scaling is not None:
            rope |= {"rope_type": "llama3", **SCALING}
        if a.family == "nemotron":
            rope |= {"partial_rotary_factor": a.rotary_percent}
        config = AutoConfig.for_model(
            a.family, hidden_size=a.hidden_size, intermediate_size=a.ffn_hidden_size, head_dim=a.kv_channels,
            num_hidden_layers=a.num_layers, num_attention_heads=a.num_attention_heads, vocab_size=a.vocab_size,
            num_key_value_heads=a.num_query_groups, max_position_embeddings=a.max_position_embeddings,
            initializer_range=a.init_method_std, tie_word_embeddings=not a.untie_embeddings_and_output_weights,
            rope_parameters=rope, **{("norm_eps" if a.family == "nemotron" else "rms_norm_eps"): a.layernorm_epsilon},
        )
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.data += 0.3 * torch.randn(tensor.shape)
        model.save_pretrained(root / f"theirs-{case}", max_shard_size="400KB")
    return root


@pytest.fixture(scope="module")
def converted(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Global logits [b, s, V] by layout and model."""
    results = {}
    for name in PLACES:
        world_size, parallel = LAYOUTS[name]
        ranks = run_on_ranks(convert_on_rank, world_size, str(folder), name, parallel, world_size)
        size = parallel.get("tensor", 1)
        last = ranks[-size:]  # tensor-parallel ranks are neighbours, the last stage comes last
        results[name] = {
            model: torch.cat([rank[model] for rank in last], dim=-1)[..., : SHAPE["vocab_size"]].transpose(0, 1)
            for model in last[0]
        }
    return results


def transformers_logits(path: Path) -> torch.Tensor:
    """[b, s, V]; nothing may be missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def alone() -> Runtime:
    return Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


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
        rows = iter(source[ours + "self_attention.linear_qkv.weight", layer].split(d))
        heads: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
        for _ in range(a.num_query_groups):
            heads["q"] += [next(rows) for _ in range(q)]
            heads["k"].append(next(rows))
            heads["v"].append(next(rows))
        for part, tensors in heads.items():
            result[f"{theirs}self_attn.{part}_proj.weight"] = torch.cat(tensors)
        result[theirs + "self_attn.o_proj.weight"] = source[ours + "self_attention.linear_proj.weight", layer]
        fc1 = source[ours + "mlp.linear_fc1.weight", layer]
        if a.family == "llama":
            result[theirs + "mlp.gate_proj.weight"] = fc1[: a.ffn_hidden_size]
        result[theirs + "mlp.up_proj.weight"] = fc1[-a.ffn_hidden_size :]
        result[theirs + "mlp.down_proj.weight"] = source[ours + "mlp.linear_fc2.weight", layer]
        for kind in kinds:
            before_attention = source[f"{ours}self_attention.linear_qkv.layer_norm_{kind}", layer]
            result[f"{theirs}input_layernorm.{kind}"] = before_attention
            result[f"{theirs}post_attention_layernorm.{kind}"] = source[f"{ours}mlp.linear_fc1.layer_norm_{kind}", layer]
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

    exported, made = (AutoConfig.from_pretrained(folder / f"{kind}").to_dict() for kind in
                      (f"export-{case}-1", f"theirs-{case}"))
    marks = {"bos_token_id": 1, "eos_token_id": 2}
    skipped = {*marks, "_name_or_path", "transformers_version"}
    assert {k: v for k, v in exported.items() if k not in skipped} == {k: v for k, v in made.items() if k not in skipped}
    assert {k: exported[k] for k in marks} == marks
    assert read_config(folder / f"theirs-{case}") == architecture_of(case)


def test_every_family_has_a_row_for_every_parameter() -> None:
    from minitron_mcore.architecture import FAMILIES
    from minitron_mcore.layout import parameter_table

    assert set(known_families()) == set(FAMILIES)
    for name, family in known_families().items():
        parameters = parameter_table(build_architecture({**SHAPE, "family": name}))
        assert {row.key for row in family.tensors} == {parameter.key for parameter in parameters}


# What is refused, and that nothing is left behind.


def refuse_on_rank(folder: str, target: str, world_size: int) -> None:
    from minitron_mcore.runtime.start import start

    start_layout({"tensor": 2}, world_size)
    export_checkpoint(Path(folder), 7, Path(target), start())


def test_an_existing_target_is_refused_on_every_rank(folder: Path, converted: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "precious").write_text("1")
    with pytest.raises(RankError) as caught:
        run_on_ranks(refuse_on_rank, 2, str(folder / "ours-nemotron-1"), str(target), 2)
    assert isinstance(caught.value.__cause__, InputError) and f"hf={target} exists" in str(caught.value.__cause__)
    assert f"then rank {1 - (caught.value.rank or 0)}" in str(caught.value), "the other rank was left waiting"
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "precious"]


def test_a_shape_without_an_equal_is_refused(folder: Path, converted: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    import yaml

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder / "ours-llama-tied-1", checkpoint)
    changes = {
        "hidden_size=100 is no multiple of num_attention_heads=6": {"hidden_size": 100},
        "rotary_percent=0.5": {"rotary_percent": 0.5},
        "does not fit its architecture.yaml": {"ffn_hidden_size": 134},
        "holds no tensor output_layer.weight": {"untie_embeddings_and_output_weights": True},
    }
    fields = yaml.safe_load((checkpoint / "architecture.yaml").read_text())
    for words, change in changes.items():
        (checkpoint / "architecture.yaml").write_text(yaml.safe_dump({**fields, **change}))
        with pytest.raises(InputError, match=words):
            export_checkpoint(checkpoint, 7, tmp_path / "target", alone())
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def damaged(folder: Path, tmp_path: Path, kind: str) -> Path:
    """A copy of transformers' tied Llama in one file, with one thing wrong."""
    import shutil

    source = tmp_path / kind
    source.mkdir()
    shutil.copy(folder / "theirs-llama-tied" / "config.json", source)
    tensors = tensors_of(folder / "theirs-llama-tied")
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
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "no config":
        (source / "config.json").unlink()
    return source


DAMAGES = {
    "missing": "holds no tensor model.layers.1.mlp.up_proj.weight",
    "left over": "model.safetensors holds a tensor model.layers.1.self_attn.q_proj.bias",
    "shape": r"model.safetensors: model.norm.weight is of shape \(97,\), but config.json means \(96,\)",
    "model_type": "model_type='gpt2' is not known: choose one of llama, nemotron",
    "bias": "attention_bias=True is not supported",
    "rope": "rope_type='linear' is not supported",
    "cut off": "model.safetensors is no whole safetensors file",
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
    import re

    sources = {kind: str(damaged(folder, tmp_path, kind)) for kind in DAMAGES}
    for said in run_on_ranks(import_damaged_on_rank, 2, sources, str(tmp_path / "target")):
        assert said.keys() == DAMAGES.keys()
        for kind, words in DAMAGES.items():
            assert re.search(words, said[kind]), said[kind]
    assert not (tmp_path / "target").exists()


def test_a_rank_whose_vocabulary_is_padding_alone(tmp_path: Path) -> None:
    """100 ids padded to 256: at TP 4 the last two ranks hold zeros, and read nothing."""
    from minitron_mcore.checkpoint.families.table import units
    from minitron_mcore.checkpoint.import_hf import SafetensorsFolder

    a = build_architecture({**SHAPE, "vocab_size": 100, "make_vocab_size_divisible_by": 256})
    table = torch.randn(100, 96)
    save_file({"model.embed_tokens.weight": table}, tmp_path / "model.safetensors")
    unit = units(known_families()["llama"], a)[0]
    source = SafetensorsFolder(tmp_path)
    whole = torch.cat([source.read_part(unit, a, rank, 4) for rank in range(4)])
    assert torch.equal(whole, torch.cat([table, torch.zeros(156, 96)]))


def test_parallel_config_is_checked(folder: Path) -> None:
    with pytest.raises(InputError, match=r"parallel\.tensor=4 does not divide num_query_groups=2"):
        import_checkpoint(folder / "theirs-llama-tied", folder / "x", architecture_of("llama-tied"),
                          ParallelConfig(tensor=4), alone())
