"""Token ids from Python as microbatches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.in_memory.models import Model, check_layout
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.agree import all_or_none, gathered
from minitron_mcore.runtime.groups import data_place


def microbatches_of(model: Model, batches: Iterable[torch.Tensor]) -> list[Microbatch]:
    """On the model's device and all of one size; rows that fill up the last one are neither scored nor counted.

    Every rank calls. Raises InputError on every rank, also where ranks of one data-parallel replica have other tokens,
    or replicas other numbers of them.
    """
    check_layout(model)
    found = all_or_none(lambda: _own(model, batches))
    numbers = (len(found), *found[0].tokens.shape)
    digest = hashlib.sha256(b"".join(each.tokens.cpu().numpy().tobytes() for each in found)).hexdigest()
    of_replica: dict[int, str] = {}
    for replica, theirs, read in gathered((data_place()["data_parallel_rank"], numbers, digest)):
        if theirs != numbers:
            rule = f"are {numbers[0]} of {numbers[1:]} on one rank and {theirs[0]} of {theirs[1:]} on another"
            raise InputError("batches", None, rule, "give every data-parallel rank equally many, of one shape")
        if of_replica.setdefault(replica, read) != read:
            rule = "differ between ranks that hold parts of one copy of the model"
            remedy = "choose them by data-parallel rank, not by rank: tensor- and pipeline-parallel ranks share theirs"
            raise InputError("batches", None, rule, remedy)
    return found


def _own(model: Model, batches: Iterable[torch.Tensor]) -> list[Microbatch]:
    """This rank's."""
    device = next(model.chunks[0].parameters()).device
    found: list[Microbatch] = []
    for number, tokens in enumerate(batches):
        key = f"batches[{number}]"
        _check_tokens(tokens, key, model.architecture)
        size = found[0].tokens.shape if found else tokens.shape
        missing = size[0] - tokens.shape[0]
        if tokens.shape[1] != size[1] or missing < 0:
            rule = f"has shape {tuple(tokens.shape)} after batches of {tuple(size)}"
            raise InputError(key, None, rule, "give equally long sequences, and at most as many rows as at first")
        valid = (torch.arange(size[0], device=device) < tokens.shape[0]).float()
        mask = valid[:, None].repeat(1, size[1])
        mask[:, -1] = 0  # the last token has no next one
        tokens = torch.cat([tokens, tokens[:1].expand(missing, -1)]).to(device)
        positions = torch.arange(size[1], device=device).expand(size).contiguous()
        found.append(Microbatch(tokens, tokens.roll(-1, dims=1), mask, positions, valid=valid))
    if not found:
        raise InputError("batches", None, "is empty", "give token tensors [b, s] (a generator can be read only once)")
    return found


def _check_tokens(tokens: Any, key: str, architecture: Architecture) -> None:
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        said = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise InputError(key, None, f"is {said}", "give token ids as an int64 tensor [b, s]")
    if tokens.shape[1] < 2:
        raise InputError(key, None, "has rows of one token, which has no next one", "give sequences of two or more")
    if tokens.shape[1] > architecture.max_position_embeddings:
        longest = f"max_position_embeddings={architecture.max_position_embeddings}"
        rule = f"has rows of {tokens.shape[1]} tokens, longer than the model's {longest}"
        raise InputError(key, None, rule, "shorten them")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= architecture.vocab_size:
        rule = f"has the token id {low if low < 0 else high}, but the model's vocab_size is {architecture.vocab_size}"
        raise InputError(key, None, rule, "use the tokenizer the model was trained with")


def cut(whole: Microbatch, micro_batch_size: int) -> list[Microbatch]:
    """The rows of `whole` in microbatches of so many, which divides them; with nothing of a teacher."""
    fields = {**whole.by_row(), "valid": whole.valid}
    parts = {name: value.split(micro_batch_size) for name, value in fields.items() if value is not None}
    return [Microbatch(**dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]
