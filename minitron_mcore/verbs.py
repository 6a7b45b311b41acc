"""The verbs: what each does, its keys, what it reads and writes; `minitron VERB --help` in words. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minitron_mcore.errors import shown
from minitron_mcore.keys import choices_of, default_of, entry_of, is_path, options_of, section_of, type_words
from minitron_mcore.recipe import entries


@dataclass(frozen=True)
class Verb:
    """summary: in the table of README.md too. keys: of the recipe, or whole sections. road: what it reads → what it
    writes."""

    summary: str
    keys: tuple[str, ...]
    road: str
    example: str

    @property
    def in_words(self) -> str:
        """The summary without Markdown."""
        return self.summary.partition(" ([")[0].replace("`", "")


_MODEL = ("precision", "seed", "parallel", "cluster", "trust", "allow")
_TRAINS = (*_MODEL, "name", "data", "tokenizer.model", "log")

_ROAD = (
    *("output", "input", "run", "student", "search", "importance", "prune", "train", "correct", "distill", "teacher"),
    *("serving", "cache", "evaluate", "tokenizer", "preprocess", "model", "name", "data", "log"),
)

VERBS = {
    "init": Verb(
        "a recipe of the project, with what starts it, copied into your folder; without a name, the list of them",
        ("path", "output"),
        "PATH, a recipe's name → configs/ and launch/ in output, which is the current folder where it is left out",
        "minitron init quickstart",
    ),
    "tokenizer": Verb(
        "train a SentencePiece model on text files",
        ("input", "seed", "tokenizer"),
        "text files → tokenizer.model",
        "minitron tokenizer input=corpus/ tokenizer.model=t.model tokenizer.vocab_size=32k",
    ),
    "preprocess": Verb(
        "text, JSON lines or Parquet, compressed or not → Megatron's `.bin` / `.idx` ([docs/data.md](docs/data.md))",
        ("input", "output_prefix", "seed", "allow", "preprocess", "tokenizer.model", "tokenizer.type"),
        "text files, tokenizer.model → output_prefix_text_document.bin and .idx, which data.train names without their "
        "ending",
        "minitron preprocess input=corpus/ output_prefix=data/corpus tokenizer.model=t.model",
    ),
    "import": Verb(
        "Hugging Face folder → sharded checkpoint, streamed and checked",
        ("hf", "checkpoint", "verify", "tokenizer.model", *_MODEL),
        "the Hugging Face folder hf → the checkpoint folder checkpoint",
        "minitron import hf=Llama-3.1-8B checkpoint=teacher",
    ),
    "train": Verb(
        "next-token training, from scratch or on from a checkpoint",
        ("train", "model", *_TRAINS),
        "data.train, and train.load where it is given → train.checkpoint, from which the same command resumes",
        "minitron train --config recipe.yaml train.checkpoint=teacher train.tokens=2B",
    ),
    "score": Verb(
        "importance of hidden channels, neurons, heads, KV groups and layers in one forward pass; what leaving "
        "out each layer or block costs",
        ("teacher.checkpoint", "scores", "importance", "data", "tokenizer.model", *_MODEL),
        "teacher.checkpoint, data.calibration (or data.train) → the file scores",
        "minitron score teacher.checkpoint=teacher data.train=data/corpus_text_document scores=scores.safetensors",
    ),
    "plan": Verb(
        "scores and a target shape → `plan.json`, a readable list of what stays; touches no weights",
        ("scores", "plan", "teacher.checkpoint", "student", "prune", "parallel", "trust"),
        "the file scores → the file plan",
        "minitron plan scores=scores.safetensors student.ffn_hidden_size=9216 plan=plan.json",
    ),
    "prune": Verb(
        "a plan carried out on a sharded checkpoint → the student's checkpoint",
        ("teacher.checkpoint", "scores", "plan", "student", "prune", *_MODEL),
        "teacher.checkpoint, and plan or scores → student.checkpoint",
        "minitron prune teacher.checkpoint=teacher plan=plan.json student.checkpoint=student",
    ),
    "ablate": Verb(
        "a grid of importance settings, each pruned in memory and evaluated untrained: table, CSV, plot",
        ("output", "teacher.checkpoint", "student", "ablate", "importance", "evaluate", "data", *_MODEL),
        "teacher.checkpoint, data → output/ablation.csv and its plot",
        "torchrun --nproc-per-node 2 -m minitron_mcore ablate --config configs/ablate-quickstart.yaml",
    ),
    "search": Verb(
        "the best shape for a budget: the candidates of a grid, listed, or ranked by short distillations "
        "([docs/search.md](docs/search.md))",
        (
            *("output", "search", "teacher", "hf", "model", "serving", "scores", "prune", "importance", "distill"),
            *("evaluate", *_TRAINS),
        ),
        "teacher.checkpoint, data.train; to list them a teacher's shape alone → output/candidates.json, its plots, and "
        "output/winner, from which distill goes on",
        "minitron search --config configs/search-nemotron-8b.yaml search.train=false",
    ),
    "correct": Verb(
        "fine-tune the teacher on the distillation's data, before it teaches",
        ("teacher.checkpoint", "correct", *_TRAINS),
        "teacher.checkpoint, data.train → correct.checkpoint, from which the same command resumes",
        "minitron correct --config recipe.yaml correct.checkpoint=corrected correct.tokens=1B",
    ),
    "cache": Verb(
        "the teacher's targets for a data set, written once: sampled without bias, or its likeliest tokens",
        ("teacher.checkpoint", "cache", "data", "tokenizer.model", "distill.tokens", "distill.temperature", *_MODEL),
        "teacher.checkpoint, data.train → cache.folder, which distill.teacher=cache:FOLDER reads",
        "minitron cache --config recipe.yaml cache.folder=targets",
    ),
    "distill": Verb(
        "train the student on the teacher's distribution, for a budget of tokens",
        ("student.checkpoint", "teacher", "distill", "chat", "correct", *_TRAINS),
        "student.checkpoint, teacher.checkpoint (or a cache), data.train or chat.train → distill.checkpoint, from "
        "which the same command resumes",
        "torchrun --nproc-per-node 8 -m minitron_mcore distill --config recipe.yaml distill.tokens=94B",
    ),
    "align": Verb(
        "fine-tune a model on chats, or on preferences (DPO, IPO, RPO, SimPO), in one round or several "
        "([docs/alignment.md](docs/alignment.md); the papers' in `configs/align-*.yaml`)",
        ("align", "chat", *_TRAINS),
        "align.load, chat.train → align.checkpoint, from which the same command resumes",
        "torchrun --nproc-per-node 8 -m minitron_mcore align --config recipe.yaml align.method=dpo align.epochs=1",
    ),
    "evaluate": Verb(
        "language-model loss, and tasks of the LM Evaluation Harness, of checkpoints at any layout and Hugging Face "
        "folders, in one table → `results.json` ([docs/evaluate.md](docs/evaluate.md))",
        ("checkpoint", "checkpoints", "results", "output", "evaluate", "data", "tokenizer.model", *_MODEL),
        "checkpoint or checkpoints, data.valid (or a part of data.train), the tasks' data sets → the file results",
        "minitron evaluate checkpoint=student data.valid=data/corpus_valid_text_document evaluate.tasks=[minitron]",
    ),
    "generate": Verb(
        "text that checkpoints write, side by side, to prompts or chat messages; greedy or sampled, at any layout "
        "([docs/generate.md](docs/generate.md))",
        ("checkpoint", "checkpoints", "generate", "tokenizer.model", *_MODEL),
        "checkpoint or checkpoints, generate.prompts → generate.output",
        "minitron generate checkpoint=student generate.prompts=prompts.jsonl generate.output=continuations.jsonl",
    ),
    "bench": Verb(
        "prefill and decode speed, latency and memory of checkpoints, in this engine and in others "
        "([docs/bench.md](docs/bench.md))",
        ("checkpoint", "checkpoints", "bench", "output", "tokenizer.model", *_MODEL),
        "checkpoints, or one checkpoint → bench.output",
        "minitron bench checkpoints.teacher=teacher checkpoints.student=distilled bench.output=bench.json",
    ),
    "export": Verb(
        "checkpoint of any pruned shape → Hugging Face folder",
        ("checkpoint", "hf", "max_shard_size", "tokenizer.model", *_MODEL),
        "checkpoint → the Hugging Face folder hf",
        "minitron export checkpoint=distilled hf=Student-4B",
    ),
    "inspect": Verb(
        "what a checkpoint, Hugging Face folder, scores file, plan, or folder of a run or search is, and whether it is "
        "whole",
        ("path", "json", "verify", "trust"),
        "PATH → nothing",
        "minitron inspect student --verify",
    ),
    "estimate": Verb(
        "what a recipe needs and costs on a cluster, from shapes alone: memory by part, layouts, time, cost, "
        "of `run` and of the rounds of `align` ([docs/estimate.md](docs/estimate.md))",
        ("estimate", "cluster", *_ROAD, "precision", "seed", "parallel", "hf", "plan"),
        "a recipe, the teacher's architecture.yaml or config.json → estimate.output",
        "minitron estimate --config recipe.yaml cluster.gpus=256 cluster.device=H100",
    ),
    "report": Verb(
        "a page with figures of a run, or of any part of one; it needs no network ([docs/report.md](docs/report.md))",
        ("path", "report"),
        "PATH → report.output, which is PATH/report.html where it is left out",
        "minitron report path=runs/quickstart",
    ),
    "run": Verb(
        "everything above, from one recipe",
        ("hf", *_ROAD, *_MODEL),
        "what the recipe names → the folder output",
        "torchrun --nproc-per-node 2 -m minitron_mcore run --config configs/quickstart.yaml",
    ),
    "reproduce": Verb(
        "a claim of a paper, tried: arms distilled with several seeds, their differences with intervals, and a verdict "
        "([docs/reproduction.md](docs/reproduction.md); the papers' in `configs/reproduce/`)",
        ("reproduce", "base", "hf", *_ROAD, *_MODEL),
        "text, or data.train and a teacher → output/NAME/reproduction.json and its plot, output/reproduction.md",
        "torchrun --nproc-per-node 2 -m minitron_mcore reproduce --config configs/reproduce/losses.yaml",
    ),
    "submit": Verb(
        "a recipe's steps as SLURM jobs that wait for each other, each of its own size; searches and ablations as "
        "arrays ([docs/cluster.md](docs/cluster.md))",
        ("submit", "hf", *_ROAD, "ablate", "align", "chat", *_MODEL),
        "a recipe, and a template of a job → output/submit, and SLURM's queue",
        "minitron submit --config recipe.yaml cluster.gpus=256 cluster.time=12:00:00",
    ),
}


# As `minitron --help` lists them: by what one is at.
GROUPS = {
    "start": ("init", "run", "submit"),
    "text to tokens": ("tokenizer", "preprocess"),
    "the teacher": ("import", "train", "correct"),
    "prune": ("score", "plan", "prune", "ablate", "search"),
    "distil and align": ("cache", "distill", "align"),
    "measure": ("evaluate", "generate", "bench", "inspect", "report"),
    "hand on": ("export",),
    "ask beforehand": ("estimate", "reproduce"),
}


def listed(width: int = 118) -> str:
    """Every verb in its group, with its summary and an example."""
    lines = []
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        for name in names:
            lines.append(f"  {name:<11} {textwrap.shorten(VERBS[name].in_words, width - 14, placeholder=' …')}")
            lines.append(f"{'':<14}$ {VERBS[name].example}")
    return "\n".join(lines)


def help_of(name: str, width: int = 110) -> str:
    """What `minitron VERB --help` prints."""
    verb = VERBS[name]
    reads, writes = verb.road.split(" → ")
    lines = [f"minitron {name}: {verb.in_words}", "", f"reads:   {reads}", f"writes:  {writes}"]
    lines += [f"example: {verb.example}", ""]
    lines += ["keys, as key=value on the command line or in the file that --config names; counts as 94B, 2e9, 1_000:"]
    for path, entry in keys_of(name):
        lines += _key_lines(path, entry, width)
    return "\n".join(lines)


def keys_of(name: str) -> list[tuple[str, Any]]:
    """(path, field) of every key of a verb, those of sections one by one; a section too that may be left out whole."""
    leaves = [each for each in entries() if section_of(each[1].type) is None or default_of(each[1]) is None]
    return [leaf for key in VERBS[name].keys for leaf in leaves if f"{leaf[0]}.".startswith(f"{key}.")]


def _key_lines(path: str, entry: Any, width: int) -> Iterator[str]:
    default = default_of(entry)
    kind = "path" if any(map(is_path, options_of(entry.type))) else type_words(entry.type).removesuffix(" or null")
    if choices := choices_of(entry.type) or choices_of(entry_of(entry.type)):
        kind = f"{'a list of ' if isinstance(default, list) else ''}{', '.join(choices)}"
    yield f"  {path}={shown(default)}  ({kind})"
    yield from textwrap.wrap(entry.metadata["description"], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
