"""What tests share: the environment they run in, marks that skip, and small inputs, each made once for a test process.

A test that changes one of these folders copies it first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before torch is imported: several processes share the cores, and more threads than that only get in each other's way.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from minitron_mcore.data.tokenizer import Tokenizer


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer.model` of 600 pieces, and the tokens of two packages, `json` and `email`, as NAME_text_document."""
    from tests.unit.text_data import EMAIL_PACKAGE, JSON_PACKAGE, small_data, small_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = small_tokenizer(folder / "tokenizer.model")
    small_data(folder / "json", tokenizer, package=JSON_PACKAGE)
    small_data(folder / "email", tokenizer, package=EMAIL_PACKAGE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    from minitron_mcore.data.tokenizer import load_tokenizer

    return load_tokenizer(str(corpus / "tokenizer.model"))


@pytest.fixture(scope="session")
def corpus_with_teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a folder of the given name: a copy of `corpus`, and beside it `teacher`, the tiny Llama, at iteration 3."""
    from tests.distributed.models import save_teacher
    from tests.distributed.ranks import run_on_ranks

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(corpus, folder, dirs_exist_ok=True)
        run_on_ranks(save_teacher, 2, folder / "teacher", None)
        return folder

    return make


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.jsonl`, 60 lines of a few words; its `tokenizer.model` and its tokens, `tokens_text_document`."""
    from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
    from tests.unit.text_data import preprocess, silent, train_tokenizer

    folder = tmp_path_factory.mktemp("words")
    text = folder / "text.jsonl"
    lines = [
        " ".join(f"{word}{number % 7}" for word in ("prune", "distil", "score", "plan") * 20) for number in range(60)
    ]
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    config = TokenizerConfig(model=str(folder / "tokenizer.model"), input=str(text), vocab_size=290)
    tokenizer = train_tokenizer(config, seed=1, report=silent)
    tokens = PreprocessConfig(input=str(text), output_prefix=str(folder / "tokens"), workers=1)
    preprocess(tokens, tokenizer, seed=1, report=silent)
    return folder
