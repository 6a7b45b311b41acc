"""What the first rank, which alone talks to the LM Evaluation Harness, has every rank do: rows' log-likelihoods and
continuations of prompts, at any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.evaluation.likelihood import Row, log_likelihoods, rows_at_once
from minitron_mcore.inference.engine import Engine, Sampling
from minitron_mcore.inference.prompts import Continuation
from minitron_mcore.model.gpt import LanguageModel


@dataclass(frozen=True)
class Likelihoods:
    """Rows, so many of their inputs at a time."""

    rows: Sequence[Row]
    micro_batch_size: int


@dataclass(frozen=True)
class Continuations:
    """Prompts in token ids, so many at a time; each ends with one of the ids `stop_tokens` or of the texts `stop`, or
    after `max_new_tokens`. temperature 0: greedy."""

    prompts: Sequence[Sequence[int]]
    micro_batch_size: int
    max_new_tokens: int
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Server:
    """Answers requests with a model as it lies over the ranks; every rank calls it with the same request."""

    chunks: Sequence[LanguageModel]
    architecture: Architecture
    tokenizer: Tokenizer

    def __call__(self, request: Likelihoods | Continuations) -> Any:
        """Answers, or the lists of new token ids; the same on every rank."""
        if isinstance(request, Likelihoods):
            vocab_size = self.architecture.vocab_size
            return log_likelihoods(self.chunks, request.rows, vocab_size, request.micro_batch_size)
        return self._continuations(request)

    def _continuations(self, request: Continuations) -> list[list[int]]:
        engine = Engine(self.chunks, self.architecture, max_batch=request.micro_batch_size)
        sampling = Sampling(request.max_new_tokens, request.temperature, request.top_p, request.seed)
        stop_tokens = request.stop_tokens
        is_stopped = Continuation(self.tokenizer, request.stop).is_stopped if request.stop else None
        found = engine.generate(request.prompts, sampling, stop_tokens=stop_tokens, is_stopped=is_stopped)
        return [list(each.tokens) for each in found]

    def inputs_at_once(self, micro_batch_size: int) -> int:
        """How many different inputs keep every rank busy in one call of the schedule."""
        return rows_at_once(micro_batch_size)
