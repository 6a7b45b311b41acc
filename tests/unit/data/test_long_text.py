"""Long documents: the ids of the whole text, whatever the tokenizer does at a text's beginning, end and between."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minitron_mcore.data import tokenizer as module
from minitron_mcore.data.long_text import encode_long
from minitron_mcore.data.tokenizer import load_tokenizer
from tests.unit.text_data import JSON_PACKAGE, python_files, small_tokenizer

SOURCE = "".join(path.read_text() for path in python_files(JSON_PACKAGE))[:20_000]
PROSE = "".join(f"Der {i}. Satz, naïve 漢字 {i * i}:  {'wie' * (i % 4)} er\tist!\r\n\n" for i in range(300))
TEXTS = {
    "source": SOURCE,
    "prose": PROSE,
    "one line": SOURCE.replace("\n", " "),
    "no spaces": "".join(PROSE.split()),
    "blank lines": "\n\n  \n".join(SOURCE.split("\n")),
    "digits": "7" * 3000 + "\nand " * 900 + "31415926" * 400,
    "runs": ("=" * 1500 + "\n" + " " * 2000 + "x\n") * 2,
    "marks": "one <s> two</s>\n" * 900,
}


def sentencepiece_model(kind: str, *, normalize: bool = False, **settings: Any) -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines() + PROSE.splitlines()[:300]),
        model_writer=model,
        model_type=kind,
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc" if normalize else "identity",
        remove_extra_whitespaces=normalize,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def hugging_face_model(kind: str) -> Tokenizer:
    model = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(byte_fallback=False))
    alphabet = []
    if kind == "byte level":
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # GPT-2's expression
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "digits":
        expression = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        from tokenizers import Regex

        model.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prepend":  # as Llama-2's: the whole text is one word
        replaced = normalizers.Replace(" ", "▁")
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
    else:
        scheme = "first" if kind == "metaspace first" else "always"
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind != "metaspace whole")
        model.normalizer = normalizers.NFKC()
    marks = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        options: dict[str, Any] = {"special_tokens": marks, "unk_token": "<unk>", "show_progress": False}
        trainer: Any = trainers.UnigramTrainer(vocab_size=600, **options)
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=marks, initial_alphabet=alphabet, show_progress=False, max_token_length=16
        )
    model.train_from_iterator((SOURCE + PROSE[:9000]).splitlines(keepends=True), trainer)
    return model


HUGGING_FACE = ("byte level", "digits", "prepend", "metaspace first", "metaspace always", "metaspace whole", "unigram")
ENCODERS: dict[str, Any] = {
    "bpe": lambda: sentencepiece_model("bpe").encode,
    "bpe without prefix": lambda: sentencepiece_model("bpe", add_dummy_prefix=False).encode,
    "bpe nfkc": lambda: sentencepiece_model("bpe", normalize=True).encode,
    "unigram": lambda: sentencepiece_model("unigram").encode,
    "unigram nfkc": lambda: sentencepiece_model("unigram", normalize=True).encode,
    "suffix": lambda: sentencepiece_model("bpe", treat_whitespace_as_suffix=True).encode,
    **{
        f"hf {kind}": lambda kind=kind: (lambda model: lambda text: model.encode(text).ids)(hugging_face_model(kind))
        for kind in (
            "byte level",
            "digits",
            "prepend",
            "metaspace first",
            "metaspace always",
            "metaspace whole",
            "unigram",
        )
    },
}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_ids_are_those_of_the_whole_text(name):
    encode = ENCODERS[name]()
    for label, text in TEXTS.items():
        longest = 0

        def counted(part: str) -> list[int]:
            nonlocal longest
            longest = max(longest, len(part))
            return encode(part)  # of this turn

        assert encode_long(counted, text, 4000) == encode(text), label
        if label in ("source", "prose", "one line", "marks"):
            assert longest < 12_000, f"{label}: the tokenizer was given {longest} characters at once"


def test_a_tokenizer_that_marks_the_beginning_or_the_end():
    model = hugging_face_model("prepend")
    for template in ("<s> $A", "$A </s>", "<s> $A </s>"):
        model.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
        assert encode_long(lambda part: model.encode(part).ids, PROSE, 4000) == model.encode(PROSE).ids


def test_a_tokenizer_parts_its_long_texts(tmp_path, monkeypatch):
    trained = small_tokenizer(tmp_path / "t.model")
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(trained.path).read_bytes())  # type: ignore[attr-defined]
    proto.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "prefix.model").write_bytes(proto.SerializeToString())
    loaded = load_tokenizer(str(tmp_path / "prefix.model"))
    whole, sizes = loaded.encode(SOURCE), []

    def encode(text: str) -> list[int]:
        sizes.append(len(text))
        return loaded.encode(text)

    monkeypatch.setattr(module, "SEGMENT_CHARACTERS", 5000)
    assert dataclasses.replace(loaded, encode=encode).tokenize(SOURCE) == whole
    assert max(sizes) < 8000 and loaded.detokenize(whole) == SOURCE


def test_a_unigram_model_is_given_more_at_once(tmp_path, monkeypatch):
    """Its sums of scores round otherwise from another beginning, which decides between cuts that are equally good."""
    (tmp_path / "u.model").write_bytes(sentencepiece_model("unigram").serialized_model_proto())
    fast = PreTrainedTokenizerFast(tokenizer_object=hugging_face_model("unigram"), eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(module, "SEGMENT_CHARACTERS", 1000)
    for path, at_once in ((tmp_path / "u.model", True), (tmp_path / "hf", True), (tmp_path / "t.model", False)):
        loaded = load_tokenizer(str(path)) if at_once else small_tokenizer(path)
        given: list[str] = []

        def encode(text: str, given: list[str] = given) -> list[int]:
            given.append(text)
            return []

        counted = dataclasses.replace(loaded, encode=encode)
        counted.tokenize(SOURCE)
        assert (given == [SOURCE]) == at_once
