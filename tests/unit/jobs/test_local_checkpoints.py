"""What is refused of local checkpoints before anything starts, in one sentence that names the key."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.continuation import identity_of, sources
from minitron_mcore.jobs.local_checkpoints import LIBRARY, NO_LOCAL, check_local
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.training.config import TrainConfig

WHERE = {"non_persistent_save_interval": 5, "non_persistent_local_ckpt_dir": "/dev/shm/run"}


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"non_persistent_save_interval": 5}, "non_persistent_save_interval", "needs non_persistent_local_ckpt_dir"),
        ({"non_persistent_local_ckpt_dir": "/x"}, "non_persistent_local_ckpt_dir", "needs non_persistent_save_interva"),
        ({"replication": True}, "replication", "copies local checkpoints, of which there are none"),
        ({**WHERE, "replication_jump": 2}, "replication_jump", "has no effect with replication=false"),
        ({**WHERE, "replication_factor": 3}, "replication_factor", "has no effect with replication=false"),
        ({**WHERE, "replication": True, "replication_factor": 1}, "replication_factor", "at least 2"),
        ({**WHERE, "non_persistent_save_interval": 0}, "non_persistent_save_interval", "at least 1"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        TrainConfig(**keys)
    assert caught.value.key == key


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == LIBRARY else found(name))
    check_local(TrainConfig(), Path("run"), "train", World())
    with pytest.raises(InputError, match="needs nvidia-resiliency-ext, which is not installed") as caught:
        check_local(TrainConfig(**WHERE), Path("run"), "train", World())  # type: ignore[arg-type]
    assert caught.value.key == "train.non_persistent_save_interval"
    assert "pip install 'nvidia-resiliency-ext" in caught.value.remedy


@pytest.mark.parametrize(
    ("jump", "factor", "size", "local_size", "is_fit"),
    [
        (None, 2, 16, 8, True),
        (None, 2, 8, 8, False),
        (None, 3, 32, 8, False),
        (None, 2, 24, 8, False),
        (8, 4, 32, 4, True),
        (4, 2, 12, 4, False),
        (1, 2, 2, 2, True),
    ],
)
def test_where_copies_go(
    jump: int | None, factor: int, size: int, local_size: int, is_fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    keys: dict[str, Any] = {**WHERE, "replication": True, "replication_jump": jump, "replication_factor": factor}
    world = World(size=size, local_size=local_size)
    if is_fit:
        check_local(TrainConfig(**keys), Path("run"), "train", world)
        return
    with pytest.raises(InputError, match=f"which do not divide the {size} there are") as caught:
        check_local(TrainConfig(**keys), Path("run"), "distill", world)
    assert caught.value.key == "distill.replication_factor"


@pytest.mark.parametrize(("local", "is_fit"), [("run", False), ("run/local", False), ("runs", True), ("other", True)])
def test_not_in_the_folder_of_the_checkpoints(
    local: str, is_fit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (tmp_path / "link").symlink_to(tmp_path)
    keys: dict[str, Any] = {**WHERE, "non_persistent_local_ckpt_dir": str(tmp_path / "link" / local)}
    if is_fit:
        check_local(TrainConfig(**keys), tmp_path / "run", "train", World())
        return
    with pytest.raises(InputError, match="lies in the folder of the checkpoints") as caught:
        check_local(TrainConfig(**keys), tmp_path / "run", "train", World())
    assert caught.value.key == "train.non_persistent_local_ckpt_dir"


def test_what_short_trainings_are_given_is_the_default() -> None:
    assert {name: getattr(TrainConfig(), name) for name in NO_LOCAL} == NO_LOCAL


def test_which_recipes_are_one_run(tmp_path: Path) -> None:
    """All that a run may change on the way, but for its budget, which decides what comes next."""
    for name in ("x", "y"):
        for ending in (".bin", ".idx"):
            (tmp_path / f"{name}{ending}").write_bytes(name.encode())

    def identity(*keys: str) -> str:
        recipe = load_recipe(None, [f"data.train={tmp_path / 'x'}", "train.tokens=1000", *keys])
        return identity_of(recipe, ("model", "data", "train"), sources(recipe))

    one = identity()
    same = ("train.micro_batch_size=2", "train.save_interval=3", "train.checkpoint=elsewhere", "log.interval=3")
    assert all(identity(key) == one for key in same)
    others = ("train.lr=1e-4", "train.tokens=2000", "seed=7", "data.sequence_length=64", f"data.train={tmp_path / 'y'}")
    assert len({one, *map(identity, others)}) == 1 + len(others)
    for ending in (".bin", ".idx"):
        (tmp_path / f"copy{ending}").write_bytes(b"x")
    assert identity(f"data.train={tmp_path / 'copy'}") == one
