"""The mark of a step that is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.iterate import Step
from minitron_mcore.recipe import Recipe


def test_what_a_step_gave(tmp_path: Path) -> None:
    step = Step("second score", "scoring", "score", Recipe())
    assert step.outcome(tmp_path) is None
    mark = step.mark(tmp_path)
    mark.parent.mkdir()
    mark.write_text('{"loss": 1.5}')
    assert mark.name == "second-score.json" and step.outcome(tmp_path) == {"loss": 1.5}
    mark.write_text('{"loss"')
    with pytest.raises(InputError) as refused:
        step.outcome(tmp_path)
    assert str(refused.value).startswith(f"output={mark} does not say what the step gave (")
    assert str(refused.value).endswith("): delete it: the step is done again")
