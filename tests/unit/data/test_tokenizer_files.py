"""What lies beside a tokenizer's model counts, against transformers' reading of the same folder."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from minitron_mcore.data.config import TokenizerConfig
from minitron_mcore.data.tokenizer import HUGGING_FACE, SENTENCEPIECE, cut_otherwise, load_tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.errors import InputError
from tests.unit.data.test_tokenizer_json import model

# From then on transformers reads a SentencePiece model without a tokenizer_config.json as sentencepiece does.
BEFORE_5_24 = metadata.version("transformers") in SpecifierSet("<5.24")
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"
MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT = {"<|im_start|>": 500, "<|im_end|>": 501}
TEXTS = ("<|im_start|>user\n x<|im_end|> <|im_end|>", "def f(x): return x", "a<|im_end|>b  <pad>c<reserved>", " a")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return model(tmp_path_factory.mktemp("bpe") / "x.model").read_bytes()


def folder_of(path: Path, proto: bytes, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(proto)
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


APPLIED: dict[str, dict[str, Any]] = {
    "added": {"added_tokens": CHAT},
    "added, and what the model has": {"added_tokens": {**CHAT, "<s>": 1, "</s>": 2}},
    "added, special": {"added_tokens": CHAT, "special_tokens_map": {**MARKS, "additional_special_tokens": list(CHAT)}},
    "another end": {"added_tokens": CHAT, "special_tokens_map": {**MARKS, "eos_token": {"content": "<|im_end|>"}}},
    "a pad of no id": {"special_tokens_map": {**MARKS, "pad_token": "<pad>"}},
    "an end of no id": {"special_tokens_map": {**MARKS, "eos_token": "<|im_end|>"}},
    "with a config": {"added_tokens": CHAT, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", **MARKS}},
}


@pytest.mark.parametrize("kind", APPLIED)
def test_added_tokens_and_marks_are_applied(tmp_path: Path, bpe: bytes, kind: str) -> None:
    """In data, in the checkpoint's copy and in the export: the ids that transformers reads from the source."""
    from transformers import AutoTokenizer

    source = folder_of(tmp_path / "source", bpe, **APPLIED[kind])
    theirs = AutoTokenizer.from_pretrained(source)
    ours = load_tokenizer(str(source))
    ours.save(str(tmp_path / "checkpoint"))
    folder_of(tmp_path / "hf", b"what lay there before", added_tokens={"<other>": 900})
    save_for_transformers(load_tokenizer(str(tmp_path / "checkpoint")), str(tmp_path / "hf"))
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    copies = [ours, *(load_tokenizer(str(tmp_path / name)) for name in ("checkpoint", "hf"))]
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert again.encode(text, add_special_tokens=False) == expected, text
        assert [copy.tokenize(text) for copy in copies] == [expected] * len(copies), text
    plain = load_tokenizer(str(folder_of(tmp_path / "plain", bpe)))
    assert plain.type == SENTENCEPIECE
    assert {(copy.type, copy.vocab_size, copy.eod, copy.fingerprint) for copy in copies} == {
        (HUGGING_FACE, len(theirs), theirs.eos_token_id, ours.fingerprint)
    }
    assert ours.fingerprint != plain.fingerprint
    assert not ours.is_named_by(plain.fingerprint)
    # Without a tokenizer_config.json transformers puts no space before a text, as the model was trained to have it.
    assert (cut_otherwise(ours) > 0) == (BEFORE_5_24 and "tokenizer_config" not in APPLIED[kind])
    assert cut_otherwise(plain) == 0
    by_name = load_tokenizer(str(source / "tokenizer.model"))
    if "tokenizer_config" not in APPLIED[kind]:
        with pytest.raises(InputError, match="give ids or marks that a SentencePiece model lacks"):
            load_tokenizer(TokenizerConfig(type=SENTENCEPIECE, model=str(source)))
    assert by_name.fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map": MARKS},
        {"special_tokens_map": {**MARKS, "pad_token": "<unk>", "additional_special_tokens": ["<s>"]}},
        {"special_tokens_map": {**MARKS, "eos_token": {"content": "</s>", "lstrip": False}}},
        {"added_tokens": {"<unk>": 0, "<s>": 1, "</s>": 2}},
        {"added_tokens": {}},
    ],
)
def test_what_says_nothing_new_leaves_a_sentencepiece_model(tmp_path: Path, bpe: bytes, files: dict[str, Any]) -> None:
    bare = load_tokenizer(str(folder_of(tmp_path / "bare", bpe)))
    ours = load_tokenizer(str(folder_of(tmp_path / "source", bpe, **files)))
    assert (ours.type, ours.fingerprint) == (SENTENCEPIECE, bare.fingerprint)
    ours.save(str(tmp_path / "copy"))
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"tokenizer.model", *(f"{name}.json" for name in files)}


