"""Problems with hidden-state losses: solved on ranks by the engine, and densely in float64 from the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from tests.distributed.dense_reference import DenseModel, draw_weights, fill
from tests.distributed.models import gather_named, global_batch, my_batch, start_layout, tiny

SITES = ("embedding", "block_output", "mlp_input", "attention_relation")
NAMES = {
    "embedding": "embedding loss",
    "block_output": "block output loss",
    "mlp_input": "mlp input loss",
    "attention_relation": "attention relation loss",
}
LM_WEIGHT, KD_WEIGHT, WEIGHT, SEED = 0.3, 1.0, 5.0, 17
# The last layer, whose output the final norm reads; a teacher's layer used twice; layers of other pipeline stages.
LAYERS = [[7, 3], [2, 1], [2, 0], [5, 2]]


@dataclass(frozen=True)
class Case:
    sites: tuple[str, ...] = SITES
    loss: str = "mse"
    wide: bool = True  # a teacher of other widths everywhere, or of the student's
    layers: bool = False  # LAYERS, or the default
    weighting: str = "fixed"
    family: str = "llama"
    relation_heads: int = 0

    @property
    def student(self) -> Any:
        return tiny(self.family)

    @property
    def teacher(self) -> Any:
        changes = {"num_layers": 8}
        if self.wide:
            changes |= {
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "num_attention_heads": 8,
                "num_query_groups": 4,
                "kv_channels": 24,
            }
        return tiny(self.family, **changes)

    @property
    def needs_projection(self) -> bool:
        return self.wide and self.sites != ("attention_relation",)

    def config(self) -> Any:
        from minitron_mcore.distillation.config import HiddenStatesConfig

        return HiddenStatesConfig(
            sites=list(self.sites),
            layers=LAYERS if self.layers else None,
            loss=self.loss,
            weighting=self.weighting,
            weight=WEIGHT,
            relation_heads=self.relation_heads,
        )


CASES = {
    **{
        f"{site}-{loss}": Case((site,), loss, wide)
        for site in SITES
        for loss, wide in (("mse", True), ("cosine", False))
        if site != "attention_relation" or loss == "mse"
    },
    "all-mse": Case(layers=True),
    "all-cosine": Case(loss="cosine", wide=False, layers=True),
    "all-dynamic": Case(loss="cosine", weighting="dynamic", layers=True),
    "all-nemotron": Case(wide=False, family="nemotron", layers=True),
    # 4 relation heads of a model with 2 query groups and 6 heads, and one with 4 and 8.
    "relation-heads": Case(("attention_relation",), relation_heads=4, layers=True),
}


@cache
def weights_of(case: Case, teacher: bool) -> dict[Any, torch.Tensor]:
    return draw_weights(case.teacher if teacher else case.student, seed=5 if teacher else 11)


def fuse_norms(chunks: list[Any]) -> None:
    """Put the layers' norms into the linears after them, as Transformer Engine does."""
    from megatron.core.transformer.identity_op import IdentityOp

    from tests.distributed.importance.test_scores import FusedLinear

    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.self_attention.linear_qkv = FusedLinear(layer.input_layernorm, layer.self_attention.linear_qkv)
            layer.mlp.linear_fc1 = FusedLinear(layer.pre_mlp_layernorm, layer.mlp.linear_fc1)
            layer.input_layernorm, layer.pre_mlp_layernorm = IdentityOp(), IdentityOp()


