"""The order in which engines and models are measured, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from minitron_mcore.bench.engines import EngineError, SizeError
from minitron_mcore.bench.figures import Case, Run
from minitron_mcore.bench.measure import Measured, measure
from minitron_mcore.bench.rows import failures_of, rows_of
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.models import tiny

CASES = [Case(1, 2, 3), Case(2, 2, 3)]


@dataclass
class Fake:
    """Writes down what is asked of it. fails: what raises; a number: that batch does, and nothing else."""

    engine: str
    model: str
    log: list[str]
    fails: str | int = ""
    version: str = ""
    kv_cache: str = "fp16"

    def load(self) -> None:
        self._do("load")

    def close(self) -> None:
        self._do("close")

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        self._do("run")
        if len(prompts) == self.fails:
            raise SizeError("out of memory")
        return Run(range(1, new_tokens + 1), None)

    def tokens(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        self._do("tokens")
        return [[7] * new_tokens for _ in prompts]

    def _do(self, what: str) -> None:
        self.log.append(f"{self.engine}-{self.model} {what}")
        if what == self.fails:
            raise EngineError("no such shape")


def measured(*fails: str | int, together: bool = True, warmup: int = 0) -> tuple[Measured, list[str], list[str]]:
    log: list[str] = []
    said: list[str] = []
    names = [("a", "teacher"), ("a", "student"), ("b", "teacher")]
    seats = [Fake(*name, log, fail) for name, fail in zip(names, [*fails, "", "", ""], strict=False)]
    found = measure(
        seats,
        CASES,
        lambda seat, case: [[1] * case.prompt_tokens] * case.batch_size,
        repeats=2,
        warmup=warmup,
        together=together,
        say=said.append,
    )
    return found, log, said


def test_seats_take_turns() -> None:
    found, log, _ = measured()
    turn = [f"{seat} run" for seat in ("a-teacher", "a-student", "b-teacher")]
    tokens = [line.replace("run", "tokens") for line in turn]
    ends = [[line.replace("run", word) for line in turn] for word in ("load", "close")]
    assert log == [*ends[0], *tokens, *turn, *turn, *tokens, *turn, *turn, *ends[1]]
    assert {len(runs) for runs in found.runs.values()} == {2} and len(found.runs) == 6
    assert found.tokens[("b", "teacher"), CASES[1]] == [[7, 7, 7], [7, 7, 7]]


def test_in_turn_one_model_is_loaded_at_a_time() -> None:
    found, log, _ = measured(together=False, warmup=1)
    is_loaded = 0
    for line in log:
        is_loaded += line.endswith("load") - line.endswith("close")
        assert is_loaded in (0, 1)
    assert log[:7] == [f"a-teacher {word}" for word in ("load", "tokens", "run", "run", "tokens", "run", "run")]
    assert {len(runs) for runs in found.runs.values()} == {2} and len(found.runs) == 6


@pytest.mark.parametrize("fails", ["load", "tokens", "run"])
@pytest.mark.parametrize("together", [True, False])
def test_an_engine_that_fails_is_left_out(fails: str, together: bool) -> None:
    """The others go on; what was loaded is closed, once each."""
    found, log, said = measured("", fails, together=together)
    assert found.failures == {(("a", "student"), None): "no such shape"}
    assert sum(line == f"a-student {fails}" for line in log) == 1
    assert "a leaves student out: no such shape" in said
    assert all(len(found.runs[seat, case]) == 2 for seat in (("a", "teacher"), ("b", "teacher")) for case in CASES)
    of_student = [line for line in log if line.startswith("a-student")]
    assert of_student.count("a-student close") == (fails != "load")


@pytest.mark.parametrize("together", [True, False])
def test_a_size_that_fails_is_left_out_alone(together: bool) -> None:
    """The smaller one stands in the file as a row, the larger one as a failure; nothing is asked twice."""
    found, log, said = measured("", 2, together=together)
    assert found.failures == {(("a", "student"), CASES[1]): "out of memory"}
    assert f"a leaves student out at {CASES[1]}: out of memory" in said
    assert [line for line in log if line.startswith("a-student")].count("a-student run") == 2 + 1
    sizes = {"batch_size": 2, "prompt_tokens": 2, "output_tokens": 3}
    assert failures_of(found) == [{"engine": "a", "model": "student", **sizes, "said": "out of memory"}]
    shapes = {"teacher": tiny("llama"), "student": tiny("llama")}
    given: dict[str, Any] = {"device": "cpu", "precision": "bf16", "parallel": ParallelConfig(), "data": 1}
    seats = [Fake("a", "teacher", []), Fake("a", "student", []), Fake("b", "teacher", [], kv_cache="bf16")]
    rows = rows_of(found, seats, CASES, shapes, **given)
    assert [(row["engine"], row["model"], row["batch_size"], row["kv_cache"]) for row in rows] == [
        *(("a", "teacher", 1, "fp16"), ("a", "student", 1, "fp16"), ("b", "teacher", 1, "bf16")),
        *(("a", "teacher", 2, "fp16"), ("b", "teacher", 2, "bf16")),
    ]


def test_what_an_engine_did_before_it_ended_stands() -> None:
    class Dying(Fake):
        def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
            if len(prompts) == 2:
                raise EngineError("it ended with exit code -9")
            return super().run(prompts, new_tokens)

    seats, cases = [Dying("a", "teacher", [])], [*CASES, Case(1, 3, 3)]
    found = measure(
        seats,
        cases,
        lambda _, case: [[1]] * case.batch_size,
        repeats=2,
        warmup=0,
        together=True,
        say=lambda words: None,
    )
    assert failures_of(found) == [{"engine": "a", "model": "teacher", "said": "it ended with exit code -9"}]
    assert [found.is_whole(("a", "teacher"), case) for case in cases] == [True, False, False]


def test_what_is_loaded_is_closed_where_something_else_breaks() -> None:
    class Broken(Fake):
        def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
            raise RuntimeError("out of memory")

    log: list[str] = []
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(
            [Broken("a", "teacher", log)], CASES, lambda *_: [[1]], repeats=1, warmup=0, together=True, say=log.append
        )
    assert log[-1] == "a-teacher close"
