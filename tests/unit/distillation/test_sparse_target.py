"""The tail of stored targets: a cache of few ids in fp16 gives the reverse KL of the distribution it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.distillation.cache.draw import make_targets
from minitron_mcore.distillation.cache.file import encode_targets, write_settings, write_shard
from minitron_mcore.distillation.cache.teacher import CachedTeacher
from minitron_mcore.distillation.logits.loss import logit_loss
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from tests.distributed.models import start_layout, tiny
from tests.distributed.ranks import run_on_ranks

S, V, K = 24, 101, 20


def peaked_logits(seed: int, height: float) -> torch.Tensor:
    """[S, V], float32: one id with nearly all probability in half of the tokens, 1e-5 and less outside K."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(S, V, generator=generator)
    logits[::2, 3] += height
    return logits


def targets_on_rank(folder: Path, dtype: str) -> SparseTarget:
    """What a cache of `peaked_logits` gives a microbatch, through the file."""
    from megatron.core import parallel_state

    layout = start_layout({}, 1)
    assert layout.tensor == 1
    group = parallel_state.get_tensor_model_parallel_group()
    settings: dict[str, Any] = {"method": "top_k", "top_k": K, "temperature": 1.0, "vocab_size": V, "dtype": dtype}
    settings |= {"num_samples": 1, "shard_samples": 1, "teacher": {"architecture": tiny("llama").to_dict()}}
    hidden = peaked_logits(1, 18.0).unsqueeze(1)
    (targets,), finite = make_targets(
        hidden, torch.eye(V), torch.tensor([0]), settings, tp_group=group, chunk_tokens=10
    )
    assert finite.all() and targets.tails is not None
    write_settings(folder, settings)
    write_shard(folder, settings, 0, [(encode_targets(targets, settings), "")])
    teacher = CachedTeacher(folder, 1.0)
    return teacher.stack([teacher.reader.read(0)])


def reverse_kl(student: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gradient [S, V] of KL(student, teacher) over `ids` [S, K] and all others as one, in float64 from all logits."""
    logits = student.double().requires_grad_()
    others = torch.ones(S, V, dtype=torch.bool).scatter(1, ids, False)

    def of_outcomes(log_probs: torch.Tensor) -> torch.Tensor:
        tail = log_probs.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat((log_probs.gather(1, ids), tail), 1)

    log_q = of_outcomes(logits.log_softmax(-1))
    log_p = of_outcomes(peaked_logits(1, 18.0).double().log_softmax(-1))
    (log_q.exp() * (log_q - log_p)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def gradient(student: torch.Tensor, target: SparseTarget) -> torch.Tensor:
    """That of the logit loss, in the logits: an output head that is the identity makes them the hidden states."""
    hidden = student.unsqueeze(1).requires_grad_()
    logit_loss(
        hidden,
        torch.eye(V),
        torch.zeros(S, 1, dtype=torch.long),
        torch.ones(S, 1),
        LossSettings(vocab_size=V, lm_weight=0.0, kd_weight=1.0, divergence="reverse_kl"),
        tp_group=None,
        teacher=target,
    ).loss.backward()
    assert hidden.grad is not None
    return hidden.grad[:, 0].double()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_tail_of_confident_tokens(tmp_path: Path, dtype: str) -> None:
    """A logit's gradient is q_i (e_i - sum q e) with e = log q - log p, so that errors of at most d in e change
    those of a token by at most 2 d in all. A stored log p is rounded by 2^-11 of its size in fp16. In fp32 everything
    is rounded by 2^-24 of its size, logits and log-probabilities of up to 32, in some four places; in fp16 so besides.
    """
    target = run_on_ranks(targets_on_rank, 1, tmp_path, dtype)[0]
    assert target.log_tail is not None and target.tail
    student = peaked_logits(2, 6.0)
    expected = reverse_kl(student, target.ids[:, 0])
    bound_S = torch.full((S,), 2 * 4 * 32 * 2.0**-24, dtype=torch.float64)
    if dtype == "fp16":
        bound_S += 2 * 2**-11 * target.log_probs.abs().amax(-1)[:, 0]
    assert (expected.abs().sum(-1) > 10 * bound_S).all(), "the bound says something"
    error_S = (gradient(student, target) - expected).abs().sum(-1)
    assert (error_S < bound_S).all(), (error_S / bound_S).max()
    if dtype == "fp16":
        # What rounded probabilities leave of 1 is no tail.
        error_S = (gradient(student, SparseTarget(target.ids, target.log_probs, True)) - expected).abs().sum(-1)
        assert (error_S > 3 * bound_S).any()


def test_what_a_tail_must_be() -> None:
    ids, log_probs = torch.zeros(2, 1, 1, dtype=torch.long), torch.zeros(2, 1, 1)
    for tail, log_tail in ((False, torch.zeros(2, 1)), (True, torch.zeros(2))):
        with pytest.raises(ValueError, match="log_tail"):
            SparseTarget(ids, log_probs, tail, log_tail)
    numpy.testing.assert_array_equal(SparseTarget(ids, log_probs, True, torch.ones(2, 1)).log_tail, torch.ones(2, 1))
