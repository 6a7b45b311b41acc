"""What is known of candidates while they train: their results as files, and which of them train on. Pure.

A result is a plain mapping, one file a candidate:

    name        of the candidate
    zero_shot   held-out LM loss of the pruned weights, in nats a token
    loss        held-out LM loss where it stands; null where it has diverged
    curve       [[tokens, held-out LM loss], …] from 0 on, at every stop
    validation  [[tokens, LM loss], …] of the training's own validations (distill.eval_interval, distill.eval_iters)
    tokens      that it was trained for
    rung        how many stops it has reached
    parameters  of the model
    diverged    why it was given up; null where it was not
    made_with   fingerprint of what all candidates of a search share
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.files import write_whole
from minitron_mcore.search.config import SearchConfig

RESULT = "result.json"
_KEYS = {"name", "zero_shot", "loss", "curve", "tokens", "rung", "made_with"}
Result = dict[str, Any]


def read_result(file: Path) -> Result | None:
    """None where it is not there. Raises InputError where it is something else."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= _KEYS:
        rule = f"holds {file.name}, not the result of a candidate"
        raise InputError("output", file.parent, rule, "name another folder as output, or delete that file")
    return found


def write_result(result: Result, file: Path) -> None:
    """Whole or not at all; makes the folder. One process calls."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(result, indent=2, allow_nan=False) + "\n")


def finite(loss: float) -> float | None:
    """A loss as JSON holds it: null for NaN and infinity."""
    return loss if math.isfinite(loss) else None


def loss_at(result: Result, tokens: int) -> float:
    """The held-out loss after `tokens` tokens; infinity where there is none."""
    found = [loss for at, loss in result["curve"] if at == tokens and loss is not None]
    return found[-1] if found else math.inf


def best_first(results: Sequence[Result]) -> list[Result]:
    """Those that trained longest first, by their loss; a candidate without a loss after the others."""
    return sorted(results, key=standing)


def standing(result: Result) -> tuple[bool, int, float]:
    """What candidates are ordered by, the best one least; equal for those that share a rank."""
    return result["loss"] is None, -result["tokens"], or_infinite(result["loss"])


def or_infinite(loss: float | None) -> float:
    """A loss as it is compared: infinity where there is none."""
    return math.inf if loss is None else loss


def survivors(losses: Mapping[str, float], keep: float) -> list[str]:
    """The names of the better share `keep` of the candidates, at least one, in the given order; of equal losses the
    earlier candidate stays."""
    names = sorted(losses, key=lambda name: losses[name])[: kept_of(len(losses), keep)]
    return [name for name in losses if name in names]


def trial_tokens(search: SearchConfig, count: int) -> int:
    """The tokens that each of `count` candidates trains for on average, whichever of them halving stops."""
    trained, before, alive = 0, 0, count
    for stop in (*search.halving.rungs, search.tokens):
        trained, before = trained + alive * (stop - before), stop
        alive = kept_of(alive, search.halving.keep)
    return trained // count


def kept_of(count: int, keep: float) -> int:
    """How many of `count` candidates train on, where the better share `keep` does."""
    return max(1, math.ceil(keep * count))
