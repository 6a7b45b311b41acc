"""`import` and `export` of what is damaged, to where nothing can be written, and killed in the middle.

Through the verbs, on one rank and on two: exit code 2, the same sentence on every rank, naming file and tensor, and
nothing written. A rank that waits for another would run into the time limit of `run_on_ranks`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests import warm
from tests.distributed.hf_cases import architecture_of, save_with_transformers, tensors_of
from tests.distributed.ranks import run_on_ranks
from tests.e2e.convert_damages import DAMAGES, SINGLE, Damage, copy_linked, rewrite
from tests.e2e.launchers import environment
from tests.e2e.verbs import all_typed, run_well
from tests.unit.text_data import small_tokenizer

Result = tuple[int, str, bool]  # exit code, stderr, whether everything is as it was


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that are right, `checkpoint`, imported, and `damaged/NAME`."""
    root = tmp_path_factory.mktemp("refusals")
    small_tokenizer(root / "tokenizer.model")
    save_with_transformers("llama-scaled", root / "sharded")
    cases = {"single": "llama-scaled", "llama-tied": "llama-tied", "nemotron": "nemotron", "mistral": "mistral"}
    for name, case in {**cases, "qwen2": "qwen2"}.items():
        save_with_transformers(case, root / "several" / name)
        (root / name).mkdir()
        shutil.copy(root / "several" / name / "config.json", root / name)
        save_file(tensors_of(root / "several" / name), root / name / SINGLE, metadata={"format": "pt"})
    copy_linked(root / "single", root / "small")
    weights = tensors_of(root / "single")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100].clone()
    (root / "small" / SINGLE).unlink()
    save_file(weights, root / "small" / SINGLE, metadata={"format": "pt"})
    config = json.loads((root / "single" / "config.json").read_text())
    rewrite(root / "small" / "config.json", json.dumps({**config, "vocab_size": 100}).encode())
    for name in ("sharded", "single", "small", "llama-tied"):
        shutil.copy(root / "tokenizer.model", root / name)
    for damage in DAMAGES:
        damage.change(copy_linked(root / damage.source, root / "damaged" / damage.name))
    (root / "file").write_text("something of the user's")
    (root / "papers").mkdir()
    (root / "papers" / "thesis.txt").write_text("years of work")
    (root / "nowhere").symlink_to(root / "gone")
    run_well("import", f"hf={root / 'sharded'}", f"checkpoint={root / 'checkpoint'}", "parallel.tensor=2", world_size=2)
    return root


def refused(commands: list[list[str]], root: Path, world_size: int) -> list[Result]:
    """The results of commands that every rank must answer alike."""
    ranks = run_on_ranks(all_typed, world_size, commands, root)
    assert all(rank == ranks[0] for rank in ranks), "ranks say different things"
    return ranks[0]


def check(verb: str, result: Result, words: str, expected: int = 2) -> None:
    code, shown, untouched = result
    assert code == expected and shown.startswith(f"minitron {verb}: ") and shown.count("\n") == 1, shown
    assert words in shown and untouched, shown


@pytest.fixture(scope="module")
def import_results(root: Path) -> dict[tuple[int, str], Result]:
    """By number of ranks and damage; each command has a target of its own, so that one mistake shows once."""
    found = {}
    for world_size in (1, 2):
        commands = [
            [
                "import",
                f"hf={root / 'damaged' / damage.name}",
                f"checkpoint={root / f'new {world_size} {damage.name}'}",
                f"parallel.tensor={world_size}",
            ]
            for damage in DAMAGES
        ]
        for damage, result in zip(DAMAGES, refused(commands, root, world_size), strict=True):
            found[world_size, damage.name] = result
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_folder(
    root: Path, import_results: dict[tuple[int, str], Result], damage: Damage, world_size: int
) -> None:
    where = root / "damaged" / damage.name
    check("import", import_results[world_size, damage.name], damage.words.replace("@", str(where)))


