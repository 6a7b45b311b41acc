"""The compiled passes over a chunk's logits against the same functions uncompiled, in values and gradients.

    python benchmarks/gpu/passes.py             512 tokens of Llama-3.1's vocabulary
    python benchmarks/gpu/passes.py --small     a few tokens of a small one; without a GPU always so

First each pass of distillation/logits/passes.py, in the variants that training asks for: every result and every
buffer that it writes in place, compiled as `by_rows` compiles it on CUDA, against the function itself on the same
tensors in float64.
Then the loss that is made of them, from hidden states and heads, against dense float64 autograd: its value and both
gradients. Errors are relative norms. Exit code 1 where one is above its bound. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# fp32 sums over a vocabulary, in another order and with another exp; bf16 rounds operands and logit gradients to 2^-8.
BOUNDS = {"pass": 1e-4, "fp32": 1e-4, "bf16": 1e-2}
NAMES = (
    *("maximum", "log_sum", "plain_logsumexp", "teacher_maximum", "teacher_log_sum"),
    *("cross", "square", "inverse_norms", "student_to_mixture"),
)


def relative(value: Tensor, expected: Tensor) -> float:
    difference, size = (value.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size) if size else float(difference)


def logits(options: argparse.Namespace) -> list[Tensor]:
    """The student's and the teacher's, [tokens, vocabulary], of standard deviation 2 as of trained models."""
    generator = torch.Generator().manual_seed(1)
    shape = (options.tokens, options.vocabulary)
    return [(2 * torch.randn(shape, generator=generator)).to(options.device) for _ in range(2)]


def variants(
    options: argparse.Namespace,
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    from minitron_mcore.distillation.config import DIVERGENCES, PROBABILISTIC
    from minitron_mcore.distillation.logits.divergences import mixture_statistics
    from minitron_mcore.distillation.logits.outcomes import tail_statistics, top_of_shard
    from minitron_mcore.distillation.logits.passes import logit_gradient_, logit_statistics
    from minitron_mcore.distillation.logits.settings import LossSettings

    rows = torch.arange(1, options.tokens + 1, device=options.device).double() / options.tokens
    # Of the second pass any positive numbers will do.
    values = {name: 0.5 + rows * (1 + 0.1 * number) for number, name in enumerate(NAMES)}
    every = [(name, 1.0, lm_share) for name in DIVERGENCES for lm_share in (0.0, 0.5)]
    every += [(name, 2.0, 0.5) for name in PROBABILISTIC]
    for name, temperature, lm_share in [("forward_kl", 2.0, 0.5)] if options.small else every:
        # The weights that make `lm_share` what it is to be.
        loss = LossSettings(
            options.vocabulary,
            lm_weight=lm_share * (temperature if name in PROBABILISTIC else 1.0),
            kd_weight=1.0,
            divergence=name,
            temperature=temperature,
            jensen_shannon_mix=0.3,
        )
        told = f"{name} at {temperature}"
        settings: dict[str, Any] = {"settings": loss, "cross": True, "report": True, "keep": False}
        if lm_share:
            yield f"statistics, {told}", logit_statistics, (), settings
        yield f"gradient, {told}, next token {lm_share}", logit_gradient_, (values,), {"settings": loss}
    normalizers = {name: value.log1p() for name, value in values.items()}
    yield "mixture", mixture_statistics, (normalizers,), {"mix": 0.3}
    columns = torch.randperm(options.vocabulary, generator=torch.Generator().manual_seed(2))[:8].to(options.device)
    columns = columns.expand(options.tokens, 8).contiguous()
    yield "tail", tail_statistics, (columns, columns % 2 == 0), {}
    yield "largest", top_of_shard, (), {"count": 8}


def check_pass(function: Callable[..., Any], given: list[Tensor], others: tuple[Any, ...], settings: Any) -> float:
    """The largest error of the compiled pass, over its results and over the logits as it leaves them."""
    from minitron_mcore.distillation.logits import passes

    both = function.__name__ not in ("tail_statistics", "top_of_shard")
    found = []
    for through, dtype in ((passes._compiled, torch.float32), (lambda same: same, torch.float64)):
        x, y = (tensor.to(dtype, copy=True) for tensor in given)
        casted = tree_map(lambda other, to=dtype: other.to(to) if other.is_floating_point() else other, others)
        if function.__name__ == "top_of_shard":
            x = x.float()  # its keys are the bits of fp32
        results = through(function)(x, *([y] if both else []), *casted, **settings)
        # The teacher's logits are a scratch buffer after the second pass.
        found.append({**results, "student's logits": x})
    compiled, plain = found
    assert compiled.keys() == plain.keys(), (compiled.keys(), plain.keys())
    return max(relative(compiled[name], plain[name]) for name in plain)


def check_loss(options: argparse.Namespace, dtype: torch.dtype, name: str) -> float:
    """The largest error of value and gradients of the whole loss against dense float64 autograd."""
    from minitron_mcore.distillation.logits.loss import Model, logit_loss
    from minitron_mcore.distillation.logits.settings import LossSettings

    generator = torch.Generator().manual_seed(3)
    tokens, hidden, wide, vocabulary = options.tokens, options.hidden, 2 * options.hidden, options.vocabulary

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(options.device, dtype)

    states, of_teacher = normal(tokens, 1, hidden).requires_grad_(), normal(tokens, 1, wide)
    head, teacher_head = (
        normal(vocabulary, hidden).mul_(2 * hidden**-0.5),
        normal(vocabulary, wide).mul_(2 * wide**-0.5),
    )
    weight = torch.nn.Parameter(head)
    main_grad = torch.zeros(vocabulary, hidden, device=options.device)
    weight.main_grad = main_grad  # type: ignore[attr-defined]
    labels = torch.randint(vocabulary, (tokens, 1), generator=generator).to(options.device)
    mask = (torch.rand(tokens, 1, generator=generator) > 0.25).float().to(options.device)
    output = logit_loss(
        states,
        weight,
        labels,
        mask,
        LossSettings(
            vocab_size=vocabulary,
            lm_weight=0.3,
            kd_weight=1.0,
            divergence=name,
            temperature=2.0,
            chunk_tokens=max(1, tokens // 3),
        ),
        tp_group=None,
        teacher=Model(of_teacher, teacher_head),
    )
    output.loss.backward()
    exact_states, exact_head = (tensor.detach().double().requires_grad_() for tensor in (states, weight))
    expected = dense_loss(exact_states, exact_head, of_teacher.double(), teacher_head.double(), labels, mask, name)
    expected.backward()
    pairs = [(output.loss.detach(), expected.detach()), (states.grad, exact_states.grad)]
    pairs.append((main_grad, exact_head.grad))
    return max(relative(mine, exact) for mine, exact in pairs)  # type: ignore[arg-type]


def dense_loss(
    states: Tensor, head: Tensor, of_teacher: Tensor, teacher_head: Tensor, labels: Tensor, mask: Tensor, name: str
) -> Tensor:
    """0.3 of the next-token loss and the divergence at temperature 2, both summed over the mask."""
    student, teacher = states[:, 0] @ head.t(), of_teacher[:, 0] @ teacher_head.t()
    log_q, log_p = (z.div(2.0).log_softmax(-1) for z in (student, teacher))
    if name == "reverse_kl":
        log_q, log_p = log_p, log_q
    divergence = 4.0 * (log_p.exp() * (log_p - log_q)).sum(-1)
    next_token = torch.nn.functional.cross_entropy(student, labels[:, 0], reduction="none")
    return ((0.3 * next_token + divergence) * mask[:, 0].double()).sum()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a machine without a GPU")
    options = parser.parse_args()
    options.small = options.small or not torch.cuda.is_available()
    options.tokens, options.vocabulary, options.hidden = (6, 600, 32) if options.small else (512, 128256, 1024)
    return options


def main() -> int:
    from minitron_mcore.runtime.start import start

    options = parse()
    options.device = start().device
    started = time.perf_counter()
    errors: dict[str, float] = {}
    given = logits(options)
    for name, function, others, settings in variants(options):
        errors[name] = check_pass(function, given, others, settings)
    compiled = time.perf_counter() - started
    for (word, dtype), name in itertools.product(
        {"fp32": torch.float32, "bf16": torch.bfloat16}.items(), ("forward_kl", "reverse_kl")
    ):
        errors[f"{word} loss, {name}"] = check_loss(options, dtype, name)
    bad = []
    for name, error in errors.items():
        bound = BOUNDS.get(name.partition(" ")[0], BOUNDS["pass"])
        print(f"{name}: {error:.1e} (bound {bound:.0e})")
        if not error <= bound:
            bad.append(name)
    worst = max(errors, key=lambda name: errors[name])
    within = f"{len(errors) - len(bad)} of {len(errors)} within their bounds"
    summary = f"{within}; the largest error {errors[worst]:.1e} ({worst})"
    shown = {name: float(f"{error:.3g}") for name, error in errors.items()}
    facts = {"summary": summary, "seconds_of_passes": round(compiled, 1), "bad": bad, "errors": shown}
    options.device = str(options.device)
    print(json.dumps({"benchmark": "gpu_passes", **vars(options), **facts}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
