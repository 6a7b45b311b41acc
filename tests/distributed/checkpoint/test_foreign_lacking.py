"""Foreign descriptions that lack keys: each key left out, one at a time, in both forms.

What the tensors show is taken from them; what they cannot show is asked for by key, and is right once it is given. The
expected architectures are written out by hand in foreign_models.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.checkpoint.stated import stating
from minitron_mcore.cli import main
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.job import stated_by
from minitron_mcore.recipe import load_recipe
from tests.distributed.foreign_models import (
    CASES,
    CONTEXT,
    ITERATION,
    PADDED,
    VOCAB,
    arguments,
    expected_architecture,
    run_config,
    write_cases,
)
from tests.distributed.ranks import run_on_ranks
from tests.unit.text_data import small_tokenizer

SCALED = "model.rope_scaling={factor: 4, low_freq_factor: 1, high_freq_factor: 3, original_max_position_embeddings: 32}"
OF_PROVIDER = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
# Keys of run_config.yaml (Llama's, its provider no family's) that are asked for -> what to give.
RUN_CONFIG = {
    "activation_func": "model.family=llama",
    "layernorm_zero_centered_gamma": "model.family=llama",
    "position_embedding_type": "model.family=llama",
    "layernorm_epsilon": "model.layernorm_epsilon=1e-5",
    "rotary_base": "model.rotary_base=500000",
    "rotary_percent": "model.rotary_percent=1",
    "seq_length": f"model.max_position_embeddings={CONTEXT}",
    "vocab_size": f"model.vocab_size={VOCAB}",
    **dict.fromkeys(OF_PROVIDER, SCALED),
}
# Options of Megatron-LM that are asked for -> what to give.
ARGUMENTS = {
    "apply_layernorm_1p": "model.family=NAME",
    "norm_epsilon": "model.layernorm_epsilon=1e-5",
    "rotary_base": "model.rotary_base=BASE",
    "rotary_percent": "model.rotary_percent=PERCENT",
    "max_position_embeddings": f"model.max_position_embeddings={CONTEXT}",
    "vocab_size": f"model.vocab_size={VOCAB}",
}
OF_FAMILY = {
    "llama": {
        "swiglu": "model.family=llama",
        "use_rope_scaling": "model.rope_scaling={factor: 8}",
        "rope_scaling_factor": "model.rope_scaling={factor: 8}",
    },
    # Llama's scaling is not for a Nemotron, but the factor's default stands in its arguments, too.
    "nemotron": {
        "squared_relu": "model.family=nemotron",
        "use_rope_scaling": "model.rope_scaling={factor: 1}",
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lacking")
    run_on_ranks(write_cases, 2, path, ["llama", "llama-bridge", "nemotron", "qwen3-bridge"])
    return path


def described(folder: Path, *overrides: str) -> Architecture:
    """As a verb reads it with these keys."""
    with stating(stated_by(load_recipe(None, list(overrides)))):
        return read_architecture(folder)


def check_asked(folder: Path, key: str, given: str | None, expected: Architecture) -> None:
    """`key` is left out in `folder`: it is shown by the tensors (`given` None), or asked for and then right."""
    if given is None:
        assert described(folder) == expected, key
        return
    with pytest.raises(InputError, match="does not say") as said:
        described(folder)
    words = str(said.value)
    assert key in words and given.partition("=")[0] in words and "\n" not in words, (key, words)
    assert described(folder, given) == expected, key


def write_run_config(root: Path, name: str, drop: tuple[str, ...], **changes: Any) -> None:
    model = yaml.safe_load(run_config(arguments(**CASES[name][0]), **changes))["model"]
    path = root / name / f"iter_{ITERATION:07d}" / "run_config.yaml"
    path.write_text(yaml.safe_dump({"model": {key: value for key, value in model.items() if key not in drop}}))


def write_arguments(root: Path, name: str, drop: tuple[str, ...], **changes: Any) -> None:
    path = root / name / f"iter_{ITERATION:07d}" / "common.pt"
    given = {**vars(arguments(**CASES[name][0])), **changes}
    args = argparse.Namespace(**{key: value for key, value in given.items() if key not in drop})
    torch.save({"args": args, "iteration": ITERATION}, path)


def test_each_key_of_a_run_config(root: Path) -> None:
    expected = expected_architecture("llama-bridge")
    keys = yaml.safe_load(run_config(arguments(**CASES["llama-bridge"][0])))["model"]
    assert set(keys) > set(RUN_CONFIG)
    for key in keys:
        write_run_config(root, "llama-bridge", (key,))
        check_asked(root / "llama-bridge", key, RUN_CONFIG.get(key), expected)


@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_each_option_of_megatron_lm(root: Path, name: str) -> None:
    expected = expected_architecture(name)
    values = {"NAME": name, "BASE": f"{expected.rotary_base:.0f}", "PERCENT": str(expected.rotary_percent)}
    asked = {**ARGUMENTS, **OF_FAMILY[name]}
    for key in vars(arguments()):
        write_arguments(root, name, (key,))
        given = asked.get(key)
        for word, value in values.items():
            given = given and given.replace(word, value)
        check_asked(root / name, "" if key == "rope_scaling_factor" else key, given, expected)


def test_all_that_is_missing_is_one_sentence(root: Path) -> None:
    """As of a file that holds megatron-core's own config alone; heads, where norms on them do not show their width."""
    drop: tuple[str, ...] = (
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "rotary_base",
        "seq_length",
        "vocab_size",
    )
    drop += ("position_embedding_type", "share_embeddings_and_output_weights", "rotary_percent", "hidden_size")
    given = [RUN_CONFIG[key] for key in drop if key in RUN_CONFIG]
    for name, heads in {"llama-bridge": ["model.num_attention_heads=6"], "qwen3-bridge": []}.items():
        changes = {"scale_factor": None} if heads else {}
        write_run_config(root, name, drop, **changes)
        with pytest.raises(InputError, match="does not say") as said:
            described(root / name)
        keys = [*given, *heads]
        assert all(key.partition("=")[0] in str(said.value) for key in keys), said.value
        assert ("num_attention_heads" in str(said.value)) == bool(heads)
        family = "llama" if heads else "qwen3"
        here = {"model.family=llama": f"model.family={family}"}
        if not heads:
            here["model.rotary_base=500000"] = "model.rotary_base=1000000"
        found = described(root / name, *(here.get(key, key) for key in keys))
        assert found == expected_architecture(name).replace(rope_scaling=None)


