"""Files that are cut off, changed and removed, and disks that are full, read-only and lost."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.faults.outcome import LEFT_OVER, files_of

# Pictures and pages, and what only tells of a run.
NEVER = re.compile(r"\.png$|report\.html$|libraries\.log$|README\.md$|\.lock$|/wandb/")
MAKE_EXT4 = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "mkfs.ext4"
LOGS = re.compile(r"(metrics|journal)\.jsonl$")
# What comes after has it where it is there.
TOLD = re.compile(r"(lineage|recipe)\.yaml$|metrics\.jsonl$|/tokenizer\.json$")
# What nobody could tell from what it may have been: texts, tokens, tokenizers, settings. What it is read for differs.
SOURCES = re.compile(r"\.(bin|jsonl|model|yaml|json|py|txt)$")


def copy_linked(source: Path, target: Path) -> None:
    """A copy that costs no room; what is to be changed is written anew (`damage`) or copied (`own_copy`)."""
    shutil.copytree(source, target, copy_function=os.link)


def own_copy(path: Path) -> None:
    """Of a file that was linked."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def choose(folder: Path, within: Sequence[str], draw: random.Random) -> Path | None:
    """A file below one of the places `within` of the folder: a kind of file first, by its name without digits, so that
    those of which there are many come no more often."""
    names = [
        name
        for place in within
        for name in (
            [place] if (folder / place).is_file() else [f"{place}/{each}" for each in files_of(folder / place)]
        )
        if not NEVER.search(name) and not any(map(LEFT_OVER.search, Path(name).parts))
    ]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "0", Path(name).name), []).append(name)
    return folder / draw.choice(kinds[draw.choice(sorted(kinds))]) if kinds else None


def damage(path: Path, kind: str, draw: random.Random) -> bytes:
    """Cut the file off, turn a bit of it over, or remove it; returns what it held."""
    content = path.read_bytes()
    path.unlink()
    if kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))] if content else content)
    elif kind == "flip":
        changed = bytearray(content)
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    return content


def change_data(path: Path, way: str, draw: random.Random) -> bytes:
    """A file of tokens changes while it is read; returns what it held."""
    content = path.read_bytes()
    # Each token another, all of them in the vocabulary.
    tokens = [content[place : place + 2] for place in range(0, len(content), 2)]
    other = b"".join(draw.sample(tokens, len(tokens)))
    if way == "renamed over":
        aside = path.with_name("other")
        aside.write_bytes(other)
        aside.rename(path)
    elif way == "written over":
        with path.open("r+b") as stream:
            stream.write(other)
    elif way == "cut off":
        os.truncate(path, len(content) // 3)
    else:
        path.unlink()
    return content


class Disk:
    """A small file system of its own at `folder`, and a second way to it, which stays when it is unmounted. Root alone
    makes one."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.copy = folder, folder.with_name(f"{folder.name}.copy")
        folder.mkdir(parents=True)
        self.copy.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={max(size, 1 << 16)}", "none", folder)
        _mount("--bind", folder, self.copy)

    def grow(self, size: int) -> None:
        _mount("-o", f"remount,size={size}", self.folder)

    def lose(self) -> bool:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
        return True

    def bring_back(self) -> list[Path]:
        """Returns what was written below it meanwhile."""
        below = list(self.folder.rglob("*"))
        _mount("--bind", self.copy, self.folder)
        return below

    def close(self) -> None:
        for place in (self.folder, self.copy):
            _unmount(place)


class Image:
    """A file system in a file, at `folder`, which turns read-only as after an error of its disk: whatever is open, a
    lock or a log, is too. Root alone makes one, where there are loop devices."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.file = folder, folder.with_name(f"{folder.name}.ext4")
        folder.mkdir(parents=True)
        with self.file.open("wb") as stream:
            stream.truncate(size)
        subprocess.run([MAKE_EXT4, "-q", "-O", "^has_journal", self.file], check=True, capture_output=True)
        self.allow()

    def forbid(self) -> bool:
        _mount("-o", "remount,abort", self.folder)
        return True

    def allow(self) -> None:
        """Once nothing holds it any more: a file system that has failed is mounted anew."""
        _unmount(self.folder)
        # Every write is on the disk at once: what is tried is a disk that takes no more, not one that loses any.
        _mount("-o", "loop,sync,errors=remount-ro", self.file, self.folder)

    def close(self) -> None:
        _unmount(self.folder)


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def _unmount(place: Path) -> None:
    with suppress(OSError):
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


def cannot(folder: Path) -> tuple[str, ...]:
    """The kinds of faults of disks that this user and machine cannot do, tried in `folder`."""
    kinds: tuple[tuple[type[Disk] | type[Image], tuple[str, ...]], ...]
    kinds = ((Disk, ("full", "lost")), (Image, ("read-only",)))
    missing: tuple[str, ...] = ()
    for kind, names in kinds:
        try:
            kind(folder / names[0], 1 << 20).close()
        except (OSError, subprocess.CalledProcessError):
            missing += names
    return missing