@pytest.mark.parametrize("name", ["sharded", "single", "llama-tied"])
def test_the_folders_that_were_damaged_are_right(root: Path, tmp_path: Path, name: str) -> None:
    run_well("import", f"hf={root / name}", f"checkpoint={tmp_path / 'checkpoint'}")


def test_a_tied_head_that_is_the_embedding(root: Path, tmp_path: Path) -> None:
    """Some tools write it twice: that says nothing new, and the export leaves it out."""
    weights = tensors_of(root / "llama-tied")
    copy_linked(root / "llama-tied", tmp_path / "twice")
    (tmp_path / "twice" / SINGLE).unlink()
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **head}, tmp_path / "twice" / SINGLE, metadata={"format": "pt"})
    names = f"checkpoint={tmp_path / 'checkpoint'}"
    run_well("import", f"hf={tmp_path / 'twice'}", names, "parallel.tensor=2", world_size=2)
    run_well("export", f"hf={tmp_path / 'again'}", names)
    again = tensors_of(tmp_path / "again")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


# What is wrong with a command that is right -> what must be said.
TARGETS = [
    ("import", "checkpoint=@/file", "checkpoint=@/file is a file: name a folder"),
    ("import", "checkpoint=@/papers", "checkpoint=@/papers exists: name a folder that does not"),
    ("import", "checkpoint=@/sharded", "checkpoint=@/sharded exists"),
    ("import", "checkpoint=@/file/in/it", "checkpoint=@/file/in/it cannot be written, because @/file is not a folder"),
    ("import", "checkpoint=/proc/nowhere/it", "checkpoint=/proc/nowhere/it cannot be written"),
    ("import", "checkpoint=@/nowhere", "checkpoint=@/nowhere"),
    ("import", "hf=@/file", "hf=@/file is a file: name the folder"),
    ("export", "hf=@/file", "hf=@/file is a file: name a folder"),
    ("export", "hf=@/checkpoint", "hf=@/checkpoint exists"),
    ("export", "hf=@/file/in/it", "hf=@/file/in/it cannot be written"),
    ("export", "hf=/proc/nowhere/it", "hf=/proc/nowhere/it cannot be written"),
    ("export", "hf=@/nowhere", "hf=@/nowhere"),
    ("export", "max_shard_size=5Gb", "max_shard_size=5Gb"),
    ("export", "checkpoint=@/wrong/architecture", "@/wrong/architecture/architecture.yaml"),
    ("export", "checkpoint=@/wrong/family", "@/wrong/family/architecture.yaml"),
    ("export", "checkpoint=@/wrong/lineage", "@/wrong/lineage/lineage.yaml"),
    ("export", "checkpoint=@/wrong/tokenizer", "@/wrong/tokenizer"),
    ("export", "checkpoint=@/wrong/vocabulary", "has 600 ids and the model vocab_size=500"),
    ("export", "checkpoint=@/wrong/cut", "@/wrong/cut/iter_0000000"),
    ("export", "checkpoint=@/wrong/gone", "@/wrong/gone/iter_0000000"),
    ("export", "checkpoint=@/sharded", "checkpoint=@/sharded is a Hugging Face folder, not a Megatron checkpoint"),
]


