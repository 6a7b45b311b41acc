"""A recipe on top of another: `base`."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mcore.recipe import load_recipe, to_yaml
from tests.refusals import refuses


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "ground.yaml").write_text("seed: 1\nname: ground\ntrain: {lr: 1e-3, tokens: 2M}\n")
    (tmp_path / "below" / "floor.yaml").write_text("base: ground.yaml\nname: floor\nstudent: {num_layers: 2}\n")
    (tmp_path / "top.yaml").write_text("base: below/floor.yaml\nname: top\ntrain: {lr: 2e-3}\n")
    return tmp_path


def test_each_changes_the_one_below(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are those of the files that name them, wherever the command is typed; those of the command are its own."""
    found = load_recipe(str(recipes / "top.yaml"), ["student.hidden_size=8"])
    assert (found.seed, found.name, found.train.lr, found.train.tokens) == (1, "top", 2e-3, 2_000_000)
    assert (found.student.num_layers, found.student.hidden_size, found.base) == (2, 8, None)
    assert "base: null" in to_yaml(found)
    monkeypatch.chdir(recipes / "below")
    assert load_recipe("../top.yaml", []) == load_recipe(str(recipes / "top.yaml"), [])
    swapped = load_recipe("../top.yaml", ["base=ground.yaml"])
    assert (swapped.name, swapped.student.num_layers, swapped.train.tokens) == ("top", None, 2_000_000)
    assert load_recipe(None, ["base=ground.yaml", "seed=4"]).seed == 4
    assert load_recipe("../top.yaml", ["base=null"]).train.tokens == 0


def test_each_of_several_is_on_top_of_the_one_before(recipes: Path) -> None:
    (recipes / "more.yaml").write_text("seed: 9\ntrain: {tokens: 3M}\n")
    (recipes / "top.yaml").write_text("base: [below/floor.yaml, more.yaml]\nname: top\n")
    found = load_recipe(str(recipes / "top.yaml"), [])
    assert (found.name, found.seed, found.student.num_layers) == ("top", 9, 2)
    assert (found.train.lr, found.train.tokens) == (1e-3, 3_000_000)
    typed = load_recipe(None, [f"base=[{recipes}/more.yaml, {recipes}/below/floor.yaml]"])
    assert (typed.name, typed.seed, typed.train.tokens) == ("floor", 1, 2_000_000)


def test_an_empty_section_takes_the_place_of_the_one_below(recipes: Path) -> None:
    (recipes / "top.yaml").write_text("base: below/floor.yaml\nstudent: {}\n")
    assert load_recipe(str(recipes / "top.yaml"), []).student.num_layers is None


def test_what_cannot_be_a_base(recipes: Path) -> None:
    top = recipes / "top.yaml"
    top.write_text("base: none.yaml\n")
    with refuses("base", "none.yaml", f"is not a file: {recipes}/none.yaml", "name a recipe in YAML"):
        load_recipe(str(top), [])
    top.write_text("base: [[a, b]]\n")
    with refuses("base", ["a", "b"], "must be the path of a recipe, or a list of them"):
        load_recipe(str(top), [])
    top.write_text("base: below/floor.yaml\n")
    (recipes / "below" / "ground.yaml").write_text("base: ../top.yaml\n")
    with refuses("base", "../top.yaml", "leads back to a recipe that builds on it"):
        load_recipe(str(top), [])
