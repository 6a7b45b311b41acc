"""A token budget with batch-size ramp-up, phases and WSD: cut off and resumed at any point and layout, it is one run.

Through the stage `train` on real tokens. At the same layout bit for bit; at another, losses to 1e-6 relative: the sums
run in another order, in fp32, over few steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import LAYOUTS
from tests.distributed.ranks import RankError, run_on_ranks
from tests.unit.text_data import EMAIL_PACKAGE, JSON_PACKAGE, small_data, small_tokenizer

# Batches of 4, 4, 8, 8, 8 sequences of 16 tokens, then 3 of 4 sequences of 32.
SIZES, LENGTHS = [4, 4, 8, 8, 8, 4, 4, 4], [16] * 5 + [32] * 3
BOUNDARY = 5
BUDGET = [
    "train.tokens=896",
    "train.global_batch_size=8",
    "train.rampup_batch_size=[4,4,8]",
    "train.phases=[{tokens: 512}, {sequence_length: 32, global_batch_size: 4}]",
    "train.lr_decay_style=WSD",
    "train.lr_wsd_decay_tokens=300",
    "train.lr_warmup_tokens=100",
]
CASES = [
    *(("DP2", 1, "DP2"), ("DP2", BOUNDARY, "DP2"), ("DP2", 1, "PP2-VPP2")),
    # A phase's beginning and its inside are above, another layout too.
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("DP2", 7, "DP2"), ("DP2", 6, "TP2"))),
]


def train_on_rank(overrides: list[str], stage: str = "train") -> list[dict[str, Any]]:
    """The verb; of each of its steps what it read, and Adam's state before and after it."""
    import importlib

    from minitron_mcore.jobs.job import resolve
    from minitron_mcore.recipe import load_recipe
    from minitron_mcore.runtime.start import start
    from minitron_mcore.runtime.world import World
    from minitron_mcore.training import loop

    states: list[dict[str, Any]] = []
    step = loop.train_step

    def watched(trained: Any, objective: Any, shape: Any, batch: Any, *others: Any) -> Any:
        read = [(number, part.tokens.shape[1]) for part in batch for number in part.samples.tolist()]
        before = adam(trained.optimizer)
        row = step(trained, objective, shape, batch, *others)
        states.append({"read": read, "before": before, "after": adam(trained.optimizer)})
        return row

    loop.train_step = watched  # type: ignore[assignment]
    try:
        runtime = start()
        job = resolve(stage, load_recipe(None, overrides), World(runtime.rank, runtime.world_size))
        importlib.import_module(f"minitron_mcore.stages.{stage}").run(job, runtime)
    finally:
        loop.train_step = step
    return states


def adam(optimizer: Any) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """(first moments, second moments, steps) of the first parameter; None before there are any."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    group = inner.param_groups[0]
    state = inner.state.get(group["params"][0], {})
    if "exp_avg" not in state:
        return None
    steps = state.get("step", group.get("step"))
    return state["exp_avg"].clone(), state["exp_avg_sq"].clone(), int(steps)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("phases")
    tokenizer = small_tokenizer(folder / "tokenizer.model", 400)
    email = small_data(folder / "email", tokenizer, package=EMAIL_PACKAGE)
    small_data(folder / "json", tokenizer, package=JSON_PACKAGE)
    return [
        f"tokenizer.model={tokenizer.path}",
        f"data.train={email}",
        f"data.valid=[{email},{folder}/json_text_document]",
        f"data.cache_path={folder}/cache",
        "data.sequence_length=16",
        "data.num_workers=0",
        "model.num_layers=4",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.num_attention_heads=4",
        "model.max_position_embeddings=32",
        "train.eval_iters=0",
        "train.lr=1e-2",
        "train.min_lr=1e-3",
        "log.tensorboard=false",
        "log.wandb=disabled",
    ]


def run(recipe: list[str], layout: str, folder: Path, stage: str = "train") -> list[dict[str, Any]]:
    return run_on_all(recipe, layout, folder, stage)[0]


def run_on_all(recipe: list[str], layout: str, folder: Path, stage: str = "train") -> list[list[dict[str, Any]]]:
    world_size, parallel = LAYOUTS[layout]
    overrides = [*recipe, *(f"parallel.{name}={value}" for name, value in parallel.items())]
    return run_on_ranks(train_on_rank, world_size, [*overrides, f"{stage}.checkpoint={folder}"], stage)


def rows(folder: Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["iteration"]: row for row in lines if row["kind"] == kind}


def cut_off(folder: Path, target: Path, iteration: int) -> None:
    """What a run killed after its checkpoint at `iteration` leaves."""
    shutil.copytree(folder, target)
    for later in range(iteration + 1, len(SIZES) + 1):
        shutil.rmtree(target / f"iter_{later:07d}", ignore_errors=True)
    (target / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    (target / "metrics.jsonl").unlink()


@pytest.fixture(scope="module")
def whole(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """The uninterrupted run: its folder, and the steps of each rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_on_all([*recipe, *BUDGET, "train.save_interval=1"], "DP2", folder)


def test_the_run_follows_its_timetable(whole: tuple[Path, Any]) -> None:
    history = rows(whole[0])
    assert [history[i + 1]["global batch size"] for i in range(len(SIZES))] == SIZES
    assert [history[i + 1]["consumed samples"] for i in range(len(SIZES))] == [sum(SIZES[: i + 1]) for i in range(8)]
    tokens = [sum(a * b for a, b in zip(SIZES[:i], LENGTHS, strict=False)) for i in range(8)]
    for number, before in enumerate(tokens):
        expected = 1e-2 * min(before / 100, 1.0)
        if before > 596:  # the last 300 of 896 tokens, exponentially
            expected = 1e-3 + 9e-3 * (2 * 0.5 ** ((before - 596) / 300) - 1)
        assert history[number + 1]["learning-rate"] == pytest.approx(expected, rel=1e-12)


