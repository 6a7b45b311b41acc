"""Every command of the documents, and every verb's example, is tried: a command of no known kind fails.

A verb is resolved whole, by `--dry-run`, with every file that it names, for the ranks that its launcher starts; the
slow tests run the verbs in earnest (test_verbs_in_earnest.py). `make`, scripts and Python programs are looked for.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from minitron_mcore import cli
from minitron_mcore.recipe import load_recipe
from minitron_mcore.verbs import VERBS
from tests.docs.documents import PLACEHOLDER, ROOT, Command, commands, mentions
from tests.docs.running import aside, made_by, placed, verb_of
from tests.docs.stage import lay_out, write_recipe

# Other projects' programs, and the shell's own words: how a command begins.
FOREIGN = {
    "torchrun … pretrain_gpt.py": "Megatron-LM's; its flags are tried in tests/distributed/checkpoint/test_way_back.py",
    "hf download": "the Hugging Face Hub's",
    "wandb login": "Weights & Biases'",
    "pre-commit install": "pre-commit's",
}
SHELL_WORDS = re.compile(r"(?:cd|ls|cat|head|tail|less|mkdir|export|\.|source|echo|git clone|squeue|scancel)\b|\. ")
# What only a run makes, left out of a dry run.
ONLY_MADE = ("distill.teacher=cache:",)
RANKS_OF_RECIPE = 8  # that recipe.yaml is for


@pytest.fixture(scope="module")
def folder(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("stage"), words)


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.where)
def test_a_command_of_the_documents(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb_of(command) is not None:
        monkeypatch.chdir(folder)
        check_verb(command, folder, capsys)
    else:
        check_other(command)


def check_verb(command: Command, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb = verb_of(command)
    assert verb is not None
    if verb.left_out:  # the rest is the reader's: no more than the keys can be right or wrong
        load_recipe(None, [word for word in verb.words if "=" in word])
        return
    write_recipe(folder, verb.name, verb.config or "recipe.yaml", command.recipe)
    words = [word for word in placed(verb, folder) if not word.startswith(ONLY_MADE)]
    ranks = max(verb.ranks, RANKS_OF_RECIPE if verb.config == "recipe.yaml" else 1)
    if ranks > 1 and "cluster.gpus" not in verb.overrides:
        words.append(f"cluster.gpus={ranks}")
    if "cluster.device" not in verb.overrides:
        words.append("cluster.gpu_memory=80Gi")
    with aside(folder, made_by(verb, folder)):
        code = cli.main([*words, "--dry-run"])
    assert code == 0, f"{command}\n{capsys.readouterr().err}"


def check_other(command: Command) -> None:
    """Fails where a command is of no kind that is known here."""
    words = [word for word in command.words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    line = " ".join(words)
    if words[0] == "make":
        targets = {word for word in words[1:] if re.fullmatch("[a-z-]+", word)}
        said = subprocess.run(["make", "-n", "VENV=no-such-environment", *targets], cwd=ROOT, capture_output=True)
        assert targets and said.returncode == 0, said.stderr.decode()
        check_paths(command)
    elif re.fullmatch(r"(?:\S*/)?python3?", words[0]):
        check_python(words)
    elif words[0] == "docker":
        check_paths(command)
        assert words[1] in ("build", "run") and (ROOT / "Dockerfile").is_file()
    elif words[0].lstrip("./").startswith(("launch/", ".ci/")):
        assert (ROOT / words[0]).is_file()
    elif words[0] in ("sbatch", "srun"):
        check_paths(command)
    elif re.match(r"(?:\S*/)?pip (?:install|wheel)\b", line):
        extras = {extra for names in re.findall(r"\.\[(.*?)\]", line) for extra in names.split(",")}
        assert extras <= set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    else:
        is_known = any(line.startswith(foreign) for foreign in FOREIGN) or SHELL_WORDS.match(line)
        assert is_known, f"{command}: of no kind that is tried here: add one to {__name__}, or mend the document"


def check_python(words: list[str]) -> None:
    """The module or file is there."""
    if words[1] == "-m":
        is_there = importlib.util.find_spec(words[2]) is not None
    else:
        is_there = words[1].startswith("-") or (ROOT / words[1]).is_file()
    assert is_there, words


def check_paths(command: Command) -> None:
    """What looks like a file of the repository is there."""
    for word in " ".join(command.words).replace("=", " ").split():
        if re.fullmatch(r"(?:tests|launch|benchmarks|configs|docs)/[\w/.-]+", word):
            assert (ROOT / word).exists(), f"{command}: {word} is not there"


@pytest.mark.parametrize("command", mentions(), ids=lambda command: command.where)
def test_a_command_in_running_text(command: Command) -> None:
    """Its verb and its keys are there; it may be a synopsis."""
    verb = verb_of(command)
    if verb is not None:
        load_recipe(None, [word for word in verb.words if "=" in word and not PLACEHOLDER.search(word)])
    elif command.words[0] == "minitron":
        assert command.words[1] in ("VERB", "--help", "--version"), f"{command}: no verb"
    elif "VERB" not in command.words and not any(PLACEHOLDER.search(word) for word in command.words):
        check_other(command)


def test_every_verb_has_a_command() -> None:
    """In a block of a document, beside its own example; those left out are in running text."""
    tried = {
        verb.name for command in commands() if (verb := verb_of(command)) and not command.where.startswith("verbs")
    }
    assert tried >= VERBS.keys() - {"init", "train", "plan", "prune", "run"}
