"""The table of `evaluate`: every model, what the papers say of it, and the differences to the first."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_mcore.report.evaluation_table import evaluation_table, with_error


def model(loss: float, value: float, **more: Any) -> dict[str, Any]:
    metrics = {"acc": {"value": value, "stderr": 0.01, **({"published": 0.773} if more else {})}}
    return {"lm loss": loss, "ppl": 10 * loss, "tasks": {"winogrande": {"shots": 5, "metrics": metrics}}, **more}


def test_models_side_by_side() -> None:
    models = {"teacher": model(2.0, 0.75, published="Llama-3.1-8B"), "student": model(2.5, 0.7)}
    change = {"winogrande": {"acc": {"difference": -0.05, "stderr": 0.004}}}
    shown = evaluation_table(models, {"student": {"lm loss": 0.5, "ppl": 5.0, "tasks": change}})
    head, *rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in shown.splitlines()]
    assert head == ["task", "shots", "metric", "teacher", "Llama-3.1-8B [B]", "student", "student − teacher"]
    assert rows == [
        ["held-out text", "loss", "2.0000", "2.5000", "+0.5000"],
        ["held-out text", "perplexity", "20.0000", "25.0000", "+5.0000"],
        ["winogrande", "5", "acc", "0.7500 ± 0.0100", "0.7730", "0.7000 ± 0.0100", "-0.0500 ± 0.0040"],
    ]


@pytest.mark.parametrize(
    ("value", "stderr", "signed", "shown"),
    [
        (None, None, False, ""),
        (-0.00001, None, True, "+0.0000"),
        (1447.7432, 3.14159, False, "1447.74 ± 3.14"),
        (1.966e9, 2.5e8, False, "1.966e+09 ± 2.5e+08"),
    ],
)
def test_numbers_as_they_are_shown(value: float | None, stderr: float | None, signed: bool, shown: str) -> None:
    assert with_error(value, stderr, signed=signed) == shown
