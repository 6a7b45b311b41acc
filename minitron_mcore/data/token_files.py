"""Megatron's token files, written document after document, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.data.tokenizer import Tokenizer


def token_dtype(vocab_size: int) -> Any:
    """The integer type of the .bin file: Megatron's own rule (`DType.optimal_dtype`), without importing it."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


class TokenWriter:
    """One .bin/.idx pair under temporary names until `publish`."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, append_eod: bool) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix, self.tokenizer, self.append_eod = prefix, tokenizer, append_eod
        self.documents = self.tokens = 0
        self.dtype = token_dtype(tokenizer.vocab_size)
        assert self.dtype is DType.optimal_dtype(tokenizer.vocab_size), "Megatron's rule has changed"
        self.builder = IndexedDatasetBuilder(prefix + ".bin.tmp", dtype=self.dtype)

    def add(self, tokens: numpy.ndarray) -> None:
        """A document. One without tokens is a boundary in the index and no sequence, as of Megatron-LM's own tool."""
        self.builder.add_document(tokens, [len(tokens)] if len(tokens) else [])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self) -> None:
        self.builder.finalize(self.prefix + ".idx.tmp")
        description = {
            "tokenizer": {
                "type": self.tokenizer.type,
                "model": self.tokenizer.path,
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "append_eod": self.append_eod,
            "dtype": numpy.dtype(self.dtype).name,
            "documents": self.documents,
            "tokens": self.tokens,
        }
        Path(self.prefix + ".json.tmp").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def publish(self) -> None:
        if os.path.exists(self.prefix + ".idx"):  # an overwrite: the old index must not meet the new tokens
            os.remove(self.prefix + ".idx")
        for ending in (".json", ".bin", ".idx"):
            os.replace(self.prefix + ending + ".tmp", self.prefix + ending)

    def discard(self) -> None:
        self.builder.data_file.close()
        for ending in (".json.tmp", ".bin.tmp", ".idx.tmp"):
            if os.path.exists(self.prefix + ending):
                os.remove(self.prefix + ending)
