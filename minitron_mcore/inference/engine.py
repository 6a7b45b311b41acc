"""Text generation at any layout: the prompts at once, then token after token, with a cache of keys and values.

Legend: s tokens of a prompt, B rows of a batch, h hidden size, n query heads and g key-value groups of this
tensor-parallel rank, d head dimension, S positions that the cache has room for, V this rank's vocabulary shard.

Prompts of unequal length are padded on the right. No token sees what lies behind it, so the padding needs no mask while
the prompts are read, and each row's next token takes the place of its first padding:

    prompts   a b c . .      one token later   a b c x .      keys that the row sees   1 1 1 1 .
              a b . . .                        a b x . .                               1 1 1 . .

The modules are those of the model (norms, projections, MLPs and their collectives); the walk through them is here,
because megatron-core's own inference keeps one offset for all rows of a batch on every device that it runs on, and
rotates all cached keys at every step (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.inference.sampling import Sampling, choose
from minitron_mcore.model.gpt import LanguageModel, unwrap
from minitron_mcore.model.schedule import evaluating
from minitron_mcore.model.vocab_parallel import VocabularyShard
from minitron_mcore.runtime.agree import all_or_none, gathered
from minitron_mcore.runtime.groups import context_group, data_group, pipeline_group, tensor_group

__all__ = ["Engine", "Generated", "Sampling"]


@dataclass(frozen=True)
class Generated:
    """What follows a prompt. tokens: without the prompt; a stop token that ended it is the last one. stopped: by a stop
    token or `is_stopped`, not by length."""

    tokens: tuple[int, ...]
    stopped: bool


class Engine:
    """Generates with a model as it lies over the ranks; made anew for other weights or not, as is convenient."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        architecture: Architecture,
        *,
        cached: bool = True,
        max_batch: int = 32,
    ) -> None:
        """chunks: this rank's, as `build_model` gives them. cached: False reads the whole row again for every token, to
        check the cache against. max_batch: rows at a time. Raises InputError under context parallelism."""
        if context_group().size() > 1:
            rule = "is not possible in generation, which needs a whole sequence on a rank"
            raise InputError("parallel.context", context_group().size(), rule, "set parallel.context=1")
        self.chunks = [unwrap(chunk) for chunk in chunks]
        self.architecture, self.cached, self.max_batch = architecture, cached, max_batch
        self._group = pipeline_group()
        self._last = dist.get_global_rank(self._group, self._group.size() - 1)
        self._device = next(self.chunks[0].parameters()).device

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        stop_tokens: Collection[int] = (),
        is_stopped: Callable[[Sequence[int]], bool] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Generated]:
        """What follows each of `prompts`, up to the model's max_position_embeddings; the same at every layout, in every
        order and batch, up to the rounding of logits.

        sampling: of all prompts, or one for each. is_stopped: of a row's new tokens so far, whether it ends there.
        on_token: called with the step (0: the prompts are read), after each step of a batch.
        Every rank calls with the same arguments and has the same result; data-parallel ranks share the prompts, and
        fail together. Raises InputError for a prompt without a token, and for one that leaves no room for another.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        limit = self.architecture.max_position_embeddings
        for number, prompt in enumerate(prompts):
            if not prompt:
                remedy = "begin it with the tokenizer's end-of-document token, behind which a document begins"
                raise InputError(f"prompts[{number}]", None, "holds no token to go on from", remedy)
            if len(prompt) >= limit:
                rule = f"holds {len(prompt)} tokens, and the model takes max_position_embeddings={limit}, of which one "
                raise InputError(f"prompts[{number}]", None, f"{rule}must be new", "shorten it")
        # Rows of like length together: those of a batch are padded to the longest.
        order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
        ranks = data_group()
        mine = order[ranks.rank() :: ranks.size()]
        found: dict[int, Generated] = {}

        def work() -> None:
            with ExitStack() as stack:
                stack.enter_context(evaluating(self.chunks))
                stack.enter_context(_whole_sequences(self.chunks))
                for start in range(0, len(mine), self.max_batch):
                    numbers = mine[start : start + self.max_batch]
                    rows = [_Row(number, list(prompts[number]), each[number]) for number in numbers]
                    self._run(rows, frozenset(stop_tokens), is_stopped, on_token)
                    found.update({row.number: Generated(tuple(row.new), row.stopped) for row in rows})

        all_or_none(work, group=ranks)
        if ranks.size() > 1:
            found = {number: one for part in gathered(found, ranks) for number, one in part.items()}
        return [found[number] for number in range(len(prompts))]

    def _run(
        self,
        rows: list[_Row],
        stop_tokens: frozenset[int],
        is_stopped: Callable[[Sequence[int]], bool] | None,
        on_token: Callable[[int], None] | None,
    ) -> None:
        """Fill the rows' `new`."""
        limit = self.architecture.max_position_embeddings
        for row in rows:
            row.room = min(row.sampling.max_new_tokens, limit - len(row.prompt))
        positions = max(len(row.prompt) + row.room for row in rows)
        cache = _Cache(self.chunks, len(rows), positions, self._device, stores=self.cached)
        fed, step = _padded([row.prompt for row in rows], self._device), 0
        cache.read_prompts([len(row.prompt) for row in rows])
        while True:
            tokens_B = self._next(fed, cache, rows, step)
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                row.take(token, stop_tokens, is_stopped)
            if on_token is not None:
                on_token(step)
            step, going_on = step + 1, [place for place, row in enumerate(rows) if not row.is_done]
            if not going_on:
                return
            if len(going_on) < len(rows):
                rows, tokens_B = [rows[place] for place in going_on], cache.keep(going_on, tokens_B)
            if self.cached:
                fed = tokens_B.unsqueeze(1)
                cache.read_token()
            else:
                whole = [row.prompt + row.new for row in rows]
                fed = _padded(whole, self._device)
                cache.read_prompts([len(one) for one in whole])

    def _next(self, tokens_Bs: Tensor, cache: _Cache, rows: list[_Row], step: int) -> Tensor:
        """The next token of every row, int64 [B], on every rank."""
        size, stage = self._group.size(), self._group.rank()
        chosen_B = tokens_Bs.new_empty(len(tokens_Bs))
        for chunk in self.chunks:
            hidden_sBh = self._embedded(chunk, tokens_Bs) if chunk.pre_process else self._received(chunk, tokens_Bs)
            for layer in chunk.decoder.layers:
                hidden_sBh = _through(layer, hidden_sBh, cache)
            if chunk.post_process:
                last_Bh = chunk.decoder.final_layernorm(cache.last_tokens(hidden_sBh))[0]
                weight_Vh = chunk.head_weight()
                shard = VocabularyShard.of(len(weight_Vh), self.architecture.vocab_size, tensor_group())
                logits_BV = torch.nn.functional.linear(last_Bh, weight_Vh).float()
                whose = [(row.sampling, row.number) for row in rows]
                chosen_B = choose(logits_BV, shard, whose, step, self.architecture.vocab_size)
            else:
                following = dist.get_global_rank(self._group, (stage + 1) % size)
                dist.send(hidden_sBh.contiguous(), following, group=self._group)
        if size > 1:
            dist.broadcast(chosen_B, self._last, group=self._group)
        return chosen_B

    @staticmethod
    def _embedded(chunk: LanguageModel, tokens_Bs: Tensor) -> Tensor:
        return chunk.embedding.word_embeddings(tokens_Bs).transpose(0, 1).contiguous()

    def _received(self, chunk: LanguageModel, tokens_Bs: Tensor) -> Tensor:
        shape, config = tokens_Bs.T.shape, chunk.config
        hidden_sBh = torch.empty(*shape, config.hidden_size, dtype=config.params_dtype, device=self._device)
        before = (self._group.rank() - 1) % self._group.size()
        dist.recv(hidden_sBh, dist.get_global_rank(self._group, before), group=self._group)
        return hidden_sBh


