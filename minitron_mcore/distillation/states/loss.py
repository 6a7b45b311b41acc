"""Losses between inner states of teacher and student, on whatever pipeline stage the student has the state.

A state's loss joins the student's backward pass where the state arises: the activation that it is read from goes on
through `_Attach`, which passes the activation's gradient on and starts the loss's own with its weight. So Megatron's
schedule stays as it is, and no loss travels between stages.

The losses themselves are in token_loss.py and relation.py. They are summed over the pairs of a site, and trained on is
the mean over all counted tokens: sums here, divided by Megatron at the end of the batch, like every other loss.

Legend: s sequence (its tensor-parallel part under sequence parallelism), b batch, h channels.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor

from minitron_mcore.architecture import Architecture
from minitron_mcore.distillation.config import SITES, HiddenStatesConfig
from minitron_mcore.distillation.states.capture import Visit, watch
from minitron_mcore.distillation.states.map import WIDE_SITES, Pair, check_hidden_states, needs_projection
from minitron_mcore.distillation.states.projection import Projection
from minitron_mcore.distillation.states.relation import relation_loss
from minitron_mcore.distillation.states.token_loss import TOKEN_LOSSES, dynamic_weight, masked_sum
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import tensor_group

# Site -> the metric's name, such as "block output loss".
METRICS = {site: f"{site.replace('_', ' ')} loss" for site in SITES}
ALPHA = "hidden states alpha"
DIFFERENCE = "hidden states difference"
_SIZE = "hidden states size"  # among a pass's means until `update`


class _Attach(torch.autograd.Function):
    """The activation, unchanged; backward also starts from `loss`, with the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient, scale, None


