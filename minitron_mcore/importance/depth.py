"""How much worse a model gets without a layer, or without a block of consecutive ones, for every place of the block.

    lm_loss                mean next-token loss, minus the whole model's (arXiv 2407.14679, section 2.2)
    logit_mse              mean over tokens and vocabulary of (whole − without)², of the logits (Nemotron Nano 2)
    normalized_logit_mse   Σ (whole − without)² / Σ whole² (Nemotron Elastic)
    accuracy               of a multiple-choice task: the whole model's minus that without (arXiv 2408.11796)
    normalized_accuracy    the same, a choice's log-likelihood being divided by its number of tokens

Layers are left out in memory (model/sites.py). One pass over the samples, and one over the task's rows, serves all
metrics of a block. Every metric counts the tokens of the loss mask.

For the logit metrics the last pipeline stage keeps the whole model's final hidden states in host memory (`kept_bytes`);
logits exist for a few hundred tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.likelihood import log_likelihoods
from minitron_mcore.evaluation.questions import Task, accuracy
from minitron_mcore.evaluation.token_values import over_world, token_values
from minitron_mcore.importance.config import LOGIT_METRICS, TASK_METRICS, TEXT_METRICS, blocks_of, measured
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import evaluating, in_calls, visit_final_states
from minitron_mcore.model.sites import without_layers


@dataclass(frozen=True)
class DepthTable:
    """`damage`: "METRIC@LENGTH" -> float64 [num_layers − LENGTH + 1], entry s without layers s … s + LENGTH − 1; larger
    is worse. `whole`: the whole model's lm_loss (nats per token) and accuracies, as far as they were measured."""

    whole: dict[str, float] = field(default_factory=dict)
    damage: dict[str, numpy.ndarray] = field(default_factory=dict)


def measure_depth(
    chunks: Sequence[LanguageModel],
    batches: Sequence[Microbatch],
    architecture: Architecture,
    metrics: Sequence[str],
    lengths: Sequence[int] = (1,),
    *,
    task: Task | None = None,
    micro_batch_size: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> DepthTable:
    """Every metric for every block of the given lengths; the same numbers on every rank, at every layout.

    `batches`: this data-parallel rank's microbatches, on the device, as many on every rank and all of one size: tokens,
    labels, loss_mask, position_ids [b, s]; a filler's loss mask is 0. Every block sees the same. `task`: the questions,
    read `micro_batch_size` rows at a time, for accuracies. `report(blocks done, of how many)`. Every rank calls.

    Takes 1 + Σ (num_layers − length + 1) passes over samples and task (`costs`). Raises InputError for impossible
    metrics or lengths, if no token counts, and if a metric is NaN or Inf.
    """
    metrics = measured(metrics)
    if not metrics:
        return DepthTable()
    blocks = blocks_of(metrics, lengths, architecture.num_layers)
    if task is None and (needs := [metric for metric in metrics if metric in TASK_METRICS]):
        raise InputError("task", None, f"is missing, and {needs[0]} needs its questions", "read it with `load_task`")
    passes = _Passes(chunks, batches, architecture.vocab_size, metrics, task, micro_batch_size)
    damage: dict[str, list[float]] = {f"{metric}@{length}": [] for metric in metrics for length in lengths}
    with evaluating(chunks):
        whole = passes.run("of the whole model")
        for done, block in enumerate(blocks, 1):
            with without_layers(chunks, block):
                without = passes.run(f"without layers {block.start} to {block.stop - 1} (the first is 0)")
            for metric in metrics:
                better, worse = (without, whole) if metric in TASK_METRICS else (whole, without)
                damage[f"{metric}@{len(block)}"].append(worse[metric] - better[metric])
            if report is not None:
                report(done, len(blocks))
    values = {name: numpy.array(entries, dtype=numpy.float64) for name, entries in damage.items()}
    return DepthTable({name: value for name, value in whole.items() if name not in LOGIT_METRICS}, values)


@dataclass
class _Passes:
    """Passes over the samples and the task, with the model in its current state; the first is of the whole model."""

    chunks: Sequence[LanguageModel]
    batches: Sequence[Microbatch]
    vocab_size: int
    metrics: Sequence[str]
    task: Task | None
    micro_batch_size: int
    kept: dict[Microbatch, torch.Tensor] = field(default_factory=dict)  # the whole model's final hidden states

    def run(self, words: str) -> dict[str, float]:
        """Every metric's value; the logit metrics compare with the first run's model, and are 0 in the first run."""
        values: dict[str, float] = {}
        if {*self.metrics} & {*TEXT_METRICS}:
            count, loss, difference, reference = self._text_sums().tolist()
            if not count:
                raise InputError("", "the calibration samples", "have no token that counts: every loss mask is 0")
            values["lm_loss"] = loss / count
            values["logit_mse"] = difference / count / self.vocab_size
            values["normalized_logit_mse"] = difference / reference if difference else 0.0
        if self.task is not None and {*self.metrics} & {*TASK_METRICS}:
            likelihoods = log_likelihoods(self.chunks, self.task.rows, self.vocab_size, self.micro_batch_size).sums
            if not numpy.isfinite(likelihoods).all():
                raise _not_finite(f"log-likelihoods {words}")
            values["accuracy"] = accuracy(self.task, likelihoods)
            values["normalized_accuracy"] = accuracy(self.task, likelihoods, normalized=True)
        for metric in self.metrics:
            if not numpy.isfinite(values[metric]):
                raise _not_finite(f"{metric} {words}")
        return {metric: values[metric] for metric in self.metrics}

    def _text_sums(self) -> torch.Tensor:
        """Counted tokens, and over them the losses, Σ (whole − without)² and Σ whole²: float64 [4], global."""
        device = next(self.chunks[0].parameters()).device
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        whole: dict[Microbatch, torch.Tensor] = {}
        first = not self.kept and {*self.metrics} & {*LOGIT_METRICS}

        def visit(chunk: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> None:
            if microbatch.is_filler:
                return
            if first:
                whole[microbatch] = hidden_SBH.to("cpu", copy=True)
            reference = self.kept[microbatch].to(device) if self.kept else None
            mask_SB = microbatch.loss_mask.transpose(0, 1).double()
            values = token_values(
                chunk, hidden_SBH, microbatch.labels, vocab_size=self.vocab_size, reference_SBH=reference
            )
            sums[0] += mask_SB.sum()
            for place, each_SB in enumerate(values, 1):
                sums[place] += (each_SB * mask_SB).sum()

        for group in in_calls(self.batches, interleaved=len(self.chunks) > 1):
            visit_final_states(self.chunks, group, visit)
        self.kept = whole or self.kept
        return over_world(sums, self.chunks)


def _not_finite(what: str) -> InputError:
    return InputError("", what, "came out as NaN or Inf", "check the checkpoint's weights, and precision")