class _Row:
    """A prompt, and what follows it so far."""

    def __init__(self, number: int, prompt: list[int], sampling: Sampling) -> None:
        self.number, self.prompt, self.sampling = number, prompt, sampling
        self.room = sampling.max_new_tokens
        self.new: list[int] = []
        self.is_done = self.stopped = False

    def take(self, token: int, stop_tokens: frozenset[int], is_stopped: Callable[[Sequence[int]], bool] | None) -> None:
        """The next token."""
        self.new.append(token)
        self.stopped = token in stop_tokens or (is_stopped is not None and is_stopped(self.new))
        self.is_done = self.stopped or len(self.new) >= self.room


class _Cache:
    """Keys and values of a batch, and where its rows are.

    `keys[layer]`, `values[layer]` [B, g, S, d], the keys with their rotary positions. Rows of equal length go a shorter
    way: one slice instead of a place and a mask a row.
    """

    def __init__(
        self, chunks: Sequence[LanguageModel], rows: int, positions: int, device: torch.device, *, stores: bool
    ) -> None:
        """stores: False where every row is read whole each time."""
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.rows = torch.arange(rows, device=device)
        self.places_S = torch.arange(positions, device=device)
        config = chunks[0].config
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers if stores):
            groups, width = layer.self_attention.num_query_groups_per_partition, config.kv_channels
            shape = rows, groups, positions, width
            for held in (self.keys, self.values):
                held[layer.layer_number] = torch.zeros(shape, dtype=config.params_dtype, device=device)
        # Not as the module computes them, which would keep the tensors for a later training.
        angles_Sw = torch.outer(self.places_S.float(), chunks[0].rotary_pos_emb.inv_freq)
        sine_Sw = angles_Sw.sin()
        # (-x2, x1) * sin, with the sign in the table.
        turns_Sd = torch.cat((angles_Sw.cos(),) * 2, dim=-1), torch.cat((-sine_Sw, sine_Sw), dim=-1)
        self._turns_Sd = [turn.to(config.params_dtype) for turn in turns_Sd]
        self.half = angles_Sw.shape[1]

    def read_prompts(self, lengths: list[int]) -> None:
        """Before the rows' first tokens, so many of each, go through the model."""
        self._stand(lengths, is_prompt=True)
        self.last_B = torch.tensor(lengths, device=self.rows.device) - 1
        self.cos, self.sin = (turn[: self.end, None, None, None] for turn in self._turns_Sd)

    def read_token(self) -> None:
        """Before one further token of each row does."""
        self._stand([length + 1 for length in self.lengths], is_prompt=False)
        self.last_B = self.last_B + 1
        self.mask: Tensor | None = None
        if self.is_even:
            self.cos, self.sin = (turn[self.end - 1] for turn in self._turns_Sd)
        else:
            self.cos, self.sin = (turn.index_select(0, self.last_B)[:, None, None] for turn in self._turns_Sd)
            self.mask = (self.places_S[: self.end] <= self.last_B[:, None])[:, None, None]

    def _stand(self, lengths: list[int], *, is_prompt: bool) -> None:
        self.lengths, self.end, self.is_prompt = lengths, max(lengths), is_prompt
        self.is_even = min(lengths) == self.end

    def keep(self, places: list[int], tokens_B: Tensor) -> Tensor:
        """Only the rows at these places go on; gives their `tokens_B`."""
        index = torch.tensor(places, device=self.rows.device)
        for held in (self.keys, self.values):
            for layer, stored in held.items():
                held[layer] = stored[index]
        self.rows, self.last_B = self.rows[: len(places)], self.last_B[index]
        self.lengths = [self.lengths[place] for place in places]
        return tokens_B[index]

    def last_tokens(self, hidden_sBh: Tensor) -> Tensor:
        """The hidden states [1, B, h] of each row's last token."""
        if not self.is_prompt:
            return hidden_sBh
        return hidden_sBh[-1:] if self.is_even else hidden_sBh[self.last_B, self.rows].unsqueeze(0)

    def turned(self, heads_sBgrd: Tensor) -> Tensor:
        """The heads with their rotary positions."""
        width = 2 * self.half
        part = heads_sBgrd if width == heads_sBgrd.shape[-1] else heads_sBgrd[..., :width]
        swapped = torch.cat((part[..., self.half :], part[..., : self.half]), dim=-1)
        turned = part * self.cos + swapped * self.sin
        return turned if part is heads_sBgrd else torch.cat((turned, heads_sBgrd[..., width:]), dim=-1)

    def attend(self, layer: int, query_sBgrd: Tensor, key_sBgd: Tensor, value_sBgd: Tensor) -> Tensor:
        """Store the keys and values of a layer, and let the queries, r of a group, see theirs -> [s, B, n * d]."""
        attention = torch.nn.functional.scaled_dot_product_attention
        if self.is_prompt:
            query, key, value = (part.permute(1, 2, 0, 3) for part in (query_sBgrd.flatten(2, 3), key_sBgd, value_sBgd))
            if self.keys:
                self.keys[layer][:, :, : self.end], self.values[layer][:, :, : self.end] = key, value
            how: Any = {"is_causal": True, "enable_gqa": query.shape[1] > key.shape[1]}
            return attention(query, key, value, **how).permute(2, 0, 1, 3).flatten(2)
        keys_BgSd, values_BgSd = self.keys[layer], self.values[layer]
        if self.is_even:
            keys_BgSd[:, :, self.end - 1], values_BgSd[:, :, self.end - 1] = key_sBgd[0], value_sBgd[0]
        else:
            keys_BgSd[self.rows, :, self.last_B] = key_sBgd[0]
            values_BgSd[self.rows, :, self.last_B] = value_sBgd[0]
        # The queries of a group see the same keys: they go as the queries of one head.
        seen = keys_BgSd[:, :, : self.end], values_BgSd[:, :, : self.end]
        return attention(query_sBgrd[0], *seen, attn_mask=self.mask).flatten(1).unsqueeze(0)


