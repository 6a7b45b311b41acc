"""What a model loses on each of some documents, at any layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from minitron_mcore.evaluation.likelihood import log_likelihoods
from minitron_mcore.model.gpt import LanguageModel


def document_losses(
    chunks: Sequence[LanguageModel],
    documents: Sequence[Sequence[int]],
    vocab_size: int,
    *,
    sequence_length: int,
    micro_batch_size: int = 1,
) -> numpy.ndarray:
    """Nats that the next-token loss of each document adds up to, float64 [documents].

    A document of n token ids, at least two, has n − 1 scored tokens, each once: it is read in windows of
    `sequence_length` tokens that follow each other, so that a window's first tokens have little before them. Every rank
    calls; the same on every rank.
    """
    rows, owners = [], []
    for number, ids in enumerate(documents):
        for start in range(0, len(ids) - 1, sequence_length):
            rows.append((tuple(ids[start : start + sequence_length + 1]), 1))
            owners.append(number)
    sums = log_likelihoods(chunks, rows, vocab_size, micro_batch_size).sums
    return -numpy.bincount(owners, sums, len(documents))  # type: ignore[no-any-return]
