"""The passes over a chunk's logits: traced for a compiler, as CUDA runs them, against run as they are."""

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from minitron_mcore.distillation.config import DIVERGENCES
from minitron_mcore.distillation.logits import passes
from minitron_mcore.distillation.logits.divergences import maximum_and_column
from minitron_mcore.distillation.logits.passes import logit_gradient_, logit_statistics
from minitron_mcore.distillation.logits.settings import LossSettings

NAMES = (
    *("maximum", "log_sum", "plain_logsumexp", "teacher_maximum", "teacher_log_sum"),
    *("cross", "square", "inverse_norms", "student_to_mixture"),
)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_passes_can_be_traced_whole(name: str) -> None:
    """In one graph (else CUDA would run piece by piece), with the same result, in place where it is in place. The
    compiler's own code is left out: it is what a GPU would differ in."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 600), torch.randn(6, 600)
    # 0.5 of the next-token loss in units of the divergence's.
    settings = LossSettings(600, 1.0, 1.0, divergence=name, temperature=2.0, jensen_shannon_mix=0.3)
    # Of the second pass any positive numbers will do.
    values = {name: torch.rand(6) + 0.5 for name in NAMES}
    found = []
    for through in (
        lambda function: function,
        lambda function: torch.compile(function, backend="aot_eager", fullgraph=True),
    ):
        x_copy, y_copy = x.clone(), y.clone()
        first = through(logit_statistics)(x_copy, y_copy, settings=settings, cross=True, report=True, keep=False)
        through(logit_gradient_)(x_copy, y_copy, values, settings=settings)
        found.append(first | {"gradient": x_copy})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected)


def test_every_variant_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than the compiler's own limit, beyond which it would run a function as it is, and not say so."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(passes.torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    passes._compiled.cache_clear()
    torch._dynamo.reset()
    function = passes._compiled(logit_statistics)
    variants = list(itertools.product(DIVERGENCES, (False, True), (False, True)))
    for name, cross, report in variants:
        settings = LossSettings(60, divergence=name, jensen_shannon_mix=0.3)
        x, y = torch.randn(3, 60), torch.randn(3, 60)
        function(x, y, settings=settings, cross=cross, report=report, keep=False)
    passes._compiled.cache_clear()
    assert len(compiled) == len(variants) > 8


@pytest.mark.parametrize("columns", [5, 511, 512, 513, 1000])
def test_column_of_the_maximum_is_the_lowest_of_several(columns: int) -> None:
    """Logits of three values only, so that most rows have many maxima; and one maximum at each place of the row."""
    torch.manual_seed(0)
    for logits in (torch.randint(3, (50, columns)).float(), torch.eye(columns), torch.zeros(2, columns)):
        maximum, column = maximum_and_column(logits)
        for row, value, index in zip(logits.tolist(), maximum.tolist(), column.tolist(), strict=True):
            assert (value, index) == (max(row), row.index(max(row)))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone tells what is resident")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_block_leaves_nothing_in_the_way_of_the_next(name: str) -> None:
    """Numbers of a block in the memory of its temporaries made the heap grow by half a megabyte a block: 32 in all, as
    much as one model's logits. Tolerance: the temporaries of two blocks."""
    settings = LossSettings(1 << 17, 0.0, 1.0, divergence=name)
    x, y = torch.randn(64, 1 << 17), torch.randn(64, 1 << 17)
    how: dict[str, Any] = {"settings": settings, "cross": True, "report": False, "keep": settings.can_keep}
    with mock.patch.object(passes, "CACHED_ENTRIES", 1):
        passes.by_rows(logit_statistics, x[:4].clone(), y[:4].clone(), **how)
        before = resident_bytes()
        found = passes.by_rows(logit_statistics, x, y, **how)
    assert resident_bytes() - before <= 2 * 3 * 4 * (1 << 17)
    assert all(value.shape == (64,) for value in found.values())
