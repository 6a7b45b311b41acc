"""A training that is to keep its best checkpoints needs something held out to compare them by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.jobs import train
from minitron_mcore.jobs.job import NOTHING
from minitron_mcore.recipe import load_recipe


@pytest.mark.parametrize("section", ["train", "correct", "distill"])
def test_nothing_is_held_out(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    described = SimpleNamespace(has_validation=False, parts=(), sources={})
    monkeypatch.setattr(train, "describe_training", lambda *found: described)
    recipe = load_recipe(None, [f"{section}.keep_best=2", f"{section}.eval_interval=5"])
    with pytest.raises(InputError) as caught:
        train.text_items(recipe, section, None, (), NOTHING)
    rule = (
        f"{section}.keep_best=2 compares validation losses, but nothing is held out to validate on: give data.valid, "
    )
    assert str(caught.value).startswith(rule)
    described.has_validation = True
    assert train.text_items(recipe, section, None, (), NOTHING) == ((), [])
