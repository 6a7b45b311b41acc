"""Pairs of answers for the multi-rank tests, and what other code makes of them: `trl` on a transformers model of the
same weights, and formulas in float64 on the dense model.

Legend: P pairs, s sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.layout import parameter_table
from tests.distributed.dense_reference import DenseModel, Name, draw_weights

LENGTH = 24  # tokens of a row
PAIRS = 8


def draw_models(architecture: Architecture) -> tuple[dict[Name, torch.Tensor], dict[Name, torch.Tensor]]:
    """Weights of the model that is trained, and of a reference that it has moved away from."""
    reference = draw_weights(architecture, seed=4)
    generator = torch.Generator().manual_seed(9)
    moved = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) * (value != 0)
        for name, value in reference.items()
    }
    return moved, reference


def draw_answers(vocab_size: int, seed: int = 0, pairs: int = PAIRS) -> list[tuple[list[int], list[bool]]]:
    """(token ids, which of them count) of every segment: a prompt, then the chosen or the rejected answer; of every
    third pair the first answer of three messages counts too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, vocab_size, (count,), generator=generator).tolist()

    segments = []
    for pair in range(pairs):
        parts = [(draw(2, 6), False)]
        if pair % 3 == 0:
            parts += [(draw(1, 4), True), (draw(1, 4), False)]
        for _ in range(2):
            whole = [*parts, (draw(1, 12), True)]
            tokens = [token for ids, _ in whole for token in ids]
            segments.append((tokens, [counts for ids, counts in whole for _ in ids]))
    return segments


