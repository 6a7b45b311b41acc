"""The table of verbs: help, README and code say the same; flags of other projects are answered with our keys."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_mcore import cli
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.job import module_of
from minitron_mcore.megatron_names import NAMES, named_here
from minitron_mcore.recipe import entries, load_recipe
from minitron_mcore.verbs import GROUPS, VERBS, help_of, keys_of

ROOT = Path(__file__).resolve().parents[2]
# Of README.md's table: verb, summary, main keys.
ROWS = re.findall(rf"^\| `({'|'.join(VERBS)})` \| (.*) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_the_readme_has_the_table_of_verbs() -> None:
    assert [(name, summary) for name, summary, _ in ROWS] == [(name, verb.summary) for name, verb in VERBS.items()]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_keys_that_there_are(verb: str) -> None:
    """Each key, each of the table's, each in the example; what is shown as its default can be typed."""
    assert importlib.util.find_spec(f"minitron_mcore.stages.{module_of(verb)}")
    shown = help_of(verb)
    own = [path for path, _ in keys_of(verb)]
    assert {*VERBS[verb].keys} <= {path for path, _ in entries()}
    assert len(own) == len(set(own))
    for path in own:
        assert re.search(rf"^  {re.escape(path)}=", shown, re.MULTILINE)
    (main,) = (words for name, _, words in ROWS if name == verb)
    for word in re.findall("`(.*?)`", main) if verb not in cli.BARE else ():
        key = word.partition("=")[0].removesuffix(".*")
        assert any(path == key or path.startswith(f"{key}.") for path in own)
    load_recipe(None, re.findall(r"^  (\S+=\S+)  \(", shown, re.MULTILINE))
    words = VERBS[verb].example.partition(f" {verb} ")[2].split()
    given = [word for word in words if "=" in word]
    load_recipe(None, given)
    paths = {word.partition("=")[0] for word in given}
    assert {path for path in paths if path.rpartition(".")[0] not in own} <= {*own}, "or an entry of a dictionary"


def test_every_verb_is_in_one_group() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(VERBS)


def test_every_key_says_what_it_means() -> None:
    assert all(entry.metadata["description"] for _, entry in entries())


def test_help_is_quick() -> None:
    """Nothing heavy is imported, nor for a wrong key."""
    heavy = "'torch', 'numpy', 'megatron', 'transformers', 'wandb', 'omegaconf'"
    for words, code in ((["--help"], 0), (["score", "--help"], 0), (["train", "sede=5"], 2)):
        program = (
            f"import sys; from minitron_mcore.cli import main\ntry: code = main({words})\nexcept SystemExit as error: "
            f"code = error.code\nprint(code, [name for name in ({heavy}) if name in sys.modules])"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert found.stdout.splitlines()[-1] == f"{code} []", found


def test_names_of_other_projects_lead_to_keys_that_there_are() -> None:
    known = {*(path for path, _ in entries()), "no key"}
    assert {words.partition(": ")[0] for words in NAMES.values()} <= known


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.train_iters=5", "train.train_iters is not a key of a recipe: write train.tokens (iterations x"),
        ("distill.train_samples=5", "distill.train_samples is not a key of a recipe: write distill.tokens (samples x"),
        ("parallel.tensor_model_parallel_size=2", "write parallel.tensor"),
        ("model.tensor_model_parallel_size=2", "write parallel.tensor"),
        ("trainer.max_steps=5", "trainer.max_steps is not a key of a recipe: write train.tokens (iterations x"),
        ("model.optim.sched.warmup_steps=5", "write train.lr_warmup_iters"),
        ("data.seq_length=5", "write data.sequence_length"),
        ("optimizer=adam", "Adam is the optimizer"),
        ("train.lrr=1", "the nearest is train.lr"),
        ("train.hidden_size=1", "the nearest is model.hidden_size"),
    ],
)
def test_megatrons_names_are_answered_with_ours(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(None, [override])
    assert words in str(caught.value)


def test_megatrons_flags_are_answered_with_our_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size is not a flag: write parallel.tensor"),
        (["--train-iters=5", "seed=3"], "--train-iters=5 is not a flag: write train.tokens (iterations x"),
        (["--micro-batch-size", "2"], "--micro-batch-size is not a flag: write train.micro_batch_size"),
        (["--hidden-size", "2"], "--hidden-size is not a flag: write model.hidden_size"),
        (["seed=3", "--no-such-flag"], "--no-such-flag is not a flag: write a key of the recipe as key=value"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["train", *words])
        shown = capsys.readouterr().err
        assert left.value.code == 2 and shown.startswith(f"minitron: {said}") and shown.count("\n") == 1
    assert named_here("--no-such-flag") == ""


def test_what_inspect_is_given_stands() -> None:
    options = cli.parse(["inspect", "~a/$b", "--json", "trust=true"])
    overrides, taken = cli.keys_of(options)
    recipe = load_recipe(None, overrides, **taken)
    assert (recipe.path, recipe.json, recipe.verify, recipe.trust) == ("~a/$b", True, False, True)
