"""A cache is known by what it holds: which teacher it is of, and whether a run that goes on began with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.architecture import Architecture, save_architecture
from minitron_mcore.checkpoint.folder import TRACKER, identify_weights
from minitron_mcore.distillation.cache.file import CacheReader, write_settings
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.cache import check_teacher, lineage_of, refuse_other_targets
from minitron_mcore.jobs.continuation import refuse_other_run
from minitron_mcore.recipe import Recipe, load_recipe
from tests.distributed.models import tiny

KEY = "distill.teacher=cache:targets"


def checkpoint(folder: Path, architecture: Architecture, manifest: str | None = None) -> Path:
    """A finished one as far as its description goes."""
    (folder / "iter_0000003").mkdir(parents=True)
    (folder / "iter_0000003" / "metadata.json").write_text("{}")
    if manifest is not None:
        (folder / "iter_0000003" / "manifest.json").write_text(manifest)
    (folder / TRACKER).write_text("3")
    save_architecture(architecture, folder / "architecture.yaml")
    return folder


def made_by(folder: Path, architecture: Architecture) -> dict[str, Any]:
    """The settings of a cache by the teacher in `folder`."""
    asked = {"checkpoint": str(folder), "architecture": architecture.to_dict(), **identify_weights(folder, 3)}
    settings = {"method": "sampled", "draws": 50, "proposal_temperature": 1.0, "temperature": 1.0, "vocab_size": 1003}
    settings |= {"dtype": "fp16", "precision": "fp32", "num_samples": 16, "shard_samples": 4, "tokenizer": "abc"}
    return json.loads(json.dumps({**settings, "teacher": asked}))


def with_teacher(folder: Path) -> Recipe:
    return load_recipe(None, [f"teacher.checkpoint={folder}"])


def test_a_teacher_without_manifest_is_known_by_its_place_and_shape(tmp_path: Path) -> None:
    llama, other = tiny("llama"), tiny("llama", hidden_size=32, ffn_hidden_size=64)
    first, second = checkpoint(tmp_path / "first", llama), checkpoint(tmp_path / "second", llama)
    settings = made_by(first, llama)
    assert settings["teacher"]["weights"] is None
    check_teacher(with_teacher(first), settings)
    check_teacher(with_teacher(tmp_path / "second" / ".." / "first"), settings)
    save_architecture(other, second / "architecture.yaml")
    with pytest.raises(InputError, match="was made by another teacher"):
        check_teacher(with_teacher(second), made_by(second, llama))
    for named in (second, checkpoint(tmp_path / "third", llama), checkpoint(tmp_path / "fourth", llama, "{}")):
        with pytest.raises(InputError, match="was made by another teacher"):
            check_teacher(with_teacher(named), settings)
    known = made_by(tmp_path / "fourth", llama)
    check_teacher(with_teacher(checkpoint(tmp_path / "moved", llama, "{}")), known)
    with pytest.raises(InputError, match="was made by another teacher"):
        check_teacher(with_teacher(checkpoint(tmp_path / "fifth", other, "{}")), known)


def test_a_run_goes_on_with_the_targets_it_began_with(tmp_path: Path) -> None:
    """More samples, or another place, are the same targets; other draws, weights or data are not."""
    teacher = checkpoint(tmp_path / "teacher", tiny("llama"), "{}")
    settings, run = made_by(teacher, tiny("llama")), tmp_path / "run"

    def cached(changes: dict[str, Any], **of_teacher: Any) -> dict[str, Any]:
        write_settings(tmp_path / "targets", settings | changes | {"teacher": settings["teacher"] | of_teacher})
        return CacheReader(tmp_path / "targets").settings

    run.mkdir()
    refuse_other_targets(run, cached({}), KEY)
    (run / "lineage.yaml").write_text(yaml.safe_dump({"stage": "distill", "teacher": lineage_of(cached({}))}))
    refuse_other_targets(run, cached({"num_samples": 64}), KEY)
    refuse_other_targets(run, cached({}, checkpoint="/elsewhere"), KEY)
    top_k = {"method": "top_k", "top_k": 5}
    for changes, of_teacher, words in (
        ({"draws": 12}, {}, "draws is 50 there and 12 in"),
        (top_k, {}, "method is 'sampled' there and 'top_k' in"),
        ({}, {"weights": "other"}, "weights is '"),
        ({}, {"iteration": 4}, "iteration is 3 there and 4 in"),
        ({"precision": "bf16"}, {}, "precision is 'fp32' there and 'bf16' in"),
        ({"tokenizer": "xyz"}, {}, "was made from other data"),
    ):
        with pytest.raises(InputError, match="was distilled from other targets so far: .*" + words):
            refuse_other_targets(run, cached(changes, **of_teacher), KEY)


def test_where_a_cache_lies_may_change(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("distill:\n  teacher: cache:/here\n  temperature: 1.0\n")
    moved = load_recipe(None, ["distill.teacher=cache:/there"])
    refuse_other_run(tmp_path, moved, ("distill",), "distill.checkpoint")
    with pytest.raises(InputError, match=r"distill\.teacher is cache:/here there and null here"):
        refuse_other_run(tmp_path, load_recipe(None, []), ("distill",), "distill.checkpoint")


def test_a_cache_is_no_place_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(InputError, match="holds a cache of a teacher's targets: name another folder"):
        refuse_other_run(tmp_path, load_recipe(None, []), ("distill",), "distill.checkpoint")
