"""Keeps the teacher's inner states while it runs ahead; map.py says which, and where they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch.utils.hooks import RemovableHandle

from minitron_mcore.distillation.states.map import WIDE_SITES
from minitron_mcore.model.gpt import LanguageModel, unwrap
from minitron_mcore.model.microbatch import Microbatch, State
from minitron_mcore.model.sites import fused_norm, layers_of, norm_sites

# The state, and the tensor of the forward pass that it is read from -> what goes on in that tensor's place, or None.
Visit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


def watch(chunk: LanguageModel, site: str, layer: int, visit: Visit) -> list[RemovableHandle]:
    """Call `visit` whenever `chunk` computes the state (site, layer); no handles if another chunk has it.

    States as map.py has them: [s, b, h], under sequence parallelism this rank's part of s; for an attention
    relation the output of linear_qkv [s, b, G (q + 2) d / TP] for the whole sequence.
    """

    def visited(given: Any, values: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Any:
        """What goes on in the place of `given`, a tensor or a tuple that begins with one; None: the same."""
        first, *rest = given if isinstance(given, tuple) else (given,)
        changed = visit(values(first), first)
        return (changed, *rest) if isinstance(given, tuple) and changed is not None else changed

    def on_output(module: torch.nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda module, args, output: visited(output))

    def on_input(module: torch.nn.Module, values: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda module, args: visited(args, values))

    if site not in WIDE_SITES:
        return [on_output(part.self_attention.linear_qkv) for index, part in layers_of(chunk) if index == layer]
    wanted = {"embedding": 0, "mlp_input": 2 * layer + 1, "block_output": 2 * layer + 2}[site]
    handles = []
    for row, norm, linear in norm_sites(chunk):
        if row == wanted:
            fused = fused_norm(linear, chunk.config)
            handles.append(on_output(norm) if fused is None else on_input(linear, fused))
    return handles


class Capture:
    """Keeps the `wanted` states, (site, layer) of the model's own layers, of every microbatch that `begin` was called
    for: detached, on the ranks of the pipeline stage that has the state.

    `chunks`: this rank's chunks of the model. `close` takes the hooks off again.
    """

    def __init__(self, chunks: list[torch.nn.Module], wanted: list[State]) -> None:
        self._microbatch: Microbatch | None = None
        self._kept: defaultdict[Microbatch, dict[State, torch.Tensor]] = defaultdict(dict)
        places = [(unwrap(chunk), site, layer) for chunk in chunks for site, layer in dict.fromkeys(wanted)]
        watched = [watch(chunk, site, layer, self._keep(site, layer)) for chunk, site, layer in places]
        self._handles = [handle for handles in watched for handle in handles]

    def begin(self, chunk: LanguageModel, microbatch: Microbatch) -> None:
        """What the next forward pass of a chunk computes belongs to `microbatch`; to be given to `run_schedule` or
        `final_hidden_states`."""
        self._microbatch = microbatch

    def take(self, batch: list[Microbatch]) -> list[dict[State, torch.Tensor]]:
        """The states of each microbatch, given up here; what the model runs from here on is not looked at."""
        kept = [self._kept.pop(microbatch, {}) for microbatch in batch]
        self._microbatch = None
        self._kept.clear()
        return kept

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._microbatch = [], None

    def _keep(self, site: str, layer: int) -> Visit:
        def visit(state: torch.Tensor, source: torch.Tensor) -> None:
            # A layer that is recomputed in backward may meet another microbatch than its own.
            again = is_checkpointing() and torch.is_grad_enabled()
            if self._microbatch is not None and not again:
                self._kept[self._microbatch][site, layer] = state.detach()

        return visit
