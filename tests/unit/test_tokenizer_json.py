"""SentencePiece models of other kinds than ours, converted: the same ids as sentencepiece gives, or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.errors import InputError
from tests.unit.text_data import EMAIL_PACKAGE, JSON_PACKAGE, python_files

TEXTS = [path.read_text(encoding="utf-8") for path in python_files(JSON_PACKAGE) + python_files(EMAIL_PACKAGE)]
TEXTS += ["", " ", "  x ", "Żółć и 漢字かな", "\t\n x", "é漢🙂", "a</s>b", "x", "    " * 9]


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


NO_PREFIX = {"add_dummy_prefix": False}


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
    "settings",
    [{}, {**NO_PREFIX, "allow_whitespace_only_pieces": True}, {"byte_fallback": False}],
    ids=["dummy-prefix", "white-space", "no-bytes"],
)
def test_unigram_models_give_the_same_ids(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Line by line, the same; where two cuts are equally good, the same pieces in another order, which is rare."""
    from transformers import AutoTokenizer

    settings = {"model_type": "unigram", "character_coverage": 1.0, **settings}
    ours = load_tokenizer(str(model(tmp_path / "x.model", **settings)))
    (tmp_path / "hf").mkdir()
    save_for_transformers(ours, str(tmp_path / "hf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    scores = dict(json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["vocab"])
    lines = [line for text in TEXTS for line in text.splitlines(keepends=True)]
    lines += ["", " ", "  x ", "<0x0A></s><unk>", "a</s>b", "    " * 9, *(["é漢🙂"] if ours.tokenize("é") else [])]
    ties = 0
    for line in lines:
        mine, others = ours.tokenize(line), theirs.encode(line)
        if mine != others:
            ties += 1
            pieces = theirs.convert_ids_to_tokens(mine), theirs.convert_ids_to_tokens(others)
            totals = [sum(scores[piece] for piece in cut) for cut in pieces]
            # Single precision keeps seven digits of sums of about 100.
            assert totals[0] == pytest.approx(totals[1], abs=1e-4), line
        assert theirs.decode(others) == ours.detokenize(mine)
    # Runs of spaces in source code: 31 of 11,475 lines where a piece may be of white space alone, else at most 2.
    rare = 0.005 if "allow_whitespace_only_pieces" in settings else 0.0005
    assert len(lines) > 8000 and ties <= rare * len(lines)
    assert load_tokenizer(str(tmp_path / "hf")).fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "word"}, "it is neither a BPE nor a unigram model"),
        ({"model_type": "unigram", "normalization_rule_name": "nfkc"}, "it normalizes text"),
        ({"model_type": "unigram", "user_defined_symbols": ["self"], **NO_PREFIX}, "with symbols of its own"),
        ({"model_type": "unigram", "character_coverage": 0.98}, "without a piece for"),
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
