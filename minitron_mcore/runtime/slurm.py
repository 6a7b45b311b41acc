"""SLURM's commands, and batch scripts from a template that a site can edit. Pure.

No shell reads what a recipe says: commands are lists of words, and a script is filled with quoted words, whole numbers
and names of letters, digits, dots, - and _.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, reading, shipped

LAUNCH = shipped("launch")
NEEDED = ("name", "nodes", "ntasks_per_node", "time", "command")
FIELDS = (*NEEDED, "gpus_per_node", "launcher")
# ${NAME} is the shell's; {{word}} stands for {word}.
_FIELD = re.compile(r"\$\{[^}]*\}|\{\{(\w+)\}\}|\{(\w+)\}")
_SECONDS = 120  # for SLURM to answer


@dataclass(frozen=True)
class Template:
    """The text of a batch script with fields in braces; `place`: its file."""

    text: str
    place: Path

    def filled(self, values: Mapping[str, object]) -> str:
        """The script. Raises InputError where a value would break its line."""
        for name, value in values.items():
            if re.search(r"[\x00-\x1f\x7f]", str(value)):
                rule = f"would put a control character into a batch script, as {{{name}}}"
                raise InputError("", repr(str(value)), rule, "name another folder")
        return _FIELD.sub(lambda found: _one(found, values), self.text)


def _one(found: re.Match[str], values: Mapping[str, object]) -> str:
    if found[1]:
        return f"{{{found[1]}}}"
    return str(values[found[2]]) if found[2] else found[0]


def read_template(path: str | None) -> Template:
    """The one that `cluster.template` names, else launch/pipeline.sbatch. Raises InputError for one that is not there,
    lacks a field or has another."""
    place, key = Path(path or LAUNCH / "pipeline.sbatch"), "cluster.template"
    if not place.is_file():
        remedy = "name a file as launch/pipeline.sbatch is" if path else "name a template: launch/ was not installed"
        raise InputError(key, place, "is not there", remedy)
    with reading(f"{key}={place}"):
        raw = place.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(key, place, "is not text") from error
    if not text.startswith("#!"):
        raise InputError(key, place, "is no batch script", "begin it with #!/usr/bin/env bash")
    there = [found[2] for found in _FIELD.finditer(text) if found[2]]
    if unknown := [name for name in there if name not in FIELDS]:
        rule = f"has a field that there is none of, {{{unknown[0]}}}"
        remedy = f"write {{{{{unknown[0]}}}}} for braces of its own; fields are {', '.join(FIELDS)}"
        raise InputError(key, place, rule, remedy)
    if missing := [name for name in NEEDED if name not in there]:
        what = ", ".join(f"{{{name}}}" for name in missing)
        raise InputError(key, place, f"lacks {what}", "put it where launch/pipeline.sbatch has it")
    if "launcher" in there and not (LAUNCH / "slurm.sbatch").is_file():
        rule = "has {launcher}, and launch/slurm.sbatch was not installed"
        raise InputError(key, place, rule, "start the tasks by srun in it, as launch/slurm.sbatch does")
    return Template(text, place)


def job_name(name: str) -> str:
    """A name as SLURM and its logs can have it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "minitron"


def time_text(seconds: float) -> str:
    """Rounded up to whole quarters of an hour, as SLURM writes it."""
    quarters = -(-int(seconds) // 900)
    days, rest = divmod(quarters, 96)
    return f"{f'{days}-' if days else ''}{rest // 4:02d}:{rest % 4 * 15:02d}:00"


def has(tool: str) -> bool:
    return shutil.which(tool) is not None


def submit(words: Sequence[str]) -> str:
    """The id of the job that sbatch makes of these words. Raises InputError with its own."""
    done = _ask(words)
    number = done.stdout.strip().partition(";")[0]  # ;CLUSTER may follow
    if done.returncode or not number.isdecimal():
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise InputError("", shlex.join(words[:1]), f"refused {words[-1]}", said[-1] if said else "without a word")
    return number


def cancel(ids: Iterable[str]) -> str:
    """What scancel says where it fails; "" where it has cancelled all of them."""
    words = ["scancel", *ids]
    try:
        done = _ask(words)
    except InputError as error:
        return str(error)
    return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""


def queued(ids: Sequence[str]) -> dict[str, str] | None:
    """Id -> state of those that wait or run; None where SLURM cannot be asked."""
    if not ids:
        return {}
    try:
        done = _ask(["squeue", "--noheader", f"--jobs={','.join(ids)}", "--format=%F %T"])
    except InputError:
        return None
    if done.returncode:
        # Of a single id that it has forgotten; of several it passes over those.
        return {} if "Invalid job id" in done.stderr else None
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in ids}


def _ask(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([*words], capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError("", words[0], "cannot be asked", first_line(error)) from error
