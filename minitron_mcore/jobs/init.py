"""`init`: a recipe that comes with the project, copied with what it names, to be changed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.errors import InputError
from minitron_mcore.files import reading, shipped
from minitron_mcore.jobs.inputs import output_folder
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.reading import load_text
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World

# What a recipe names of its own kind, in its keys or in what its head says to type.
_NAMED = re.compile(r"\bconfigs/([\w./-]*\w)")


@dataclass(frozen=True, kw_only=True)
class InitJob(Job):
    """files: (where each lies, where it goes). recipes: (name, what it is) of all there are, if none is asked for."""

    files: tuple[tuple[Path, Path], ...] = ()
    recipes: tuple[tuple[str, str], ...] = ()

    @property
    def needs_ranks(self) -> bool:
        return False


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> InitJob:
    """The recipe called `path`, and the launch scripts, to `configs/` and `launch/` in the folder `output`, the current
    one where it is left out. Raises InputError, also for a file that is there and holds something else."""
    configs = shipped("configs")
    if not recipe.path:
        return InitJob(recipe, recipes=tuple(listed(configs)))
    name = recipe.path.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    if name not in (names := [each for each, _ in listed(configs)]):
        raise InputError("path", recipe.path, "is not a recipe of the project", f"choose one of {', '.join(names)}")
    target = output_folder(recipe.output or ".", "output")
    found = [configs / f"{name}.yaml"]
    for file in found:  # grows as it goes
        found += [each for each in named_by(file, configs) if each not in found]
    launch = [each for each in sorted(shipped("launch").iterdir()) if each.is_file()]
    files = [(each, target / "configs" / each.relative_to(configs)) for each in found]
    files += [(each, target / "launch" / each.name) for each in launch]
    for source, there in files:
        with reading(str(there)):
            if there.exists() and (not there.is_file() or there.read_bytes() != source.read_bytes()):
                rule = f"would write {there}, which is there and holds something else"
                raise InputError("output", recipe.output or ".", rule, "move it away, or name another folder")
    makes = tuple(Item("output", str(there), "a copy") for _, there in files)
    return InitJob(recipe, makes=makes, files=tuple(files))


def listed(configs: Path) -> Iterator[tuple[str, str]]:
    """(name, first sentence of its head) of every recipe."""
    for file in [path for depth in ("*", "*/*", "*/*/*") for path in sorted(configs.glob(f"{depth}.yaml"))]:
        if file.name == "architecture.yaml":  # a model's
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        head = " ".join(line.removeprefix("#").strip() for line in lines[: _paragraph(lines)])
        yield str(file.relative_to(configs).with_suffix("")), re.split(r"(?<=[.?:;]) ", head)[0].rstrip(":;")


def _paragraph(lines: list[str]) -> int:
    """How many lines the first paragraph of a head has."""
    return next((number for number, line in enumerate(lines) if not line.strip("# ")), len(lines))


def named_by(file: Path, configs: Path) -> Iterator[Path]:
    """What else of `configs` the recipe `file` needs: its base, and files and folders that it names."""
    text = file.read_text(encoding="utf-8")
    base = (load_text(text) or {}).get("base") if file.suffix == ".yaml" else None
    for each in base if isinstance(base, list) else filter(None, [base]):
        yield (file.parent / each).resolve()
    for name in dict.fromkeys(_NAMED.findall(text)):
        place = configs / name
        if place.is_file():
            yield place
        elif place.is_dir():
            yield from (each for each in sorted(place.rglob("*")) if each.is_file())
