"""Training, distillation and losses of models in memory: the engine's own step, without files, resuming or signals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from minitron_mcore.checkpoint.store import as_chunks
from minitron_mcore.distillation.config import DistillConfig, HiddenStatesConfig, check_window
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.states.loss import StateLosses
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.errors import DivergedError, InputError
from minitron_mcore.evaluation.held_out import mean_loss
from minitron_mcore.in_memory.batches import cut, microbatches_of
from minitron_mcore.in_memory.models import Model, check_layout
from minitron_mcore.in_memory.process import started
from minitron_mcore.keys import section_at
from minitron_mcore.model.fp8 import passes_of
from minitron_mcore.model.gpt import LanguageModel, build_model
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.model.schedule import in_calls
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.overlap import finish_gathering
from minitron_mcore.training.budget import plan_timetable
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.learning_rate import check_learning_rate
from minitron_mcore.training.step import Trained, not_finite, train_step

# Keys of the sections `train` and `distill` that mean something without files and a token budget.
STEP = (
    *(
        "micro_batch_size",
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_warmup_iters",
        "lr_warmup_tokens",
        "lr_wsd_decay_style",
    ),
    *("lr_wsd_decay_tokens", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "loss_chunk_tokens"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "overlap_grad_reduce"),
    *("overlap_param_gather", "ddp_bucket_size", "max_skipped_iterations"),
)
LOSS = ("logit_loss", "jensen_shannon_mix", "temperature", "kd_weight", "lm_weight", "top_k", "loss_chunk_tokens")
DISTILL = (*STEP, *LOSS, "recompute_loss", "teacher_window", "hidden_states")
Section = TypeVar("Section", bound=TrainConfig)


def train(model: Model, batches: Iterable[torch.Tensor], **keys: Any) -> Model:
    """Next-token training of a copy of `model`, one step a batch; `model` stays as it is. Every rank calls.

    keys: of a recipe's section `train`, as far as they mean something here: STEP. The learning rate runs from `lr` to
    `min_lr` over the batches; without a `micro_batch_size` the rows of a batch are one microbatch. Returns the trained
    model, frozen, with the means of each step in `history`. Steps whose loss or gradient is NaN or Inf are skipped.
    Raises InputError, and DivergedError for `max_skipped_iterations` (5) such steps in a row.
    """
    check_layout(model)
    config = _section(TrainConfig, STEP, keys)
    objective = Objective(LossSettings(model.architecture.vocab_size, chunk_tokens=config.loss_chunk_tokens))
    lineage = {"stage": "train", "load": model.lineage}
    return _fit(model, batches, config, objective, lineage, keys.get("micro_batch_size"))


def distill(student: Model, teacher: Model, batches: Iterable[torch.Tensor], **keys: Any) -> Model:
    """A copy of `student` trained on the distribution of `teacher`, one step a batch; both stay as they are.

    keys: of a recipe's section `distill`, as far as they mean something here: DISTILL; `hidden_states` as a dictionary.
    Otherwise as `train`; `history` has "lm loss", "logits distillation loss" and what else metrics.jsonl has of a step.
    Every rank calls. Raises InputError also for models of different vocabularies. Source: arXiv 2407.14679, section 3.
    """
    check_layout(student)
    of_states = keys.pop("hidden_states", {})
    if not isinstance(of_states, Mapping):
        raise InputError("hidden_states", of_states, "must be a dictionary", 'write it as {"sites": ["block_output"]}')
    states = section_at("hidden_states", HiddenStatesConfig, of_states)
    config = _section(DistillConfig, DISTILL, {**keys, "hidden_states": states})
    taught = _taught(student, teacher, LossSettings.of(config, student.architecture.vocab_size))
    taught.window = config.teacher_window
    lineage = {"stage": "distill", "student": student.lineage, "teacher": teacher.lineage}
    return _fit(student, batches, config, taught, lineage, keys.get("micro_batch_size"))


def evaluate(
    model: Model, batches: Iterable[torch.Tensor], teacher: Model | None = None, **keys: Any
) -> dict[str, float]:
    """Means over the s − 1 tokens of every row that have a next one: "lm loss" in nats, and "ppl".

    With a `teacher` also "logits distillation loss", "teacher lm loss" and "top-1 agreement"; keys: those of a recipe's
    section `distill` that say what the loss is: LOSS. The same on every rank; every rank calls. Raises InputError.
    """
    check_layout(model)
    vocabulary = model.architecture.vocab_size
    objective = Objective(LossSettings(vocabulary))
    if teacher is not None:
        objective = _taught(model, teacher, LossSettings.of(_section(DistillConfig, LOSS, keys), vocabulary))
    elif keys:
        name, value = next(iter(keys.items()))
        raise InputError(name, value, "has no effect without a teacher", "give one, or leave it out")
    groups = in_calls(microbatches_of(model, batches), interleaved=len(model.chunks) > 1)
    return mean_loss(as_chunks(model.chunks), groups, objective)


def lm_loss(model: Model, batches: Iterable[torch.Tensor]) -> float:
    """Mean next-token loss in nats, over the s − 1 tokens of every row that have a next one; the same on every rank."""
    return evaluate(model, batches)["lm loss"]


def _section(kind: type[Section], allowed: Sequence[str], keys: dict[str, Any]) -> Section:
    """Raises InputError for a key that is none, or means nothing here."""
    for name, value in keys.items():
        if name not in allowed:
            raise InputError(name, value, "is not a key here", f"choose of {', '.join(allowed)}")
    return section_at("", kind, keys)


def _taught(student: Model, teacher: Model, settings: LossSettings) -> Objective:
    """Raises InputError where the two have different vocabularies, or one of them another layout."""
    check_layout(teacher)
    ours, theirs = student.architecture.vocab_size, teacher.architecture.vocab_size
    if ours != theirs:
        rule = f"has vocab_size={theirs}, and the student {ours}"
        raise InputError("teacher", None, rule, "compare models of one vocabulary")
    return Objective(settings, Teacher(teacher.chunks, teacher.architecture))


def _fit(
    model: Model,
    batches: Iterable[torch.Tensor],
    config: TrainConfig,
    objective: Objective,
    lineage: dict[str, Any],
    micro_batch_size: int | None,
) -> Model:
    """A trained copy of `model`; the budget of `config` is the batches."""
    _, layout = started()
    whole = microbatches_of(model, batches)
    config = _sized(config, whole, micro_batch_size, layout)
    section = "distill" if isinstance(config, DistillConfig) else "train"
    timetable = plan_timetable(config, whole[0].tokens.shape[1], section)
    check_learning_rate(config, timetable, section)
    check_recompute(config, model.architecture, layout, section)
    chunks = build_model(model.architecture, layout, model.precision, **passes_of(config))
    _copy(model.chunks, chunks)
    with _states(config, chunks, objective, model, layout):
        trained = Trained.of(chunks, config, timetable)
        history: list[dict[str, float]] = []
        skipped = 0
        for step, batch in zip(timetable.steps(0), whole, strict=True):
            history.append(train_step(trained, objective, step.shape, cut(batch, config.micro_batch_size)))
            skipped = skipped + 1 if (bad := not_finite(history[-1])) else 0
            if skipped >= config.max_skipped_iterations:
                words = f"step {len(history)}: {', '.join(bad)} not finite; {skipped} steps in a row were skipped"
                raise DivergedError(f"{words}, so max_skipped_iterations={skipped} ends the training")
        finish_gathering(trained.chunks)
    frozen = build_model(model.architecture, layout, model.precision, trainable=False)
    _copy(chunks, frozen)
    told = {**lineage, "tokens": config.tokens}
    return Model(frozen, model.architecture, model.precision, model.source, told, history)


def _sized(config: Section, whole: list[Microbatch], micro_batch_size: int | None, layout: ParallelConfig) -> Section:
    """With the batches' sizes, and their tokens as the budget. Raises InputError for microbatches that do not fit."""
    rows, length = whole[0].tokens.shape
    size, replicas = micro_batch_size or rows, data_group().size()
    if rows % size:
        raise InputError("micro_batch_size", size, f"does not divide the {rows} rows of a batch", "choose a divisor")
    if layout.virtual_pipeline and rows // size % layout.pipeline:
        rule = f"makes {rows // size} microbatches of a batch, and the interleaved schedule takes multiples of pipeline"
        raise InputError("micro_batch_size", size, f"{rule}={layout.pipeline}", "choose another, or other batches")
    if isinstance(config, DistillConfig):
        check_window(config.teacher_window, layout, "teacher_window")
    sizes: Any = {"global_batch_size": rows * replicas, "micro_batch_size": size}
    sizes["tokens"] = len(whole) * rows * replicas * length
    return dataclasses.replace(config, **sizes)


@contextmanager
def _states(
    config: TrainConfig, chunks: list[LanguageModel], objective: Objective, student: Model, layout: ParallelConfig
) -> Iterator[None]:
    """Within, losses between inner states, if `config` asks for any; the teacher is left without hooks."""
    teacher = objective.running_teacher
    if teacher is None or not isinstance(config, DistillConfig) or not config.hidden_states.sites:
        yield
        return
    models = student.architecture, teacher.architecture
    objective.states = StateLosses(chunks, config.hidden_states, *models, layout, seed=0)
    teacher.want_states(objective.states.pairs, student.architecture.num_layers)
    try:
        yield
    finally:
        teacher.want_states([], student.architecture.num_layers)


@torch.no_grad()
def _copy(source: Sequence[LanguageModel], target: Sequence[LanguageModel]) -> None:
    """The weights of one model into another of its shape and layout."""
    for old, new in zip(source, target, strict=True):
        for (*_, here), (*_, there) in zip(named_parameters(old), named_parameters(new), strict=True):
            there.copy_(here)
