"""A checkpoint's folder: when an iteration counts, and what lies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.checkpoint.folder import (
    TRACKER,
    find_checkpoint,
    finish_iteration,
    latest_iteration,
    read_architecture,
    read_lineage,
    write_description,
)
from minitron_mcore.errors import InputError
from tests.refusals import refuses


def finished(folder: Path, iteration: int) -> Path:
    """What a save leaves, as far as it is looked at here."""
    temporary = folder / f".unfinished_iter_{iteration:07d}"
    temporary.mkdir(parents=True)
    (temporary / "metadata.json").write_text("{}")
    finish_iteration(folder, temporary, iteration)
    return folder / f"iter_{iteration:07d}"


def test_the_newest_finished_iteration(tmp_path: Path) -> None:
    assert latest_iteration(tmp_path / "nowhere") is None and latest_iteration(tmp_path) is None
    assert (finished(tmp_path, 5) / "metadata.json").is_file()
    finished(tmp_path, 12)
    assert latest_iteration(tmp_path) == 12
    assert find_checkpoint(str(tmp_path), "checkpoint") == (tmp_path, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "iter_0000012", TRACKER]


def test_an_iteration_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    (finished(tmp_path, 5) / "of_the_old_one").touch()
    assert [path.name for path in finished(tmp_path, 5).iterdir()] == ["metadata.json"]


def test_what_a_cut_off_save_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    """Weights without their final name, and a folder with its name to which the tracker has not moved on."""
    for name in (".unfinished_iter_0000009", "iter_0000009"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").write_text("{}")
    assert latest_iteration(tmp_path) is None
    with pytest.raises(InputError, match=f"checkpoint={tmp_path} holds no finished checkpoint: {TRACKER} is missing"):
        find_checkpoint(tmp_path, "checkpoint")
    finished(tmp_path, 7)
    assert latest_iteration(tmp_path) == 7


@pytest.mark.parametrize("cut_off", [True, False])
def test_a_tracker_that_names_no_whole_iteration(tmp_path: Path, cut_off: bool) -> None:
    iteration = finished(tmp_path, 5)
    (iteration / "metadata.json").unlink()
    if not cut_off:
        iteration.rmdir()
    with pytest.raises(InputError, match=r"names iteration 5, but .*iter_0000005 is not a finished checkpoint"):
        latest_iteration(tmp_path)


@pytest.mark.parametrize("content", [b"", b"release", b"-3", b"5.0", b"1e3", "²".encode(), b"\xff\xfe5\x00", b"5 7"])
def test_a_tracker_with_rubbish(tmp_path: Path, content: bytes) -> None:
    finished(tmp_path, 5)
    (tmp_path / TRACKER).write_bytes(content)
    with refuses(value=tmp_path / TRACKER, rule="instead of a number", remedy="of the newest finished iteration"):
        latest_iteration(tmp_path)


def test_a_tracker_written_by_hand(tmp_path: Path) -> None:
    finished(tmp_path, 5)
    finished(tmp_path, 9)
    (tmp_path / TRACKER).write_text(" 5\n")
    assert latest_iteration(tmp_path) == 5


@pytest.mark.parametrize(
    ("given", "value", "rule"),
    [(None, None, "is not given"), ("", None, "is not given"), ("/nowhere", "/nowhere", "is not there")],
)
def test_a_checkpoint_that_must_be_there(given: str | None, value: str | None, rule: str) -> None:
    with refuses("teacher.checkpoint", value, rule, "name the folder of a checkpoint"):
        find_checkpoint(given, "teacher.checkpoint")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refuses("checkpoint", tmp_path / "file", "is a file", "name the folder of a checkpoint"):
        find_checkpoint(tmp_path / "file", "checkpoint")


def test_a_hugging_face_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    remedy = f"minitron import hf={tmp_path} checkpoint=DIR"
    with refuses("teacher.checkpoint", tmp_path, "is a Hugging Face folder", remedy):
        find_checkpoint(tmp_path, "teacher.checkpoint")


def test_a_runs_folder_is_no_checkpoint_but_holds_some(tmp_path: Path) -> None:
    for place in ("teacher", "students/a/distilled"):
        finished(tmp_path / place, 5)
        (tmp_path / place / TRACKER).write_text("5")
    (tmp_path / "scores.safetensors").touch()
    names = f"{tmp_path / 'students/a/distilled'}, {tmp_path / 'teacher'}"
    with refuses("checkpoint", tmp_path, "is not a checkpoint itself", names):
        find_checkpoint(tmp_path, "checkpoint")


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    architecture = build_architecture(sizes)
    lineage = {"stage": "train", "tokens": 8, "load": None}
    write_description(
        tmp_path, architecture, lineage=lineage, recipe="name: a\n", save_tokenizer=lambda path: Path(path).mkdir()
    )
    assert read_architecture(tmp_path) == architecture and read_lineage(tmp_path) == lineage
    assert (tmp_path / "recipe.yaml").read_text() == "name: a\n" and (tmp_path / "tokenizer").is_dir()
    assert not list(tmp_path.glob("*.tmp"))


def test_torn_descriptions_are_named(tmp_path: Path) -> None:
    assert read_lineage(tmp_path) == {}
    (tmp_path / "lineage.yaml").write_text("stage: [\n")
    with pytest.raises(InputError, match=r"lineage\.yaml is not YAML"):
        read_lineage(tmp_path)
    with pytest.raises(InputError, match=r"architecture\.yaml is missing"):
        read_architecture(tmp_path)
