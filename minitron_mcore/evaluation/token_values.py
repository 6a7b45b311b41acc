"""Per-token values of a model, from its final hidden states: the next-token loss, whether the next token is the
likeliest, and how far its logits are from those of another model with the same head.

Logits exist for one chunk of tokens at a time, on this rank's shard of the vocabulary; padding rows of the head take no
part. Sums over the vocabulary are formed in float32 from products with float32 output, from there on in float64.

Legend: S sequence, B micro-batch, N = S * B tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.vocab_parallel import (
    ABSENT,
    VocabularyShard,
    combine,
    local_softmax,
    product_,
    product_operand,
)
from minitron_mcore.runtime.groups import tensor_group


@torch.no_grad()
def token_values(
    chunk: LanguageModel,
    hidden_SBH: torch.Tensor,
    labels_BS: torch.Tensor,
    *,
    vocab_size: int,
    reference_SBH: torch.Tensor | None = None,
    chunk_tokens: int = 512,
) -> torch.Tensor:
    """Of every token, float64 [1 or 3, S, B], the same on every tensor-parallel rank: the loss of the next token, in
    nats; with a reference, over the true vocabulary, Σ (reference logit − logit)² and Σ (reference logit)² too.

    `hidden_SBH`, `reference_SBH`: final hidden states as the schedule gives them, under sequence parallelism this
    rank's part of the sequence; the reference's logits are taken through the same head. `labels_BS`: global ids of the
    whole sequence. Every tensor-parallel rank of the last pipeline stage calls; one small collective a chunk.

    Extra memory: two float32 buffers of [chunk_tokens, V], three with a reference; in bf16 a widened head on CPU.
    """
    states = [hidden_SBH] if reference_SBH is None else [hidden_SBH, reference_SBH]
    states_NH = [whole_sequences(chunk, state).flatten(0, 1) for state in states]
    values = _values(chunk, states_NH, labels_BS.transpose(0, 1).flatten(), vocab_size, chunk_tokens)
    return values.unflatten(1, labels_BS.T.shape)


@torch.no_grad()
def chosen_values(
    chunk: LanguageModel, states_NH: torch.Tensor, labels_N: torch.Tensor, *, vocab_size: int, chunk_tokens: int = 512
) -> torch.Tensor:
    """Of tokens that the caller has chosen, float64 [2, N]: the loss of the label, in nats, and 1 where no other token
    of the true vocabulary is likelier, else 0; of equally likely ones the lowest id counts.

    `states_NH`: their final hidden states, of whole sequences. Otherwise as `token_values`.
    """
    return _values(chunk, [states_NH], labels_N, vocab_size, chunk_tokens, greedy=True)


def whole_sequences(chunk: LanguageModel, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """Final hidden states of whole sequences, from those that the schedule gives."""
    if not chunk.config.sequence_parallel:
        return hidden_SBH
    return gather_from_sequence_parallel_region(hidden_SBH, group=tensor_group())


def _values(
    chunk: LanguageModel,
    states_NH: Sequence[torch.Tensor],
    labels_N: torch.Tensor,
    vocab_size: int,
    chunk_tokens: int,
    *,
    greedy: bool = False,
) -> torch.Tensor:
    """What `token_values` gives, or `chosen_values` where `greedy`, by chunks of tokens."""
    weight_VH = chunk.head_weight()
    shard = VocabularyShard.of(weight_VH.shape[0], vocab_size, tensor_group())
    head_VH = product_operand(weight_VH[: shard.width])
    tokens, rows = labels_N.numel(), 2 * len(states_NH) - 1 + greedy
    values = torch.zeros(rows, tokens, dtype=torch.float64, device=weight_VH.device)
    buffers = values.new_empty(len(states_NH) + 1, min(chunk_tokens, tokens), shard.width, dtype=torch.float32)
    for start in range(0, tokens, chunk_tokens):
        part = slice(start, min(start + chunk_tokens, tokens))
        logits = buffers[:, : part.stop - part.start].unbind(0)
        for logits_CV, state_NH in zip(logits, states_NH, strict=False):
            product_(logits_CV, product_operand(state_NH[part].to(weight_VH.dtype)), head_VH.t())
        values[:, part] = _chunk_values(logits, labels_N[part], shard, greedy)
    return values


def _chunk_values(
    logits: tuple[torch.Tensor, ...], labels_C: torch.Tensor, shard: VocabularyShard, greedy: bool
) -> torch.Tensor:
    """Loss and, with a reference, both squared sums, or, where `greedy`, whether the label is the likeliest: float64
    [1, 2 or 3, C]. `logits`: [C, V] of the model, of the reference where there is one, and a spare buffer; all are
    overwritten."""
    logits_CV, *between, spare_CV = logits
    statistics: list[torch.Tensor] = []
    for reference_CV in between:
        square_C = torch.mul(reference_CV, reference_CV, out=spare_CV).sum(-1)
        statistics = [reference_CV.sub_(logits_CV).square_().sum(-1), square_C]
    if shard.absent:
        statistics = [torch.zeros_like(row) for row in statistics]
        logits_CV.fill_(ABSENT)
    if greedy:
        statistics = [(logits_CV.argmax(-1) + shard.start).float()]  # exact: ids are below 2 ** 24
    index_C, here_C = shard.locate(labels_C)
    label_C = logits_CV.gather(1, index_C.unsqueeze(1)).squeeze(1).masked_fill(~here_C, 0.0)
    gathered_RKC = shard.gather(torch.stack([*local_softmax(logits_CV, spare_CV), label_C, *statistics])).double()
    logsumexp_C, _ = combine(gathered_RKC[:, 0], gathered_RKC[:, 1])
    loss_C = logsumexp_C - gathered_RKC[:, 2].sum(0)
    if greedy:
        best_1C = gathered_RKC[:, 0].argmax(0, keepdim=True)
        return torch.stack([loss_C, (gathered_RKC[:, 3].gather(0, best_1C)[0] == labels_C).double()])
    return torch.stack([loss_C, *gathered_RKC[:, 3:].sum(0)])


def over_world(values: torch.Tensor, chunks: Sequence[LanguageModel]) -> torch.Tensor:
    """Add up sums that lie on the data-parallel ranks of the last pipeline stage, equal on every tensor-parallel rank,
    and give the total to every rank. Every rank calls."""
    answers = chunks[-1].post_process and tensor_group().rank() == 0
    total = values.clone() if answers else torch.zeros_like(values)
    torch.distributed.all_reduce(total)
    return total
