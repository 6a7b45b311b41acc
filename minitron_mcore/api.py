"""Score, plan and prune a model in memory, from Python: in a notebook, without a launcher.

    import minitron_mcore.api as minitron

    teacher = minitron.load("teacher/")
    scores = minitron.score(teacher, batches, aggregation="l2/mean")
    plan = minitron.plan(scores, ffn_hidden_size=320, num_layers=8)
    student = minitron.prune(teacher, plan)
    minitron.lm_loss(student, batches)
    minitron.save(student, "student/")

`batches` is a sequence of int64 tensors [b, s] of token ids, on any device: all of one s, the last of at most the
others' b. Under a launcher every rank calls every function with its own data-parallel rank's batches, equally many on
each; `start` sets the model's layout. Every function raises `minitron_mcore.errors.InputError` for wrong input, in one
sentence. Worked examples: docs/api.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from minitron_mcore.runtime.libraries import quiet_libraries
from minitron_mcore.runtime.parallel import seed_everything
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.start import start as start_process

quiet_libraries()  # Megatron warns while it is imported


from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.companions import carry_companions
from minitron_mcore.checkpoint.folder import (
    find_checkpoint,
    read_architecture,
    read_lineage,
    tokenizer_folder,
    write_description,
)
from minitron_mcore.checkpoint.store import as_chunks, load_model, model_state, save_state
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.held_out import mean_loss
from minitron_mcore.importance.config import ImportanceConfig
from minitron_mcore.importance.depth import measure_depth
from minitron_mcore.importance.hooks import Measure
from minitron_mcore.importance.magnitude import from_squares, squares
from minitron_mcore.importance.score import measure as measure_model
from minitron_mcore.importance.score import score_model
from minitron_mcore.importance.scores import Scores, load_scores, random_scores, save_scores, tolerance_of
from minitron_mcore.keys import section_at
from minitron_mcore.model.gpt import DTYPES, LanguageModel, build_model
from minitron_mcore.model.initialize import initialize, named_parameters
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import in_calls
from minitron_mcore.pruning.apply import prune_chunks
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.pruning.plan import make_plan
from minitron_mcore.pruning.plan_file import PruningPlan, check_same_model, load_plan, save_plan
from minitron_mcore.pruning.targets import TARGETS
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.parallel import layout_stands, use_layout
from minitron_mcore.runtime.whole_folder import whole_folder

__all__ = ["Measure", "Model", "build", "lm_loss", "load", "load_plan", "load_scores", "measure", "plan", "prune"]
__all__ += ["save", "save_plan", "save_scores", "score", "start"]

_standing: tuple[Runtime, ParallelConfig] | None = None


@dataclass
class Model:
    """A model in memory: this rank's `chunks` (one, or one a virtual stage; torch modules) and what it is.

    `source`: the checkpoint folder that it, or the teacher it was cut from, was loaded from; None for random weights.
    """

    chunks: list[LanguageModel]
    architecture: Architecture
    precision: str = "fp32"
    source: Path | None = None
    lineage: dict[str, Any] = field(default_factory=dict)


def start(*, seed: int = 1234, **parallel: Any) -> Runtime:
    """Start this process and lay models out as `parallel` says: tensor, pipeline, virtual_pipeline, sequence.

    Not needed in a notebook: the other functions start a single process by themselves. Models loaded at another layout
    cannot be used afterwards. Every rank calls. Raises InputError.
    """
    global _standing
    wanted = ParallelConfig(**parallel)
    if wanted.context > 1:
        raise InputError("context", wanted.context, "does not work here, where scores need whole sequences", "omit it")
    runtime = start_process()
    use_layout(wanted, runtime.world_size)
    seed_everything(seed)
    _standing = runtime, wanted
    return runtime


def _started() -> tuple[Runtime, ParallelConfig]:
    if _standing is None or not layout_stands():
        start()
    assert _standing is not None
    return _standing


def _listed(choices: Mapping[str, Any]) -> dict[str, Any]:
    """`choices` as a recipe's section takes them, which knows no sequences but lists."""
    return {name: [*value] if isinstance(value, tuple | range) else value for name, value in choices.items()}


def _check_precision(precision: str) -> None:
    if precision not in DTYPES:
        raise InputError("precision", precision, "is not allowed", f"choose one of {', '.join(DTYPES)}")


def load(folder: str | Path, precision: str = "fp32") -> Model:
    """The newest iteration of the sharded checkpoint in `folder`, saved at any layout; precision fp32 or bf16.

    The model is frozen and in evaluation mode. Every rank calls.
    """
    _check_precision(precision)
    path, iteration = find_checkpoint(folder, "folder")
    architecture = read_architecture(path)
    chunks = load_model((path, iteration), architecture, _started()[1], precision)
    lineage = {"checkpoint": str(path), "iteration": iteration, "lineage": read_lineage(path)}
    return Model(chunks, architecture, precision, path, lineage)