def test_every_sample_once(whole: tuple[Path, Any]) -> None:
    """In order over the ramp-up; the second phase from the sample on that 512 tokens are, in the longer data set."""
    firsts = [0, 4, 8, 16, 24, 512 // 32, 512 // 32 + 4, 512 // 32 + 8]
    for number, steps in enumerate(zip(*whole[1], strict=True)):
        expected = [(firsts[number] + i, LENGTHS[number]) for i in range(SIZES[number])]
        assert sorted(read for step in steps for read in step["read"]) == expected


def test_adam_goes_on_over_the_boundary(whole: tuple[Path, Any]) -> None:
    """From both moments before and after a step the same gradient follows, which a fresh start would not give."""
    states = whole[1][0]
    assert [state["after"][2] for state in states] == list(range(1, 9))
    first, second, _ = states[BOUNDARY]["before"]
    after_first, after_second, _ = states[BOUNDARY]["after"]
    gradient = (after_first - 0.9 * first) / 0.1
    squared = (after_second - 0.95 * second) / 0.05
    assert float(first.norm()) > 0 and float(squared.norm()) > 0
    torch.testing.assert_close(squared, gradient**2, rtol=1e-3, atol=1e-4 * float(squared.max()))
    assert torch.equal(states[BOUNDARY]["before"][0], states[BOUNDARY - 1]["after"][0])


@pytest.mark.parametrize(("before", "cut", "after"), CASES)
def test_resumed_in_any_phase(
    before: str, cut: int, after: str, recipe: list[str], whole: tuple[Path, Any], tmp_path: Path
) -> None:
    cut_off(whole[0], tmp_path / "cut", cut)
    run([*recipe, *BUDGET], after, tmp_path / "cut")
    history, resumed = rows(whole[0]), rows(tmp_path / "cut")
    assert sorted(resumed) == list(range(cut + 1, len(SIZES) + 1))
    for iteration, row in resumed.items():
        for name in ("consumed samples", "learning-rate", "global batch size"):
            assert row[name] == history[iteration][name]
        if after == before:
            assert all(row[name] == history[iteration][name] for name in ("lm loss", "grad-norm"))
        assert row["lm loss"] == pytest.approx(history[iteration]["lm loss"], rel=1e-6)


def test_a_budget_changed_on_the_way(recipe: list[str], tmp_path: Path) -> None:
    """Two iterations at a constant rate; then longer sequences after them, and more tokens, from the same moments."""
    constant = [*recipe, "train.global_batch_size=4", "train.lr_decay_style=constant"]
    run([*constant, "train.tokens=128"], "1", tmp_path / "run")
    longer = ["train.tokens=384", "train.phases=[{tokens: 128}, {sequence_length: 32}]"]
    states = run([*constant, *longer], "1", tmp_path / "run")
    history = rows(tmp_path / "run")
    assert sorted(history) == [1, 2, 3, 4] and history[4]["consumed samples"] == 16
    assert [state["after"][2] for state in states] == [3, 4]
    straight = run([*constant, *longer], "1", tmp_path / "straight")
    assert torch.equal(straight[3]["after"][0], states[1]["after"][0]), "as if it had been planned from the start"
    # That same folder cannot become a run in which these sequences were never longer.
    with pytest.raises(RankError, match="holds a run of 4 iterations with other batch sizes or sequence lengths"):
        run([*constant, "train.tokens=512"], "1", tmp_path / "run")
    with pytest.raises(RankError, match=r"global_batch_size is 4 there and 8 here.*give train.phases"):
        run([*constant, *longer, "train.global_batch_size=8"], "1", tmp_path / "run")


@pytest.mark.slow  # phases are trained above, and distillation at each layout in test_engine.py
def test_distillation_through_phases(recipe: list[str], whole: tuple[Path, Any], tmp_path: Path) -> None:
    """The teacher runs ahead over batches of every size and length, at any layout."""
    distill = [entry.replace("train.", "distill.", 1) for entry in BUDGET]
    models = [f"teacher.checkpoint={whole[0]}", f"distill.load={whole[0]}", "distill.lm_weight=0.5"]
    found = {}
    for layout in ("1", "TP2-SP", "PP2-VPP2"):
        overrides = [*recipe, *distill, *models, "distill.eval_iters=0", "distill.lr=1e-2"]
        run(overrides, layout, tmp_path / layout, "distill")
        found[layout] = rows(tmp_path / layout)
    for layout in ("TP2-SP", "PP2-VPP2"):
        for iteration, row in found["1"].items():
            assert found[layout][iteration]["lm loss"] == pytest.approx(row["lm loss"], rel=1e-5)
        assert found[layout][1]["logits distillation loss"] == pytest.approx(0, abs=1e-6)
        last = found["1"][8]["logits distillation loss"]
        assert found[layout][8]["logits distillation loss"] == pytest.approx(last, rel=1e-3) and last > 1e-4


def test_a_phase_longer_than_the_model(recipe: list[str], tmp_path: Path) -> None:
    words = r"train.phases\[1\].sequence_length=33 is longer than the model's max_position_embeddings=32"
    with pytest.raises(RankError, match=words):
        run([*recipe, "train.tokens=512", "train.phases=[{tokens: 128}, {sequence_length: 33}]"], "1", tmp_path / "run")
    assert not (tmp_path / "run").exists()
