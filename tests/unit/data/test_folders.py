"""Files below a folder: links are followed, each folder is entered once, in an order of names alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minitron_mcore.data.config import PreprocessConfig
from minitron_mcore.data.corpus import find_files, texts_to_encode
from minitron_mcore.errors import InputError
from tests.unit.text_data import silent


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")


def found(
    root: Path, inputs: str | None = None, said: list[str] | None = None, exclude: tuple[str, ...] = ()
) -> list[str]:
    report = silent if said is None else said.append
    files = find_files(inputs or str(root / "in"), [".txt"], "input", exclude, report)
    assert len(set(files)) == len(files)
    return [os.path.relpath(path, root) for path in files]


def test_without_links_as_os_walk_goes(tmp_path):
    write(tmp_path / "in", "b.txt", "a/z.txt", "a/b/c.txt", "a-b/x.txt", "a.txt", "c/no.md", "a/TXT.TXT", "a/y.txt.gz")
    walked = []
    for parent, folders, names in os.walk(tmp_path / "in"):
        folders.sort()
        walked += [os.path.relpath(os.path.join(parent, name), tmp_path) for name in sorted(names) if ".md" not in name]
    assert found(tmp_path) == walked and len(walked) == 7


def test_links_to_folders_and_files(tmp_path):
    write(tmp_path, "in/a/x.txt", "disk/one/y.txt", "disk/two/z.txt", "disk/w.txt", "disk/skip/v.txt")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "disk")
    (tmp_path / "in" / "a" / "relative").symlink_to("../../disk/one")
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "disk" / "w.txt")
    expected = ["in/c.txt", "in/a/x.txt", "in/a/relative/y.txt", "in/b/w.txt", "in/b/two/z.txt"]
    assert found(tmp_path, exclude=("skip",)) == expected, "what is linked twice is read once"
    assert found(tmp_path, exclude=("skip", "b")) == expected[:3], "a link's own name counts too"
    assert found(tmp_path, str(tmp_path / "in" / "b"), exclude=("skip",)) == [
        "in/b/w.txt",
        "in/b/one/y.txt",
        "in/b/two/z.txt",
    ]


@pytest.mark.parametrize("target", [".", "..", "../..", "../other", "/"])
def test_loops_end(target, tmp_path):
    """A link to its own folder, to one above, to one beside, and to one whose link leads back."""
    root = tmp_path / "in"
    write(root, "a/x.txt", "other/y.txt")
    if target == "/":
        write(tmp_path, "outside/z.txt")
        (root / "a" / "link").symlink_to(tmp_path / "outside")
        (tmp_path / "outside" / "back").symlink_to(root)
        assert found(tmp_path) == ["in/a/x.txt", "in/a/link/z.txt", "in/other/y.txt"]
        return
    (root / "a" / "link").symlink_to(target)
    expected = ["in/a/x.txt", "in/other/y.txt"]
    if target == "../..":  # the folder above, with what else lies there
        write(tmp_path, "else/z.txt")
        expected = ["in/a/x.txt", "in/a/link/else/z.txt", "in/other/y.txt"]
    assert found(tmp_path) == expected
    assert found(tmp_path, str(root / "**" / "*.txt")) == sorted(expected), "by a glob too"


def test_links_that_lead_nowhere_are_named(tmp_path):
    write(tmp_path / "in", "a.txt")
    (tmp_path / "in" / "lost").symlink_to("/nowhere/folder")
    (tmp_path / "in" / "own").symlink_to("own")
    said: list[str] = []
    assert found(tmp_path, said=said) == ["in/a.txt"]
    left_out = f"input: {tmp_path}/in/lost and 1 more left out"
    assert said == [f"{left_out}: it is a link to /nowhere/folder, which does not exist"]
    with pytest.raises(InputError, match="in/lost is a link to /nowhere/folder, which does not exist"):
        found(tmp_path, str(tmp_path / "in" / "lost"))


def test_a_closed_folder_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "in", "a.txt", "closed/b.txt")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"input=.*closed cannot be read \(Permission denied\): .*exclude"):
        found(tmp_path)
    assert found(tmp_path, exclude=("closed",)) == ["in/a.txt"]


def test_what_is_no_file_is_left_out_and_named(tmp_path):
    """A named pipe would be waited on for ever, and what a shell makes of `<(zcat a.gz)` can be read only once."""
    write(tmp_path / "in", "a.txt")
    os.mkfifo(tmp_path / "in" / "b.txt")
    os.mkfifo(tmp_path / "in" / "other")
    (tmp_path / "in" / "zero.txt").symlink_to("/dev/zero")
    said: list[str] = []
    assert found(tmp_path, said=said) == ["in/a.txt"]
    words = "left out: it is a pipe, a socket or a device, not a file"
    assert said == [f"input: {tmp_path}/in/b.txt and 1 more {words}"]
    assert found(tmp_path, str(tmp_path / "in" / "*.txt"), said) == ["in/a.txt"] and said[1] == said[0]
    for path in ("in/b.txt", "in/zero.txt"):
        with pytest.raises(InputError, match=f"input=.*{path} is a pipe, a socket or a device, not a file: write"):
            found(tmp_path, str(tmp_path / path))


def test_a_folder_without_such_files_names_the_key_of_the_endings(tmp_path):
    write(tmp_path, "in/a.py")
    config = PreprocessConfig(input=str(tmp_path / "in"), output_prefix=str(tmp_path / "tokens"))
    with pytest.raises(InputError, match=r"^input=.*: name others, or set preprocess\.extensions$"):
        texts_to_encode(config, "input")
