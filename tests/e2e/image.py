"""The Dockerfile's steps, carried out in a root file system by chroot: what there is of Docker where no engine runs.

Known are the instructions that the Dockerfile has, as it has them; anything else is an error. Needs root.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from tests.e2e.launchers import ROOT

# In a namespace of mounts, so that none is left: the system's own, and what PLACES names, at the same place inside.
ENTER = """\
set -e
for place in /proc /dev $PLACES; do
  if [ -d "$place" ]; then mkdir -p "$ROOT_FOLDER$place"
  else mkdir -p "$(dirname "$ROOT_FOLDER$place")"; touch "$ROOT_FOLDER$place"; fi
  mount --rbind "$place" "$ROOT_FOLDER$place"
done
[ -n "$NET" ] || ip link set lo up
exec chroot --userspec="$AS" "$ROOT_FOLDER" env -i --chdir="$WORK" "$@"
"""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, its words), continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, words = line.partition(" ")
            yield name, words.strip()


def in_context(path: Path) -> bool:
    """Whether Docker is sent a file of this checkout: by .dockerignore, whose patterns begin at the root."""
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    parts = path.relative_to(ROOT).parts
    starts = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    return not any(
        fnmatch(start, pattern) or (pattern.startswith("**/") and fnmatch(start.split("/")[-1], pattern[3:]))
        for start in starts
        for pattern in patterns
    )


Done = subprocess.CompletedProcess[str]


@dataclass
class Image:
    """A root file system, and what the instructions so far have set."""

    root: Path
    arguments: dict[str, str]  # of the build
    machine: dict[str, str]  # variables that this machine's network asks for
    places: tuple[str, ...]  # files and folders of this machine that they name
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "0"
    folder: str = "/"
    shell: tuple[str, ...] = ("/bin/sh", "-c")
    entry: tuple[str, ...] = ()
    known: dict[str, str] = field(default_factory=dict)  # values of ARG

    def build(self, target: str) -> None:
        """The stages that lead to the last one: ours, which begins FROM ${DEVICE}, and the one of that name."""
        stage = ""
        for name, words in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
            if name == "FROM":
                base, _, stage = words.partition(" AS ")
                stage = stage or target
                assert stage != target or base in ("${CPU_IMAGE}", "${DEVICE}"), base
            elif stage in ("", target):
                getattr(self, f"_{name.lower()}")(words)

    def _arg(self, words: str) -> None:
        name, _, value = words.partition("=")
        self.known[name] = self.arguments.get(name, self.known.get(name, value))

    def _env(self, words: str) -> None:
        self.env |= dict(re.findall(r"(\w+)=(\S*)", words))

    def _shell(self, words: str) -> None:
        self.shell = tuple(json.loads(words))

    def _workdir(self, words: str) -> None:
        self.folder = words
        (self.root / words.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _user(self, words: str) -> None:
        self.user = words

    def _entrypoint(self, words: str) -> None:
        self.entry = tuple(json.loads(words))

    def _cmd(self, words: str) -> None:
        json.loads(words)

    def _copy(self, words: str) -> None:
        *names, there = words.split()
        target = self.root / self.folder.lstrip("/") / there
        for name in names:
            files = [ROOT / name] if (ROOT / name).is_file() else tracked()
            for path in filter(in_context, files):
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)

    def _run(self, words: str) -> None:
        done = self.run([*self.shell, words], env=self.machine | self.known)
        assert done.returncode == 0, f"RUN {words}\n{done.stdout[-4000:]}"

    def run(
        self, command: list[str], env: dict[str, str] | None = None, net: bool = True
    ) -> subprocess.CompletedProcess:
        """As this user, with the image's variables, and others; unless `net`, with loopback alone, as
        `docker run --network none`."""
        apart = ["unshare", "--mount", *([] if net else ["--net"]), "sh", "-c", ENTER, "sh"]
        settings = {
            "ROOT_FOLDER": str(self.root),
            "AS": f"{self.user}:{self.user}",
            "WORK": self.folder,
            "NET": "yes" if net else "",
        }
        return subprocess.run(
            [*apart, *(f"{name}={value}" for name, value in ((env or {}) | self.env).items()), *command],
            env=os.environ | settings | {"PLACES": " ".join(self.places)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def tracked() -> list[Path]:
    """Files of this checkout that git does not ignore, and that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.decode().split("\0")[:-1] if (ROOT / name).is_file()]


def reach(pip_says: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Variables that take pip where it finds packages on this machine, and the files and folders that they name."""
    found = re.findall(r"^(\S+?)\.([\w-]+)='(.*)'$", pip_says, flags=re.MULTILINE)
    variables = {f"PIP_{key.upper().replace('-', '_')}": value for _, key, value in found}
    variables |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    variables.pop("PIP_CONSTRAINT", None)
    words = [word for value in variables.values() for word in shlex.split(value)]
    # An index of files names them relative to itself, beside it.
    named = [str(Path(word[7:]).parent) if word.startswith("file:///") else word for word in words]
    return variables, tuple(word for word in named if word.startswith("/") and Path(word).exists())
