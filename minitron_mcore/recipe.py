"""The recipe: one dataclass of sections, read from YAML and `key=value` overrides.

Each section's dataclass lies beside what it configures (`<package>/config.py`). OmegaConf merges and checks types;
every error names the full path, what was given, what is allowed, and the nearest valid key.
"""

import dataclasses
import difflib
import json
import sysconfig
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from minitron_mcore.data.config import DataConfig, PreprocessConfig, TokenizerConfig
from minitron_mcore.distillation.config import (
    CACHE_METHODS,
    CACHE_TYPES,
    LOGIT_LOSSES,
    STATE_LOSSES,
    WEIGHTINGS,
    CacheConfig,
    DistillConfig,
)
from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import AGGREGATIONS, METHODS, NEURON_SITES, ImportanceConfig
from minitron_mcore.model.config import ModelConfig
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.search.config import AblateConfig
from minitron_mcore.training.config import (
    LR_DECAY_STYLES,
    LR_WSD_DECAY_STYLES,
    RECOMPUTE_GRANULARITIES,
    RECOMPUTE_METHODS,
    CorrectConfig,
    LogConfig,
    TrainConfig,
)


@dataclass
class TeacherConfig:
    """The model that is pruned and distilled from."""

    checkpoint: Optional[str] = None
    parallel: Optional[ParallelConfig] = None  # the teacher's own layout in the same ranks; null: the student's
    placement: str = (
        "resident"  # sharded: over data-parallel ranks; offloaded: in host memory; a layer brought in ahead
    )
    precision: Optional[str] = None  # fp32, bf16, or fp8 with Transformer Engine; null: the recipe's


@dataclass
class RunConfig:
    """What `run` makes."""

    students: dict[str, StudentConfig] = field(default_factory=dict)  # by name; none: the one of `student.*`
    # What the first student is compared with, on the same tokens: next_token (pruned, trained without a teacher) and
    # random (the same shape from random weights).
    baselines: list[str] = field(default_factory=list)


@dataclass
class EvaluateConfig:
    """Held-out LM loss."""

    samples: int = 64  # sequences of the validation set
    micro_batch_size: int = 1


@dataclass
class Recipe:
    """Everything a user can say. Verbs read the sections they need."""

    name: str = "run"
    output: Optional[str] = None  # folder of the run: metrics, resolved recipe, and every stage's files under `run`
    seed: int = 1234
    precision: str = "fp32"  # fp32 or bf16
    input: Optional[Any] = None  # preprocess: text or JSONL files, or folders
    output_prefix: Optional[str] = None  # preprocess: path of the .bin/.idx, without ending
    checkpoint: Optional[str] = None  # evaluate, export: folder of a checkpoint; import writes it
    hf: Optional[str] = None  # Hugging Face folder: import reads it, export writes it
    results: Optional[str] = None  # evaluate: file to write; none: results.json beside the checkpoint
    scores: Optional[str] = None  # score writes it, plan and prune read it
    plan: Optional[str] = None  # plan writes it, prune reads it
    path: Optional[str] = None  # inspect: the folder or file to describe
    json: bool = False  # inspect: print JSON, not a table
    verify: bool = False  # inspect: check every tensor's checksum; import: compare logits with transformers
    trust: bool = False  # read checkpoints whose pickles hold more than tensors and plain values: they may run code
    allow: list[str] = field(default_factory=list)  # refusals to go past, as words of ALLOWANCES; the message names it
    max_shard_size: str = "5GB"  # export: largest weight file, as 500MB or 5GB
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)