@pytest.fixture(scope="module")
def target_results(root: Path) -> dict[tuple[int, str], Result]:
    for name in ("architecture", "family", "lineage", "tokenizer", "vocabulary", "cut", "gone"):
        shutil.copytree(root / "checkpoint", root / "wrong" / name)
    wrong = root / "wrong"
    described = yaml.safe_load((wrong / "family" / "architecture.yaml").read_text())
    (wrong / "family" / "architecture.yaml").write_text(yaml.safe_dump({**described, "family": "gpt2"}))
    (wrong / "vocabulary" / "architecture.yaml").write_text(yaml.safe_dump({**described, "vocab_size": 500}))
    (wrong / "architecture" / "architecture.yaml").write_text("num_layers: [\n")
    (wrong / "lineage" / "lineage.yaml").write_text("stage: [\n")
    (wrong / "tokenizer" / "tokenizer" / "tokenizer.model").write_bytes(b"no model")
    weights = sorted((wrong / "cut" / "iter_0000000").glob("*.distcp"))[-1]
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    sorted((wrong / "gone" / "iter_0000000").glob("*.distcp"))[-1].unlink()

    # What every command has, before it is made wrong.
    right = {"import": ("hf=@/sharded", "checkpoint=@/new N"), "export": ("checkpoint=@/checkpoint", "hf=@/new N")}
    found = {}
    for world_size in (1, 2):
        commands = [
            [
                text.replace("@", str(root)).replace("/new N", f"/new {world_size} {number}")
                for text in (verb, *right[verb], word, f"parallel.tensor={world_size}")
            ]
            for number, (verb, word, _) in enumerate(TARGETS)
        ]
        for (verb, word, _), result in zip(TARGETS, refused(commands, root, world_size), strict=True):
            found[world_size, f"{verb} {word}"] = result
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("verb", "word", "words"), TARGETS, ids=lambda word: str(word))
def test_what_cannot_be_written_or_read(
    root: Path, target_results: dict[tuple[int, str], Result], verb: str, word: str, words: str, world_size: int
) -> None:
    check(verb, target_results[world_size, f"{verb} {word}"], words.replace("@", str(root)))


def typed_with_little_room(commands: list[list[str]], root: Path, room: int, ranks: list[int]) -> list[Result]:
    """No file may grow beyond `room` bytes on these ranks: writing fails in the middle, as on a full disk."""
    import torch.distributed

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() in ranks:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the worker's own log may have grown beyond that already
            return all_typed(commands, root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# The model is 1.8 MB. Where weights fit, a card of 3 MB beside them does not.
SMALL, LARGE = 100_000, 2_000_000


@pytest.mark.parametrize(
    ("verb", "room", "world_size", "ranks"),
    [
        ("import", SMALL, 1, [0]),
        ("import", SMALL, 2, [0, 1]),
        ("import", SMALL, 2, [0]),
        ("import", SMALL, 2, [1]),
        ("import", LARGE, 2, [0]),
        ("export", SMALL, 1, [0]),
        ("export", SMALL, 2, [0]),
        ("export", LARGE, 2, [0]),
    ],
)
def test_a_full_disk(root: Path, tmp_path: Path, verb: str, room: int, world_size: int, ranks: list[int]) -> None:
    source = "single" if verb == "import" else "checkpoint"
    shutil.copytree(root / source, tmp_path / "source")
    notice = tmp_path / "source" / ("LICENSE" if verb == "import" else "hugging_face/LICENSE")
    notice.write_bytes(b"terms " * 500_000)
    names = {"import": ("hf", "checkpoint"), "export": ("checkpoint", "hf")}[verb]
    target = tmp_path / "deep" / "target"
    command = [verb, f"{names[0]}={tmp_path / 'source'}", f"{names[1]}={target}", f"parallel.tensor={world_size}"]
    for code, shown, _ in (
        rank[0] for rank in run_on_ranks(typed_with_little_room, world_size, [command], tmp_path, room, ranks)
    ):
        assert code == 1 and shown.startswith(f"minitron {verb}: ") and shown.count("\n") == 1, shown
        assert "cannot be written" in shown and str(target.parent) in shown and "File too large" in shown, shown
    left = [path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "source")]
    assert left in ([], [target.parent]), "something half-written is left"
    run_well(*command, world_size=world_size)
    assert target.is_dir() and list(target.parent.iterdir()) == [target]


# What of the target's files cannot be opened for writing: those of one rank, and what the first rank alone writes.
UNWRITABLE = [
    ("import", name)
    for name in (
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata.tmp",
        "metadata.json",
        "manifest.json.tmp",
        "latest_checkpointed_iteration.txt.tmp",
        "architecture.yaml.tmp",
        "tokenizer.model.tmp",
        "hugging_face/config.json.tmp",
    )
]
UNWRITABLE += [
    ("export", name)
    for name in (
        "model-00002-of-00005.safetensors",
        "model.safetensors.index.json",
        "/config.json",
        "generation_config.json.tmp",
        "tokenizer.json",
        "manifest.json.tmp",
        "README.md",
    )
]


