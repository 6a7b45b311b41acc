"""The recipe: defaults < YAML < key=value, saved as it was resolved, and every mistake named with its whole path."""

from __future__ import annotations

import dataclasses
import json
import operator
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.errors import InputError
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.recipe import Recipe, TeacherConfig, entries, load_recipe, to_yaml
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.search.config import AblateConfig
from minitron_mcore.training.config import PhaseConfig, TrainConfig

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
        ("log.tensorboard", "False", False),
        ("train.tokens", "94B", 94_000_000_000),
        ("train.tokens", "9.4e10", 94_000_000_000),
        ("train.tokens", "1.5M", 1_500_000),
        ("data.sequence_length", "128k", 128_000),
        ("data.sequence_length", "4Ki", 4096),
        ("parallel.tensor", "010", 10),
        ("checkpoint", "010", "010"),
        ("checkpoint", "1_000", "1_000"),
        ("checkpoint", "1e3", "1e3"),
        ("checkpoint", "0x1F", "0x1F"),
        ("checkpoint", "12:30", "12:30"),
        ("checkpoint", "2024-11-28", "2024-11-28"),
        ("checkpoint", "yes", "yes"),
        ("checkpoint", "off", "off"),
        ("checkpoint", "'null'", "null"),
        ("checkpoint", "", None),
        ("name", "007", "007"),
        ("tokenizer.exclude", "[007, no]", ["007", "no"]),
        ("data.train", "[007, x]", [7.0, "x"]),
        ("name", "a=b", "a=b"),
        ("model.rope_scaling", "{factor: 8.0}", {"factor": 8.0}),
        ("model.rope_scaling", "null", None),
        ("parallel.virtual_pipeline", "null", None),
        ("model.num_layers", "2", 2),
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
    trains = not config.name.startswith(("ablate-", "align-"))
    assert (recipe.distill.tokens + recipe.search.tokens > 0) == trains and recipe.name != Recipe().name
    assert (recipe.align.load is not None) == config.name.startswith("align-")
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_resolved_recipe_comes_back(config: Path, tmp_path: Path) -> None:
    """Saved beside a run, it is the same recipe, with nothing left to look up."""
    nested = "model.rope_scaling={factor: 2, in: {a: b}}"
    overrides = ["train.lr=1e-2", "input=['${python_stdlib:}', 'b: c']", nested, "name='1'"]
    recipe = load_recipe(str(config), [*overrides, "run.students.third={num_layers: 1}"])
    saved = to_yaml(recipe)
    assert load_recipe(write(tmp_path, saved), []) == recipe
    assert "${" not in saved
    assert yaml.safe_load(saved) == dataclasses.asdict(recipe), "any YAML reader understands it"


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
        ("bench.prompt=1", "bench.prompt", "bench.prompt_tokens"),
        ("bench.prompts=1", "bench.prompts", "bench.prompt_tokens"),
        ("bench.num_layers=1", "bench.num_layers", "model.num_layers"),
        ("run.student.w.num_layers=1", "run.student", "run.students"),
        ("run.students.w.hidden=1", "run.students.w.hidden", "run.students.w.hidden_size"),
    ],
)
def test_an_unknown_key_is_named_with_its_path(tmp_path: Path, override: str, path: str, nearest: str) -> None:
    said = f"{path} is not a key of a recipe: the nearest is {nearest}"
    assert refusal(None, override) == said
    keys, _, value = override.partition("=")
    nested: Any = int(value)
    for part in reversed(keys.split(".")):
        nested = {part: nested}
    assert refusal(write(tmp_path, yaml.safe_dump(nested))) == said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensor=two", "parallel.tensor=two must be a whole number"),
        (
            "parallel.tensor=2.5",
            "parallel.tensor=2.5 must be a whole number: write it as 8, 1_000, 128k, 1.5M, 94B, 80Gi or",
        ),
        ("train.tokens=1.5", "train.tokens=1.5 must be a whole number: write it as"),
        ("train.tokens=1.2345k", "train.tokens=1.2345k must be a whole number: write it as"),
        ("train.tokens=5x", "train.tokens=5x must be a whole number"),
        ("train.tokens=1e999999999", "train.tokens=1e999999999 must be a whole number"),
        ("parallel.tensor=0x10", "parallel.tensor=0x10 must be a whole number"),
        ("parallel.tensor=null", "parallel.tensor=null must be a whole number"),
        ("train.lr=fast", "train.lr=fast must be a number"),
        ("train.lr=", "train.lr= must be a number"),
        ("train.lr=true", "train.lr=true must be a number"),
        ("train.lr.x=1", "train.lr={x: 1} must be a number"),
        ("train.lr=nan", "train.lr=nan must be finite and at least 0"),
        ("log.tensorboard=maybe", "log.tensorboard=maybe must be true or false"),
        ("log.tensorboard=no", "log.tensorboard=no must be true or false"),
        ("student.num_layers=all", "student.num_layers=all must be a whole number or null"),
        ("run.students.w.num_layers=x", "run.students.w.num_layers=x must be a whole number or null"),
        ("run.students.w=3", "run.students.w=3 must be a section of keys"),
        ("run.students=[w]", "run.students=[w] must be a section of keys"),
        ("train=3", "train=3 must be a section of keys"),
        ("train=null", "train=null must be a section of keys"),
        ("run.baselines=random", "run.baselines=random must be a list as in [first,second]"),
        ("name=null", "name=null must be text"),
        ("precision=bf61", "precision=bf61 must be one of fp32, bf16: did you mean bf16?"),
        ("log.wandb=off", "log.wandb=off must be one of auto, online, offline, disabled"),
        ("distill.lr_decay_style=wsd", "distill.lr_decay_style=wsd must be one of cosine, linear, constant, WSD"),
        ("run.baselines=[randm]", "run.baselines[0]=randm must be one of next_token, random: did you mean random?"),
        ("name=${nothing}", "name=${nothing} refers to nothing, which is not a key of a recipe"),
        ("name=${name}", "name refers to itself"),
        ("train.lr", "train.lr is not an override: write key=value, as in train.lr=1e-4"),
        ("=1", "=1 is not an override: write key=value"),
        ("name=[", "name=[ cannot be read: "),
        ("train.phases=[{tokens: 0},{}]", "train.phases[0].tokens=0 must be at least 1"),
        ("train.phases=[{sequence_length: 0}]", "train.phases[0].sequence_length=0 must be at least 1"),
        ("teacher.parallel.sequence=true", "teacher.parallel.sequence=true cuts the sequence over"),
        ("correct.min_lr=1", "correct.min_lr=1.0 must lie between 0 and lr=6e-05: lower it, or raise lr"),
        ("run.students.w.ratios={hidden_size: x}", "run.students.w.ratios.hidden_size=x must be a number"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, words: str) -> None:
    assert refusal(None, override).startswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- train\n", "holds a list: write a recipe as key: value"),
        ("train\n", "holds the text train: write a recipe as key: value"),
        ("train:\n", "train= must be a section of keys"),
        ("train: {lr: 1\n", "--config {config} is not YAML: "),
        ("seed: 1\nseed: 2\n", "--config {config} is not YAML: found duplicate key seed in line 2"),
        ("train: {lr: fast}\n", "train.lr=fast must be a number"),
        ("name: !!python/object/apply:os.getcwd []\n", "--config {config} is not YAML: "),
        ("\0", "--config {config} is not YAML: "),
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


