"""SentencePiece models of other kinds than ours, converted: the same ids as sentencepiece gives, or refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.errors import InputError
from tests.unit.text_data import EMAIL_PACKAGE, JSON_PACKAGE, python_files

TEXTS = [path.read_text(encoding="utf-8") for path in python_files(JSON_PACKAGE) + python_files(EMAIL_PACKAGE)]
TEXTS += ["", " ", "  x ", "\t\n x", "é漢🙂", "a</s>b", "x", "    " * 9]


def model(path: Path, **settings: Any) -> Path:
    """A model as Llama 2's is trained, but for `settings`."""
    written = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "max_sentence_length": 1 << 20,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=written, **{**options, **settings}
    )
    path.write_bytes(written.getvalue())
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<|user|>", "self"]},
        {"byte_fallback": False, "character_coverage": 1.0, "bos_id": -1},
        {"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2},
    ],
    ids=["dummy-prefix", "white-space", "own-symbols", "no-bytes", "other-ids"],
)
def test_the_same_ids(tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(str(model(tmp_path / "x.model", **settings)))
    (tmp_path / "hf").mkdir()
    save_for_transformers(ours, str(tmp_path / "hf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [*TEXTS, "a<|user|>b  <|user|> self.selfie"]:
        assert theirs.encode(text) == ours.encode(text), text[:60]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eod)
    saved = load_tokenizer(str(tmp_path / "hf"))
    assert saved.tokenize(TEXTS[0]) == ours.tokenize(TEXTS[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "unigram"}, "it is no BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text"),
        ({"remove_extra_whitespaces": True}, "it normalizes text"),
        ({"treat_whitespace_as_suffix": True}, "before the word"),
        ({"user_defined_symbols": ["<|user|>"]}, "its own symbols"),
    ],
)
def test_what_has_no_equal_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    tokenizer = load_tokenizer(str(model(tmp_path / "x.model", **settings)))
    (tmp_path / "hf").mkdir()
    with pytest.raises(InputError, match=words):
        save_for_transformers(tokenizer, str(tmp_path / "hf"))
    assert not list((tmp_path / "hf").iterdir())
