"""SentencePiece models of other kinds than ours, converted: the same ids as sentencepiece gives, or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from minitron_mcore.data.agreement import check_saved
from minitron_mcore.data.tokenizer import PROBES, load_tokenizer
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
    options = {"sentence_iterator": iter(TEXTS), **options, **settings}
    sentencepiece.SentencePieceTrainer.train(model_writer=written, **options)
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


SYMBOLS = ["<|user|>", "self"]
DEFAULT = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}  # SentencePiece's own
RULES: dict[str, dict[str, Any]] = {
    "default-unigram": {"model_type": "unigram", **DEFAULT, "byte_fallback": False},
    "default-unigram-bytes": {"model_type": "unigram", **DEFAULT},
    "default-unigram-symbols": {"model_type": "unigram", **DEFAULT, "user_defined_symbols": SYMBOLS},
    "unigram-no-prefix": {"model_type": "unigram", **DEFAULT, **NO_PREFIX, "byte_fallback": False},
    "unigram-symbols": {"model_type": "unigram", "byte_fallback": False, "user_defined_symbols": SYMBOLS},
    "default-bpe": {**DEFAULT, "byte_fallback": False},
    "default-bpe-bytes": DEFAULT,
    "nmt_nfkc-spaces-kept": {"normalization_rule_name": "nmt_nfkc"},
    "nfkc-no-prefix": {**DEFAULT, "normalization_rule_name": "nfkc", **NO_PREFIX},
    "lower-case": {**DEFAULT, "normalization_rule_name": "nmt_nfkc_cf"},
    "spaces-trimmed": {"remove_extra_whitespaces": True},
    "bpe-symbols-prefix": {"user_defined_symbols": SYMBOLS},
    "bpe-symbols-default": {**DEFAULT, "user_defined_symbols": SYMBOLS, "byte_fallback": False},
}
# Unlike the source code above: the words of people, and few characters, so that `<` and `|` are no pieces alone.
WORDS = ["the quick brown fox jumps over the lazy dog 0123456789 and nobody was surprised by it self selfish"] * 50
NORMALIZED = [
    *(
        "ﬁ①Ａ  ½ ㈱ ｶﾞ e\u0301 \u00a0x\u3000y",
        "a\r\n b\tc\n",
        "  a   b ",
        "\u2581",
        "\u2581 x\u2581",
        "\u200bé\u00ad\ufeff",
    ),
    *(
        "<|user|>",
        " <|user|>  self",
        "a <|user|>b selfself</s>self<0x0A>self ",
        "</s>",
        "a</s>b <unk><s>",
        "漢</s>🙂é<",
        "\u1112\u1161\u11ab u\u0308\u0304 か\u3099 ｶﾞ",
    ),
]


@pytest.mark.parametrize("words", [False, True], ids=["source-code", "few-characters"])
@pytest.mark.parametrize("kind", RULES)
def test_normalization_rules_and_symbols_give_the_same_ids(tmp_path: Path, kind: str, words: bool) -> None:
    """Against sentencepiece, in what transformers loads; exact ties of a unigram model apart."""
    from transformers import AutoTokenizer

    settings = RULES[kind]
    if words:
        size = 400 if settings.get("byte_fallback", True) else 60
        settings = {**settings, "sentence_iterator": iter(WORDS), "vocab_size": size, "hard_vocab_limit": False}
    ours = load_tokenizer(str(model(tmp_path / "x.model", **settings)))
    (tmp_path / "hf").mkdir()
    save_for_transformers(ours, str(tmp_path / "hf"))
    check_saved(ours, str(tmp_path / "hf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]
    scores = dict(content["vocab"]) if content["type"] == "Unigram" else {}
    lines = [line for text in TEXTS[:6] for line in text.splitlines(keepends=True)]
    ties = 0
    for line in [*lines, *WORDS[:1], *NORMALIZED, *PROBES]:
        mine, others = ours.tokenize(line), theirs.encode(line)
        if mine != others:
            assert scores, line
            pieces = theirs.convert_ids_to_tokens(mine), theirs.convert_ids_to_tokens(others)
            totals = [sum(scores[piece] for piece in cut) for cut in pieces]
            assert totals[0] == pytest.approx(totals[1], abs=1e-4), line
            ties += 1
        if settings.get("byte_fallback", True) and "\u2581" not in line:
            assert theirs.decode(mine) == ours.detokenize(mine)
    assert len(lines) > 500 and ties <= 0.005 * len(lines)


def test_llama_cpp_reads_what_is_put_before_a_text(tmp_path: Path) -> None:
    """Its converter takes both keys from here, and otherwise puts a space and bos before every prompt."""
    from transformers import AutoTokenizer

    for prefix in (False, True):
        ours = load_tokenizer(str(model(tmp_path / "x.model", add_dummy_prefix=prefix)))
        folder = tmp_path / str(prefix)
        folder.mkdir()
        save_for_transformers(ours, str(folder))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        assert (config["add_prefix_space"], config["add_bos_token"]) == (prefix, False)
        said = [AutoTokenizer.from_pretrained(folder).encode(text) for text in TEXTS[-8:]]
        del config["add_prefix_space"], config["add_bos_token"], config["add_eos_token"]
        path.write_text(json.dumps(config))
        unsaid = [AutoTokenizer.from_pretrained(folder).encode(text) for text in TEXTS[-8:]]
        assert said == unsaid == [ours.tokenize(text) for text in TEXTS[-8:]]


def with_types(path: Path, **types: int) -> Path:
    """The model at `path` with other types of some pieces."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    for piece in proto.pieces:
        piece.type = types.get(piece.piece, piece.type)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("settings", "types", "words"),
    [
        ({"model_type": "word"}, {}, "it is neither a BPE nor a unigram model"),
        ({"model_type": "unigram"}, {"e": 5}, "without a piece for 'e' alone"),
        ({"treat_whitespace_as_suffix": True}, {}, "before the word"),
        ({"user_defined_symbols": ["a b"]}, {}, "beside added spaces"),
    ],
)
def test_what_has_no_equal_is_refused(
    tmp_path: Path, settings: dict[str, Any], types: dict[str, int], words: str
) -> None:
    tokenizer = load_tokenizer(str(with_types(model(tmp_path / "x.model", **settings), **types)))
    (tmp_path / "hf").mkdir()
    with pytest.raises(InputError, match=words):
        save_for_transformers(tokenizer, str(tmp_path / "hf"))
    assert not list((tmp_path / "hf").iterdir())


@pytest.mark.parametrize("kind", ["ids", "marks", "cut"])
def test_what_reads_otherwise_is_found(tmp_path: Path, kind: str) -> None:
    ours = load_tokenizer(str(model(tmp_path / "x.model")))
    (tmp_path / "hf").mkdir()
    save_for_transformers(ours, str(tmp_path / "hf"))
    check_saved(ours, str(tmp_path / "hf"))
    name = "tokenizer_config.json" if kind == "marks" else "tokenizer.json"
    content = json.loads((tmp_path / "hf" / name).read_text())
    if kind == "marks":
        content["eos_token"] = "<s>"
    elif kind == "ids":
        content["model"]["vocab"]["<0xF6>"], content["model"]["vocab"]["<0xF5>"] = 248, 249
    else:
        content["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})
    (tmp_path / "hf" / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match="which would read it otherwise"):
        check_saved(ours, str(tmp_path / "hf"))
