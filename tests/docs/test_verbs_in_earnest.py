"""The documents' commands that a tiny model can run, run: as they are typed, except for the sizes in SMALLER.

In the order of the documents, since one makes what a later one reads. What asks for several ranks or for the papers'
recipes stays with the dry runs of test_commands.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.distributed.ranks import run_on_ranks
from tests.docs.documents import Command, commands
from tests.docs.running import aside, made_by, placed, verb_of
from tests.docs.stage import SMALL, SMALL_RECIPE, lay_out_small, write_recipe
from tests.e2e.verbs import commands_on_rank

pytestmark = pytest.mark.slow
# What is tried here, and what makes it small.
DATA = ("data.sequence_length=32", "data.num_workers=0")
SMALLER: dict[str, tuple[str, ...]] = {
    "tokenizer": ("tokenizer.vocab_size=290",),
    "preprocess": ("preprocess.workers=1",),
    "import": (),
    "train": ("train.tokens=8192", "train.lr_warmup_iters=1", "log.wandb=disabled"),
    "score": ("importance.num_samples=4", "importance.micro_batch_size=4", "importance.block_lengths=[1]"),
    "plan": ("student.ffn_hidden_size=64",),
    "prune": (),
    "correct": ("correct.tokens=512",),
    "cache": (),
    "distill": ("distill.tokens=4096", "distill.lr_warmup_iters=1", "log.wandb=disabled"),
    "evaluate": ("evaluate.samples=4",),
    "generate": ("generate.max_new_tokens=4",),
    "bench": ("bench.prompt_tokens=8", "bench.output_tokens=4", "bench.repeats=1"),
    "export": (),
    "inspect": (),
    "report": (),
}
# A folder that no command here makes.
NOT_THERE = ("runs/aligned",)


def is_tried(command: Command) -> bool:
    verb = verb_of(command)
    if verb is None or verb.left_out or verb.ranks > 1 or verb.name not in SMALLER or "--dry-run" in verb.words:
        return False
    is_own = verb.config is None or not verb.config.startswith("configs/")
    return is_own and not any(each in word for word in verb.words for each in NOT_THERE)


TRIED = [command for command in commands() if is_tried(command)]


def run_in(folder: Path, *given: list[str]) -> list[tuple[int, str]]:
    """Runs in a worker."""
    home = os.getcwd()
    os.chdir(folder)
    try:
        return commands_on_rank(list(given))
    finally:
        os.chdir(home)


@pytest.fixture(scope="module")
def folder(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earnest")
    for name, recipe in (("small.yaml", SMALL), ("recipe.yaml", SMALL_RECIPE)):
        (folder / name).write_text(yaml.safe_dump(recipe))
    ((code, shown),) = run_on_ranks(run_in, 1, folder, ["run", "--config", "small.yaml"])[0]
    assert code == 0, shown
    lay_out_small(folder, words)
    ((code, shown),) = run_on_ranks(run_in, 1, folder, ["cache", "--config", "recipe.yaml", "cache.folder=targets"])[0]
    assert code == 0, shown
    return folder


def test_enough_is_tried() -> None:
    assert {verb.name for command in TRIED if (verb := verb_of(command))} == SMALLER.keys()


@pytest.mark.parametrize("command", TRIED, ids=lambda command: command.where)
def test_a_command_runs(command: Command, folder: Path) -> None:
    verb = verb_of(command)
    assert verb is not None
    if verb.config != "recipe.yaml":
        write_recipe(folder, verb.name, verb.config or "none.yaml", command.recipe)
    sizes = [*SMALLER[verb.name], *(DATA if verb.config is None else ())]
    # A size of a shape only in place of another one.
    sizes = [word for word in sizes if not word.startswith("student.") or word.partition("=")[0] in verb.overrides]
    with aside(folder, made_by(verb, folder)):
        ((code, shown),) = run_on_ranks(run_in, 1, folder, [*placed(verb, folder), *sizes])[0]
    if "the Hugging Face hub is out of reach" in shown:
        pytest.skip(f"no network: {shown}")
    assert code == 0, f"{command}\n{shown}"
