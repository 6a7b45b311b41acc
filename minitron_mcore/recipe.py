"""The recipe: one dataclass of sections, read from YAML and `key=value` overrides. Pure.

Each section lies beside what it configures (`<package>/config.py`) and checks itself (keys.py); its text is read by the
keys' types (reading.py). Every error names the key's full path, what was given, what is allowed, and the nearest key.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, Union

from minitron_mcore.alignment.config import AlignConfig
from minitron_mcore.bench.config import BenchConfig
from minitron_mcore.data.chat.config import ChatConfig
from minitron_mcore.data.config import DataConfig, PreprocessConfig, TokenizerConfig
from minitron_mcore.distillation.config import CacheConfig, DistillConfig
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.config import EstimateConfig, ServingConfig
from minitron_mcore.evaluation.config import EvaluateConfig
from minitron_mcore.files import as_yaml
from minitron_mcore.importance.config import ImportanceConfig
from minitron_mcore.inference.config import GenerateConfig
from minitron_mcore.keys import NO_KEY, OneOf, PathName, Sources, flat, key, section, section_of
from minitron_mcore.megatron_names import SECTIONS, named_here
from minitron_mcore.model.config import ModelConfig
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.reading import NULLS, Plain, expanded, filled, load_text, merged, override_value, put, read
from minitron_mcore.report.config import ReportConfig
from minitron_mcore.reproduction.config import ReproduceConfig
from minitron_mcore.runtime.config import INSTANCES, ClusterConfig, ParallelConfig, SubmitConfig, WatchConfig
from minitron_mcore.search.config import AblateConfig, SearchConfig
from minitron_mcore.training.config import CorrectConfig, LogConfig, TrainConfig

# What may be gone past, because transformers does too: what each word of `allow` lets through.
ALLOWANCES = {
    "zero_tensors": "import: matrices that are zero throughout, as of a block made an identity",
    "non_finite_tensors": "import: tensors that hold NaN or Inf",
    "extra_tensors": "import: tensors that the family's model does not have; they are left out",
    "larger_tokenizer": "a tokenizer with ordinary pieces beyond the model's vocabulary, which no text may hold",
    "other_tokenizer": "data, a cache or a student of another tokenizer",
    "unconverted_tokenizer": "export: a SentencePiece model that transformers would not cut so; it goes along as it is",
    "long_sequences": "sequences longer than the model's max_position_embeddings",
}
# What has a stranger's code run, or names some. A recipe may be a stranger's: the command itself is to say these.
RUNS_CODE = ("trust", "evaluate.task_folder", "bench.converter", "bench.python")
# What is said over a file: the texts key=value, or values by their keys.
Overrides = Union[list[str], Mapping[str, Any]]
# numpy's and torch's generators take seeds up to here.
MOST_SEED = 2**63 - 1


@section
class TeacherConfig:
    """The model that is pruned and distilled from."""

    checkpoint: Optional[PathName] = key(None, "folder of the teacher's checkpoint")
    parallel: Optional[ParallelConfig] = key(
        None, "the teacher's own layout in the same ranks; null: the student's", may_change=True
    )
    placement: Annotated[str, OneOf("resident", "sharded", "offloaded")] = key(
        "resident",
        "sharded: over data-parallel ranks; offloaded: in host memory; a layer is brought in ahead",
        may_change=True,
    )
    precision: Optional[Annotated[str, OneOf("fp32", "bf16", "fp8")]] = key(
        None, "fp8 needs Transformer Engine; null: the recipe's"
    )

    def __post_init__(self) -> None:
        if self.parallel is not None and (count := self.parallel.num_distributed_optimizer_instances) > 1:
            rule = "has no effect on a teacher that lies by itself, which has no optimizer"
            raise InputError(f"parallel.{INSTANCES}", count, rule, "leave it out")


@section
class RunConfig:
    """What `run` makes."""

    students: dict[str, StudentConfig] = key({}, "by name; none: the one of student.*")
    chain: bool = key(
        False,
        "cut each student but the first from the one before it, distilled, which then teaches it (arXiv 2407.14679, "
        "table 11); false: all from the teacher",
    )
    baselines: list[Annotated[str, OneOf("next_token", "random")]] = key(
        [],
        "what the first student is compared with, on the same tokens: next_token (pruned, trained without a teacher) "
        "and random (the same shape from random weights)",
    )
    cache: bool = key(
        False,
        "let the teacher run once, over what the students will read, and distil them from its targets, which cache.* "
        "describes",
    )
    prompts: list[str] = key(
        [], "what the teacher and the distilled students go on with at the end, as generate.* says", may_change=True
    )
    only: Optional[str] = key(
        None,
        "one step, by its name in the folder `done`, whose input is there; null: all that are left, and the report",
        may_change=True,
    )


@section
class Recipe:
    """Everything a user can say. Verbs read the sections they need."""

    name: str = key("run", "what the run is called on dashboards")
    base: Union[PathName, list[PathName], None] = key(
        None,
        "another recipe, whose keys this one changes, or several, each on top of the one before; in a file, paths from "
        "its folder. A saved recipe names none",
        may_change=True,
    )
    output: Optional[PathName] = key(
        None, "folder of the run: metrics, resolved recipe, and every stage's files under `run`"
    )
    seed: int = key(1234, "seed of everything that is drawn", at_least=0, at_most=MOST_SEED)
    precision: Annotated[str, OneOf("fp32", "bf16")] = key("fp32", "number format of weights and activations")
    input: Sources = key(None, "preprocess: text or JSONL files, or folders")
    output_prefix: Optional[PathName] = key(None, "preprocess: path of the .bin/.idx, without ending")
    checkpoint: Optional[PathName] = key(None, "evaluate, generate, export: folder of a checkpoint; import writes it")
    checkpoints: dict[str, PathName] = key(
        {},
        "evaluate, generate, bench: several by name, side by side; the first is what the others are compared with",
        may_change=True,
    )
    hf: Optional[PathName] = key(None, "Hugging Face folder: import reads it, export writes it")
    results: Optional[PathName] = key(None, "evaluate: file to write; null: results.json beside the checkpoint")
    scores: Optional[PathName] = key(None, "score writes it, plan and prune read it")
    plan: Optional[PathName] = key(None, "plan writes it, prune reads it")
    path: Optional[PathName] = key(
        None, "inspect: the folder or file to describe; report: the folder; init: the recipe's name"
    )
    json: bool = key(False, "inspect: print JSON, not a table")
    verify: bool = key(False, "inspect: check every tensor's checksum; import: compare logits with transformers")
    trust: bool = key(
        False,
        "on the command line alone: whoever wrote the checkpoints and the recipe may have code run, by pickles that "
        "hold more than tensors and plain values, and by keys that name programs",
    )
    allow: list[Annotated[str, OneOf(*ALLOWANCES)]] = key([], "refusals to go past; their messages name the word")
    max_shard_size: str = key("5GB", "export: largest weight file, as 500MB or 5GB")
    parallel: ParallelConfig = key(ParallelConfig, "how the model is laid over the ranks", may_change=True)
    tokenizer: TokenizerConfig = key(TokenizerConfig, "the tokenizer, and how it is trained")
    preprocess: PreprocessConfig = key(PreprocessConfig, "text to token ids")
    data: DataConfig = key(DataConfig, "what training, validation and calibration read")
    chat: ChatConfig = key(ChatConfig, "chats and preferences to train on")
    model: ModelConfig = key(ModelConfig, "the architecture to train from random weights")
    teacher: TeacherConfig = key(TeacherConfig, "the model that is pruned and distilled from")
    student: StudentConfig = key(StudentConfig, "the shape to prune to")
    importance: ImportanceConfig = key(ImportanceConfig, "how the teacher's axes are scored")
    prune: PruneConfig = key(PruneConfig, "how the plan chooses")
    ablate: AblateConfig = key(AblateConfig, "the grid of `ablate`")
    search: SearchConfig = key(SearchConfig, "the candidates of `search`, and how they are ranked")
    bench: BenchConfig = key(BenchConfig, "which engines are timed, at which sizes", may_change=True)
    serving: ServingConfig = key(ServingConfig, "the inference that shapes are compared by", may_change=True)
    train: TrainConfig = key(TrainConfig, "next-token training")
    correct: CorrectConfig = key(CorrectConfig, "correction of the teacher on the distillation's data")
    cache: CacheConfig = key(CacheConfig, "the teacher's targets in files")
    distill: DistillConfig = key(DistillConfig, "training of the student from its teacher")
    align: AlignConfig = key(AlignConfig, "fine-tuning on answers, and preference optimisation")
    evaluate: EvaluateConfig = key(EvaluateConfig, "held-out LM loss")
    generate: GenerateConfig = key(GenerateConfig, "text that models write", may_change=True)
    run: RunConfig = key(RunConfig, "what `run` makes")
    log: LogConfig = key(LogConfig, "where metrics go")
    watch: WatchConfig = key(WatchConfig, "ranks that hang", may_change=True)
    cluster: ClusterConfig = key(ClusterConfig, "the machine that is planned for", may_change=True)
    submit: SubmitConfig = key(SubmitConfig, "a recipe as jobs of SLURM", may_change=True)
    estimate: EstimateConfig = key(EstimateConfig, "what a run will cost", may_change=True)
    report: ReportConfig = key(ReportConfig, "the page of a run", may_change=True)
    reproduce: ReproduceConfig = key(ReproduceConfig, "a claim of a paper, tried", may_change=True)


def load_recipe(config: Optional[str], overrides: Overrides, **taken: Any) -> Recipe:
    """Defaults < the `base` of the YAML file `config` < that file < `overrides` < `taken`, values that are not read.

    Raises InputError naming the key.
    """
    values = _said(overrides)
    said = [value for path, value in values if path == "base"][-1:]
    tree = _on_base({} if config is None else _read_yaml(config), config, said)
    for path, value in values:
        if path != "base":
            put(tree, path, value, _default)
    return dataclasses.replace(recipe_of(tree), **taken)


def _said(overrides: Overrides) -> list[tuple[str, Any]]:
    """(path, value) of each. Raises InputError for what is no key=value."""
    if isinstance(overrides, Mapping):
        return [*overrides.items()]
    values: list[tuple[str, Any]] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip(".[]"):
            raise InputError("", override, "is not an override", "write key=value, as in train.lr=1e-4")
        try:
            value = override_value(text)
        except ValueError as error:
            raise InputError(path, text, f"cannot be read: {error}") from error
        values.append((path, value))
    return values


def _on_base(
    tree: dict[str, Any], config: Optional[str], said: Sequence[Any] = (), below: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """`tree`, read from the file `config`, on top of the recipes that it names as `base`, or that the command does
    (`said`, one value if it does), each on top of the one named before it, and of its own. below: the files that led
    here. Raises InputError."""
    named = tree.pop("base", None)
    base = said[0] if said else named
    if base is None or (isinstance(base, Plain) and base in NULLS):
        return tree
    below = (*below, Path(config).resolve()) if config else below
    ground: dict[str, Any] = {}
    for each in base if isinstance(base, list) else [base]:
        path = _base_file(each, None if said else config, below)
        ground = merged(ground, _on_base(_read_yaml(str(path)), str(path), below=below))
    return merged(ground, tree)


def _base_file(base: Any, config: Optional[str], below: tuple[Path, ...]) -> Path:
    """The file that `base` names, from the folder of the file `config` where that one does. Raises InputError."""
    if not isinstance(base, str):
        raise InputError("base", base, "must be the path of a recipe, or a list of them")
    path = Path(expanded(base, "base"))
    if config is not None:
        path = Path(config).parent / path
    if not path.is_file():
        where = "" if str(path) == base else f": {path}"
        raise InputError("base", base, f"is not a file{where}", "name a recipe in YAML")
    if path.resolve() in below:
        raise InputError("base", base, "leads back to a recipe that builds on it", "leave one of them out")
    return path


def refuse_code(recipe: Recipe, config: Optional[str], overrides: Overrides) -> None:
    """Raise InputError where the file `config` has code run, or names some, and not the command itself: the file may
    be a stranger's."""
    if config is None:
        return
    command: dict[str, Any] = {}
    for path, value in _said(overrides):
        if any(each == path or each.startswith(f"{path}.") or path.startswith(f"{each}.") for each in RUNS_CODE):
            put(command, path, value, _default)
    said = flat(command)
    if recipe.trust and "trust" in said:
        return
    remedy = f"if you trust whoever wrote {config}, write it, or trust=true, behind the command"
    for path, value in flat(dataclasses.asdict(recipe)).items():
        is_of = any(path == each or path.startswith(f"{each}.") for each in RUNS_CODE)
        if is_of and value not in (None, False) and path not in said:
            raise InputError(path, value, "may have a stranger's code run, which a file cannot ask for", remedy)


