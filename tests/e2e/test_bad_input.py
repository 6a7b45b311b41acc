"""Wrong input, through the command line, for every verb: exit code 2, one sentence that names it, nothing written.

Each case takes a command that is right and makes one thing wrong. `@` stands for the folder of the test.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minitron_mcore.verbs import VERBS
from tests.distributed.ranks import run_on_ranks
from tests.e2e.bad_bench_cases import BENCH
from tests.e2e.bad_distill_cases import DISTILL
from tests.e2e.bad_estimate_cases import ESTIMATE
from tests.e2e.bad_generate_cases import GENERATE
from tests.e2e.bad_input_cases import CASES, Case
from tests.e2e.bad_overlap_cases import OVERLAP
from tests.e2e.bad_report_cases import REPORT
from tests.e2e.bad_search_cases import SEARCH
from tests.e2e.verbs import all_typed, typed

ALL = (*CASES, *DISTILL, *SEARCH, *ESTIMATE, *GENERATE, *REPORT, *BENCH, *OVERLAP)
TRACKER = "latest_checkpointed_iteration.txt"
ROOT = Path(__file__).parents[2]
# What no description says: it is found only while text or tensors are read.
SEEN_WHILE_RUNNING = {
    ("tokenizer", "tokenizer.input=@/blank.txt"),
    ("tokenizer", "tokenizer.input=@/empty.txt"),
    ("tokenizer", "tokenizer.vocab_size=9999"),
    ("preprocess", "input=@/empty.txt"),
    ("preprocess", "input=@/broken.jsonl"),
    ("preprocess", "preprocess.json_keys=[body]"),
    ("evaluate", "checkpoint=@/checkpoints/damaged"),
}

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "rotary_base": 10000.0,
}
TRAIN = {"tokens": 64, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 1}
RECIPE = {
    "tokenizer": {"model": "@/tokenizer.model", "input": "@/text.jsonl", "vocab_size": 300},
    "preprocess": {"workers": 1},
    "data": {"train": "@/data/tokens_text_document", "sequence_length": 16, "num_workers": 0, "split": "80,20,0"},
    "model": MODEL,
    "importance": {"num_samples": 2},
    "evaluate": {"samples": 2},
    "train": TRAIN,
    "distill": TRAIN,
    "log": {"wandb": "disabled", "tensorboard": False},
}
# What each verb needs beside the recipe; every output is new.
RIGHT = {
    "tokenizer": ["tokenizer.model=@/new/tokenizer.model"],
    "preprocess": ["input=@/text.jsonl", "output_prefix=@/new/tokens"],
    "import": ["hf=@/hf", "checkpoint=@/new/imported"],
    "train": ["train.checkpoint=@/new/trained"],
    "score": ["teacher.checkpoint=@/teacher", "scores=@/new/scores.safetensors"],
    "plan": [
        "teacher.checkpoint=@/teacher",
        "scores=@/scores.safetensors",
        "plan=@/new/plan.json",
        "student.num_layers=1",
    ],
    "prune": ["teacher.checkpoint=@/teacher", "scores=@/scores.safetensors", "student.checkpoint=@/new/student"],
    "search": [
        "teacher.checkpoint=@/teacher",
        "output=@/new/search",
        "search.train=false",
        "search.num_layers=[1]",
        "search.ffn_ratio=[1,1.5]",
    ],
    "distill": ["teacher.checkpoint=@/teacher", "student.checkpoint=@/student", "distill.checkpoint=@/new/distilled"],
    "evaluate": ["checkpoint=@/teacher", "output=@/new/evaluation"],
    "generate": ["checkpoint=@/teacher", "generate.prompt=prune1", "generate.output=@/new/text.jsonl"],
    "bench": [
        "checkpoint=@/teacher",
        "bench.engines=[minitron]",
        "bench.prompt_tokens=8",
        "bench.output_tokens=4",
        "bench.output=@/new/bench.json",
    ],
    "export": ["checkpoint=@/teacher", "hf=@/new/hf"],
    "estimate": [
        "teacher.checkpoint=@/teacher",
        "student.num_layers=1",
        "cluster.gpus=2",
        "estimate.output=@/new/estimate.json",
    ],
    "report": ["path=@/teacher", "report.output=@/new/report.html"],
    "run": ["output=@/new/run"],
}


def command(root: Path, verb: str, overrides: list[str]) -> list[str]:
    words = [verb, "--config", "@/recipe.yaml", *RIGHT[verb], *overrides]
    return [word.replace("@", str(root)) for word in words]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every verb reads, made by the verbs: text, tokenizer, tokens, teacher, scores, student."""
    root = tmp_path_factory.mktemp("bad_input")
    lines = [" ".join(f"{word}{number % 7}" for word in ("prune", "distil", "score") * 20) for number in range(40)]
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE).replace("@", str(root)))
    steps = [
        ("tokenizer", ["tokenizer.model=@/tokenizer.model"]),
        ("tokenizer", ["tokenizer.model=@/other.model", "tokenizer.vocab_size=310"]),
        ("preprocess", ["output_prefix=@/data/tokens"]),
        ("train", ["train.checkpoint=@/teacher"]),
        ("score", ["scores=@/scores.safetensors"]),
        ("prune", ["student.checkpoint=@/student", "student.num_layers=1"]),
        ("evaluate", ["output=@/evaluation"]),
    ]
    results = run_on_ranks(all_typed, 1, [command(root, *step) for step in steps], root)[0]
    assert [code for code, _, _ in results] == [0] * len(steps), results
    make_wrong_things(root)
    return root