def test_entries_are_the_fields() -> None:
    """Independently: every path leads to an attribute, and every attribute that is no section has a path."""
    paths = [path for path, _ in entries()]
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
    """Defaults are not checked where they are left out: here each is given."""
    load_recipe(None, [f"{path}={value}" for path, value in flat_texts(Recipe())])


def flat_texts(section: Any, above: str = "") -> Iterator[tuple[str, str]]:
    for entry in dataclasses.fields(section):
        value, path = getattr(section, entry.name), f"{above}{entry.name}"
        if dataclasses.is_dataclass(value):
            yield from flat_texts(value, f"{path}.")
        else:
            yield path, json.dumps(value) if isinstance(value, list | dict) else "null" if value is None else str(value)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (
            "[{token: 5}]",
            "train.phases[0].token is not a key of a recipe: the nearest is train.phases",
        ),
        (
            "[{tokens: 5}, {tokens: x}]",
            "train.phases[1].tokens=x must be a whole number",
        ),
        ("[5]", "train.phases[0]=5 must be a section of keys"),
        ("{tokens: 5}", "train.phases={tokens: 5} must be a list as in"),
        ("5", "train.phases=5 must be a list as in"),
    ],
)
def test_lists_of_sections_are_walked(written: str, words: str) -> None:
    assert refusal(None, f"train.phases={written}").startswith(words)


def test_a_list_of_sections(tmp_path: Path) -> None:
    given = load_recipe(None, ["train.phases=[{tokens: 5}, {sequence_length: 8}]"])
    assert given.train.phases == [PhaseConfig(tokens=5), PhaseConfig(sequence_length=8)]
    assert load_recipe(write(tmp_path, to_yaml(given)), []) == given


def test_an_empty_section_on_the_command_line_takes_the_place_of_the_one_that_is_there(tmp_path: Path) -> None:
    """As align.stages={} is typed for one round of a recipe of several."""
    config = write(tmp_path, "align: {lr: 1.0, stages: {sft: {lr: 2.0}}}\ntrain: {lr: 3.0}\n")
    given = load_recipe(config, ["align.stages={}", "train={}"])
    assert given.align.stages == {} and given.align.lr == 1.0
    assert given.train == TrainConfig()
    assert load_recipe(config, ["align={stages: {dpo: {}}}"]).align.stages == {"sft": {"lr": 2.0}, "dpo": {}}


