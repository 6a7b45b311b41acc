"""Files that are cut off, changed and removed, and disks that are full, read-only and lost."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.faults.outcome import LEFT_OVER, files_of

# Pictures and pages, and what only tells of a run.
NEVER = re.compile(r"\.png$|report\.html$|libraries\.log$|README\.md$|\.lock$|/wandb/")
LOGS = re.compile(r"(metrics|journal)\.jsonl$")


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

    def forbid(self) -> bool:
        """Read-only; that waits for a moment in which no file is open to be written."""
        deadline = time.monotonic() + 5
        while subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], capture_output=True).returncode:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def allow(self) -> None:
        _mount("-o", "remount,rw", self.folder)

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
            with suppress(OSError):
                subprocess.run(["umount", "-l", str(place)], capture_output=True)


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True
