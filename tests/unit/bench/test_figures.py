"""Figures of runs whose times are made up: by hand, exactly."""

from __future__ import annotations

import pytest

from minitron_mcore.bench.figures import Case, Run, figures, percentiles, spread, tables, with_ratios

CASE = Case(batch_size=4, prompt_tokens=10, output_tokens=3)


def test_figures_of_three_runs() -> None:
    """Prefills of 1, 2 and 4 s; steps of (1, 3), (2, 2) and (4, 6) s: medians are of the runs' means 2, 2 and 5."""
    runs = [Run([1, 2, 5], 10), Run([2, 4, 6], None), Run([4, 8, 14], 7)]
    found = figures(CASE, runs)
    assert (found["prefill_latency"], found["decode_latency"]) == (2, 2)
    assert (found["prefill_throughput"], found["decode_throughput"]) == (20, 2)
    assert found["spread"]["prefill_latency"] == 0.75, "1, 2, 4: the quartiles are 1.5 and 3"
    assert found["spread"]["decode_latency"] == 0.75, "2, 2, 5: 2 and 3.5"
    # Steps in order: 1 2 2 3 4 6; at 0.9 half-way between the fifth and the sixth.
    assert found["step_percentiles"] == pytest.approx({"p50": 2.5, "p90": 5, "p99": 5.9})
    assert found["request_percentiles"]["p50"] == 6
    assert (found["memory"], found["repeats"]) == (10, 3)


def test_percentiles_lie_between_values_in_proportion() -> None:
    assert percentiles(range(101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([3.0]) == {"p50": 3, "p90": 3, "p99": 3}
    assert spread(range(101)) == 25, "half of them lie within 25 of the median"


def row(engine: str, model: str, decode: float, batch: int = 1) -> dict[str, object]:
    found = figures(Case(batch, 10, 3), [Run([1, 1 + batch / decode, 1 + 2 * batch / decode], None)])
    return {"engine": engine, "model": model, "batch_size": batch, "prompt_tokens": 10, "output_tokens": 3, **found}


def test_ratios_are_to_the_first_model_in_the_same_engine_and_case() -> None:
    rows = [row("a", "teacher", 2), row("a", "student", 5), row("b", "student", 8), row("a", "student", 3, batch=2)]
    done = with_ratios(rows, "teacher")
    assert [each["speed_up"].get("decode") for each in done] == [pytest.approx(1), pytest.approx(2.5), None, None]
    shown = tables(done, "teacher").splitlines()
    assert [line.split()[:2] for line in shown if line.startswith(("a ", "b "))] == [
        *(["a", "teacher"], ["a", "student"], ["b", "student"], ["a", "student"])
    ]
    assert sum("of teacher" in line for line in shown) == 2 and "2.50x" in shown[3]
    assert not any("±" in line for line in shown), "one run says nothing of a spread"
    rows = [{**row("a", "teacher", 2), **figures(Case(1, 10, 3), [Run([1, 1 + s, 1 + 2 * s], None) for s in (2, 4)])}]
    assert " 0.4 ± 0.1 " in tables(with_ratios(rows, "teacher"), "teacher"), "rates of 0.5 and 0.25: 0.375 ± 0.0625"
