"""Whether a run goes on: files count by what they hold, however they are written; another file is another run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.continuation import refuse_other_run, sources
from minitron_mcore.keys import section_of
from minitron_mcore.recipe import Recipe, load_recipe, to_yaml

SECTIONS = ("data", "teacher", "tokenizer", "distill")


def data(prefix: Path, content: bytes) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".idx", ".bin"):
        prefix.with_name(prefix.name + ending).write_bytes(ending.encode() + content * 40_000)


def checkpoint(folder: Path, checksum: str) -> None:
    iteration = folder / "iter_0000003"
    iteration.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    for name, text in (("metadata.json", "{}"), (".metadata", ""), ("common.pt", ""), ("manifest.json", checksum)):
        (iteration / name).write_text(text)


def store(folder: Path, recipe: Recipe) -> None:
    """What a trained checkpoint has beside it."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "lineage.yaml").write_text(yaml.safe_dump({"stage": "distill", "sources": sources(recipe)}))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data and checkpoints, the same on another mount, and others like them."""
    for mount, mark in (("here", b"a"), ("there", b"a"), ("other", b"b")):
        data(tmp_path / mount / "x", mark)
        data(tmp_path / mount / "y", mark + b"y")
        checkpoint(tmp_path / mount / "teacher", f"sum of {mark!r}")
        (tmp_path / mount / "t.model").write_bytes(mark)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


FIRST = ["data.train=[0.3,here/x,0.7,here/y]", "teacher.checkpoint=here/teacher", "tokenizer.model=here/t.model"]


@pytest.mark.parametrize(
    "written",
    [
        "data.train=[0.3,here/x.bin,0.7,here/y.idx]",
        "data.train=0.3 here/x 0.7 ~/here/y",
        "data.train=[0.3,@/here/x,0.7,link/y]",
        "data.train=[0.3,@/there/x,0.7,there/y]",
        "teacher.checkpoint=@/here/teacher",
        "teacher.checkpoint=./link/teacher/",
        "teacher.checkpoint=~/there/teacher",
        "tokenizer.model=there/t.model",
    ],
)
@pytest.mark.parametrize("is_gone", [False, True])
def test_the_same_files_are_the_same_run(home: Path, written: str, is_gone: bool) -> None:
    """Where they lay before may be gone: what they held is recorded."""
    store(home / "run", load_recipe(None, FIRST))
    words = [*FIRST, written.replace("@", str(home))]
    if is_gone and "there" in written:
        shutil.rmtree(home / "here")
        words = [word.replace("here/", "there/").replace("tthere/", "there/") for word in words]
    refuse_other_run(home / "run", load_recipe(None, words), SECTIONS, "distill.checkpoint", "distill")


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("data.train=[0.3,other/x,0.7,other/y]", "data.train"),
        ("data.train=[0.3,here/y,0.7,here/x]", "data.train"),
        ("data.train=[0.7,here/x,0.3,here/y]", "data.train"),
        ("data.train=[here/x,here/y]", "data.train"),
        ("data.train=here/x", "data.train"),
        ("data.train=[0.3,nowhere/x,0.7,here/y]", "data.train"),
        ("data.valid=here/x", "data.valid"),
        ("teacher.checkpoint=other/teacher", "teacher.checkpoint"),
        ("teacher.checkpoint=null", "teacher.checkpoint"),
        ("tokenizer.model=other/t.model", "tokenizer.model"),
        ("distill.load=here/teacher", "distill.load"),
    ],
)
def test_other_files_are_another_run(home: Path, written: str, key: str) -> None:
    store(home / "run", load_recipe(None, FIRST))
    with pytest.raises(InputError) as caught:
        recipe = load_recipe(None, [*FIRST, written])
        refuse_other_run(home / "run", recipe, SECTIONS, "distill.checkpoint", "distill")
    assert f"holds another run: {key} is " in caught.value.rule
    assert (caught.value.key, caught.value.remedy) == ("distill.checkpoint", "name another folder, or delete that one")