class StateLosses:
    """The pairs' losses, attached to the student's chunks.

    Between `begin(chunk, microbatch)` and the end of that chunk's forward pass every pair whose student state the
    chunk has takes its teacher state from the microbatch, adds its loss to the site's sum and, where
    gradients are recorded, to the backward pass. In a layer that is recomputed it does so in backward, when the state
    is computed with gradients. `alpha` is the weight of the sum of all pairs' losses:

        fixed      weight
        dynamic    `dynamic_weight` of the step before: global means, hence the same on every rank and at every layout;
                   None until `update` has seen a batch

    The size of the pairs, by which the dynamic weight judges their losses, is the mean square of the teacher's state
    for mse, and 1 for the others, which do not depend on the states' scale.
    """

    def __init__(
        self,
        chunks: list[LanguageModel],
        config: HiddenStatesConfig,
        student: Architecture,
        teacher: Architecture,
        parallel: ParallelConfig,
        *,
        seed: int,
    ) -> None:
        """Hook this rank's chunks permanently and, where the widths differ, attach the projection that `seed` fills.

        Every rank calls, before `wrap_model` and after the student's own weights are in place. Raises InputError as
        map.check_hidden_states.
        """
        self.pairs, self._relation_heads = check_hidden_states(config, student, teacher, parallel)
        assert self.pairs, "no sites, no losses: leave the object out"
        self.sites = list(dict.fromkeys(pair.site for pair in self.pairs))
        self.weight, self.dynamic = config.weight, config.weighting == "dynamic"
        self.alpha: float | None = None if self.dynamic else config.weight
        self._config, self._models = chunks[0].config, (student, teacher)
        self._token_loss = TOKEN_LOSSES[config.loss]
        self._scaled = [pair for pair in self.pairs if pair.site in WIDE_SITES and config.loss == "mse"]
        lifts = needs_projection(self.sites, student, teacher)
        self._projection = Projection(chunks[0], teacher.hidden_size, seed) if lifts else None
        self._microbatch: Microbatch | None = None
        self._trains = False
        # Pair -> the microbatches whose state was computed without gradients, to be computed again in backward.
        self._later: defaultdict[Pair, deque[Microbatch]] = defaultdict(deque)
        self._clear()
        # Without sequence parallelism a rank's sum is the whole one; of attention relations it has its heads' alone.
        is_shared = [self._config.sequence_parallel or key == "attention_relation" for key in self._sums]
        self._is_shared = torch.tensor(is_shared, device=torch.cuda.current_device())
        # The pairs whose student state this rank has, by the teacher's state that they use.
        self._uses = Counter(
            (pair.site, pair.teacher_layer)
            for chunk in chunks
            for pair in self.pairs
            if watch(chunk, pair.site, pair.student_layer, self._visit(pair))
        )

    def begin(self, chunk: LanguageModel, microbatch: Microbatch) -> None:
        """What the next forward pass of a chunk computes belongs to `microbatch`."""
        self._microbatch = microbatch
        self._trains = torch.is_grad_enabled()

    def take_sums(self) -> dict[str, Tensor]:
        """Each site's loss, and the states' size, summed over the counted tokens that this pipeline stage has seen
        since the last call; zero where it has no pair. Every rank calls."""
        names, total = [METRICS.get(key, key) for key in self._sums], torch.stack(list(self._sums.values()))
        parts = torch.where(self._is_shared, total, total.new_zeros(()))
        torch.distributed.all_reduce(parts, group=tensor_group())
        self._clear()
        self._microbatch = None
        return dict(zip(names, torch.where(self._is_shared, parts, total), strict=True))

    def resume(self, alpha: float | None) -> None:
        """Go on with the dynamic weight that a run before this one had worked out; a fixed one is the recipe's."""
        if self.dynamic:
            self.alpha = alpha

    def update(self, means: dict[str, float], *, trains: bool) -> None:
        """Make of a pass's global means what is reported: without the states' size and, of one that trains, with the
        weight it ran under and, of a dynamic one, `hidden states difference`, the losses over the size. From these the
        weight of the next step follows; it stays as it is without a counted token, or if a mean is NaN or Inf."""
        scaled_size = means.pop(_SIZE)
        if not trains:
            return
        means[ALPHA] = self.alpha or 0.0
        if not self.dynamic:
            return
        states, logits = sum(means[METRICS[site]] for site in self.sites), means["logits distillation loss"]
        size = scaled_size + len(self.pairs) - len(self._scaled)
        means[DIFFERENCE] = states / size if size else 0.0
        if means["num_tokens"] and all(map(math.isfinite, (states, size, logits))):
            self.alpha = dynamic_weight(self.weight, logits, states, size)

    def _clear(self) -> None:
        device = torch.cuda.current_device()
        self._sums = {key: torch.zeros((), dtype=torch.float64, device=device) for key in (*self.sites, _SIZE)}

    def _visit(self, pair: Pair) -> Visit:
        def visit(state: Tensor, source: Tensor) -> Tensor | None:
            microbatch = self._microbatch
            if microbatch is None:
                return None
            if self._trains and is_checkpointing():
                # Backward passes of a chunk follow one another as its forward passes did.
                if not torch.is_grad_enabled():
                    self._later[pair].append(microbatch)
                    return None
                microbatch = self._later[pair].popleft()
            loss = self._loss(pair, state, microbatch)
            self._sums[pair.site] += loss.detach()
            if not (torch.is_grad_enabled() and loss.requires_grad and self.alpha):
                return None
            scale = torch.full_like(loss, self.alpha)
            if self._config.grad_scale_func is not None:
                scale = self._config.grad_scale_func(scale)
            return _Attach.apply(source, loss, scale)

        return visit

    def _loss(self, pair: Pair, state: Tensor, microbatch: Microbatch) -> Tensor:
        """The pair's loss summed over this rank's counted tokens, fp32."""
        key, group = (pair.site, pair.teacher_layer), tensor_group()
        target = microbatch.teacher.take_state(key, self._uses[key])
        mask_SB = microbatch.loss_mask.transpose(0, 1).float()
        if pair.site not in WIDE_SITES:
            lengths = None if microbatch.packed is None else microbatch.packed.lengths
            return relation_loss(state, target, mask_SB, self._models, self._relation_heads, group.size(), lengths)
        if self._config.sequence_parallel:
            mask_SB = mask_SB.chunk(group.size())[group.rank()]
        if self.dynamic and pair in self._scaled:
            norm_SB = torch.linalg.vector_norm(target, dim=-1, dtype=torch.float32)
            self._sums[_SIZE] += torch.dot(norm_SB.square().flatten(), mask_SB.flatten()) / target.shape[-1]
        if self._projection is not None:
            state = self._projection(state)
        return masked_sum(state, target, mask_SB, self._token_loss)