def test_what_cannot_be_applied_is_refused(tmp_path: Path, bpe: bytes) -> None:
    cases: list[tuple[str, bytes, dict[str, Any]]] = [
        ("gives '<|im_start|>' the id 700", bpe, {"added_tokens": {"<|im_start|>": 700, "<|im_end|>": 600}}),
        ("the id '600', which is not a whole number", bpe, {"added_tokens": {"<|im_start|>": "600"}}),
        ("not a mapping of names", bpe, {"added_tokens": ["<|im_start|>"]}),
    ]
    if BEFORE_5_24:
        unigram = model(tmp_path / "u.model", model_type="unigram", vocab_size=400).read_bytes()
        words = r"a Hugging Face tokenizer \(.*beside tokenizer\.model .*\): save it as tokenizer\.json, or move them"
        cases.append((words, unigram, {"added_tokens": {"<|im_start|>": 400}}))
    for number, (words, proto, files) in enumerate(cases):
        with pytest.raises(InputError, match=words):
            load_tokenizer(str(folder_of(tmp_path / str(number), proto, **files)))
    broken = folder_of(tmp_path / "broken", bpe)
    (broken / SPECIAL).write_text("{")
    with pytest.raises(InputError, match=r"special_tokens_map\.json cannot be read"):
        load_tokenizer(str(broken))


def test_a_tokenizer_without_end_of_sentence_is_given_one(tmp_path: Path, bpe: bytes) -> None:
    """One of sentencepiece, and a tokenizer.json alone."""
    from tests.unit.data.test_fingerprint import train_byte_level

    silent = model(tmp_path / "silent.model", eos_id=-1, user_defined_symbols=["<end>"]).read_bytes()
    folder_of(tmp_path / "sentencepiece", silent)
    train_byte_level(tmp_path / "json")
    (tmp_path / "json" / "tokenizer_config.json").unlink()
    for name, end in (("sentencepiece", "<end>"), ("json", "def")):
        folder = tmp_path / name
        with pytest.raises(InputError, match=r"has no end-of-sentence token, .*: name .* as eos_token in .*_map\.json"):
            load_tokenizer(str(folder))
        (folder / SPECIAL).write_text(json.dumps({"eos_token": end}))
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.pieces()[tokenizer.eod] == end


def test_a_folders_own_code_is_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask at the terminal."""
    from tests.unit.data.test_fingerprint import train_byte_level

    train_byte_level(tmp_path)
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(InputError, match=r"it needs custom code, which is not run here\): save it as tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_vocabulary_and_merges_alone_are_a_tokenizer(tmp_path: Path) -> None:
    """As older GPT-2 and Qwen folders have them."""
    from tests.unit.data.test_fingerprint import train_byte_level

    train_byte_level(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for path in list(tmp_path.iterdir()):
        path.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(whole["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in whole["merges"]))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    ours = load_tokenizer(str(tmp_path))
    assert ours.type == HUGGING_FACE and ours.detokenize(ours.tokenize("def f(): pass")) == "def f(): pass"


def test_several_chat_templates_go_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from tests.unit.data.test_fingerprint import train_byte_level

    train_byte_level(tmp_path / "source")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "source")
    theirs.chat_template = {"default": "D {{ messages }}", "tool_use": "T {{ messages }}", "rag": "R {{ messages }}"}
    theirs.save_pretrained(tmp_path / "source")
    load_tokenizer(str(tmp_path / "source")).save(str(tmp_path / "checkpoint"))
    (tmp_path / "hf").mkdir()
    save_for_transformers(load_tokenizer(str(tmp_path / "checkpoint")), str(tmp_path / "hf"))
    for name in ("checkpoint", "hf"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == theirs.chat_template