def test_without_any_description_the_user_gives_it(root: Path) -> None:
    """A checkpoint of megatron-core's own `dist_checkpointing.save`, whose common part has no arguments."""
    path = root / "llama" / f"iter_{ITERATION:07d}" / "common.pt"
    torch.save({"iteration": ITERATION}, path)
    with pytest.raises(InputError, match=r"holds no args of Megatron-LM, .* give model\.family"):
        described(root / "llama")
    with pytest.raises(InputError, match="does not say") as said:
        described(root / "llama", "model.family=llama")
    of_family = ("model.family=llama", RUN_CONFIG["rotary_percent"])
    given = [key for name, key in RUN_CONFIG.items() if name not in OF_PROVIDER and key not in of_family]
    given += ["model.num_attention_heads=6", "model.rope_scaling={factor: 8}"]
    assert all(key.partition("=")[0] in str(said.value) for key in given), said.value
    assert described(root / "llama", *given, "model.family=llama") == expected_architecture("llama")


def test_a_provider_named_after_a_family_says_what_it_fixes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop = ("activation_func", "layernorm_zero_centered_gamma", "position_embedding_type", "rotary_percent")
    target = "megatron.bridge.models.llama.llama_provider.LlamaModelProvider"
    write_run_config(root, "llama-bridge", (*drop, *OF_PROVIDER), _target_=target)
    expected = expected_architecture("llama-bridge")
    for _ in range(2):
        assert described(root / "llama-bridge") == expected.replace(rope_scaling=None)
    assert capsys.readouterr().err.count("does not mention rope_scaling: rotary frequencies are taken as not") == 1
    assert described(root / "llama-bridge", SCALED) == expected
    write_run_config(root, "llama-bridge", (*OF_PROVIDER, "rotary_base"), _target_=target)
    with pytest.raises(InputError, match=r"give model\.rotary_base, model\.rope_scaling"):
        described(root / "llama-bridge")


