"""What the user tells us of foreign checkpoints: what a description leaves open (`model.*`, the tokenizer), and trust.

Many functions describe a checkpoint by its folder alone, so this is kept for as long as a verb runs. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# Fields that the stored tensors may leave open: the keys of the section `model` that are read for foreign checkpoints.
ASKED = (
    *("family", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings"),
    *("rotary_base", "rotary_percent", "rope_scaling", "layernorm_epsilon"),
)


@dataclass(frozen=True)
class Stated:
    """`fields`: those of ASKED that the user gave. `count_ids(path)`: name and number of ids of the tokenizer at `path`
    (None: the one the user named); None where none can be read. `trust`: pickles may run code."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    count_ids: Callable[[str | None], tuple[str, int] | None] = lambda path: None
    trust: bool = False


_stated: ContextVar[Stated] = ContextVar("stated", default=Stated())  # noqa: B039  (frozen, and never filled)


@contextmanager
def stating(stated: Stated) -> Iterator[None]:
    """Within, foreign checkpoints are described by what is `stated`, where they say nothing themselves, and trusted or
    not."""
    token = _stated.set(stated)
    try:
        yield
    finally:
        _stated.reset(token)


def said_by_user() -> Stated:
    return _stated.get()