def build(architecture: Architecture | Mapping[str, Any], seed: int = 1234, precision: str = "fp32") -> Model:
    """A model of random weights, the same at every layout. `architecture`: Megatron's field names, as in
    {"family": "llama", "num_layers": 4, "hidden_size": 64, …}; what the family fixes may be left out."""
    _check_precision(precision)
    if not isinstance(architecture, Architecture):
        architecture = build_architecture(dict(architecture))
    chunks = build_model(architecture, _started()[1], precision, trainable=False)
    initialize(chunks, architecture, seed)
    return Model(chunks, architecture, precision, None, {"seed": seed})


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
    microbatches = _microbatches(model, batches)
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
    aggregate = measure_model(model.chunks, _microbatches(model, batches), model.architecture, {what: [sequence]})
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
    _, layout = _standing or (None, ParallelConfig())
    layout = ParallelConfig(tensor=tensor or layout.tensor, pipeline=pipeline or layout.pipeline)
    return make_plan(scores, student, section_at("prune", PruneConfig, _listed(choices)), layout, sequence_length)


def prune(model: Model, plan: PruningPlan, *, trainable: bool = False) -> Model:
    """The student in memory, beside the teacher, which stays as it is: the same bits as `minitron prune` writes."""
    check_same_model(plan.teacher, model.architecture, "plan")
    chunks = prune_chunks(as_chunks(model.chunks), plan, trainable=trainable)
    lineage = {"stage": "prune", "teacher": model.lineage, "plan": {"fingerprint": plan.fingerprint}}
    return Model(chunks, plan.student, model.precision, model.source, lineage)


def lm_loss(model: Model, batches: Iterable[torch.Tensor]) -> float:
    """Mean next-token loss in nats, over the s − 1 tokens of every row that have a next one; the same on every rank."""
    microbatches = _microbatches(model, batches)
    groups = in_calls(microbatches, interleaved=len(model.chunks) > 1)
    objective = Objective(LossSettings(model.architecture.vocab_size))
    return mean_loss(as_chunks(model.chunks), groups, objective)["lm loss"]


def save(model: Model, folder: str | Path) -> Path:
    """Write a checkpoint that every verb reads: weights, architecture, lineage, the source's tokenizer if it has one.

    `folder` must be new or empty, and appears only when it is complete. Every rank calls.
    """
    runtime, _ = _started()
    target = Path(folder).resolve()

    def refuse() -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError("folder", folder, "exists already", "name another folder")

    def describe(unfinished: Path) -> None:
        source = model.source
        inherited = read_lineage(source).get("tokenizer") if source else None
        lineage = {"stage": "api", "tokens": 0, "tokenizer": inherited, **model.lineage}
        tokenizer = tokenizer_folder(source) if source else None
        save = partial(shutil.copytree, tokenizer) if tokenizer else None
        recipe = f"precision: {model.precision}\n"
        write_description(unfinished, model.architecture, lineage=lineage, recipe=recipe, save_tokenizer=save)
        if source:
            carry_companions(source, unfinished)

    runtime.on_main(refuse)
    with whole_folder(target, f"folder={folder}") as unfinished:
        save_state(unfinished, 0, model_state(as_chunks(model.chunks)), runtime, model.architecture)
        runtime.on_main(partial(describe, unfinished))
    return target


def _magnitude(model: Model) -> Scores:
    config = model.chunks[0].config
    if config.tensor_model_parallel_size * config.pipeline_model_parallel_size > 1:
        rule = "reads whole matrices in memory, which a sharded model does not have"
        remedy = "save the model and use `minitron score importance.method=magnitude`, which reads checkpoints"
        raise InputError("method", "magnitude", rule, remedy)
    held = {(key, layer): tensor.detach() for key, layer, tensor in named_parameters(model.chunks[0])}
    sums = squares(model.architecture, lambda parameter, layer: held[parameter.key, layer].cpu())
    return from_squares(model.architecture, sums)


def _microbatches(model: Model, batches: Iterable[torch.Tensor]) -> list[Microbatch]:
    """On the model's device and all of one size; rows that fill up the last one are neither scored nor counted."""
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
    if tokens.shape[1] > architecture.max_position_embeddings:
        longest = f"max_position_embeddings={architecture.max_position_embeddings}"
        rule = f"has rows of {tokens.shape[1]} tokens, longer than the model's {longest}"
        raise InputError(key, None, rule, "shorten them")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= architecture.vocab_size:
        rule = f"has the token id {low if low < 0 else high}, but the model's vocab_size is {architecture.vocab_size}"
        raise InputError(key, None, rule, "use the tokenizer the model was trained with")