def test_what_is_said_twice_must_agree(root: Path) -> None:
    write_run_config(root, "llama-bridge", ())
    place = root / "llama-bridge"
    assert described(place, "model.rotary_base=500000", SCALED, "model.vocab_size=1003").vocab_size == VOCAB
    refused = {
        "model.rotary_base=10000": r"model\.rotary_base=10000.0 contradicts .*run_config\.yaml, which says 500000",
        "model.layernorm_epsilon=1e-6": r"model\.layernorm_epsilon=1e-06 contradicts",
        "model.rope_scaling={factor: 8}": r"model\.rope_scaling\.factor=8 contradicts .* which says 4\.0",
        "model.family=nemotron": r"normalization=RMSNorm in .* does not fit model\.family=nemotron: a nemotron",
        "model.family=gpt": r"model\.family=gpt is not known: choose one of",
    }
    for given, words in refused.items():
        with pytest.raises(InputError, match=words):
            described(place, given)
    with pytest.raises(InputError, match=r"model\.vocab_size=1000 contradicts .* which says 1003"):
        described(place, "model.vocab_size=1000")
    write_run_config(root, "llama-bridge", (), vocab_size=PADDED)  # as what left here with its padding comes back
    assert described(place).vocab_size == PADDED
    assert described(place, f"model.vocab_size={VOCAB}") == expected_architecture("llama-bridge")


def test_a_verb_reads_the_keys(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run_config(root, "llama-bridge", ("rotary_base",))
    place = str(root / "llama-bridge")
    assert main(["inspect", place]) == 2
    assert "give model.rotary_base" in capsys.readouterr().err
    assert main(["inspect", place, "model.rotary_base=250000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"]["rotary_base"] == 250000.0


def test_the_tokenizer_says_the_vocabulary(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron-LM's arguments hold the padded size alone: rows beyond the tokenizer's ids are padding."""
    model = tmp_path / "tokenizer.model"
    ids = small_tokenizer(model).vocab_size
    unit = PADDED // 2  # of which Megatron-LM makes all rows at tensor parallelism 2
    assert unit < ids < PADDED

    def counted(*overrides: str, **changes: Any) -> int:
        write_arguments(root, "llama", ("vocab_size",), make_vocab_size_divisible_by=unit, **changes)
        found = described(root / "llama", *overrides)
        assert found == expected_architecture("llama").replace(vocab_size=found.vocab_size)
        return found.vocab_size

    assert counted(f"tokenizer.model={model}") == ids
    assert counted(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model)) == ids
    assert f"does not say vocab_size: the {ids:,} ids of {model} count" in capsys.readouterr().err
    shutil.copy(model, root / "llama" / "moved.model")  # where the path is another machine's
    assert counted(tokenizer_model="/elsewhere/moved.model") == ids
    assert counted(f"tokenizer.model={model}", "model.vocab_size=1000") == 1000
    with pytest.raises(InputError, match=r"give model\.vocab_size or tokenizer\.model; the tokenizer it names, /gone,"):
        counted(tokenizer_model="/gone")
    with pytest.raises(InputError, match=rf"has {ids:,} ids, which no padding turns into the 1,024 stored rows"):
        write_arguments(root, "llama", ("vocab_size",), tensor_model_parallel_size=2)
        described(root / "llama", f"tokenizer.model={model}")
    write_arguments(root, "llama", (), tokenizer_type="NullTokenizer")
    assert described(root / "llama").vocab_size == VOCAB + 1  # its end of document
