"""Files and folders that are closed to this user, or nobody's to write: one sentence that names the key.

As root, for whom nothing is closed, the tests go on as another user.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minitron_mcore import cli, recipe
from minitron_mcore.checkpoint.folder import TRACKER, find_checkpoint, read_architecture
from minitron_mcore.data.blend import check_prefixes, parse_blend
from minitron_mcore.data.corpus import find_files, make_parent
from minitron_mcore.data.text_file import inspect_file
from minitron_mcore.data.tokenizer_files import FILES, copy_files
from minitron_mcore.distillation.cache.file import read_settings
from minitron_mcore.errors import InputError, StorageError
from minitron_mcore.files import writing
from minitron_mcore.jobs.inputs import output_folder
from minitron_mcore.recipe import Recipe

NOBODY = 65534


@contextmanager
def as_another_user() -> Iterator[None]:
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that everybody may look into, unlike pytest's own; its files are open too, until a test closes one."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        folder.chmod(0o755)
        checkpoint = folder / "inner" / "checkpoint"
        (checkpoint / "iter_0000003").mkdir(parents=True)
        (checkpoint / "tokenizer").mkdir()
        for name in ("iter_0000003/metadata.json", "iter_0000003/.metadata", "architecture.yaml", "cache.json"):
            (checkpoint / name).write_text("{}")
        (checkpoint / TRACKER).write_text("3")
        for name in ("tokens.bin", "tokens.idx"):
            (folder / "inner" / name).touch()
        yield folder
        for path in sorted(folder.rglob("*")):
            path.chmod(0o755)


def refusal(work: Callable[[], object]) -> str:
    with as_another_user(), pytest.raises(InputError) as caught:
        work()
    assert type(caught.value) is InputError
    return str(caught.value)


@pytest.mark.parametrize(
    "closed", ["", "checkpoint", "checkpoint/iter_0000003", "checkpoint/iter_0000003/.metadata"]
    + [f"checkpoint/{name}" for name in ("architecture.yaml", TRACKER, "tokenizer")],
)  # fmt: skip
def test_a_closed_checkpoint(root: Path, closed: str) -> None:
    folder = root / "inner" / "checkpoint"
    with as_another_user():
        assert find_checkpoint(folder, "teacher.checkpoint") == (folder, 3)
    (root / "inner" / closed).chmod(0)
    said = refusal(lambda: find_checkpoint(folder, "teacher.checkpoint"))
    place = f" at {folder.parent / closed}" if closed else ""  # what is asked for itself
    assert said.startswith(f"teacher.checkpoint={folder} cannot be read: permission denied{place}")
    assert said.endswith(": open it to this user, or name another")


def test_a_closed_description(root: Path) -> None:
    folder = root / "inner" / "checkpoint"
    (folder / "architecture.yaml").chmod(0)
    said = refusal(lambda: read_architecture(folder))
    assert said.startswith(f"{folder}/architecture.yaml cannot be read: permission denied: ")


@pytest.mark.parametrize("closed", ["", "checkpoint", "checkpoint/cache.json"])
def test_a_closed_cache(root: Path, closed: str) -> None:
    folder = root / "inner" / "checkpoint"
    (root / "inner" / closed).chmod(0)
    said = refusal(lambda: read_settings(folder))
    assert said.startswith(f"distill.teacher=cache:{folder} cannot be read: permission denied at {folder}/cache.json:")


@pytest.mark.parametrize("closed", ["", "tokens.bin", "tokens.idx"])
def test_closed_tokens(root: Path, closed: str) -> None:
    prefix = str(root / "inner" / "tokens")
    (root / "inner" / closed).chmod(0)
    said = refusal(lambda: check_prefixes([parse_blend(prefix, "data.train")]))
    name = closed or "tokens.idx"
    assert said.startswith(f"data.train: {root}/inner/{name} cannot be read: permission denied: ")


def test_text_in_a_closed_folder(root: Path) -> None:
    """In the second the names can be listed, and nothing behind them looked at."""
    folder = root / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    found: list[str] = []
    folder.chmod(0)
    said = refusal(lambda: find_files(str(root), [".txt"], "input", (), found.append))
    assert said.startswith(f"input={folder} cannot be read (Permission denied): ")
    folder.chmod(0o444)
    said = refusal(lambda: [inspect_file(path) for path in find_files(str(root), [".txt"], "input", (), found.append)])
    assert said.startswith(f"{folder}/a.txt cannot be read: permission denied: ") and not found


@pytest.mark.parametrize("closed", ["tokenizer", "tokenizer/additional_chat_templates"])
def test_the_files_of_a_tokenizer(root: Path, tmp_path: Path, closed: str) -> None:
    """None is silently left out."""
    checkpoint = root / "inner" / "checkpoint"
    (checkpoint / "tokenizer" / "additional_chat_templates").mkdir()
    (checkpoint / closed).chmod(0o311)
    said = refusal(lambda: copy_files(str(checkpoint / "tokenizer"), str(tmp_path), FILES))
    place = str(checkpoint / closed)
    assert said.startswith(f"{checkpoint}/tokenizer cannot be read: permission denied at {place}")


def test_a_folder_that_lets_nobody_look_into_it(root: Path) -> None:
    (root / "inner").chmod(0o222)
    said = refusal(lambda: make_parent(f"{root}/inner/new/file", "output"))
    assert said.startswith(f"output={root}/inner/new/file cannot be written")


@pytest.mark.parametrize("name", ["checkpoint", "new", "new/deeper"])
def test_an_output_below_a_closed_folder(root: Path, name: str) -> None:
    (root / "inner").chmod(0)
    folder = root / "inner" / name
    said = refusal(lambda: output_folder(str(folder), "distill.checkpoint"))
    assert said.startswith(f"distill.checkpoint={folder} cannot be ") and f"{root}/inner" in said


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_an_output_where_nothing_can_be_made() -> None:
    with pytest.raises(
        InputError, match=r"^distill\.checkpoint=/proc/x/y cannot be written, because .* in /proc: name another$"
    ):
        output_folder("/proc/x/y", "distill.checkpoint")


def test_an_output_is_not_made_by_looking(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    assert output_folder(str(tmp_path / "new" / "deeper"), "output") == tmp_path / "new" / "deeper"
    assert tmp_path.stat().st_mtime_ns == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_a_full_disk_is_no_wrong_input(code: int) -> None:
    with pytest.raises(InputError, match=r"^x cannot be written: \[Errno") as caught, writing("x"):
        raise OSError(code, os.strerror(code))
    assert isinstance(caught.value, StorageError) == (code != errno.EACCES)
    assert caught.value.exit_code == (2 if code == errno.EACCES else 1)


def test_what_nobody_put_into_words() -> None:
    given = Recipe()
    given.teacher.checkpoint, given.distill.teacher, given.data.train = "/a", "cache:/a/b", ["/a/c"]
    # The path once, where the key names it.
    for path, sentence in {
        "/a/x": "teacher.checkpoint=/a cannot be read: permission denied at /a/x: ",
        "/a": "teacher.checkpoint=/a cannot be read: permission denied: ",
        "/ab": "/ab cannot be read: permission denied: ",
    }.items():
        told = cli.explained(PermissionError(errno.EACCES, os.strerror(errno.EACCES), path), given)
        assert told is not None and told.exit_code == 2
        assert str(told).startswith(sentence)
    full = cli.explained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/y"), given)
    assert full is not None and full.exit_code == 1
    assert str(full).startswith("teacher.checkpoint=/a cannot be written: [Errno 28]")
    assert cli.explained(FileNotFoundError(errno.ENOENT, "none", "/a"), given) is None


def fails(error: OSError) -> Callable[..., Recipe]:
    def load(*arguments: object, **taken: object) -> Recipe:
        raise error

    return load


def test_a_closed_file_is_the_last_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recipe, "load_recipe", fails(PermissionError(errno.EACCES, "Permission denied", "/x/y")))
    assert cli.main(["plan"]) == 2
    shown = capsys.readouterr().err
    assert shown == "minitron plan: /x/y cannot be read: permission denied: open it to this user, or name another\n"


def test_nobody_reads_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As behind `| head`; a connection that breaks elsewhere is still an error."""
    broken = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    monkeypatch.setattr(recipe, "load_recipe", fails(broken))
    reading, writing_end = os.pipe()
    with os.fdopen(writing_end, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(BrokenPipeError):
            cli.main(["inspect", "x"])
        os.close(reading)
        assert cli.main(["inspect", "x"]) == 141
        print("nothing is left that could fail", flush=True)
    assert capsys.readouterr().err == ""
