"""Before the first step of a distillation: is the teacher a trained model, and does the loss measure what it should?

One microbatch of the first global batch goes through the teacher. While its layers run, their weights are looked at;
then the loss is worked out with the teacher in the student's place: its next-token loss is the teacher's own, and its
distillation loss is that of a teacher from itself, which is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from minitron_mcore.checkpoint.store import as_chunks
from minitron_mcore.checkpoint.weight_checks import Seen, WeightChecks
from minitron_mcore.distillation.config import DistillConfig
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.errors import InputError
from minitron_mcore.layout import parameter_table
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import LossSums, run_schedule
from minitron_mcore.model.sites import layers_of
from minitron_mcore.runtime.agree import gathered
from minitron_mcore.training.job import Job

# A loss of equal distributions is rounding in fp32 sums of products that are the same to the last bit.
SELF_LOSS = 1e-5


def check_teacher(job: Job, batch: list[Microbatch]) -> None:
    """Look at the teacher of `job` by a microbatch of `batch`, the first global batch; every rank calls.

    Prints what was found, and a warning if the teacher knows nothing. Raises InputError for weights or a loss that are
    NaN or Inf, weights that are all zero, and if the distillation loss between the teacher and itself is not 0.
    """
    objective, teacher = job.objective, job.objective.running_teacher
    if teacher is None or not (isinstance(job.train, DistillConfig) and job.train.check_teacher):
        return
    checks = WeightChecks()
    with torch.no_grad(), _looking_at_weights(teacher.chunks, checks):
        means = _teach_itself(job.chunks, objective, teacher, batch)
    _judge_weights(checks, teacher)
    if not means["num_tokens"]:
        return  # all tokens of the microbatch are masked
    loss, self_loss = means["lm loss"], means["logits distillation loss"]
    uniform = math.log(objective.settings.vocab_size)
    if not (math.isfinite(loss) and math.isfinite(self_loss)):
        rule = f"has a loss of {loss} on the first microbatch"
        remedy = f"its weights are damaged, or precision={job.precision} is too narrow for it"
        raise InputError("teacher.checkpoint", None, rule, remedy)
    if abs(self_loss) > SELF_LOSS:
        rule = f"gives {self_loss:.3g} between the teacher and itself, where it should give 0"
        remedy = "teacher and loss do not fit together (distill.check_teacher=false skips this check)"
        raise InputError("distill.logit_loss", objective.settings.divergence, rule, remedy)
    job.runtime.print(
        f"teacher: weights finite and filled, loss {loss:.4f} on {means['num_tokens']:.0f} tokens (a uniform guess: "
        f"{uniform:.4f}), distillation loss from itself {self_loss:.1e}"
    )
    if loss >= uniform:
        job.runtime.print(
            f"WARNING: on the first microbatch the teacher's loss {loss:.4f} is no better than a uniform guess over "
            f"{objective.settings.vocab_size} ids: are teacher.checkpoint and the tokenizer the right ones?"
        )


def _teach_itself(
    chunks: list[LanguageModel], objective: Objective, teacher: Teacher, batch: list[Microbatch]
) -> dict[str, float]:
    """Mean losses of a microbatch with the teacher as its own student; every rank calls, with gradients off."""

    def loss(model: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> LossSums:
        stand_in: Any = SimpleNamespace(head_weight=teacher.head_weight, config=model.config)
        return objective.loss(stand_in, microbatch.teacher.final, microbatch)

    # The interleaved schedule takes a multiple of the stages.
    count = chunks[0].config.pipeline_model_parallel_size if len(chunks) > 1 else 1
    part = [replace(microbatch) for microbatch in batch[:count]]
    teacher.run_ahead(part)
    return run_schedule(as_chunks(chunks), part, loss, forward_only=True)


@contextmanager
def _looking_at_weights(chunks: list[LanguageModel], checks: WeightChecks) -> Iterator[None]:
    """Within the `with`, the weights of every layer that runs are looked at: else they may not be on the device."""

    def look(chunk: LanguageModel, at: int | None) -> None:
        for key, layer, tensor in named_parameters(chunk):
            if layer == at and (name := _name(key, layer)) not in checks.seen:
                checks.look(name, tensor.detach())

    with ExitStack() as hooks:
        for chunk in chunks:
            look(chunk, None)
            for index, layer in layers_of(chunk):
                ran = partial(look, chunk, index)
                hooks.enter_context(layer.register_forward_hook(lambda *_, ran=ran: ran()))
        yield


def _judge_weights(checks: WeightChecks, teacher: Teacher) -> None:
    """Every rank calls; all raise InputError for the same weights, or none does."""
    may_be_zero = {parameter.key for parameter in parameter_table(teacher.architecture) if parameter.initial == "zero"}
    shards = gathered(checks.seen, teacher.chunks[0].tp_group)
    bad = []
    for name in checks.seen:
        found = sum((shard.get(name, Seen()) for shard in shards), Seen())
        if not found.finite:
            bad.append(f"{name} holds NaN or Inf")
        elif found.zero and found.num_elements and name.partition(" of layer ")[0] not in may_be_zero:
            bad.append(f"{name} is all zero")
    every = sorted({fault for rank in gathered(bad) for fault in rank})
    if every:
        more = f" (and {len(every) - 1} more)" if len(every) > 1 else ""
        rule = "has weights that were lost or never filled in"
        remedy = f"{every[0]}{more}; if they are meant to be so, distill.check_teacher=false skips this check"
        raise InputError("teacher.checkpoint", None, rule, remedy)


def _name(key: str, layer: int | None) -> str:
    return key if layer is None else f"{key} of layer {layer}"