def test_a_large_file_is_told_from_one_like_it(home: Path) -> None:
    """One byte in the middle of a small file, the size and the ends of a larger one."""
    for name, change in (("middle", 40_000), ("end", -1)):
        data(home / name / "x", b"a")
        content = bytearray((home / name / "x.bin").read_bytes())
        content[change] ^= 1
        (home / name / "x.bin").write_bytes(content)
    found = [sources(load_recipe(None, [f"data.train={name}/x"])) for name in ("here", "there", "middle", "end")]
    assert found[0] == found[1] and found[2] != found[0] != found[3]


def keys(is_wanted: Callable[[Any], bool]) -> set[str]:
    found = set()
    for entry in dataclasses.fields(Recipe):
        inner = section_of(entry.type)
        names = dataclasses.fields(inner) if inner else ()
        found |= {f"{entry.name}.{each.name}" for each in names if is_wanted(each)}
    return found


def test_which_keys_may_differ() -> None:
    """As a list, so that a change is seen: a key that changes results must never come in here, but for types that round
    what is computed, which a run is resumed without where there is no fp8."""
    trained = ("train", "correct", "distill", "align")
    everywhere = (
        *("checkpoint", "micro_batch_size", "eval_interval", "eval_iters", "save_interval", "loss_chunk_tokens"),
        *("recompute_granularity", "recompute_method", "recompute_num_layers", "max_skipped_iterations"),
        *("overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size", "tp_comm_overlap"),
        *("async_save", "on_save_error", "keep_last", "keep_every", "keep_best"),
        *("non_persistent_save_interval", "non_persistent_local_ckpt_dir"),
        *("replication", "replication_jump", "replication_factor"),
        *("exit_interval", "exit_duration_in_mins"),
        *("fp8_format", "fp8_recipe", "first_last_layers_bf16", "num_layers_at_start_in_bf16"),
        *("num_layers_at_end_in_bf16", "use_precision_aware_optimizer", "main_params_dtype"),
        *("exp_avg_dtype", "exp_avg_sq_dtype"),
    )
    expected = {f"{section}.{name}" for section in trained for name in everywhere}
    expected |= {"distill.recompute_loss", "distill.teacher_window", "distill.check_teacher"}
    expected |= {"teacher.parallel", "teacher.placement", "data.cache_path", "data.num_workers", "student.checkpoint"}
    expected |= {f"{section}.micro_batch_size" for section in ("importance", "evaluate", "cache")}
    expected |= {"search.side_by_side", "search.keep_checkpoints", "align.reference", "chat.cache_path", "chat.workers"}
    expected |= {"evaluate.answers", "report.output", "run.prompts", "run.only", "search.stop", "search.share"}
    assert keys(lambda entry: entry.metadata["may_change"]) == expected
    budget = {f"{section}.{name}" for section in trained for name in ("tokens", "phases", "lr_wsd_decay_tokens")}
    assert keys(lambda entry: entry.metadata["budget"]) == budget | {"align.samples", "align.epochs"}


def test_what_is_stored_is_compared_first(tmp_path: Path) -> None:
    """Not what a short recipe lacks, which is as by default."""
    (tmp_path / "recipe.yaml").write_text("data: {sequence_length: 17}\n")
    with pytest.raises(InputError, match=r"data\.sequence_length is 17 there and 16 here"):
        refuse_other_run(tmp_path, load_recipe(None, ["data.train=x", "data.sequence_length=16"]), ("data",), "output")


def test_what_a_run_makes_is_none_of_its_sources(tmp_path: Path) -> None:
    """A step of `run` names its own folder as the teacher of later steps; it is there only once the step goes on."""
    for name in ("teacher", "tokenizer"):
        (tmp_path / name).write_text(name)
    recipe = load_recipe(None, [f"teacher.checkpoint={tmp_path}/teacher", f"tokenizer.model={tmp_path}/tokenizer"])
    assert set(sources(recipe)) == {"teacher.checkpoint", "tokenizer.model"}
    assert set(sources(recipe, tmp_path / "teacher")) == {"tokenizer.model"}