def rewards_of(pairs: int = PAIRS) -> torch.Tensor:
    """fp64 [P, 2]"""
    return torch.randn(pairs, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rows_of(segments: list[tuple[list[int], list[bool]]], length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Unpacked: a row of `length` for each segment, [2 P, s] a field of a microbatch, as data/chat reads them."""
    count = len(segments)
    tokens, labels = (torch.zeros(count, length, dtype=torch.int64) for _ in range(2))
    mask, numbers = torch.zeros(count, length), torch.full((count, length), -1)
    for number, (ids, counted) in enumerate(segments):
        used = len(ids) - 1
        tokens[number, :used], labels[number, :used] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        mask[number, :used] = torch.tensor(counted[1:]).float()
        numbers[number, :used] = number
    positions = torch.arange(length).expand(count, length).contiguous()
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions, "segments": numbers}


def in_microbatches(rows: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """Rows in order, `size` at a time."""
    return [{name: part.contiguous() for name, part in zip(rows, parts, strict=True)} for parts in _cut(rows, size)]


def _cut(rows: dict[str, torch.Tensor], size: int) -> Any:
    return zip(*(value.split(size) for value in rows.values()), strict=True)


def transformers_model(architecture: Architecture, weights: dict[Name, torch.Tensor]) -> Any:
    """A fp32 model of transformers with these weights, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from minitron_mcore.checkpoint.conversion import units
    from minitron_mcore.families.find import known_families
    from minitron_mcore.families.table import config_of

    config = config_of(known_families()[architecture.family], architecture, "the test")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    state = {
        name: part
        for unit in units(architecture)
        for name, part in zip(
            unit.names,
            unit.layout.split(weights[unit.parameter.key, unit.layer].float(), architecture),
            strict=True,
        )
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("lm_head" in name for name in missing), (missing, unexpected)
    return model.eval()


def gradients_of(model: Any, architecture: Architecture) -> dict[Name, torch.Tensor]:
    """What backward left in a transformers model, as our global parameters; none for the vocabulary's padding."""
    from minitron_mcore.checkpoint.conversion import units

    named, table = dict(model.named_parameters()), {each.key: each for each in parameter_table(architecture)}
    found = {}
    for unit in units(architecture):
        joined = unit.layout.join([named[name].grad for name in unit.names], architecture)
        whole = torch.zeros(table[unit.parameter.key].shape(architecture))
        whole[: len(joined)] = joined
        found[unit.parameter.key, unit.layer] = whole
    return found


@dataclass
class Expected:
    """Means over the pairs, and the gradients of `loss`."""

    means: dict[str, float]
    gradients: dict[Name, torch.Tensor]


def trl_batch(segments: list[tuple[list[int], list[bool]]]) -> dict[str, torch.Tensor]:
    """The batch as trl's collator makes it: all chosen sides, then all rejected ones, padded on the right."""
    ordered = [*segments[0::2], *segments[1::2]]
    length = max(len(ids) for ids, _ in ordered)
    batch = {name: torch.zeros(len(ordered), length, dtype=torch.int64) for name in TRL_FIELDS}
    for row, (ids, counted) in enumerate(ordered):
        for name, values in zip(TRL_FIELDS, (ids, [1] * len(ids), [int(each) for each in counted]), strict=True):
            batch[name][row, : len(ids)] = torch.tensor(values)
    return batch


SIDES = ("chosen", "rejected")
TRL_FIELDS = ("input_ids", "attention_mask", "completion_mask")


def a_tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2", pad_token="w0")


def trl_dpo(
    folder: Path, architecture: Architecture, segments: list[tuple[list[int], list[bool]]], **how: Any
) -> Expected:
    """A batch through trl's DPO trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    moved, reference = draw_models(architecture)
    model = transformers_model(architecture, moved)
    given: Any = {"report_to": "none", "use_cpu": True, "gradient_checkpointing": False, "bf16": False, **how}
    trainer: Any = DPOTrainer(
        model,
        transformers_model(architecture, reference),
        DPOConfig(str(folder), disable_tqdm=True, **given),
        train_dataset=Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}]),
        processing_class=a_tokenizer(architecture.vocab_size),
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trl_batch(segments))
    loss.backward()
    means = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return Expected({**means, "loss": loss.item()}, gradients_of(model, architecture))


def trl_simpo(architecture: Architecture, segments: list[tuple[list[int], list[bool]]], **numbers: float) -> Expected:
    """The same pairs by the functions of trl's CPO trainer."""
    from types import SimpleNamespace

    from trl.experimental import cpo

    trainer: Any = cpo.CPOTrainer
    model = transformers_model(architecture, draw_models(architecture)[0])
    batch = trl_batch(segments)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logps = trainer.get_batch_logps(logits, labels, average_log_prob=True)
    stand_in = SimpleNamespace(alpha=0.0, loss_type="simpo", accelerator=SimpleNamespace(device="cpu"), **numbers)
    losses, chosen, rejected = trainer.cpo_loss(stand_in, *logps.chunk(2))
    losses.mean().backward()
    means = {"loss": losses.mean().item(), "rewards/chosen": chosen.mean().item()}
    means |= {"rewards/rejected": rejected.mean().item(), "rewards/margins": (chosen - rejected).mean().item()}
    means |= {"rewards/accuracies": (chosen > rejected).float().mean().item()}
    means |= {f"logps/{side}": part.mean().item() for side, part in zip(SIDES, logps.chunk(2), strict=True)}
    return Expected(means, gradients_of(model, architecture))


def transformers_answers(
    architecture: Architecture, segments: list[tuple[list[int], list[bool]]], mean: str
) -> Expected:
    """The next-token loss of all answers by transformers' own loss: over counted tokens, or over samples."""
    model = transformers_model(architecture, draw_models(architecture)[0])
    total = 0.0
    batch = trl_batch(segments)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    parts = [slice(row, row + 1) for row in range(len(labels))] if mean == "samples" else [slice(None)]
    for part in parts:
        given = {name: batch[name][part] for name in ("input_ids", "attention_mask")}
        loss = model(**given, labels=labels[part]).loss / len(parts)
        loss.backward()
        total += loss.item()
    return Expected({"loss": total, "tokens": float((labels != -100).sum())}, gradients_of(model, architecture))


def dense_log_probs(model: DenseModel, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """fp64 [segments], summed over the counted tokens."""
    logits = model.forward(rows["tokens"])["logits"][..., : model.architecture.vocab_size]
    chosen = logits.log_softmax(-1).gather(-1, rows["labels"].unsqueeze(-1)).squeeze(-1)
    return (chosen * rows["loss_mask"].double()).sum(1)


def dense_preference(
    architecture: Architecture, rows: dict[str, torch.Tensor], loss_of: Any, rewards: torch.Tensor | None = None
) -> Expected:
    """`loss_of(log-probabilities [P, 2], those of the reference, counts, rewards)`, a mean, in float64."""
    moved, reference = draw_models(architecture)
    model = DenseModel(architecture, moved).requires_grad()
    with torch.no_grad():
        known = dense_log_probs(DenseModel(architecture, reference), rows).view(-1, 2)
    counts = rows["loss_mask"].double().sum(1).view(-1, 2)
    loss = loss_of(dense_log_probs(model, rows).view(-1, 2), known, counts, rewards)
    loss.backward()
    gradients = {name: value.grad for name, value in model.weights.items() if value.grad is not None}
    return Expected({"loss": loss.item()}, gradients)


def packed_rows_of(
    segments: list[tuple[list[int], list[bool]]], length: int, multiple: int = 2
) -> dict[str, torch.Tensor]:
    """As many pairs in a row of `length` as it holds, in order, both sides of a pair one after the other; positions
    begin anew with every segment. Rows of padding alone make their number a multiple of `multiple`."""
    apart, sizes = rows_of(segments), [len(ids) - 1 for ids, _ in segments]
    lines: list[list[int]] = [[]]
    for first in range(0, len(segments), 2):
        if sum(sizes[number] for number in (*lines[-1], first, first + 1)) > length:
            lines.append([])
        lines[-1] += [first, first + 1]
    lines += [[]] * (-len(lines) % multiple)
    rows = {name: torch.zeros(len(lines), length, dtype=value.dtype) for name, value in apart.items()}
    rows["segments"] -= 1
    for row, numbers in enumerate(lines):
        end = 0
        for number in numbers:
            for name, value in apart.items():
                rows[name][row, end : end + sizes[number]] = value[number, : sizes[number]]
            end += sizes[number]
    return rows
