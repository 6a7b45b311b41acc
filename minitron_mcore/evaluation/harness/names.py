"""Which tasks a recipe asks for, and where their YAML lies: without importing the harness, which takes seconds. Pure.

The harness's own index reads some 14,000 files as YAML, in a quarter of a minute. Here a name is looked for in their
text, in a second, and the harness is then shown the folders alone that the names lie in.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minitron_mcore.errors import InputError

KEY = "evaluate.tasks"
CONTINUATION, PERPLEXITY = "minitron_continuation", "minitron_perplexity"
LOCAL = (CONTINUATION, PERPLEXITY)
LEAVE = "leave it out"
# arXiv 2408.11796, table 1, without what the harness has no task for (XLSum) and what runs the model's code.
PRESETS = {
    "minitron": ("winogrande:5", "arc_challenge:25", "mmlu:5", "hellaswag:10", "gsm8k:5", "truthfulqa_mc2:0"),
}
# `task: name`, `group: name`, `tag: name`, or a list of names below or beside the key.
_NAMED = re.compile(r"^[ -]*[\"']?(?:task|group|tag)[\"']?[ \t]*:((?:.*\n)(?:[ \t]*(?:-|#).*\n|[ \t]*\n)*)", re.M)
_NAME = re.compile(r"[^\s\"'\[\],]+")
_GROUP = re.compile(r"^group[ \t]*:[ \t]*[\"']?([^\s\"'#]+)", re.M)
_INCLUDED = re.compile(r"^include[ \t]*:[ \t]*[\"']?([^\s\"'#]+)", re.M)
_RUNS_CODE = re.compile(r"^[ -]*unsafe_code[ \t]*:[ \t]*(\w+)", re.M)


@dataclass(frozen=True)
class Asked:
    """A task or a group of them. shots: None: the task's own. folders: what of the harness's tasks it needs; none: it
    is one of LOCAL or the user's."""

    name: str
    shots: int | None
    folders: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return self.name in LOCAL


def asked_tasks(words: Iterable[str], shots: int | None, task_folder: str | None) -> tuple[Asked, ...]:
    """The tasks that `words` name, presets spelled out. Raises InputError where the harness is not installed, where a
    name is unknown, where two words ask for the same task, and for one that runs what a model writes."""
    own = harness_folder([*words])
    given = names_in(task_folder) if task_folder else {}
    found: dict[str, Asked] = {}
    for word in (each for given_word in words for each in PRESETS.get(given_word, (given_word,))):
        asked = _asked(word, shots, given, own)
        if asked.name in found:
            raise InputError(KEY, word, f"asks for {asked.name} twice", "name it once")
        own_folder = (task_folder,) if task_folder and asked.name in given else ()
        if task := code_runner(asked.name, asked.folders or own_folder):
            which = "" if task == asked.name else f" (in {task})"
            raise InputError(KEY, word, f"runs the programs that a model writes{which}, which is not done here", LEAVE)
        found[asked.name] = asked
    return tuple(found.values())


def _asked(word: str, shots: int | None, given: Mapping[str, frozenset[str]], own: str) -> Asked:
    name, colon, number = word.rpartition(":")
    for each, its_shots in ((word, shots), (name, int(number) if colon and number.isdecimal() else None)):
        if each in LOCAL or each in given:
            return Asked(each, its_shots)
    known = _names_of_harness(own)
    if word in known:
        return Asked(word, shots, tuple(sorted(known[word])))
    if colon and number.isdecimal() and name in known:
        return Asked(name, int(number), tuple(sorted(known[name])))
    meant = name if colon and number.isdecimal() else word
    near = difflib.get_close_matches(meant, [*LOCAL, *PRESETS, *given, *known], n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else "see `lm-eval ls tasks`"
    raise InputError(KEY, word, "is no task of the LM Evaluation Harness, nor of evaluate.task_folder", remedy)


def harness_folder(words: list[str]) -> str:
    """The folder of the harness's tasks. Raises InputError where it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.origin:
        remedy = "run `pip install 'minitron-mcore[eval]'`, or leave evaluate.tasks out"
        raise InputError(KEY, words, "needs the LM Evaluation Harness, which is not installed", remedy)
    return os.path.join(os.path.dirname(found.origin), "tasks")


@cache
def _names_of_harness(folder: str) -> dict[str, frozenset[str]]:
    return names_in(folder)


def names_in(folder: str) -> dict[str, frozenset[str]]:
    """Names of tasks, groups and tags -> the folders right below `folder` (or itself) whose YAML has them. Raises
    InputError where there is no such folder."""
    if not os.path.isdir(folder):
        raise InputError("evaluate.task_folder", folder, "is not a folder", "name one that holds tasks as YAML")
    found: dict[str, set[str]] = {}
    for file, _, names in _listed(folder):
        top = file.parent.relative_to(folder).parts[:1]
        for name in names:
            found.setdefault(name, set()).add(os.path.join(folder, *top))
    return {name: frozenset(places) for name, places in found.items()}


def _listed(folder: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Every file of YAML in `folder`, its text, and the names in it."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in (Path(place, name) for name in sorted(files) if "yaml" in name or "." not in name):
            text = file.read_text(encoding="utf-8", errors="replace") + "\n"
            listed = (re.sub(r"#.*|^[ \t]*- ", "", names, flags=re.M) for names in _NAMED.findall(text))
            yield file, text, [name for names in listed for name in _NAME.findall(names)]


def code_runner(name: str, folders: Iterable[str]) -> str | None:
    """`name`, or of a group of that name the task, where its YAML in `folders` says that it runs programs which a model
    writes (`unsafe_code`); else None."""
    files = [each for folder in folders for each in _listed(folder)]
    asked, seen = [name], {name}
    for each in asked:
        for file, text, names in files:
            if each not in names:
                continue
            if _GROUP.findall(text) == [each]:
                asked += [part for part in names if part not in seen]
                seen.update(names)
            elif _GROUP.search(text) is None and _runs_code(file, text):
                return each
    return None


def _runs_code(file: Path, text: str) -> bool:
    """Whether a task's YAML says so, or else what it includes."""
    read = {file}
    while (said := _RUNS_CODE.search(text)) is None:
        included = _INCLUDED.search(text)
        if included is None or (file := file.parent / included[1]) in read or not file.is_file():
            return False
        read.add(file)
        text = file.read_text(encoding="utf-8", errors="replace")
    return said[1].lower() in ("true", "yes", "on")