# What may be gone past, since transformers does too: a word of `allow` -> what it lets through.
ALLOWANCES = {
    "zero_tensors": "import: matrices that are zero throughout, as of a block made an identity",
    "non_finite_tensors": "import: tensors that hold NaN or Inf",
    "extra_tensors": "import: tensors that the family's model does not have; they are left out",
    "larger_tokenizer": "a tokenizer with ordinary pieces beyond the model's vocabulary, which no text may hold",
    "other_tokenizer": "data, a cache or a student of another tokenizer",
    "unconverted_tokenizer": "export: a SentencePiece model that transformers would not cut so; it goes along as it is",
    "long_sequences": "sequences longer than the model's max_position_embeddings",
}
PLACEMENTS = ("resident", "sharded", "offloaded")
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("fp32", "bf16"),
    **{f"{section}.lr_decay_style": LR_DECAY_STYLES for section in ("train", "correct", "distill")},
    **{f"{section}.lr_wsd_decay_style": LR_WSD_DECAY_STYLES for section in ("train", "correct", "distill")},
    **{f"{section}.recompute_granularity": RECOMPUTE_GRANULARITIES for section in ("train", "correct", "distill")},
    **{f"{section}.recompute_method": RECOMPUTE_METHODS for section in ("train", "correct", "distill")},
    "teacher.placement": PLACEMENTS,
    "teacher.precision": ("fp32", "bf16", "fp8"),
    "cache.method": CACHE_METHODS,
    "cache.dtype": CACHE_TYPES,
    "distill.logit_loss": LOGIT_LOSSES,
    "distill.hidden_states.loss": STATE_LOSSES,
    "distill.hidden_states.weighting": WEIGHTINGS,
    "importance.method": METHODS,
    "importance.batch_aggregation": tuple(sorted(AGGREGATIONS)),
    "importance.sequence_aggregation": tuple(sorted(AGGREGATIONS)),
    "importance.neuron_site": NEURON_SITES,
    "prune.layers": ("scattered", "contiguous"),
    "prune.head_residual": ("none", "paper", "laco"),
    "prune.step_loss": ("distillation", "next_token"),
    "log.console": ("short", "full"),
    "log.wandb": ("auto", "online", "offline", "disabled"),
}
# `input: ${python_stdlib:}` names real text that is on every machine: the Python standard library's own source.
OmegaConf.register_resolver("python_stdlib", lambda: sysconfig.get_paths()["stdlib"], replace=True)

BASELINES = ("next_token", "random")


def load_recipe(config: Optional[str], overrides: list[str]) -> Recipe:
    """Defaults < the YAML file `config` < `key=value` overrides. Raises InputError naming the key."""
    merged = OmegaConf.structured(Recipe)
    if config is not None:
        merged = _merge(merged, _read_yaml(config), f"in {config}")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip("."):
            raise InputError(f"{override!r} is no override: write key=value, as in train.lr=1e-4")
        try:
            given = OmegaConf.from_dotlist([override])
        except (YAMLError, OmegaConfBaseException, ValueError) as error:
            raise InputError(f"{override!r} cannot be read: {_one_line(error)}") from error
        merged = _merge(merged, _in_lists(merged, key, given), "on the command line")
    try:
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key or 'the recipe'}: {_one_line(error)}") from error
    assert isinstance(recipe, Recipe)
    check_choices(recipe)
    return recipe


def _in_lists(merged: Any, key: str, given: DictConfig) -> DictConfig:
    """`given`, where `key` names an entry of a list, as in distill.phases[1].tokens: all of the list, that changed."""
    path, bracket, rest = key.partition("[")
    number = rest.partition("]")[0]
    there = OmegaConf.select(merged, path) if bracket and number.isdecimal() else None
    if not isinstance(there, ListConfig):
        return given
    if int(number) >= len(there):
        raise InputError(f"{key} (on the command line) names entry {number} from 0 on, and {path} has {len(there)}")
    entries: Any = OmegaConf.to_container(there, resolve=False)
    value = OmegaConf.to_container(given, resolve=False)
    for part in (*path.split("."), number):
        value = value[part]  # type: ignore[call-overload,index]
    entry = entries[int(number)]
    entries[int(number)] = {**entry, **value} if isinstance(entry, dict) and isinstance(value, dict) else value
    whole: Any = entries
    for part in reversed(path.split(".")):
        whole = {part: whole}
    return OmegaConf.create(whole)


def _read_yaml(config: str) -> DictConfig:
    path = Path(config)
    if not path.is_file():
        raise InputError(f"--config {config} is not a file: name a recipe in YAML")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"--config {config} is no YAML: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"--config {config} holds a list: a recipe is written as key: value")
    return loaded


def _merge(merged: Any, given: DictConfig, where: str) -> Any:
    _check_keys(OmegaConf.to_container(given, resolve=False), Recipe, "", where)
    try:
        return OmegaConf.merge(merged, given)
    except ValidationError as error:
        path = error.full_key or ""
        value = OmegaConf.select(given, path)
        raise InputError(f"{path}={_shown(value)} ({where}) is not allowed: {_allowed(path)}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key or 'the recipe'} ({where}): {_one_line(error)}") from error


