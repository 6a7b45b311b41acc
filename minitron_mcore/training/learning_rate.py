"""The learning rate's schedule in tokens, and what of it may change when a run goes on. Pure.

Warm-up to `lr`, then by `lr_decay_style`; the formulas are those of Megatron's OptimizerParamScheduler.
"""

from __future__ import annotations

import math
from itertools import groupby

from minitron_mcore.errors import InputError
from minitron_mcore.tables import counted
from minitron_mcore.training.budget import Timetable, plan_timetable
from minitron_mcore.training.config import TrainConfig


def warmup_tokens(train: TrainConfig, timetable: Timetable) -> int:
    """Tokens of the warm-up, whichever way it is given."""
    return train.lr_warmup_tokens or timetable.at(train.lr_warmup_iters).tokens_before


def decay_start(train: TrainConfig, timetable: Timetable) -> float:
    """Tokens after which the learning rate depends on the budget's end."""
    if train.lr_decay_style == "constant":
        return math.inf
    if train.lr_decay_style == "WSD":
        return timetable.tokens - train.lr_wsd_decay_tokens
    return warmup_tokens(train, timetable)


def check_learning_rate(train: TrainConfig, timetable: Timetable, section: str, budget: str | None = None) -> None:
    """Raise InputError for a schedule that does not fit the budget.

    budget: the section that `timetable`, and so `train.tokens`, is of; None: `section` itself.
    """
    budgeted = f"the budget, {timetable.tokens} tokens"  # of align, which may be given in samples or epochs
    tokens = f"{budget or section}.tokens={train.tokens}" if train.tokens else budgeted
    if train.lr_warmup_iters >= timetable.iterations:
        rule = f"must be less than the {counted(timetable.iterations, 'iteration')} of {tokens}"
        raise InputError(f"{section}.lr_warmup_iters", train.lr_warmup_iters, rule, "lower it")
    if train.lr_warmup_tokens >= timetable.tokens:
        key = f"{section}.lr_warmup_tokens"
        raise InputError(key, train.lr_warmup_tokens, f"must be less than {tokens}", "lower it")
    most = timetable.tokens - warmup_tokens(train, timetable)
    if train.lr_decay_style == "WSD" and not 1 <= train.lr_wsd_decay_tokens <= most:
        rule = f"must lie between 1 and the {most} tokens after the warm-up"
        raise InputError(f"{section}.lr_wsd_decay_tokens", train.lr_wsd_decay_tokens, rule, "set it, or lower it")


def check_continuation(
    before: tuple[TrainConfig, int],
    now: tuple[TrainConfig, int],
    iteration: int,
    section: str,
    named: tuple[tuple[str, float], tuple[str, float]] | None = None,
) -> None:
    """Raise InputError where a run that stands at `iteration` cannot go on to another budget.

    before, now: (section, `data.sequence_length`) that the run was made with, and that it is to go on with. What was
    trained must be the same in both, batch by batch, and so must the learning rate up to here. named: of both the key
    and value of the budget, where the user has not given it in tokens.
    """
    train, other = before[0], now[0]
    was, (key, value) = named or (("tokens", train.tokens), ("tokens", other.tokens))
    given = f"{section}.{key}"
    timetable, planned = (plan_timetable(config, length, section) for config, length in (before, now))
    done = timetable.at(iteration).tokens_before
    if planned.tokens < done:
        less = f"less than the {done}" if key == "tokens" else f"{planned.tokens} tokens, less than the {done}"
        rule = f"is {less} that {section}.checkpoint={other.checkpoint} has been trained on"
        raise InputError(given, value, rule, "give as many or more")
    if planned.iterations < iteration or _shapes(timetable, iteration) != _shapes(planned, iteration):
        asked = f"{given}={value} and {section}.phases give"
        rule = f"holds a run of {iteration} iterations with other batch sizes or sequence lengths than {asked}"
        remedy = f"change only what comes after its {done} tokens"
        raise InputError(f"{section}.checkpoint", other.checkpoint, rule, remedy)
    start = min(decay_start(train, timetable), decay_start(other, planned))
    warm, planned_warm = warmup_tokens(train, timetable), warmup_tokens(other, planned)
    if warm != planned_warm:
        rule = f"would end after {planned_warm} tokens with the new budget and phases, not after {warm} as before"
        raise InputError(f"{section}.lr_warmup_iters", train.lr_warmup_iters, rule, "change only what comes after it")
    same_end = (timetable.tokens, train.lr_wsd_decay_tokens) == (planned.tokens, other.lr_wsd_decay_tokens)
    if done > start and not same_end:
        rule = f"cannot replace {section}.{was[0]}={was[1]} after {done} tokens, because the learning rate"
        why = f"({section}.lr_decay_style={train.lr_decay_style}) already decays towards the old budget's end"
        remedy = "keep the old budget; a constant rate can go on, and WSD before its decay"
        raise InputError(given, value, f"{rule} {why}", remedy)


def _shapes(timetable: Timetable, iteration: int) -> list[tuple[int, int, int]]:
    """(first iteration, sequence length, global batch size) of every stretch that begins before `iteration`."""
    before = (first for first in timetable.starts if first.iteration < iteration)
    # Phases may be split or joined where nothing changes.
    runs = groupby(before, lambda first: (first.shape.sequence_length, first.shape.global_batch_size))
    return [(next(run).iteration, *sizes) for sizes, run in runs]
