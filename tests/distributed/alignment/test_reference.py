"""A reference's log-probabilities: against the dense model in float64, at every layout, killed and gone on with,
damaged, of other facts, of a broken model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.alignment.reference import read_reference
from minitron_mcore.errors import InputError
from tests.distributed.alignment.problems import dense_log_probs, draw_answers, draw_models, rows_of
from tests.distributed.alignment.runs import LAYOUTS, MIXED, quick, worked_out
from tests.distributed.dense_reference import DenseModel
from tests.distributed.models import tiny
from tests.distributed.ranks import run_on_ranks

FACTS = {"weights": "abc", "data": 1}
SEGMENTS = 16  # in blocks of 3: six, the last of one


def work_out(folder: Path, layout: str = "1", dies_after: int | None = None) -> Any:
    """[blocks that were worked out, then the values]; None from a pass that died."""
    world_size, parallel = LAYOUTS[layout]
    found = run_on_ranks(worked_out, world_size, tiny("llama"), parallel, world_size, folder, dies_after)
    assert all(rank == found[0] for rank in found), "every rank gets all values"
    return found[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("reference")
    blocks, *values = work_out(folder)
    assert blocks == 6
    return folder, values


def test_against_the_dense_model(whole: tuple[Path, list[float]]) -> None:
    """fp32 log-probabilities of up to a hundred nats: 1e-5 of them."""
    architecture = tiny("llama")
    model = DenseModel(architecture, draw_models(architecture)[1])
    exact = dense_log_probs(model, rows_of(draw_answers(architecture.vocab_size)))
    assert whole[1] == pytest.approx(exact.tolist(), rel=1e-5)
    assert len(exact) == SEGMENTS and float(exact.max()) < -1


@pytest.mark.parametrize("layout", quick("PP2-VPP2", "DP2", "CP2", MIXED))
def test_every_layout(whole: tuple[Path, list[float]], layout: str, tmp_path: Path) -> None:
    assert work_out(tmp_path, layout)[1:] == pytest.approx(whole[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["1", "DP2"])
def test_killed_between_blocks(whole: tuple[Path, list[float]], layout: str, tmp_path: Path) -> None:
    """Bit for bit what a pass gives that is never killed; a block that was damaged since is worked out again."""
    never_killed = whole[1] if layout == "1" else work_out(tmp_path / "never", layout)[1:]
    assert work_out(tmp_path, layout, dies_after=2) is None
    assert read_reference(tmp_path, FACTS, SEGMENTS) is None, "it is not finished"
    assert work_out(tmp_path, layout, dies_after=2) is None
    block = tmp_path / "block-000001.npy"
    numpy.save(block, numpy.load(block) + 1e-9)
    blocks, *values = work_out(tmp_path, layout)
    assert blocks == 3 and values == never_killed
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["reference.json", "reference.npy"]
    blocks, *values = work_out(tmp_path, layout)
    assert blocks == 0 and values == never_killed


def test_what_is_read(whole: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, values = whole
    assert read_reference(folder, FACTS, SEGMENTS).tolist() == values  # type: ignore[union-attr]
    assert read_reference(folder, {**FACTS, "data": 2}, SEGMENTS) is None
    assert read_reference(folder, FACTS, SEGMENTS + 2) is None
    assert read_reference(tmp_path / "nowhere", FACTS, SEGMENTS) is None
    said = json.loads((folder / "reference.json").read_text())
    (tmp_path / "reference.json").write_text(json.dumps(said))
    for content in (b"", b"no numbers", None):
        if content is None:
            numpy.save(tmp_path / "reference.npy", numpy.array(values) + 1e-12)
        else:
            (tmp_path / "reference.npy").write_bytes(content)
        with pytest.raises(InputError, match="is damaged: it does not have the checksum"):
            read_reference(tmp_path, FACTS, SEGMENTS)
    (tmp_path / "reference.json").write_text("{")
    assert read_reference(tmp_path, FACTS, SEGMENTS) is None


def broken(folder: Path) -> str:
    from tests.distributed.alignment import runs

    def weights(architecture: Any) -> Any:
        moved, reference = draw_models(architecture)
        first = next(iter(reference.values()))
        first[0, 0], first[1:] = torch.nan, torch.nan
        return moved, reference

    runs.draw_models = weights  # type: ignore[assignment]
    try:
        worked_out(tiny("llama"), {}, 1, folder, None)
    except InputError as error:
        return str(error)
    finally:
        runs.draw_models = draw_models
    return ""


def test_a_broken_model_is_refused(tmp_path: Path) -> None:
    assert "align.load gives log-probabilities that are NaN or Inf in segment 0" in run_on_ranks(broken, 1, tmp_path)[0]