def _check_keys(given: Any, kind: Any, path: str, where: str) -> None:
    """Raise InputError for a key that is none, and for a value where a section of keys belongs; sections are walked."""
    is_list = any(typing.get_origin(option) is list for option in _options(kind))
    if is_list and isinstance(given, dict):
        raise InputError(f"{path}={_shown(given)} ({where}) is not allowed: {_allowed(path)}")
    if is_list and isinstance(given, list) and dataclasses.is_dataclass(_type_of(f"{path}[0]")):
        for number, value in enumerate(given):
            _check_entry(value, f"{path}[{number}]", where)
    elif is_list and isinstance(given, list) and typing.get_origin(_type_of(f"{path}[0]")) is list:
        for number, value in enumerate(given):
            if not isinstance(value, list):
                inner = f"{path}[{number}]"
                raise InputError(f"{inner}={_shown(value)} ({where}) is not allowed: {_allowed(inner)}")
    if given is not None:
        kind = _section(kind)
    if not (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict):
        return
    if not isinstance(given, dict):
        raise InputError(f"{path}={_shown(given)} ({where}) is not allowed: {_allowed(path)}")
    for name, value in given.items():
        inner = f"{path}.{name}".lstrip(".")
        if _type_of(inner) is None:
            raise InputError(f"{inner} ({where}) is no key of a recipe: the nearest is {_nearest(inner)}")
        _check_keys(value, _type_of(inner), inner, where)


def _check_entry(given: Any, path: str, where: str) -> None:
    """The same for an entry of a list of sections, and its values' types: OmegaConf names no path inside a list."""
    kind = _type_of(path)
    _check_keys(given, kind, path, where)
    try:
        OmegaConf.merge(OmegaConf.structured(kind), given)
    except ValidationError as error:
        inner = f"{path}.{error.full_key}"
        value = given.get(error.full_key)
        raise InputError(f"{inner}={_shown(value)} ({where}) is not allowed: {_allowed(inner)}") from error


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:  # a YAML error: what is wrong comes last
        return f"{error.problem} in line {mark.line + 1}"  # type: ignore[attr-defined]
    return str(error).strip().split("\n")[0]


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _type_of(path: str) -> Any:
    """The type of the value at a key's full path; None where there is no such key."""
    kind: Any = Recipe
    for name in path.replace("[", ".[").split("."):
        if name.startswith("["):  # an entry of a list
            lists = [option for option in _options(kind) if typing.get_origin(option) is list]
            kind = typing.get_args(lists[0])[0] if lists else None
        elif dataclasses.is_dataclass(kind := _section(kind)):
            kind = {entry.name: entry.type for entry in dataclasses.fields(kind)}.get(name)
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Union else (kind,)


def _section(kind: Any) -> Any:
    """The section of keys that an optional one would be; any other type as it is."""
    return next((option for option in _options(kind) if dataclasses.is_dataclass(option)), kind)


def key_paths(kind: Any = Recipe, prefix: str = "") -> list[str]:
    """Every key's full path, sections included; a dictionary's own keys are the user's."""
    paths: list[str] = []
    for entry in dataclasses.fields(kind):
        paths.append(prefix + entry.name)
        if dataclasses.is_dataclass(section := _section(entry.type)):
            paths += key_paths(section, prefix + entry.name + ".")
    return paths


def _nearest(path: str) -> str:
    """The valid key most like `path`: of the same name elsewhere, or of a like name, rather in the same section."""
    parent, _, leaf = path.rpartition(".")
    known = key_paths()
    kind = _section(_type_of(parent)) if parent else None
    if dataclasses.is_dataclass(kind):
        known += [f"{parent}.{entry.name}" for entry in dataclasses.fields(kind)]

    def likeness(key: str) -> float:
        section, _, name = key.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, name).ratio() + 0.5 * (section == parent) + 0.2 * (name == leaf)

    return max(known, key=likeness)


def _allowed(path: str) -> str:
    """What may stand at a key's path, in words."""
    kind = _type_of(path)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    sections = {list: "a list as in [first,second]"}
    words = [
        names.get(option) or sections.get(typing.get_origin(option), "a section of keys") for option in _options(kind)
    ]
    return f"{' or '.join(words)} is needed"


def check_choices(recipe: Recipe) -> None:
    """Raise InputError where a key with few values holds another."""
    for path, allowed in CHOICES.items():
        value: Any = recipe
        for part in path.split("."):
            value = getattr(value, part)
        if value is not None and value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"{path}={value!r} is not allowed: choose one of {', '.join(allowed)}{hint}")
    for word in recipe.allow:
        if word not in ALLOWANCES:
            raise InputError(f"allow={recipe.allow} holds {word!r}: choose from {', '.join(ALLOWANCES)}")
    for name in recipe.run.baselines:
        if name not in BASELINES:
            raise InputError(f"run.baselines={recipe.run.baselines} holds {name!r}: choose from {', '.join(BASELINES)}")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as it is saved with every run."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))