def typed_on_a_full_disk(cases: list[tuple[str, list[str]]], root: Path) -> list[Result]:
    """Each command, with ENOSPC for whoever opens a file whose path ends so to write it."""
    full: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if (
            full
            and event == "open"
            and str(arguments[0]).endswith(full[0])
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(watch)  # for good, hence without effect once `full` is empty
    results = []
    for ending, command in cases:
        full[:] = [ending]
        try:
            results += all_typed([command], root)
        finally:
            full.clear()
    return results


@pytest.fixture(scope="module")
def full_disk_results(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    """On two ranks."""
    folder = tmp_path_factory.mktemp("full")
    given = {
        "import": [f"hf={root / 'sharded'}"],
        "export": [f"checkpoint={root / 'checkpoint'}", "max_shard_size=400KB"],
    }
    target = {"import": "checkpoint", "export": "hf"}
    cases = [
        (name, [verb, *given[verb], f"{target[verb]}={folder / f'{verb} {number}'}", "parallel.tensor=2"])
        for number, (verb, name) in enumerate(UNWRITABLE)
    ]
    ranks = run_on_ranks(typed_on_a_full_disk, 2, cases, folder)
    assert ranks[0] == ranks[1], "ranks say different things"
    return dict(zip(UNWRITABLE, ranks[0], strict=True))


@pytest.mark.parametrize(("verb", "name"), UNWRITABLE)
def test_a_full_disk_at_any_file(full_disk_results: dict[tuple[str, str], Result], verb: str, name: str) -> None:
    key = {"import": "checkpoint=", "export": "hf="}[verb]
    check(verb, full_disk_results[verb, name], f"minitron {verb}: {key}", 1)
    _, shown, _ = full_disk_results[verb, name]
    assert "cannot be written: [Errno 28] No space left on device" in shown and name in shown, shown


# A moment -> how killed_at.py knows it: the audit event, and how the path ends that it is about.
MOMENTS = {
    "import among the weights": ("open", ".distcp"),
    "import before it counts": ("os.rename", "target"),
    "export among the weights": ("open", "model-00003-of-00005.safetensors"),
    "export before it counts": ("os.rename", "target"),
}


def test_killed_in_the_middle(root: Path, tmp_path: Path) -> None:
    """kill -9 leaves nothing that looks finished, and the same command then ends well."""
    shutil.copytree(root / "sharded", tmp_path / "hf")
    shutil.copytree(root / "checkpoint", tmp_path / "checkpoint")
    commands, folders, processes = [], [], []
    for number, (moment, (event, ending)) in enumerate(MOMENTS.items()):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        if moment.startswith("import"):
            command = ["import", f"hf={tmp_path / 'hf'}", f"checkpoint={folder / 'target'}"]
        else:
            names = [f"checkpoint={tmp_path / 'checkpoint'}", f"hf={folder / 'target'}"]
            command = ["export", *names, "max_shard_size=400KB"]
        commands.append(command)
        folders.append(folder)
        log = tmp_path / f"{number}.log"
        processes.append(warm.start("tests.e2e.killed_at", [event, ending, *command], output=log, env=environment()))
    for number, process in enumerate(processes):
        assert process.wait(timeout=120) == -signal.SIGKILL, (tmp_path / f"{number}.log").read_text()

    for command, folder in zip(commands, folders, strict=True):
        left = list(folder.iterdir())
        assert left and all(path.name.startswith(".") for path in left), "killed too early or too late"
        run_well(*command)
        assert [path.name for path in folder.iterdir()] == ["target"]
    expected = tensors_of(root / "sharded")
    for folder in folders[2:]:
        found = tensors_of(folder / "target")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    for folder in folders[:2]:
        shown = json.loads(run_well("inspect", f"path={folder / 'target'}", "json=true", "verify=true"))
        assert shown["parameters"] == architecture_of("llama-scaled").num_parameters