def recipe_of(tree: dict[str, Any]) -> Recipe:
    """Of a mapping as a YAML file holds it. Raises InputError naming the key."""
    recipe: Recipe = read(Recipe, filled(tree, _default), "", unknown_key)
    return recipe


def with_keys(config: Any, values: dict[str, Any]) -> Any:
    """A recipe, or a section, with other values at some keys, as in {"teacher.checkpoint": "t", "name": "n"}."""
    if not values:
        return config
    inner: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        inner.setdefault(name, {})[rest] = value
    changes = {name: with_keys(those.pop("", getattr(config, name)), those) for name, those in inner.items()}
    return dataclasses.replace(config, **changes)


def _read_yaml(config: str) -> dict[str, Any]:
    path = Path(config)
    if not path.is_file():
        raise InputError("", f"--config {config}", "is not a file", "name a recipe in YAML")
    try:
        loaded = load_text(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("", f"--config {config}", f"is not YAML: {error}") from error
    if isinstance(loaded, list) or (isinstance(loaded, str) and loaded):
        held = "a list" if isinstance(loaded, list) else f"the text {loaded[:40]}"
        raise InputError("", f"--config {config}", f"holds {held}", "write a recipe as key: value")
    return loaded or {}


def _default(path: str) -> Any:
    """What a recipe has at a path where nothing is given; None where there is no such key."""
    found: Any = Recipe()
    for name in path.split("."):
        found = getattr(found, name, None)
    return dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found  # type: ignore[arg-type]


def unknown_key(path: str, value: Any, beside: list[str]) -> InputError:
    """beside: the keys that there are in its section."""
    while path.rpartition(".")[2] in SECTIONS and isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        path = f"{path}.{name}"
    nearest, leaf = _nearest(path, beside), path.rpartition(".")[2]
    name, colon, rest = path.partition(":")
    if colon and rest and value in (None, ""):
        return InputError(path, None, NO_KEY, f"put a blank behind the colon: {name.rpartition('.')[2]}: {rest}")
    known = "" if nearest.rpartition(".")[2] == leaf else named_here(path)
    return InputError(path, None, NO_KEY, known or f"the nearest is {nearest}")


def flag_help(flag: str) -> str:
    """What to write for a flag, as --train-iters or --hidden-size, in words."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    is_key = (nearest := _nearest(name)).rpartition(".")[2] == name
    return named_here(flag) or f"write {nearest if is_key else 'a key of the recipe'} as key=value"


def entries(kind: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full path, field) of every key, sections included; a dictionary's own keys are the user's."""
    for entry in dataclasses.fields(kind):
        yield prefix + entry.name, entry
        if (inner := section_of(entry.type)) is not None:
            yield from entries(inner, f"{prefix}{entry.name}.")


def _nearest(path: str, beside: Iterable[str] = ()) -> str:
    """The valid key most like `path`: of the same name elsewhere, or of a like name, rather in the same section; and
    rather there where it has all of the name's words, as bench.prompt_tokens for bench.prompt."""
    parent, _, leaf = path.rpartition(".")

    def words(name: str) -> set[str]:
        return {word.rstrip("s") for word in name.split("_")}

    def likeness(known_key: str) -> float:
        above, _, name = known_key.rpartition(".")
        is_beside = above == parent
        close = difflib.SequenceMatcher(None, leaf, name).ratio()
        return close + 0.5 * is_beside + 0.2 * (name == leaf) + 0.3 * (is_beside and words(leaf) <= words(name))

    return max([*(each for each, _ in entries()), *beside], key=likeness)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as it is saved with every run."""
    return as_yaml(dataclasses.asdict(recipe))
