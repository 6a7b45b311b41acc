"""Records as token ids, cut to length: what the processes that prepare do. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Optional

import numpy

from minitron_mcore.data.chat.forms import Pair, RecordError, parse_pair, parse_sample
from minitron_mcore.data.chat.template import ChatTemplate, Encoder, Ids
from minitron_mcore.data.config import TokenizerConfig
from minitron_mcore.data.records import UNITS, Replacements, object_of
from minitron_mcore.data.text_file import TextFile
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.errors import InputError


@dataclass(frozen=True)
class How:
    """What records are made of; small, for it goes to every process."""

    tokenizer_type: str
    tokenizer: str  # its path
    rows: Optional[int]  # of a model with fewer than the tokenizer has ids
    template: Optional[ChatTemplate]
    sequence_length: int
    pairs: bool
    needs_rewards: bool
    turns: bool
    last: bool
    cut: bool
    skip: bool
    packing: bool


@dataclass
class Task:
    """Records, each with what names it, its file and its number there; the bytes that they take of the files."""

    records: list[tuple[str, TextFile, int, bytes | dict[str, Any]]] = field(default_factory=list)
    read: int = 0


@dataclass
class Unit:
    """A chat has one side, a preference two. No sides: it is left out, as too long or, with a `fault`, as skipped.

    needed: the sequence length at which it would be whole.
    """

    sides: tuple[Ids, ...] = ()
    rewards: Optional[tuple[float, float]] = None
    is_cut: bool = False
    fault: str = ""
    needed: int = 0


@dataclass
class Encoded:
    """What became of a task's records, one for one."""

    units: list[Unit] = field(default_factory=list)
    read: int = 0
    replacements: Replacements = field(default_factory=Replacements)


def encode(task: Task, how: How) -> Encoded:
    """Runs in a process of its own, or not. Raises InputError with key, file and line for a record that breaks a rule,
    unless those are skipped."""
    encoder = _encoder(how)
    encoded = Encoded(read=task.read)
    for key, file, number, content in task.records:
        where = f"{file.path}, {UNITS[file.form]} {number:,}"
        try:
            unit = _unit(_read(content, number, file, encoded.replacements), encoder, how)
        except RecordError as error:
            refusal = InputError(key, where, error.rule, f"{error.remedy}, or set chat.bad_records=skip")
            if not how.skip:
                raise refusal from error
            unit = Unit(fault=f"{where}, {error.rule}")
        encoded.units.append(unit)
    return encoded


@lru_cache(maxsize=1)
def _encoder(how: How) -> Encoder:
    tokenizer = load_tokenizer(TokenizerConfig(type=how.tokenizer_type, model=how.tokenizer))
    return Encoder(replace(tokenizer, rows=how.rows), how.template, last=how.last)


def _read(content: bytes | dict[str, Any], number: int, file: TextFile, replaced: Replacements) -> dict[str, Any]:
    try:
        return object_of(content, number, file, replaced)
    except InputError as error:
        raise RecordError(error.rule, error.remedy) from error


def _unit(fields: dict[str, Any], encoder: Encoder, how: How) -> Unit:
    if not how.pairs:
        ids, learnt = encoder(parse_sample(fields, turns=how.turns))
        return _fit_chat((ids, learnt), how)
    pair: Pair = parse_pair(fields, turns=how.turns, needs_rewards=how.needs_rewards)
    return _fit_pair((encoder(pair.chosen), encoder(pair.rejected)), pair.rewards, how, bos=encoder.tokenizer.bos)


def _fit_chat(side: Ids, how: How) -> Unit:
    """A chat of at most sequence_length + 1 tokens, since the last one is never read."""
    ids, learnt = side
    limit = how.sequence_length + 1
    if len(ids) <= limit:
        return Unit((_with_labels(side),))
    needed = len(ids) - 1
    # What is left must have something to learn.
    if not how.cut or not learnt[1:limit].any():
        return Unit(needed=needed)
    return Unit(((ids[:limit], learnt[:limit]),), is_cut=True, needed=needed)


def _fit_pair(sides: tuple[Ids, Ids], rewards: Optional[tuple[float, float]], how: How, *, bos: Optional[int]) -> Unit:
    """A preference whose sides fit, each alone or, packed, together. Where it is cut, both sides lose the same tokens
    from the beginning of their prompt, behind `bos`; the answers stay whole."""
    for side in sides:
        _with_labels(side)
    (chosen, _), (rejected, _) = sides
    if numpy.array_equal(chosen, rejected):
        raise RecordError("has answers that are the same tokens")
    needed = max(len(chosen), len(rejected)) - 1
    excess = needed - how.sequence_length
    if how.packing:
        needed = len(chosen) + len(rejected) - 2
        excess = -(-(needed - how.sequence_length) // 2)
    if excess <= 0:
        return Unit(sides, rewards)
    kept = int(chosen[0] == bos)
    prompt = min(_shared(chosen, rejected), *(int(learnt.argmax()) for _, learnt in sides))
    if not how.cut or excess >= prompt - kept:  # a token of the prompt stays, which predicts the answer's first
        return Unit(needed=needed)
    gone = slice(kept, kept + excess)
    cut = tuple((numpy.delete(ids, gone), numpy.delete(learnt, gone)) for ids, learnt in sides)
    return Unit(cut, rewards, is_cut=True, needed=needed)


def _with_labels(side: Ids) -> Ids:
    if not side[1][1:].any():
        raise RecordError(
            "has nothing before its answer, and an answer of one token" if len(side[0]) else "has no token"
        )
    return side


def _shared(one: numpy.ndarray, other: numpy.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(other))
    unlike = numpy.flatnonzero(one[:size] != other[:size])
    return int(unlike[0]) if len(unlike) else size