def make_wrong_things(root: Path) -> None:
    (root / "empty.txt").touch()
    (root / "blank.txt").write_text(" \n\n")
    (root / "empty_folder").mkdir()
    (root / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "file").write_text("something of the user's")
    (root / "papers").mkdir()
    (root / "papers" / "thesis.txt").write_text("years of work")
    (root / "recipes").mkdir()
    (root / "recipes" / "list.yaml").write_text("- train\n")
    (root / "recipes" / "torn.yaml").write_text("train: {lr: 1\n")
    (root / "other_run").mkdir()
    (root / "other_run" / "recipe.yaml").write_text("data: {sequence_length: 17}\n")
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    (root / "hf_one_layer").mkdir()
    (root / "hf_one_layer" / "config.json").write_text(json.dumps({**llama, "num_attention_heads": 4}))
    make_wrong_checkpoints(root / "teacher", root / "checkpoints")


def make_wrong_checkpoints(teacher: Path, folder: Path) -> None:
    """Copies of the teacher, each with one thing wrong."""
    changes: dict[str, dict[str, int]] = {
        "one_group": {"num_query_groups": 1},
        "odd_ffn": {"ffn_hidden_size": 63},
        "same_recipe": {"ffn_hidden_size": 63},
        "other_vocabulary": {"vocab_size": 301},
        "short": {"max_position_embeddings": 15},
    }
    others = ("unfinished", "no_recipe", "torn_tracker", "cut_off", "torn_architecture", "damaged", "no_tokenizer")
    for name in (*changes, *others):
        shutil.copytree(teacher, folder / name)
    for name, change in changes.items():
        path = folder / name / "architecture.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    (folder / "unfinished" / TRACKER).unlink()
    (folder / "unfinished" / "iter_0000001").rename(folder / "unfinished" / ".unfinished_iter_0000001")
    (folder / "no_recipe" / "recipe.yaml").unlink()
    shutil.rmtree(folder / "no_tokenizer" / "tokenizer")
    (folder / "torn_tracker" / TRACKER).write_bytes(b"\xff\xfe1")
    (folder / "cut_off" / "iter_0000001" / "metadata.json").unlink()
    (folder / "torn_architecture" / "architecture.yaml").write_text("num_layers: [\n")
    for path in (folder / "damaged" / "iter_0000001").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 16])  # the weights too, not the optimizer alone


def case_name(case: Case) -> str:
    verb, overrides = case[-3], case[-2]
    ranks = f"-{case[0]} ranks" if len(case) == 4 else ""
    return f"{verb}{ranks} {' '.join(overrides)}"  # type: ignore[arg-type]


def ranks_of(case: Case) -> int:
    return case[0] if len(case) == 4 else 1


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, list[tuple[int, str, bool]]]:
    """Every case's results by rank, all cases of one number of ranks in one call."""
    found: dict[str, list[tuple[int, str, bool]]] = {}
    for world_size in (1, 2):
        cases = [case for case in ALL if ranks_of(case) == world_size]
        commands = [command(root, *case[-3:-1]) for case in cases]  # type: ignore[misc]
        by_rank = run_on_ranks(all_typed, world_size, commands, root)
        found |= {case_name(case): list(ranks) for case, *ranks in zip(cases, *by_rank, strict=True)}
    return found


@pytest.mark.parametrize("case", ALL, ids=case_name)
def test_wrong_input_is_named_and_nothing_is_written(
    case: Case, root: Path, results: dict[str, list[tuple[int, str, bool]]]
) -> None:
    ranks = results[case_name(case)]
    assert [code for code, _, _ in ranks] == [2] * ranks_of(case), ranks[0][1]
    for _, shown, untouched in ranks:
        assert shown.startswith(f"minitron {case[-3]}: ") and shown.count("\n") == 1 and shown.endswith("\n"), shown
        assert case[-1].replace("@", str(root)) in shown
        assert untouched


@pytest.fixture(scope="module")
def dry_results(root: Path) -> dict[str, tuple[int, str, bool]]:
    """Every case with --dry-run, in a process without megatron or a process group."""
    cases = ALL
    commands = [[*command(root, *case[-3:-1]), *planned_ranks(case)] for case in cases]  # type: ignore[misc]
    words = [sys.executable, "-m", "tests.e2e.dry_runs", str(root)]
    done = subprocess.run(words, input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heavy"] == []
    return {case_name(case): tuple(result) for case, result in zip(cases, found["results"], strict=True)}


def planned_ranks(case: Case) -> list[str]:
    return [f"cluster.gpus={ranks_of(case)}"] if ranks_of(case) > 1 else []


@pytest.mark.parametrize("case", ALL, ids=case_name)
def test_a_dry_run_refuses_what_the_run_refuses(
    case: Case, results: dict[str, list[tuple[int, str, bool]]], dry_results: dict[str, tuple[int, str, bool]]
) -> None:
    code, shown, untouched = dry_results[case_name(case)]
    assert untouched
    if (case[-3], *case[-2]) in SEEN_WHILE_RUNNING:
        assert code == 0, shown
    else:
        assert (code, shown) == results[case_name(case)][0][:2]


@pytest.mark.parametrize(
    ("verb", "remedy"), [("prunne", "did you mean prune?\n"), ("xyz", f"choose one of {', '.join(VERBS)}\n")]
)
def test_an_unknown_verb_is_named_beside_those_there_are(verb: str, remedy: str, tmp_path: Path) -> None:
    code, shown = run_on_ranks(typed, 1, [verb, f"output={tmp_path}/new"])[0]
    assert (code, shown) == (2, f"minitron: {verb} is not a verb: {remedy}")
    assert not list(tmp_path.iterdir())
