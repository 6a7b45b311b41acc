"""Importance, plans and students of models in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch

from minitron_mcore.checkpoint.store import as_chunks
from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import ImportanceConfig
from minitron_mcore.importance.depth import measure_depth
from minitron_mcore.importance.hooks import Measure
from minitron_mcore.importance.magnitude import from_squares, squares
from minitron_mcore.importance.score import measure as measure_model
from minitron_mcore.importance.score import score_model
from minitron_mcore.importance.scores import Scores, random_scores, tolerance_of
from minitron_mcore.in_memory.batches import microbatches_of
from minitron_mcore.in_memory.models import Model, check_layout
from minitron_mcore.in_memory.process import standing_layout
from minitron_mcore.keys import section_at
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.pruning.apply import prune_chunks
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.pruning.plan import make_plan
from minitron_mcore.pruning.plan_file import PruningPlan, check_same_model
from minitron_mcore.pruning.targets import TARGETS
from minitron_mcore.runtime.config import ParallelConfig


def score(
    model: Model, batches: Iterable[torch.Tensor], *, aggregation: str = "l2/mean", seed: int = 1234, **choices: Any
) -> Scores:
    """Importance of every axis of `model`, float64, larger being more important (see importance/scores.py).

    `aggregation`: over samples / over a sample's tokens, each of mean, l2, var. `choices`: keys of a recipe's section
    `importance`. `neuron_site` is where neurons are read. `aggregations` and `neuron_sites`: further ones from the same
    pass, in `scores.variants`. `depth_metrics` (lm_loss, logit_mse, normalized_logit_mse): the cost of leaving out each
    block of `block_lengths` layers, by 1 + Σ (layers − length + 1) further passes, in `scores.depth`. `method`:
    activation, or the baselines magnitude (of the weights; one rank only) and random (from `seed`), which ignore
    `batches`. Source: arXiv 2407.14679, section 2.2 and table 13.
    """
    batch, _, sequence = aggregation.partition("/")
    config = ImportanceConfig(batch_aggregation=batch, sequence_aggregation=sequence, **_listed(choices))
    if config.method == "random":
        return random_scores(model.architecture, seed)
    if config.method == "magnitude":
        return _magnitude(model)
    microbatches = microbatches_of(model, batches)
    settings = {"precision": model.precision, "tolerance": tolerance_of(model.precision, batch, sequence)}
    scores = score_model(model.chunks, microbatches, model.architecture, config, settings=settings)
    metrics, lengths = config.depth_metrics, config.block_lengths
    scores.depth.update(measure_depth(model.chunks, microbatches, model.architecture, metrics, lengths).damage)
    return scores


def measure(
    model: Model, batches: Iterable[torch.Tensor], what: Measure, *, aggregation: str = "l2/mean"
) -> numpy.ndarray:
    """A custom metric: what the hooks of `what` record, aggregated: float64 [rows, channels] of the whole model.

    `what`: a name, the global (rows, channels), and a function that hooks a chunk (see importance/hooks.py; docs/api.md
    has one in ten lines). The same on every rank.
    """
    batch, _, sequence = aggregation.partition("/")
    ImportanceConfig(batch_aggregation=batch, sequence_aggregation=sequence)  # refuses what is no aggregation
    aggregate = measure_model(model.chunks, microbatches_of(model, batches), model.architecture, {what: [sequence]})
    return aggregate(what, batch, sequence)


def plan(
    scores: Scores,
    *,
    keep_layers: Sequence[int] | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    sequence_length: int | None = None,
    **choices: Any,
) -> PruningPlan:
    """The indices that stay on every axis, for a student of the given sizes; sizes left out stay the teacher's.

    `choices`: sizes by name (num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups) or as
    `ratios` of the teacher's, and the keys of a recipe's section `prune`: divisible_by, layers (scattered or
    contiguous), depth_metric, variant, head_residual, residual_matrices. `keep_layers`: the layers that stay.
    `sequence_length`: for the FLOPs. Pure data; save it with `save_plan`.
    """
    of_student = {name: choices.pop(name) for name in (*TARGETS, "ratios") if name in choices}
    layers = None if keep_layers is None else [*keep_layers]
    student = section_at("student", StudentConfig, {**of_student, "layers": layers})
    layout = standing_layout()
    layout = ParallelConfig(tensor=tensor or layout.tensor, pipeline=pipeline or layout.pipeline)
    return make_plan(scores, student, section_at("prune", PruneConfig, _listed(choices)), layout, sequence_length)


def prune(model: Model, plan: PruningPlan, *, trainable: bool = False) -> Model:
    """The student in memory, beside the teacher, which stays as it is: the same bits as `minitron prune` writes."""
    check_layout(model)
    check_same_model(plan.teacher, model.architecture, "plan")
    chunks = prune_chunks(as_chunks(model.chunks), plan, trainable=trainable)
    lineage = {"stage": "prune", "teacher": model.lineage, "plan": {"fingerprint": plan.fingerprint}}
    return Model(chunks, plan.student, model.precision, model.source, lineage)


def _magnitude(model: Model) -> Scores:
    config = model.chunks[0].config
    if config.tensor_model_parallel_size * config.pipeline_model_parallel_size > 1:
        rule = "reads whole matrices in memory, which a sharded model does not have"
        remedy = "save the model and use `minitron score importance.method=magnitude`, which reads checkpoints"
        raise InputError("method", "magnitude", rule, remedy)
    held = {(key, layer): tensor.detach() for key, layer, tensor in named_parameters(model.chunks[0])}
    sums = squares(model.architecture, lambda parameter, layer: held[parameter.key, layer].cpu())
    return from_squares(model.architecture, sums)


def _listed(choices: Mapping[str, Any]) -> dict[str, Any]:
    """`choices` as a recipe's section takes them, which knows no sequences but lists."""
    return {name: [*value] if isinstance(value, tuple | range) else value for name, value in choices.items()}