def build(
    case: Case, layout: Any, precision: str = "fp32", *, fused: bool = False, recompute: Recompute = KEEP_ALL
) -> tuple[Any, Any]:
    """(the student's chunks, the objective), not yet wrapped."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.states.loss import StateLosses
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model

    teacher_chunks = build_model(case.teacher, layout, precision, trainable=False)
    fill(teacher_chunks, case.teacher, weights_of(case, True))
    models = build_model(case.student, layout, precision, recompute=recompute)
    fill(models, case.student, weights_of(case, False))
    if fused:
        fuse_norms([*teacher_chunks, *models])
    states = StateLosses(models, case.config(), case.student, case.teacher, layout, seed=SEED)
    teacher = Teacher(teacher_chunks, case.teacher)
    teacher.want_states(states.pairs, case.student.num_layers)
    objective = Objective(
        LossSettings(vocab_size=case.student.vocab_size, lm_weight=LM_WEIGHT, kd_weight=KD_WEIGHT),
        teacher=teacher,
        states=states,
    )
    return models, objective


def solve_on_rank(
    names: list[str],
    parallel: dict[str, Any],
    world_size: int,
    precision: str = "fp32",
    fused: bool = False,
    window: int = 0,
    recompute: Recompute = KEEP_ALL,
    parts: list[dict[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """Means, gradients and the gradient norm of a first step, for each case; `window` as the objective's. parts: the
    global batch, if not `global_batch`."""
    from minitron_mcore.distillation.states.projection import finalize_gradients
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.model.microbatch import on_this_context_rank
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, wrap_model

    layout = start_layout(parallel, world_size)
    found = {}
    for name in names:
        case = CASES[name]
        models, objective = build(case, layout, precision, fused=fused, recompute=recompute)
        objective.window = window
        chunks = wrap_model(models)
        optimizer = build_optimizer(chunks, TrainConfig(lr=1e-2), precision)

        # All-reduced, not reduce-scattered, so that every rank holds whole gradients to compare.
        def finalize(*args: Any, force_all_reduce: bool = False, **kwargs: Any) -> None:
            finalize_gradients(*args, force_all_reduce=True, **kwargs)

        models[0].config.finalize_model_grads_func = finalize
        batch = my_batch(parts or global_batch(case.student.vocab_size))
        means = objective.run(chunks, [on_this_context_rank(microbatch) for microbatch in batch])
        optimizer.prepare_grads()
        projection = getattr(models[0], "state_projection", None)
        found[name] = {
            "means": means,
            "gradients": gather_named(
                [
                    (key.replace(".inner", ""), layer, tensor.main_grad)  # type: ignore[attr-defined]
                    for model in models
                    for key, layer, tensor in named_parameters(model)
                ]
            ),
            "projection": None if projection is None else projection.weight.detach().clone(),
            "projection_gradient": None if projection is None else projection.weight.main_grad.clone(),
            "norm": float(optimizer.get_grad_norm()),
            "next_alpha": objective.states.alpha,
        }
    return found


def dense_states(model: DenseModel, states: dict[str, Any], site: str, layer: int) -> torch.Tensor:
    """[b, s, h], or [b, s, g (q + 2) d] for an attention relation."""
    if site == "embedding":
        return states["input_normed"][0]
    if site == "mlp_input":
        return states["pre_mlp_normed"][layer]
    if site == "attention_relation":
        return model._qkv(states["input_normed"][layer], layer)
    return (states["input_normed"] + [states["final_hidden"]])[layer + 1]


def dense_relations(architecture: Any, qkv: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """Logarithms of the relations [b, A, s, s] of queries, keys and values."""
    a = architecture
    per_group = a.num_attention_heads // a.num_query_groups
    parts = qkv.unflatten(-1, (a.num_query_groups, per_group + 2, a.kv_channels))
    found = []
    for part in (parts[..., :per_group, :], parts[..., per_group, :], parts[..., per_group + 1, :]):
        split = part.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = split @ split.transpose(2, 3) / math.sqrt(split.shape[-1])
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(future, -math.inf).log_softmax(-1))
    return found


def dense_token_loss(case: Case, site: str, student: torch.Tensor, teacher: torch.Tensor, lift: Any) -> torch.Tensor:
    """[b, s]"""
    if site == "attention_relation":
        heads = case.relation_heads or 2  # both models' query groups: 2 and 4, or 2 and 2
        total = torch.zeros(student.shape[:2], dtype=torch.float64)
        relations = (dense_relations(a, x, heads) for a, x in ((case.student, student), (case.teacher, teacher)))
        for ours, theirs in zip(*relations, strict=True):
            terms = torch.where(theirs.isinf(), 0.0, theirs.exp() * (theirs - ours.masked_fill(ours.isinf(), 0.0)))
            total = total + terms.nan_to_num().sum(-1).mean(1) / 3
        return total
    state = student if lift is None else student @ lift.T
    if case.loss == "mse":
        return (state - teacher).square().mean(-1)
    return 1 - torch.nn.functional.cosine_similarity(state, teacher, dim=-1, eps=1e-30)


def dense_solution(
    case: Case, projection: torch.Tensor | None, parts: list[dict[str, torch.Tensor]] | None = None
) -> dict[str, Any]:
    """Means, alpha, every gradient, from the formulas in float64. parts: the batch, if not `global_batch`."""
    model = DenseModel(case.student, weights_of(case, False)).requires_grad()
    teacher = DenseModel(case.teacher, weights_of(case, True))
    lift = None if projection is None else projection.double().requires_grad_(True)
    batch, vocab = parts or global_batch(case.student.vocab_size), case.student.vocab_size
    count = sum(float(part["loss_mask"].sum()) for part in batch)
    layers = LAYERS if case.layers else [[5, 1]]
    sums: dict[str, Any] = {}

    def add(name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + (values * mask).sum() / count

    for part in batch:
        mask = part["loss_mask"].double()
        states = model.forward(part["tokens"])
        with torch.no_grad():
            target = teacher.forward(part["tokens"])
        logits, teacher_logits = states["logits"][..., :vocab], target["logits"][..., :vocab].log_softmax(-1)
        cross_entropy = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part["labels"], reduction="none")
        add("lm loss", cross_entropy, mask)
        kl = (teacher_logits.exp() * (teacher_logits - logits.log_softmax(-1))).sum(-1)
        add("logits distillation loss", kl, mask)
        for site in case.sites:
            for theirs, ours in [[0, 0]] if site == "embedding" else layers:
                state, wanted = dense_states(model, states, site, ours), dense_states(teacher, target, site, theirs)
                add(NAMES[site], dense_token_loss(case, site, state, wanted.detach(), lift), mask)
    inner = sum(sums[NAMES[site]] for site in case.sites)
    alpha = WEIGHT
    if case.weighting == "dynamic":
        alpha = WEIGHT * float(sums["logits distillation loss"].detach()) / float(inner.detach())
    (LM_WEIGHT * sums["lm loss"] + KD_WEIGHT * sums["logits distillation loss"] + alpha * inner).backward()
    gradients = {name: tensor.grad for name, tensor in model.weights.items()}
    everything = [*gradients.values(), *([] if lift is None else [lift.grad])]
    return {
        "means": {name: float(value.detach()) for name, value in sums.items()},
        "alpha": alpha,
        "gradients": gradients,
        "projection_gradient": None if lift is None else lift.grad,
        "norm": math.sqrt(sum(float(part.square().sum()) for part in everything if part is not None)),
    }
