"""transformers' tokenizer for one of ours: for its chat template, and for libraries that take no other. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron_mcore.data.tokenizer import SENTENCEPIECE, Tokenizer
from minitron_mcore.data.tokenizer_files import MODEL, TEMPLATE_FILES, files_of
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.runtime.libraries import AS_DATA, imported


def transformers_tokenizer(tokenizer: Tokenizer, config: Mapping[str, Any] | None = None) -> Any:
    """What AutoTokenizer gives for the files that `export` writes of `tokenizer`, its chat template included.

    config: of the model's config.json what AutoTokenizer looks for where the tokenizer's own files leave it open, such
    as `model_type`; None: what lies beside the tokenizer. Any process may call; a SentencePiece model is converted, in
    seconds. Raises InputError for one that has no equal in transformers.
    """
    if config is None and tokenizer.type != SENTENCEPIECE:
        return _loaded(tokenizer.path)
    with TemporaryDirectory() as folder:
        save_for_transformers(tokenizer, folder)
        if config is not None:
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        found = _loaded(folder)
    found.name_or_path = tokenizer.path
    return found


@cache
def templating(tokenizer: Tokenizer) -> Any:
    """transformers' tokenizer, where it has a chat template; else None. One is made for a tokenizer, and shared."""
    if tokenizer.type == SENTENCEPIECE:
        model = Path(tokenizer.path)
        if model.name != MODEL or not files_of(str(model.parent), TEMPLATE_FILES):
            return None
    found = transformers_tokenizer(tokenizer)
    return found if found.chat_template else None


def _loaded(folder: str) -> Any:
    # Not given, it asks at the terminal whether a folder's own code may run.
    automatic = imported("transformers").AutoTokenizer
    return automatic.from_pretrained(folder, **AS_DATA)
