"""How a document's command is tried: which program it starts, what stands for its placeholders, where its files lie."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.keys import flat
from minitron_mcore.recipe import load_recipe
from minitron_mcore.verbs import VERBS
from tests.docs.documents import PLACEHOLDER, Command

# Launchers, with how many ranks their words ask for; a node of launch/ has eight.
GPUS_PER_NODE = 8
# What a reader puts in, and what the tests do.
STANDS_FOR = {"RECIPE.yaml": "recipe.yaml", "PATH": "teacher", "FOLDER": "runs/quickstart"}
# The keys by which verbs name what they make: there must be nothing yet.
MAKES = {
    **{"tokenizer": "tokenizer.model", "preprocess": "output_prefix", "import": "checkpoint", "score": "scores"},
    **{"plan": "plan", "prune": "student.checkpoint", "train": "train.checkpoint", "correct": "correct.checkpoint"},
    **{"cache": "cache.folder", "distill": "distill.checkpoint", "align": "align.checkpoint", "export": "hf"},
    **{"generate": "generate.output", "bench": "bench.output", "evaluate": "results", "report": "report.output"},
    **{"search": "output", "ablate": "output", "run": "output", "reproduce": "output"},
}


@dataclass(frozen=True)
class Verb:
    """A command of ours without its launcher."""

    name: str
    words: tuple[str, ...]
    ranks: int
    left_out: tuple[str, ...] = ()  # placeholders

    @property
    def overrides(self) -> dict[str, str]:
        return {path: value for path, equals, value in (word.partition("=") for word in self.words) if equals}

    @property
    def config(self) -> str | None:
        place = self.words.index("--config") + 1 if "--config" in self.words else 0
        return self.words[place] if place else None

    @property
    def is_whole(self) -> bool:
        """Whether it can be typed as it stands."""
        return not self.left_out


def verb_of(command: Command) -> Verb | None:
    """The verb that a command starts, by whatever launcher; None where it starts something else."""
    words = [word for word in command.words if not re.fullmatch(r"[A-Z_]+=\S*", word) or word.endswith(".yaml")]
    settings = dict(word.split("=", 1) for word in command.words if re.fullmatch(r"[A-Z_]+=\S+", word))
    program, ranks = words[0], 1
    if program == "minitron":
        rest = words[1:]
    elif "minitron_mcore" in words and words[words.index("minitron_mcore") - 1] == "-m":
        rest = words[words.index("minitron_mcore") + 1 :]
        ranks = int(option(words, "--nproc-per-node", "1")) * int(option(words, "--nnodes", "1"))
    elif program == "launch/torchrun.sh":
        rest = words[1:]
        ranks = int(settings.get("NPROC_PER_NODE", GPUS_PER_NODE)) * int(settings.get("NNODES", "1").split(":")[0])
    elif program == "sbatch" and "launch/slurm.sbatch" in words:
        rest = words[words.index("launch/slurm.sbatch") + 1 :]
        ranks = int(option(words, "--nodes", "1")) * GPUS_PER_NODE
    elif program == "launch/docker.sh":
        rest = words[1:]
    elif program == "docker" and "minitron" in words:
        rest = words[words.index("minitron") + 1 :]
    else:
        return None
    if not rest or rest[0] not in VERBS:
        return None
    given = ["recipe.yaml" if word.endswith("/recipe.yaml") else STANDS_FOR.get(word, word) for word in rest[1:]]
    left_out = tuple(word for word in given if PLACEHOLDER.search(word.partition("=")[2] or word))
    return Verb(rest[0], tuple(word for word in given if word not in left_out), ranks, left_out)


def option(words: list[str], name: str, default: str) -> str:
    """A number: of `--name value` or `--name=value`."""
    found = [words[place + 1] for place, word in enumerate(words) if word == name]
    found += [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return found[0] if found and found[0].isdigit() else default


def placed(verb: Verb, folder: Path) -> list[str]:
    """The words with absolute paths, its own and its recipe's, laid below `folder`, where the command is run."""
    words = [re.sub(r"(^|=)/(?=\w)", rf"\1{folder}/", word) for word in verb.words]
    said = recipe_of(verb, folder)
    away = {path: value for path, value in said.items() if is_elsewhere(value)}
    return [verb.name, *(f"{path}={folder}{value}" for path, value in away.items()), *words]


def is_elsewhere(value: object) -> bool:
    """Whether it is an absolute path of a machine that a document speaks of."""
    return isinstance(value, str) and value.startswith("/") and not Path(value).exists()


def recipe_of(verb: Verb, folder: Path) -> dict[str, Any]:
    """What the file that `--config` names says, and its base; {} where there is none."""
    if verb.config is None:
        return {}
    return flat(dataclasses.asdict(load_recipe(str(folder / verb.config.lstrip("/")), [])))


def made_by(verb: Verb, folder: Path) -> str | None:
    """What the command makes, relative to `folder`."""
    key = MAKES.get(verb.name, "")
    said = verb.overrides.get(key) or recipe_of(verb, folder).get(key)
    return str(said).lstrip("/") if said else None


@contextlib.contextmanager
def aside(folder: Path, name: str | None) -> Iterator[None]:
    """Without the file or folder `name` and what begins so, as a command finds it that makes them; afterwards what was
    there stands there again."""
    path = folder / (name or "nothing")
    moved = [each for each in (path, *path.parent.glob(f"{path.name}_*")) if each.exists()] if name else []
    for each in moved:
        each.rename(each.with_name(f".{each.name}"))
    try:
        yield
    finally:
        for each in moved:
            if each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink(missing_ok=True)
            each.with_name(f".{each.name}").rename(each)
