"""Fingerprints: equal for a SentencePiece model and its Hugging Face forms, different for whatever changes the ids."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.data.tokenizer import HUGGING_FACE, SENTENCEPIECE, Tokenizer, load_tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from tests.unit.data.test_tokenizer_json import model
from tests.unit.text_data import JSON_PACKAGE, python_files, small_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "bpe-no-prefix": {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
    "bpe-no-bytes": {"byte_fallback": False, "character_coverage": 1.0},
    "bpe-other-ids": {"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2},
    "bpe-no-bos": {"bos_id": -1},
    "unigram": {"model_type": "unigram", "character_coverage": 1.0},
}


def hugging_face_form(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    save_for_transformers(tokenizer, str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_and_its_tokenizer_json_are_the_same(tmp_path: Path, kind: str) -> None:
    original = load_tokenizer(str(model(tmp_path / "x.model", **KINDS[kind])))
    folder = hugging_face_form(original, tmp_path / "hf")
    form = load_tokenizer(str(folder))
    assert (original.type, form.type) == (SENTENCEPIECE, HUGGING_FACE)
    assert form.fingerprint == original.fingerprint
    assert (form.vocab_size, form.bos, form.eod) == (original.vocab_size, original.bos, original.eod)
    (folder / "tokenizer.model").unlink()
    assert load_tokenizer(str(folder)).fingerprint == original.fingerprint


def test_the_form_that_transformers_makes_is_the_same(tmp_path: Path) -> None:
    """As a Llama 2 folder without tokenizer.json: transformers converts the model by rules of its own."""
    original = load_tokenizer(str(model(tmp_path / "x.model")))
    (tmp_path / "llama").mkdir()
    shutil.copy(tmp_path / "x.model", tmp_path / "llama" / "tokenizer.model")
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **marks}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(config))
    form = load_tokenizer(str(tmp_path / "llama"))
    assert (form.type, form.fingerprint) == (HUGGING_FACE, original.fingerprint)


def swap_two_ids(files: dict[str, Any]) -> None:
    vocab = files["tokenizer.json"]["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def rename_a_piece(files: dict[str, Any]) -> None:
    tokenizer = files["tokenizer.json"]["model"]
    number = tokenizer["vocab"].pop("<0xF5>")  # a byte that UTF-8 never has: no probe can tell
    tokenizer["vocab"]["<|reserved|>"] = number


def take_another_eos(files: dict[str, Any]) -> None:
    files["tokenizer_config.json"]["eos_token"] = "<s>"


def merge_in_another_order(files: dict[str, Any]) -> None:
    files["tokenizer.json"]["model"]["merges"].reverse()


def add_a_prefix(files: dict[str, Any]) -> None:
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    files["tokenizer.json"]["normalizer"]["normalizers"].insert(0, prepend)


def add_a_token(files: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    number = len(files["tokenizer.json"]["model"]["vocab"])
    files["tokenizer.json"]["added_tokens"].append({"id": number, "content": "<|extra|>", **flags})


def indent_otherwise(files: dict[str, Any]) -> None:
    files["tokenizer_config.json"]["chat_template"] = "{{ messages }}"


CHANGES: list[tuple[Callable[[dict[str, Any]], None], bool]] = [
    (swap_two_ids, False),
    (rename_a_piece, False),
    (take_another_eos, False),
    (merge_in_another_order, False),
    (add_a_prefix, False),
    (add_a_token, False),
    (indent_otherwise, True),
]


@pytest.mark.parametrize(("change", "same"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_what_changes_the_ids_changes_it(tmp_path: Path, change: Callable[..., None], same: bool) -> None:
    original = small_tokenizer(tmp_path / "x.model")
    folder = hugging_face_form(original, tmp_path / "hf")
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: json.loads((folder / name).read_text()) for name in names}
    change(files)
    for name in names:
        (folder / name).write_text(json.dumps(files[name]))
    assert (load_tokenizer(str(folder)).fingerprint == original.fingerprint) is same


def test_other_models_are_different(tmp_path: Path) -> None:
    models = [load_tokenizer(str(model(tmp_path / f"{kind}.model", **KINDS[kind]))) for kind in KINDS]
    assert len({tokenizer.fingerprint for tokenizer in models}) == len(models)


def test_names_from_before_still_count(tmp_path: Path) -> None:
    """Data and checkpoints once named a tokenizer by its files' bytes."""
    original, other = small_tokenizer(tmp_path / "x.model"), small_tokenizer(tmp_path / "y.model", vocab_size=500)
    form = load_tokenizer(str(hugging_face_form(original, tmp_path / "hf")))
    of_file = hashlib.sha256((tmp_path / "x.model").read_bytes()).hexdigest()
    content = b"2" + b"".join((tmp_path / "hf" / name).read_bytes() for name in ("tokenizer.json", "tokenizer.model"))
    of_folder = hashlib.sha256(content).hexdigest()
    for tokenizer, names in ((original, [of_file]), (form, [of_file, of_folder])):
        assert all(tokenizer.is_named_by(name) for name in (original.fingerprint, *names))
        assert not tokenizer.is_named_by(other.fingerprint) and not tokenizer.is_named_by("")
    assert not other.is_named_by(of_file)
    # A tokenizer.model of something else beside tokenizer.json says nothing about it.
    shutil.copy(tmp_path / "y.model", tmp_path / "hf" / "tokenizer.model")
    of_other = hashlib.sha256((tmp_path / "y.model").read_bytes()).hexdigest()
    assert not load_tokenizer(str(tmp_path / "hf")).is_named_by(of_other)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Llama 3's: byte-level BPE behind a regular expression, marks as added tokens, no tokenizer.model."""
    folder = tmp_path_factory.mktemp("byte-level")
    train_byte_level(folder)
    return folder


def train_byte_level(folder: Path, vocab_size: int = 500) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(path) for path in python_files(JSON_PACKAGE)], trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    marks = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


def test_byte_level_bpe_keeps_its_ids_and_its_bytes(byte_level: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(str(byte_level))
    ours.save(str(tmp_path / "checkpoint"))
    hugging_face_form(load_tokenizer(str(tmp_path / "checkpoint")), tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [path.read_text(encoding="utf-8") for path in python_files(JSON_PACKAGE)]
    for text in [*texts, "", " ", "  x \t\r\n\n y", "é漢🙂\u2581\0", "    " * 9, "a<|eot_id|>b"]:
        assert theirs.encode(text, add_special_tokens=False) == ours.tokenize(text)
        assert theirs.decode(ours.tokenize(text)) == ours.detokenize(ours.tokenize(text)) == text
    for path in byte_level.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    assert load_tokenizer(str(tmp_path / "hf")).fingerprint == ours.fingerprint
    train_byte_level(tmp_path / "other", vocab_size=499)
    assert load_tokenizer(str(tmp_path / "other")).fingerprint != ours.fingerprint
