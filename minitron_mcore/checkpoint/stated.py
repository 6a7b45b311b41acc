"""What the user tells us of a foreign checkpoint whose description leaves it open: `model.*`, and the tokenizer.

Many functions describe a checkpoint by its folder alone, so this is kept for as long as a verb runs. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from minitron_mcore.errors import InputError

# Fields that the stored tensors may leave open: the keys of the section `model` that are read for foreign checkpoints.
ASKED = (
    "family",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "rotary_base",
    "rotary_percent",
    "rope_scaling",
    "layernorm_epsilon",
)


def _no_tokenizer(path: str | None) -> tuple[str, int] | None:
    return None


@dataclass(frozen=True)
class Stated:
    """`fields`: those of ASKED that the user gave. `count_ids(path)`: name and number of ids of the tokenizer at `path`
    (None: the one the user named); None where none can be read."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    count_ids: Callable[[str | None], tuple[str, int] | None] = _no_tokenizer


_stated: ContextVar[Stated] = ContextVar("stated", default=Stated())  # noqa: B039  (frozen, and never filled)


@contextmanager
def stating(stated: Stated) -> Iterator[None]:
    """Within, foreign checkpoints are described by what is `stated`, where they say nothing themselves."""
    token = _stated.set(stated)
    try:
        yield
    finally:
        _stated.reset(token)


def said_by_user() -> Stated:
    return _stated.get()


def refuse_contradictions(described: Mapping[str, Any], source: Any) -> None:
    """Raise InputError where the user contradicts the description in the file `source`."""
    for name, value in said_by_user().fields.items():
        if name == "family" or (there := described.get(name)) is None:
            continue
        pairs = {name: (value, there)}
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            pairs = {f"{name}.{inner}": (value[inner], there.get(inner)) for inner in value}
        for path, (here, said) in pairs.items():
            if said is not None and here != said:
                rule = f"contradicts {source}, which says {said}"
                raise InputError(f"model.{path}", here, rule, "leave it out: it is only for what a description lacks")