def test_an_entry_of_a_list_on_the_command_line(tmp_path: Path) -> None:
    """As the advice on memory names it; the other entries, and the entry's other keys, stay."""
    two = "distill.phases=[{tokens: 5, micro_batch_size: 4}, {sequence_length: 8}]"
    given = load_recipe(None, [two, "distill.phases[0].micro_batch_size=1"])
    assert given.distill.phases == [PhaseConfig(tokens=5, micro_batch_size=1), PhaseConfig(sequence_length=8)]
    assert load_recipe(None, ["student.layers=[0,2,4]", "student.layers[1]=3"]).student.layers == [0, 3, 4]
    for change, words in (
        (
            "distill.phases[2].tokens=1",
            "distill.phases[2].tokens names entry 2, counted from 0, but distill.phases has 2",
        ),
        ("distill.phases[1].tokens=x", "distill.phases[1].tokens=x must be a whole"),
        ("distill.phases[1].token=1", "distill.phases[1].token is not a key of a recipe"),
    ):
        with pytest.raises(InputError) as caught:
            load_recipe(None, [two, change])
        assert str(caught.value).startswith(words), caught.value


def test_paths_are_expanded_and_other_texts_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    written = {
        "checkpoint": ("~/a", "/home/me/a"),
        "hf": ("$SCRATCH/${name}/~b", "/scratch/~/~b"),
        "output": ("~", "/home/me"),
        "scores": ("${SCRATCH}/s", "/scratch/s"),
        "input": ("[~/a, b~]", ["/home/me/a", "b~"]),
        "data.train": ("0.3 ~/a 0.7 $SCRATCH/b", "0.3 /home/me/a 0.7 /scratch/b"),
        "data.valid": ("[0.3, ~/a]", [0.3, "/home/me/a"]),
        "distill.teacher": ("cache:~/c", "cache:/home/me/c"),
        "name": ("'~'", "~"),
    }
    recipe = load_recipe(None, [f"{key}={text}" for key, (text, _) in written.items()])
    for key, (_, told) in written.items():
        assert operator.attrgetter(key)(recipe) == told
    assert refusal(None, "hf=$NOWHERE/x").startswith("hf=$NOWHERE/x names NOWHERE, which is neither")


def test_text_on_the_command_line_is_taken_as_it_stands() -> None:
    for text in ("runs/a #2", "a: b", "*.txt", "&x", "%d", "!x", "a, b", "- a", "x]"):
        assert load_recipe(None, [f"input={text}"]).input == text


def test_sections_check_themselves_however_they_are_made() -> None:
    """In Python a key is named as the argument is; a value that is not given is not taken for another type."""
    for make, words in (
        (lambda: TrainConfig(lr=-1.0), "lr=-1.0 must be finite and at least 0"),
        (lambda: dataclasses.replace(TrainConfig(), min_lr=1.0), "min_lr=1.0 must lie between 0 and lr=0.0003"),
        (lambda: TrainConfig(tokens="5"), "tokens=5 must be a whole number"),  # type: ignore[arg-type]
        (lambda: TrainConfig(tokens=True), "tokens=true must be a whole number"),
        (lambda: TrainConfig(token=5), "token is not a key of a recipe"),  # type: ignore[call-arg]
        (lambda: AblateConfig(methods=[]), "methods=[] is empty: name at least one"),
        (lambda: Recipe(train=3), "train=3 must be a section of keys"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert str(caught.value).startswith(words)
    assert TrainConfig(lr=1, min_lr=0).lr == 1.0


def test_merge_keys_and_references(tmp_path: Path) -> None:
    text = "train: &shared {lr: 1e-3, tokens: 5}\ndistill:\n  <<: *shared\n  tokens: 7\n"
    text += "data: {train: [a, b], valid: '${data.train}'}\n"
    recipe = load_recipe(write(tmp_path, text), ["output=/runs/${name}", "scores=${output}/s"])
    assert (recipe.distill.lr, recipe.distill.tokens, recipe.train.tokens) == (1e-3, 7, 5)
    assert recipe.data.valid == ["a", "b"] and recipe.scores == "/runs/run/s"


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    config = write(tmp_path, "train: &shared {lr: 1e-3}\ndistill: *shared\n")
    recipe = load_recipe(config, ["train.lr=2e-3", "distill.top_k=3"])
    assert (recipe.train.lr, recipe.distill.lr, recipe.distill.top_k) == (2e-3, 1e-3, 3)
    assert "is not YAML" in refusal(write(tmp_path, "input: &a [*a]\n"))