def _through(layer: Any, hidden_sBh: Tensor, cache: _Cache) -> Tensor:
    """One transformer layer. Of a group, the projection has r queries, a key and a value, next to each other."""
    if "forward" in vars(layer):  # it is left out (model/sites.py: without_layers)
        return layer(hidden_sBh)[0]
    attention, mlp, config = layer.self_attention, layer.mlp, layer.config
    mixed_sBm = _product(attention.linear_qkv, layer.input_layernorm(hidden_sBh))
    mixed = mixed_sBm.view(*mixed_sBm.shape[:2], attention.num_query_groups_per_partition, -1, config.kv_channels)
    heads = mixed[..., :-1, :]
    if attention.q_layernorm is not None:
        normed = attention.q_layernorm(mixed[..., :-2, :]), attention.k_layernorm(mixed[..., -2:-1, :])
        heads = torch.cat(normed, dim=-2)
    turned = cache.turned(heads)
    context = cache.attend(layer.layer_number, turned[..., :-1, :], turned[..., -1, :], mixed[..., -1, :])
    hidden_sBh = hidden_sBh + _product(attention.linear_proj, context)
    inner = _product(mlp.linear_fc1, layer.pre_mlp_layernorm(hidden_sBh))
    if config.gated_linear_unit:
        gate, inner = inner.chunk(2, dim=-1)
        inner = config.activation_func(gate) * inner
    else:
        inner = config.activation_func(inner)
    return hidden_sBh + _product(mlp.linear_fc2, inner)


def _product(linear: Any, x: Tensor) -> Tensor:
    """A parallel linear layer. Megatron's own goes through autograd, at the price of another product for few rows."""
    if isinstance(linear, ColumnParallelLinear):
        return torch.nn.functional.linear(x, linear.weight, linear.bias)
    if not isinstance(linear, RowParallelLinear):
        return linear(x)[0]  # Transformer Engine's
    out = torch.nn.functional.linear(x, linear.weight)
    if tensor_group().size() > 1:
        dist.all_reduce(out, group=tensor_group())
    return out


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, s], on the right filled up with id 0."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


@contextmanager
def _whole_sequences(chunks: Sequence[LanguageModel]) -> Iterator[None]:
    """Within the `with`, no module cuts the sequence over tensor-parallel ranks: a step may have a single token."""
    names = "sequence_parallel", "reduce_scatter_embeddings"
    modules = [module for chunk in chunks for module in chunk.modules()]
    before = [(module, name) for module in modules for name in names if getattr(module, name, False) is True]
    try:
        for module, name in before:
            setattr(module, name, False)
        yield
    finally:
        for module, name in before:
            setattr(module, name, True)
