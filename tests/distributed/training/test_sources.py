"""Held-out losses of each source of a blend apart: what validating on that source alone gives, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.training.test_phases import recipe, rows, run

__all__ = ["recipe"]


def validation(overrides: list[str], folder: Path, stage: str = "train") -> dict[str, Any]:
    run(overrides, "DP2", folder, stage)
    found = next(iter(rows(folder, "validation").values()))
    return {name: value for name, value in found.items() if " validation" in name}


@pytest.fixture(scope="module")
def small(recipe: list[str]) -> list[str]:
    shared = ["data.calibration=null", "data.split=80,20,0"]
    sizes = ["global_batch_size=4", "tokens=64", "eval_iters=2", "lr_decay_style=constant"]
    return [*recipe, *shared, *(f"{section}.{size}" for section in ("train", "distill") for size in sizes)]


@pytest.fixture(scope="module")
def prefixes(recipe: list[str]) -> list[str]:
    """Of the package email, and of the package json."""
    given = next(entry for entry in recipe if entry.startswith("data.valid="))
    return given.removeprefix("data.valid=[").rstrip("]").split(",")


def test_each_source_as_alone(small: list[str], prefixes: list[str], tmp_path: Path) -> None:
    both = validation(small, tmp_path / "both")
    names = ["lm loss validation", "ppl validation"]
    sources = ["email_text_document", "json_text_document"]
    assert set(names) <= set(both) and {f"{name} {source}" for name in names for source in sources} <= set(both)
    for prefix, source in zip(prefixes, sources, strict=True):
        alone = validation([*small, f"data.valid={prefix}"], tmp_path / source)
        assert alone == {name.removesuffix(f" {source}"): value for name, value in both.items() if source in name}
    values = [both[f"lm loss validation {source}"] for source in sources]
    assert values[0] != values[1] and both["lm loss validation"] not in values


def test_of_a_split_blend_and_both_losses(small: list[str], prefixes: list[str], tmp_path: Path) -> None:
    """Sources of `data.train` where `data.split` cuts it; distillation reports its losses for each as well."""
    blend = f"data.train=[3,{prefixes[0]},1,{prefixes[1]}]"
    run([*small, "train.eval_iters=0"], "DP2", tmp_path / "teacher")
    still = [f"{section}.{rate}=0" for section in ("train", "distill") for rate in ("lr", "min_lr")]
    teacher = [f"teacher.checkpoint={tmp_path}/teacher", f"distill.load={tmp_path}/teacher"]
    found = validation([*small, *still, *teacher, blend, "data.valid=null"], tmp_path / "student", "distill")
    for prefix, source in zip(prefixes, ("email_text_document", "json_text_document"), strict=True):
        assert found[f"logits distillation loss validation {source}"] == pytest.approx(0, abs=1e-6)
        alone = [f"data.train={prefix}", "data.valid=null", f"train.load={tmp_path}/teacher"]
        expected = validation([*small, *still, *alone], tmp_path / source)
        # The loss alone and beside the teacher's runs the same sums in another order.
        assert found[f"lm loss validation {source}"] == pytest.approx(expected["lm loss validation"], rel=1e-6)
