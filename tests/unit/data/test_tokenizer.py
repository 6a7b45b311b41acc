"""Tokenizers: exact round trips on real source files, the same ids as the libraries give, clear refusals."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minitron_mcore.data import tokenizer_training as training
from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.job import NOTHING, resolve
from minitron_mcore.jobs.tokenizer import TokenizerJob
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World
from tests.unit.text_data import EMAIL_PACKAGE, JSON_PACKAGE, python_files, silent, small_tokenizer, train_tokenizer

STRINGS = ["", " ", "  a", "a  ", "a\n\n", "\n", "\t\tx ", "a\r\nb\r", "é漢字🎉", "\x00a", "\ufeff", "a\u00a0", "<s>"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", STRINGS)
def test_every_string_comes_back(trained, text):
    assert trained.detokenize(trained.tokenize(text)) == text


def test_every_source_file_comes_back(trained):
    files = python_files(EMAIL_PACKAGE) + sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    for path in files:
        assert trained.detokenize(trained.tokenize(text_of(path))) == text_of(path), path


def test_special_ids_and_bytes(trained):
    processor = sentencepiece.SentencePieceProcessor(model_file=trained.path)
    assert (processor.unk_id(), trained.bos, trained.eod, trained.eos, trained.pad) == (0, 1, 2, 2, -1)
    assert trained.vocab_size == 600 == processor.get_piece_size()
    assert [processor.id_to_piece(3 + byte) for byte in (0, 10, 255)] == ["<0x00>", "<0x0A>", "<0xFF>"]
    assert all(0 not in trained.tokenize(text) for text in STRINGS), "byte fallback leaves nothing unknown"


def test_indentation_and_line_ends_are_learned(trained):
    processor = sentencepiece.SentencePieceProcessor(model_file=trained.path)
    pieces = [processor.id_to_piece(i) for i in range(trained.vocab_size)]
    assert "▁▁▁▁" in pieces and ":\n" in pieces


def test_same_ids_as_sentencepiece_and_megatron(trained):
    from megatron.core.tokenizers import MegatronTokenizer

    megatron = MegatronTokenizer.from_pretrained(trained.path, metadata_path={"library": "sentencepiece"})
    plain = sentencepiece.SentencePieceProcessor(model_file=trained.path)
    for path in python_files(JSON_PACKAGE):
        ids = trained.tokenize(text_of(path))
        assert ids == megatron.tokenize(text_of(path)) == plain.encode(text_of(path))
    assert (trained.vocab_size, trained.eod, trained.bos) == (megatron.vocab_size, megatron.eod, megatron.bos)


def test_training_is_deterministic(trained, tmp_path):
    again = small_tokenizer(tmp_path / "again.model")
    assert again.fingerprint == trained.fingerprint
    assert again.unique_identifiers == trained.unique_identifiers
    assert small_tokenizer(tmp_path / "other.model", vocab_size=601).fingerprint != trained.fingerprint


def test_sampling_depends_on_the_seed_alone(tmp_path):
    def train(name: str, seed: int) -> str:
        config = TokenizerConfig(model=str(tmp_path / name), input=EMAIL_PACKAGE, extensions=["py"], vocab_size=400)
        config.input_sentence_size = 30
        return train_tokenizer(config, seed=seed, report=silent).fingerprint

    assert train("a", 1) == train("b", 1)
    assert train("c", 2) != train("a2", 1)


def test_sample_is_even_and_bounded():
    passages = [str(i) for i in range(1000)]
    kept, characters = training._sample(iter(passages), 100, seed=5)
    assert len(set(kept)) == 100 and set(kept) <= set(passages)
    assert characters == sum(map(len, passages))
    # 100 of 1000 from each tenth: 10 expected, standard deviation 3; 0 or 22 and more would be no even draw
    tenths = [sum(1 for k in kept if int(k) // 100 == t) for t in range(10)]
    assert all(0 < count < 22 for count in tenths)
    assert training._sample(iter(passages), 0, seed=5)[0] == passages


def test_passages_end_at_lines():
    assert list(training._segments("ab\ncd\nefghij", 4)) == ["ab\n", "cd\n", "efgh", "ij"]


def test_progress_is_reported_and_nothing_else_is_written(tmp_path):
    lines: list[str] = []
    config = TokenizerConfig(model=str(tmp_path / "new" / "t.model"), input=[JSON_PACKAGE], extensions=[".py"])
    config.vocab_size = 400
    train_tokenizer(config, seed=0, report=lines.append)
    assert f"{len(python_files(JSON_PACKAGE))} files" in lines[0] and "t.model written" in lines[-1]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["t.model"]


def test_trains_on_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two two"}\n{"text": "two three"}\n')
    config = TokenizerConfig(model=str(tmp_path / "t.model"), input=str(tmp_path), vocab_size=275)
    assert train_tokenizer(config, seed=0, report=silent).vocab_size == 275


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    model.train([str(path) for path in python_files(JSON_PACKAGE)], trainer)
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_hugging_face_folder(hugging_face):
    from tokenizers import Tokenizer

    loaded = load_tokenizer(str(hugging_face))
    reference = Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    assert (loaded.vocab_size, loaded.bos, loaded.eod) == (reference.get_vocab_size(), 0, 1)
    for text in STRINGS[:-1] + [text_of(path) for path in python_files(JSON_PACKAGE)]:
        assert loaded.tokenize(text) == reference.encode(text, add_special_tokens=False).ids
        assert loaded.detokenize(loaded.tokenize(text)) == text
    same = load_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(hugging_face / "tokenizer.json")))
    assert same.fingerprint == loaded.fingerprint


def test_saved_copies_are_the_same_tokenizer(trained, hugging_face, tmp_path):
    for number, original in enumerate([trained, load_tokenizer(str(hugging_face))]):
        folder = tmp_path / str(number)
        original.save(str(folder))
        copy = load_tokenizer(str(folder))
        assert (copy.fingerprint, copy.eod, copy.type) == (original.fingerprint, original.eod, original.type)
        assert copy.tokenize("def f():\n") == original.tokenize("def f():\n")


def config_for(tmp_path: Path, **settings: Any) -> TokenizerConfig:
    given = {"model": str(tmp_path / "t.model"), "input": JSON_PACKAGE, "extensions": [".py"], "vocab_size": 400}
    return TokenizerConfig(**{**given, **settings})


@pytest.mark.parametrize(
    ("settings", "key", "rule", "remedy"),
    [
        ({"type": "HuggingFaceTokenizer"}, "tokenizer.type", "cannot be trained here", "SentencePieceTokenizer"),
        ({"model": "/proc/nowhere/t.model"}, "tokenizer.model", "cannot be written", "name another"),
        ({"input": None}, "tokenizer.input", "must be a path", ""),
        ({"input": 5}, "input", "must be text or a list", ""),
        ({"input": "/nowhere/text"}, "tokenizer.input", "does not exist", "name what is there"),
        ({"extensions": [".nothing"]}, "tokenizer.input", "no file ending in .nothing", "tokenizer.extensions"),
        ({"vocab_size": 100_000}, "tokenizer.vocab_size", "is too large", "set it to that or less"),
        ({"vocab_size": 100}, "tokenizer.vocab_size", "is too small", "tokenizer.character_coverage"),
    ],
)
def test_training_refuses(tmp_path, settings, key, rule, remedy):
    with pytest.raises(InputError) as caught:
        train_tokenizer(config_for(tmp_path, **settings), seed=0, report=silent)
    error = caught.value
    assert error.key == key and rule in error.rule and remedy in error.remedy and "\n" not in str(error)
    assert not list(tmp_path.iterdir())


def test_a_job_names_all_missing_keys_at_once(tmp_path):
    with pytest.raises(InputError) as caught:
        resolve("tokenizer", Recipe(), World())
    assert caught.value.key == "input, tokenizer.model"
    with pytest.raises(InputError) as caught:
        resolve("preprocess", Recipe(preprocess=PreprocessConfig(input="x")), World())
    assert caught.value.key == "output_prefix, tokenizer.model"


def test_a_promised_tokenizer_is_enough_to_resolve_preprocess(tmp_path):
    config = config_for(tmp_path, input=None)
    recipe = Recipe(input=JSON_PACKAGE, output_prefix=str(tmp_path / "json"), tokenizer=config)
    recipe.preprocess = PreprocessConfig(extensions=[".py"], valid_fraction=0.5)
    first = resolve("tokenizer", recipe, World())
    assert isinstance(first, TokenizerJob) and len(first.texts.files) == len(python_files(JSON_PACKAGE))
    with pytest.raises(InputError, match=r"tokenizer\.model=.* does not exist"):
        resolve("preprocess", recipe, World())
    promises = NOTHING.after(first)
    promises = promises.after(resolve("preprocess", recipe, World(), promises))
    assert promises.prefixes == {f"{tmp_path}/json_text_document", f"{tmp_path}/json_valid_text_document"}
    assert not list(tmp_path.iterdir())


def test_training_refuses_an_empty_corpus(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "empty.txt").write_text(" \n\n")
    with pytest.raises(InputError, match="holds no text"):
        train_tokenizer(config_for(tmp_path, input=str(text), extensions=[".txt"]), seed=0, report=silent)


def test_training_keeps_an_existing_model(tmp_path):
    (tmp_path / "t.model").write_text("precious")
    with pytest.raises(InputError, match=r"t\.model exists: .*tokenizer\.overwrite=true"):
        train_tokenizer(config_for(tmp_path), seed=0, report=silent)
    assert (tmp_path / "t.model").read_text() == "precious"
    assert train_tokenizer(config_for(tmp_path, overwrite=True), seed=0, report=silent).vocab_size == 400


def test_largest_vocabulary_named_in_the_refusal_works(tmp_path):
    with pytest.raises(InputError) as caught:
        train_tokenizer(config_for(tmp_path, vocab_size=100_000), seed=0, report=silent)
    most = int(str(caught.value).split("which has ")[1].split(" ")[0])
    assert train_tokenizer(config_for(tmp_path, vocab_size=most), seed=0, report=silent).vocab_size == most


def test_loading_refuses(tmp_path):
    (tmp_path / "not.model").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    cases: list[tuple[str | TokenizerConfig, str]] = [
        (TokenizerConfig(), "tokenizer.model is not set"),
        (str(tmp_path / "none"), "does not exist"),
        (str(tmp_path / "not.model"), "is not a SentencePiece model"),
        (str(tmp_path / "folder"), "holds neither tokenizer.json nor tokenizer.model"),
        (str(tmp_path / "hf"), "cannot be read as a Hugging Face tokenizer"),
        (TokenizerConfig(type="HuggingFaceTokenizer", model=str(tmp_path / "not.model")), "needs a folder"),
    ]
    for source, words in cases:
        with pytest.raises(InputError) as caught:
            load_tokenizer(source)
        assert words in str(caught.value) and "\n" not in str(caught.value)
