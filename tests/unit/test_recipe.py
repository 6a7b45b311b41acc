"""The recipe: defaults < YAML < key=value, saved as it was resolved, and every mistake named with its whole path."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.errors import InputError
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.recipe import Recipe, TeacherConfig, check_choices, key_paths, load_recipe, to_yaml
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.config import PhaseConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def refusal(config: str | None, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(config, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_later_wins(tmp_path: Path) -> None:
    config = write(tmp_path, "train: {lr: 0.5, tokens: 7}\nstudent: {hidden_size: 8}\n")
    recipe = load_recipe(config, ["train.lr=0.25", "train.lr=0.125", "parallel.tensor=4"])
    assert recipe.train.lr == 0.125, "the command line, its last word"
    assert (recipe.train.tokens, recipe.student.hidden_size) == (7, 8), "the file"
    assert (recipe.train.adam_beta2, recipe.student.num_layers, recipe.seed) == (0.95, None, 1234), "the defaults"
    assert recipe.parallel.tensor == 4
    assert load_recipe(None, []) == Recipe()


def test_an_empty_file_is_a_recipe(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "# nothing yet\n"), []) == Recipe()


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("train.lr", "1e-4", 1e-4),
        ("train.lr", "1E-4", 1e-4),
        ("train.lr", "1.0e-4", 1e-4),
        ("train.lr", ".5", 0.5),
        ("train.lr", "3", 3.0),
        ("train.tokens", "94_000_000_000", 94_000_000_000),
        ("train.tokens", "94000000000", 94_000_000_000),
        ("seed", "0", 0),
        ("log.tensorboard", "false", False),
        ("log.tensorboard", "no", False),
        ("name", "a=b", "a=b"),
        ("model.rope_scaling", "{factor: 8.0}", {"factor": 8.0}),
        ("model.rope_scaling", "null", None),
        ("parallel.virtual_pipeline", "null", None),
        ("parallel.virtual_pipeline", "2", 2),
        ("teacher.checkpoint", "null", None),
        ("student.hidden_size", "null", None),
        ("input", "[a.txt, b]", ["a.txt", "b"]),
        ("data.train", "[0.3, a, 0.7, b]", [0.3, "a", 0.7, "b"]),
        ("data.train", "0.3 a 0.7 b", "0.3 a 0.7 b"),
        ("tokenizer.extensions", "[.py, .md]", [".py", ".md"]),
        ("run.baselines", "[random]", ["random"]),
        ("run.baselines", "[]", []),
    ],
)
def test_values_mean_the_same_in_a_file_and_on_the_command_line(
    tmp_path: Path, key: str, written: str, value: Any
) -> None:
    section, _, name = key.rpartition(".")
    text = f"{section}: {{{name}: {written}}}" if section else f"{name}: {written}"
    for recipe in (load_recipe(None, [f"{key}={written}"]), load_recipe(write(tmp_path, text), [])):
        found: Any = recipe
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value and type(found) is type(value)


def test_students_by_name(tmp_path: Path) -> None:
    config = write(tmp_path, "run: {students: {width: {hidden_size: 8}, depth: {num_layers: 2}}}\n")
    students = load_recipe(
        config, ["run.students.width.ffn_hidden_size=16", "run.students.both.num_layers=1"]
    ).run.students
    assert students == {
        "width": StudentConfig(hidden_size=8, ffn_hidden_size=16),
        "depth": StudentConfig(num_layers=2),
        "both": StudentConfig(num_layers=1),
    }


def test_the_standard_librarys_source_is_named() -> None:
    stdlib = load_recipe(None, ["input=${python_stdlib:}"]).input
    assert stdlib == sysconfig.get_paths()["stdlib"] and (Path(stdlib) / "dataclasses.py").is_file()
    assert load_recipe(None, ["name=run-${seed}", "seed=5"]).name == "run-5"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_recipes_of_the_repository_load(config: Path) -> None:
    recipe = load_recipe(str(config), [])
    trains = not config.name.startswith("ablate-")
    assert (recipe.distill.tokens > 0) == trains and recipe.name != Recipe().name
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_resolved_recipe_comes_back(config: Path, tmp_path: Path) -> None:
    """Saved beside a run, it is the same recipe, with nothing left to look up."""
    overrides = ["train.lr=1e-5", "input=['${python_stdlib:}', 'b: c']", "model.rope_scaling={factor: 2}", "name='1'"]
    recipe = load_recipe(str(config), [*overrides, "run.students.third={num_layers: 1}"])
    saved = to_yaml(recipe)
    assert load_recipe(write(tmp_path, saved), []) == recipe
    assert "${" not in saved
    assert yaml.safe_load(saved) == dataclasses.asdict(recipe), "any YAML reader understands it"


COMMAND = "(on the command line)"


@pytest.mark.parametrize(
    ("override", "path", "nearest"),
    [
        ("sede=1", "sede", "seed"),
        ("trian.lr=1", "trian", "train"),
        ("lr=1", "lr", "train.lr"),
        ("train.lrr=1", "train.lrr", "train.lr"),
        ("train.hidden_size=1", "train.hidden_size", "model.hidden_size"),
        ("importance.num_sample=1", "importance.num_sample", "importance.num_samples"),
        ("parallel.tp=2", "parallel.tp", "parallel.tensor"),
        ("run.student.w.num_layers=1", "run.student", "run.students"),
        ("run.students.w.hidden=1", "run.students.w.hidden", "run.students.w.hidden_size"),
    ],
)
def test_an_unknown_key_is_named_with_its_path(tmp_path: Path, override: str, path: str, nearest: str) -> None:
    assert refusal(None, override) == f"{path} {COMMAND} is no key of a recipe: the nearest is {nearest}"
    keys, _, value = override.partition("=")
    nested: Any = int(value)
    for part in reversed(keys.split(".")):
        nested = {part: nested}
    config = write(tmp_path, yaml.safe_dump(nested))
    assert refusal(config) == f"{path} (in {config}) is no key of a recipe: the nearest is {nearest}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensor=two", f"parallel.tensor='two' {COMMAND} is not allowed: a whole number is needed"),
        ("parallel.tensor=2.5", f"parallel.tensor=2.5 {COMMAND} is not allowed: a whole number is needed"),
        ("parallel.tensor=null", f"parallel.tensor=null {COMMAND} is not allowed: a whole number is needed"),
        ("train.tokens=9.4e10", f"train.tokens=94000000000.0 {COMMAND} is not allowed: a whole number is needed"),
        ("train.lr=fast", f"train.lr='fast' {COMMAND} is not allowed: a number is needed"),
        ("train.lr=", f"train.lr=null {COMMAND} is not allowed: a number is needed"),
        ("train.lr=true", f"train.lr=true {COMMAND} is not allowed: a number is needed"),
        ("train.lr.x=1", f"train.lr={{'x': 1}} {COMMAND} is not allowed: a number is needed"),
        ("log.tensorboard=maybe", f"log.tensorboard='maybe' {COMMAND} is not allowed: true or false is needed"),
        ("student.num_layers=all", f"student.num_layers='all' {COMMAND} is not allowed: a whole number or null is"),
        ("run.students.w.num_layers=x", f"run.students.w.num_layers='x' {COMMAND} is not allowed: a whole number or"),
        ("run.students.w=3", f"run.students.w=3 {COMMAND} is not allowed: a section of keys is needed"),
        ("run.students=[w]", f"run.students=['w'] {COMMAND} is not allowed: a section of keys is needed"),
        ("train=3", f"train=3 {COMMAND} is not allowed: a section of keys is needed"),
        ("train=null", f"train=null {COMMAND} is not allowed: a section of keys is needed"),
        ("run.baselines=random", f"run.baselines='random' {COMMAND} is not allowed: a list as in [first,second]"),
        ("name=null", f"name=null {COMMAND} is not allowed: text is needed"),
        ("precision=bf61", "precision='bf61' is not allowed: choose one of fp32, bf16 (did you mean bf16?)"),
        ("log.wandb=of", "log.wandb='of' is not allowed: choose one of auto, online, offline, disabled"),
        (
            "distill.lr_decay_style=wsd",
            "distill.lr_decay_style='wsd' is not allowed: choose one of cosine, linear, con",
        ),
        ("run.baselines=[randm]", "run.baselines=['randm'] holds 'randm': choose from next_token, random"),
        ("name=${nothing}", "name: Interpolation key 'nothing' not found"),
        ("train.lr", "'train.lr' is no override: write key=value, as in train.lr=1e-4"),
        ("=1", "'=1' is no override: write key=value"),
        ("name=[", "'name=[' cannot be read"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, words: str) -> None:
    assert refusal(None, override).startswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- train\n", "holds a list: a recipe is written as key: value"),
        ("train\n", "train=null (in {config}) is not allowed: a section of keys is needed"),
        ("train:\n", "train=null (in {config}) is not allowed: a section of keys is needed"),
        ("train: {lr: 1\n", "--config {config} is no YAML: "),
        ("seed: 1\nseed: 2\n", "--config {config} is no YAML: found duplicate key seed in line 2"),
        ("train: {lr: fast}\n", "train.lr='fast' (in {config}) is not allowed: a number is needed"),
        ("name: !!python/object/apply:os.getcwd []\n", "--config {config} is no YAML: "),
        ("\0", "--config {config} is no YAML: "),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    config = write(tmp_path, text)
    assert words.format(config=config) in refusal(config)


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        assert refusal(str(path)) == f"--config {path} is not a file: name a recipe in YAML"


def count_keys(section: dict[str, Any]) -> int:
    return sum(1 + (count_keys(value) if isinstance(value, dict) else 0) for value in section.values())


def test_key_paths_are_the_fields() -> None:
    """Independently: every path leads to an attribute, and every attribute that is no section has a path."""
    paths = key_paths()
    assert {"seed", "train", "train.lr", "distill.temperature", "run.students"} <= set(paths) and len(
        set(paths)
    ) == len(paths)
    # With the sections that may be left out.
    flat = dataclasses.asdict(Recipe(teacher=TeacherConfig(parallel=ParallelConfig())))
    for path in paths:
        found: Any = flat
        for part in path.split("."):
            found = found[part]
    assert len(paths) == count_keys(flat)


def test_defaults_are_allowed() -> None:
    check_choices(Recipe())


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (
            "[{token: 5}]",
            "train.phases[0].token (on the command line) is no key of a recipe: the nearest is train.phases",
        ),
        (
            "[{tokens: 5}, {tokens: x}]",
            "train.phases[1].tokens='x' (on the command line) is not allowed: a whole number",
        ),
        ("[5]", "train.phases[0]=5 (on the command line) is not allowed: a section of keys is needed"),
        ("{tokens: 5}", "train.phases={'tokens': 5} (on the command line) is not allowed: a list as in"),
        ("5", "train.phases=5 (on the command line) is not allowed: a list as in"),
    ],
)
def test_lists_of_sections_are_walked(written: str, words: str) -> None:
    assert refusal(None, f"train.phases={written}").startswith(words)


def test_a_list_of_sections(tmp_path: Path) -> None:
    given = load_recipe(None, ["train.phases=[{tokens: 5}, {sequence_length: 8}]"])
    assert given.train.phases == [PhaseConfig(tokens=5), PhaseConfig(sequence_length=8)]
    assert load_recipe(write(tmp_path, to_yaml(given)), []) == given


def test_an_entry_of_a_list_on_the_command_line(tmp_path: Path) -> None:
    """As the advice on memory names it; the other entries, and the entry's other keys, stay."""
    two = "distill.phases=[{tokens: 5, micro_batch_size: 4}, {sequence_length: 8}]"
    given = load_recipe(None, [two, "distill.phases[0].micro_batch_size=1"])
    assert given.distill.phases == [PhaseConfig(tokens=5, micro_batch_size=1), PhaseConfig(sequence_length=8)]
    assert load_recipe(None, ["student.layers=[0,2,4]", "student.layers[1]=3"]).student.layers == [0, 3, 4]
    for change, words in (
        ("distill.phases[2].tokens=1", "distill.phases[2].tokens (on the command line) names entry 2 from 0 on, and"),
        ("distill.phases[1].tokens=x", "distill.phases[1].tokens='x' (on the command line) is not allowed: a whole"),
        ("distill.phases[1].token=1", "distill.phases[1].token (on the command line) is no key of a recipe"),
    ):
        with pytest.raises(InputError) as caught:
            load_recipe(None, [two, change])
        assert str(caught.value).startswith(words), caught.value
