"""The verb `score`: its file, the same at every layout, left alone when made in the same way, refused otherwise."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.importance.scores import AXES, TOLERANCE, load_scores
from tests.distributed.models import save_teacher, tiny
from tests.distributed.ranks import run_on_ranks
from tests.plans import make_plan

COMMON = [
    "tokenizer.model=@/tokenizer.model",
    "data.calibration=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "importance.num_samples=13",
    "seed=5",
]
TEACHER = ["teacher.checkpoint=@/teacher"]
# name -> layout and micro-batch size, which must not matter
LAYOUTS = {
    "TP2": ["parallel.tensor=2"],
    "TP2-SP": ["parallel.tensor=2", "parallel.sequence=true", "importance.micro_batch_size=2"],
    "PP2": ["parallel.pipeline=2", "importance.micro_batch_size=3"],
    "PP2-VPP2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "DP2": ["importance.micro_batch_size=4"],
}

MENU = ["importance.aggregations=[mean/mean,var/l2]", "importance.neuron_sites=[pre_activation]"]

STUDENT = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}


def score(root: Path, overrides: list[str]) -> tuple[str, str]:
    """(what was printed, what was refused); `@` stands for the folder of the test."""
    from minitron_mcore.errors import InputError
    from minitron_mcore.jobs.score import resolve
    from minitron_mcore.recipe import load_recipe
    from minitron_mcore.runtime.start import start
    from minitron_mcore.runtime.world import World
    from minitron_mcore.stages import score as stage

    printed, runtime = io.StringIO(), start()
    try:
        recipe = load_recipe(None, [text.replace("@", str(root)) for text in [*COMMON, *overrides]])
        with contextlib.redirect_stdout(printed):
            job = resolve(recipe, World(size=runtime.world_size))
            assert stage.run(job, runtime) == Path(recipe.scores or ""), "the stage returns its file"
    except InputError as error:
        return printed.getvalue(), str(error)
    return printed.getvalue(), ""


def score_everywhere(root: Path) -> dict[str, Any]:
    save_teacher(root / "teacher", None)
    save_teacher(root / "broken", float("nan"))
    results: dict[str, Any] = {
        name: score(root, [*TEACHER, *layout, f"scores=@/{name}"]) for name, layout in LAYOUTS.items()
    }
    for method in ("magnitude", "random"):
        for layout in ("TP2", "PP2"):
            asked = [*TEACHER, *LAYOUTS[layout], f"importance.method={method}", f"scores=@/{method}-{layout}"]
            results[f"{method}-{layout}"] = score(root, asked)
    results["menu"] = score(root, [*TEACHER, *LAYOUTS["TP2-SP"], *MENU, "scores=@/menu"])
    before = (root / "TP2").read_bytes()
    results["again"] = score(root, [*TEACHER, *LAYOUTS["DP2"], "scores=@/TP2"])
    refused = {
        "seed": [*TEACHER, "scores=@/TP2", "seed=6"],
        "importance.sequence_aggregation": [*TEACHER, "scores=@/TP2", "importance.sequence_aggregation=l2"],
        "exists and is not a scores file": [*TEACHER, "scores=@/tokenizer.model"],
        "scores is not given": TEACHER,
        "teacher.checkpoint is not given": ["scores=@/new"],
        "calibration samples": [*TEACHER, "scores=@/new", "importance.num_samples=100000"],
        "importance.micro_batch_size=0": [*TEACHER, "scores=@/new", "importance.micro_batch_size=0"],
        "importance.method": [*TEACHER, "scores=@/TP2", "importance.method=magnitude"],
        "importance.aggregations[0]=l3/mean must be one of": [
            *TEACHER,
            "scores=@/new",
            "importance.aggregations=[l3/mean]",
        ],
        "importance.num_samples=0": [*TEACHER, "scores=@/new", "importance.num_samples=0"],
        "makes no forward pass": [
            *TEACHER,
            "scores=@/new",
            "importance.method=magnitude",
            "importance.depth_metrics=[lm_loss]",
        ],
        "layer 1 ": ["teacher.checkpoint=@/broken", "scores=@/new"],
    }
    results["refused"] = {word: score(root, overrides)[1] for word, overrides in refused.items()}
    results["unchanged"] = (root / "TP2").read_bytes() == before and not list(root.glob("new*"))
    return results


@pytest.fixture(scope="module")
def root(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(corpus, tmp_path_factory.mktemp("score"), dirs_exist_ok=True))


def test_scores_from_the_command_line(root) -> None:
    ranks = run_on_ranks(score_everywhere, 2, root)
    first = load_scores(root / "TP2")
    assert first.architecture == tiny("llama")
    assert first.settings["teacher"] == {"checkpoint": str(root / "teacher"), "iteration": 3}
    assert first.settings["num_samples"] == 13 and first.settings["sequence_length"] == 32
    assert first.settings["tolerance"] == TOLERANCE["fp32"]
    for name in LAYOUTS:
        printed, refused = ranks[0][name]
        assert refused == "" and ranks[1][name] == ("", ""), f"{name}: only the first rank prints"
        assert "13 samples of 32 tokens" in printed and "block influence" in printed
        scores = load_scores(root / name)
        for axis in AXES:
            found, wanted = getattr(scores, axis), getattr(first, axis)
            assert numpy.abs(found - wanted).max() <= TOLERANCE["fp32"] * numpy.abs(wanted).max(), f"{name} {axis}"
        assert make_plan(scores, STUDENT).fingerprint == make_plan(first, STUDENT).fingerprint, f"{name}: other indices"

    menu = load_scores(root / "menu")
    assert ranks[0]["menu"][1] == "" and "further variants: mean/mean/down_projection_input" in ranks[0]["menu"][0]
    assert len(menu.variants) == 5 and menu.groups is not None and menu.primary == first.primary
    chosen = menu.variant("var/l2/pre_activation")
    assert make_plan(chosen, STUDENT).fingerprint != make_plan(menu, STUDENT).fingerprint

    for method in ("magnitude", "random"):
        one, other = (load_scores(root / f"{method}-{layout}") for layout in ("TP2", "PP2"))
        assert ranks[0][f"{method}-TP2"][1] == "" and f"layers of least {method}" in ranks[0][f"{method}-TP2"][0]
        assert one.settings == other.settings and "tokenizer" not in one.settings
        for (axis, found), (_, wanted) in zip(one.arrays(), other.arrays(), strict=True):
            assert numpy.abs(found - wanted).max() <= one.settings["tolerance"] * numpy.abs(wanted).max(), axis
        assert make_plan(one, STUDENT).fingerprint == make_plan(other, STUDENT).fingerprint

    assert "made in the same way" in ranks[0]["again"][0]
    for rank in ranks:
        for word, message in rank["refused"].items():
            assert word in message, f"{word!r} is not named in: {message!r}"
        assert rank["unchanged"]
