"""Small real text for tests: packages of Python's standard library, and a tokenizer trained on them."""

from __future__ import annotations

import email
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron_mcore.data import preprocess as preprocessing
from minitron_mcore.data import tokenizer_training
from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
from minitron_mcore.data.corpus import texts_to_encode, texts_to_train_on
from minitron_mcore.data.tokenizer import Tokenizer

JSON_PACKAGE = str(Path(json.__file__).parent)
EMAIL_PACKAGE = str(Path(email.__file__).parent)


def python_files(folder: str) -> list[Path]:
    """In the order the corpus reader promises: folder by folder, by name."""
    return sorted(Path(folder).glob("*.py")) + sorted(Path(folder).glob("*/*.py"))


def silent(_: str) -> None:
    """A report that prints nothing."""


def train_tokenizer(config: TokenizerConfig, *, seed: int, report: Callable[[str], None] = print) -> Tokenizer:
    """What the verb `tokenizer` does with `config`."""
    texts = texts_to_train_on(config)
    for note in texts.notes:
        report(f"WARNING: {note}")
    return tokenizer_training.train_tokenizer(config, texts, seed=seed, report=report)


def preprocess(
    config: PreprocessConfig, tokenizer: Tokenizer, *, seed: int, report: Callable[[str], None] = print, **how: Any
) -> list[str]:
    """What the verb `preprocess` does with `config`."""
    texts = texts_to_encode(config)
    for note in texts.notes:
        report(f"WARNING: {note}")
    return preprocessing.preprocess(config, texts, tokenizer, seed=seed, report=report, **how)


def small_tokenizer(path: Path, vocab_size: int = 600, package: str = JSON_PACKAGE) -> Tokenizer:
    config = TokenizerConfig(model=str(path), input=package, extensions=[".py"], vocab_size=vocab_size)
    return train_tokenizer(config, seed=1, report=silent)


def small_data(prefix: Path, tokenizer: Tokenizer, package: str = EMAIL_PACKAGE, **settings: object) -> str:
    """Preprocess a package's modules; returns the prefix of the token files."""
    config = PreprocessConfig(input=package, output_prefix=str(prefix), extensions=[".py"], workers=1)
    for name, value in settings.items():
        setattr(config, name, value)
    return preprocess(config, tokenizer, seed=1, report=silent)[0]
