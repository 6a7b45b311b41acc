"""A tokenizer beside a model of fewer rows, and two tokenizers of the same ids: what goes, what is said, what not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.checkpoint.folder import write_description
from minitron_mcore.data.agreement import difference
from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import build_datasets
from minitron_mcore.data.described import split_part
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import check_same_tokenizer, fit_tokenizer, model_tokenizer
from minitron_mcore.jobs.job import NOTHING, Model
from minitron_mcore.recipe import Recipe, load_recipe
from minitron_mcore.runtime import notice
from tests.distributed.hf_cases import SHAPE
from tests.unit.data.test_fingerprint import train_byte_level
from tests.unit.text_data import JSON_PACKAGE, small_data

ROWS = 503  # 500 pieces and the three marks that train_byte_level adds


@pytest.fixture(autouse=True)
def says_anew() -> None:
    notice.say.cache_clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; `padded`, with <pad> behind; `chat`, with another end and more marks; `other`, of other merges."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("tokenizers")
    train_byte_level(root / "base")
    for name, tokens in (("padded", ["<pad>"]), ("chat", ["<|im_start|>", "<|im_end|>"])):
        tokenizer = AutoTokenizer.from_pretrained(root / "base")
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        if name == "chat":
            tokenizer.eos_token = "<|eot_id|>"
        tokenizer.save_pretrained(root / name)
    shutil.copytree(root / "base", root / "other")
    content = json.loads((root / "other" / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (root / "other" / "tokenizer.json").write_text(json.dumps(content))
    return root


def of(folders: Path, name: str) -> Tokenizer:
    return load_tokenizer(str(folders / name))


def model_of(rows: int) -> Any:
    return build_architecture({**SHAPE, "family": "llama", "vocab_size": rows})


def checkpoint(path: Path, tokenizer: Tokenizer, rows: int = ROWS) -> Model:
    lineage = {"tokenizer": tokenizer.fingerprint}
    write_description(path, model_of(rows), lineage=lineage, recipe="", save_tokenizer=tokenizer.save)
    return Model("student.checkpoint", path, model_of(rows), 1, lineage)


def tokenizer_of(recipe: Recipe, model: Model) -> Tokenizer:
    tokenizer = model_tokenizer(recipe, model, NOTHING)
    assert tokenizer is not None
    return tokenizer


def test_marks_beyond_the_vocabulary_are_said(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And refused where a text holds one. Nothing is said of a tokenizer of fewer ids."""
    assert fit_tokenizer(of(folders, "base"), model_of(ROWS + 9), Recipe()).rows is None
    assert not capsys.readouterr().err
    fitted = fit_tokenizer(of(folders, "padded"), model_of(ROWS), Recipe())
    assert "1 ids beyond the model's vocab_size=503 ('<pad>')" in capsys.readouterr().err
    assert fitted.tokenize("an ordinary text") == of(folders, "base").tokenize("an ordinary text")
    with pytest.raises(
        InputError, match=r"'a <pad>' holds id 503 \('<pad>'\) of .*, beyond the model's vocab_size=503"
    ):
        fitted.tokenize("a <pad>")


def test_ordinary_pieces_beyond_it_want_a_yes(folders: Path) -> None:
    rows = 490
    with pytest.raises(InputError, match=r"has 503 ids and the model vocab_size=490: .*allow=\[larger_tokenizer\]"):
        fit_tokenizer(of(folders, "base"), model_of(rows), Recipe())
    assert fit_tokenizer(of(folders, "base"), model_of(rows), Recipe(allow=["larger_tokenizer"])).rows == rows


def build(prefix: str, tokenizer: Tokenizer) -> Any:
    config = DataConfig(train=prefix, split="1", sequence_length=8, num_workers=0)
    return build_datasets(config, tokenizer, [split_part(config, "train", 2)], seed=1)[0]


def test_data_that_holds_such_an_id_is_refused(folders: Path, tmp_path: Path) -> None:
    """However rare it is, with and without a description of what made the data."""
    padded = of(folders, "padded")
    prefix = small_data(tmp_path / "text", padded, package=JSON_PACKAGE)
    fitted = fit_tokenizer(padded, model_of(ROWS), Recipe())
    assert build(prefix, fitted) is not None
    tokens = numpy.memmap(prefix + ".bin", dtype=numpy.uint16, mode="r+")
    tokens[len(tokens) // 2] = ROWS
    tokens.flush()
    assert build(prefix, padded) is not None
    with pytest.raises(InputError, match=r"data\.train=.* holds id 503 \('<pad>'\) of .*, beyond"):
        build(prefix, fitted)
    Path(prefix + ".json").unlink()
    with pytest.raises(InputError, match="holds token 503, beyond the 503 of"):
        build(prefix, fitted)


def test_ids_that_agree_are_the_same_tokenizer(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a student, for data, and for a tokenizer that the recipe names; it is said, and another is refused."""
    base, chat = of(folders, "base"), of(folders, "chat")
    assert difference(base, chat) is None and base.fingerprint != chat.fingerprint
    student = checkpoint(tmp_path / "student", chat, ROWS + 2)
    check_same_tokenizer(base, student)
    assert "has another tokenizer than its teacher, of the same ids" in capsys.readouterr().err
    named = Recipe()
    named.tokenizer.model = str(folders / "base")
    assert tokenizer_of(named, student).fingerprint == chat.fingerprint
    assert "base has the same ids as far as the model goes, " in capsys.readouterr().err
    prefix = small_data(tmp_path / "text", chat, package=JSON_PACKAGE)
    assert build(prefix, base) is not None
    assert "of the same ids, but ends documents with id 502, not 501" in capsys.readouterr().err


def test_other_ids_want_a_yes(folders: Path, tmp_path: Path) -> None:
    base, other = of(folders, "base"), of(folders, "other")
    assert "in the one and" in str(difference(base, other))
    student = checkpoint(tmp_path / "student", other)
    prefix = small_data(tmp_path / "text", other, package=JSON_PACKAGE)
    for refused in (lambda: check_same_tokenizer(base, student), lambda: build(prefix, base)):
        with pytest.raises(InputError, match=r"another tokenizer .*allow=\[other_tokenizer\]"):
            refused()
    teacher = checkpoint(tmp_path / "teacher", base)
    yes = tokenizer_of(load_recipe(None, ["allow=[other_tokenizer]"]), teacher)
    check_same_tokenizer(yes, student)
    assert build(prefix, yes) is not None
    with pytest.raises(InputError, match=r"allow.*=anything must be one of zero_tensors"):
        load_recipe(None, ["allow=[anything]"])
