"""A run goes on from the newest checkpoint that is whole: a damaged one is skipped, with a warning that names the file,
and where none is left nothing is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.checkpoint.folder import (
    TRACKER,
    drop_every_iteration,
    latest_iteration,
    read_lineage,
    resumable_iterations,
    resumed_iteration,
)
from minitron_mcore.checkpoint.integrity import damaged_files, damaged_pieces
from minitron_mcore.checkpoint.reader import find_elements
from minitron_mcore.checkpoint.unpickle import read_metadata
from minitron_mcore.errors import InputError
from tests.distributed.ranks import run_on_ranks
from tests.distributed.training.test_resume import STEPS, fit_on_rank


def flip(file: Path) -> None:
    """A bit of a number in the middle of the largest tensor in a file, or of a file that holds none."""
    place, content = file.parent, bytearray(file.read_bytes())
    first, size = 0, len(content)
    if file.suffix == ".distcp":
        stored = read_metadata(place).storage_data.values()
        piece = max((info for info in stored if info.relative_path == file.name), key=lambda info: info.length)
        found = find_elements(place, piece)
        assert found is not None
        first, size = found[2], math.prod(found[0]) * found[1].itemsize
    content[first + size // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def damaged_on_rank(folder: str, world_size: int) -> dict[str, Any]:
    """A whole run, and one that goes on where iterations 6 and 4 are damaged; and one where all are."""
    from minitron_mcore.runtime.start import Runtime, start

    whole, hurt, lost = (Path(folder) / name for name in ("whole", "hurt", "lost"))
    keys: dict[str, Any] = {"save_interval": 2, "lr": 1e-2}
    history = fit_on_rank({}, world_size, str(whole), **keys)["history"]

    def prepare() -> None:
        for place in (hurt, lost):
            shutil.copytree(whole, place)
            cut(place / "iter_0000004" / "__0_0.distcp")
        flip(hurt / "iter_0000006" / "__1_0.distcp")
        (lost / "iter_0000006" / "common.pt").unlink()
        flip(lost / "iter_0000002" / "__0_0.distcp")

    start().on_main(prepare)
    said, printing = [], Runtime.print
    Runtime.print = lambda self, *words: said.append(" ".join(map(str, words)))  # type: ignore[method-assign]
    try:
        resumed = fit_on_rank({}, world_size, str(hurt), **keys)["history"]
        before = contents(lost)
        try:
            fit_on_rank({}, world_size, str(lost), **keys)
            refusal = ""
        except InputError as error:
            refusal = f"{error.exit_code}: {error}"
    finally:
        Runtime.print = printing  # type: ignore[method-assign]
    warnings = [line for line in said if line.startswith("WARNING")]
    stays = contents(lost) == before
    return {"whole": history, "resumed": resumed, "refusal": refusal, "warnings": warnings, "stays": stays}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("damaged")
    return folder, run_on_ranks(damaged_on_rank, 2, str(folder), 2)


def test_damaged_ones_are_skipped(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    tmp_path, (first, second) = runs
    assert first["resumed"] == first["whole"] and sorted(first["whole"]) == list(range(1, STEPS + 1))
    hurt, lost = tmp_path / "hurt", tmp_path / "lost"
    words = [
        f"of iteration 6 is skipped, for it is damaged: {hurt / 'iter_0000006' / '__1_0.distcp'}: ",
        f"of iteration 4 is skipped, for it is damaged: {hurt / 'iter_0000004' / '__0_0.distcp'} is cut off: it has ",
        f"of iteration 6 is skipped, for it is damaged: {lost / 'iter_0000006' / 'common.pt'} is missing",
        f"of iteration 4 is skipped, for it is damaged: {lost / 'iter_0000004' / '__0_0.distcp'} is cut off: it has ",
        f"of iteration 2 is skipped, for it is damaged: {lost / 'iter_0000002' / '__0_0.distcp'}: ",
    ]
    for warning, word in zip(first["warnings"], words, strict=True):
        assert word in warning and "\n" not in warning
    assert "has changed since it was written: its checksum differs" in first["warnings"][0]
    assert first["warnings"] == second["warnings"], "every rank has the same answer"
    assert first["refusal"] == second["refusal"]
    assert first["refusal"].startswith(f"2: {lost} holds no checkpoint that is whole; of the oldest, {lost}")
    assert first["refusal"].endswith(": restore one, or name another folder to begin anew")
    assert first["stays"] and second["stays"], "nothing is written over"
    # It went on from 2, and has saved 4 and 6 anew.
    assert latest_iteration(hurt) == STEPS
    for iteration in (2, 4, 6):
        place = hurt / f"iter_{iteration:07d}"
        assert damaged_files(place) == damaged_pieces(place, (0, 1)) == []
    assert read_lineage(hurt) == read_lineage(tmp_path / "whole")


def drop_manifest_entry(file: Path) -> None:
    text = file.read_text()
    assert '"decoder.final_layernorm.weight"' in text
    file.write_text(text.replace('"decoder.final_layernorm.weight"', '"decoder.final_layernorm.wait"'))


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing, though manifest.json names it"),
    ("__1_0.distcp", cut, "__1_0.distcp is cut off: it has "),
    ("__0_0.distcp", flip, "has changed since it was written: its checksum differs"),
    (".metadata", flip, ".metadata has changed since it was written"),
    ("metadata.json", Path.unlink, "metadata.json is missing"),
    ("manifest.json", cut, "manifest.json is damaged: it is not a manifest"),
    ("manifest.json", drop_manifest_entry, "decoder.final_layernorm.weight, which manifest.json does not name"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_each_one_is_found(name: str, damage: Callable[[Path], None], words: str, runs: Any, tmp_path: Path) -> None:
    place = tmp_path / "iter_0000006"
    shutil.copytree(runs[0] / "whole" / "iter_0000006", place)
    assert damaged_files(place) == [] and all(damaged_pieces(place, (number, 2)) == [] for number in (0, 1))
    damage(place / name)
    faults = damaged_files(place) or [fault for number in (0, 1) for fault in damaged_pieces(place, (number, 2))]
    assert any(words in fault and str(place) in fault for fault in faults), faults


def test_where_a_run_goes_on_by_names_alone(tmp_path: Path) -> None:
    for iteration in (2, 4, 6, 8):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
        (tmp_path / f"iter_{iteration:07d}" / "metadata.json").touch()
    # The tracker was lost, or the run was killed before it wrote its first.
    assert resumable_iterations(tmp_path) == [8, 6, 4, 2] and resumed_iteration(tmp_path) == 8
    (tmp_path / TRACKER).write_text("6")
    assert resumable_iterations(tmp_path) == [6, 4, 2] and resumed_iteration(tmp_path) == 6
    shutil.rmtree(tmp_path / "iter_0000006")
    assert resumable_iterations(tmp_path) == [6, 4, 2] and resumed_iteration(tmp_path) == 4
    (tmp_path / TRACKER).write_text("rubbish")
    assert resumable_iterations(tmp_path) == [8, 4, 2]
    for iteration in (2, 4, 8):
        (tmp_path / f"iter_{iteration:07d}" / "metadata.json").unlink()
    with pytest.raises(InputError, match=r"no checkpoint that is whole: .*iter_0000008/metadata\.json is missing"):
        resumed_iteration(tmp_path)
    drop_every_iteration(tmp_path)
    assert not list(tmp_path.iterdir()) and resumed_iteration(tmp_path) is None
