"""The verbs `plan` and `prune` at TP2: what they write, and that wrong input changes nothing on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml

from minitron_mcore.importance.scores import WIDTH_AXES, Scores, load_scores, save_scores
from minitron_mcore.jobs.prune import other_teacher, pipeline_split
from minitron_mcore.pruning.plan_file import load_plan
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.models import start_layout, tiny
from tests.distributed.ranks import run_on_ranks

TARGET = ["student.num_layers=3", "student.hidden_size=32", "student.ffn_hidden_size=64"]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save_teacher(folder: Path, world_size: int) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start

    config, architecture = start_layout({"tensor": 2}, world_size), tiny("llama")
    runtime, chunks = start(), build_model(architecture, config, "fp32")
    initialize(chunks, architecture, seed=1)
    save_state(folder, 7, model_state(as_chunks(chunks)), runtime)
    if runtime.is_main:
        write_description(
            folder,
            architecture,
            lineage={"stage": "train", "tokens": 99, "tokenizer": "abc"},
            recipe="name: teacher\n",
            save_tokenizer=lambda path: Path(path).mkdir(),
        )
        (folder / "tokenizer" / "tokenizer.model").write_text("pieces")
    runtime.barrier()


def run_verb(verb: str, overrides: list[str], root: Path) -> str:
    """What the verb refused, or ""; `@` stands for the folder of the test."""
    import importlib

    from minitron_mcore.errors import InputError
    from minitron_mcore.jobs.job import resolve
    from minitron_mcore.recipe import load_recipe
    from minitron_mcore.runtime.start import start
    from minitron_mcore.runtime.world import World

    runtime = start()
    try:
        recipe = load_recipe(None, ["parallel.tensor=2", *(text.replace("@", str(root)) for text in overrides)])
        job = resolve(verb, recipe, World(size=runtime.world_size))
        importlib.import_module(f"minitron_mcore.stages.{verb}").run(job, runtime)
    except InputError as error:
        return str(error)
    return ""


def build(root: Path, world_size: int) -> list[str]:
    save_teacher(root / "teacher", world_size)
    common = ["teacher.checkpoint=@/teacher", "scores=@/scores.safetensors"]
    return [
        run_verb("plan", [*common, *TARGET, "plan=@/plan.json"], root),
        run_verb("prune", [*common, "plan=@/plan.json", "student.checkpoint=@/planned"], root),
        run_verb("prune", [*common, *TARGET, "student.checkpoint=@/students/scored"], root),
    ]


def run_all(cases: list[tuple[str, list[str]]], root: Path) -> list[tuple[str, bool]]:
    """Each case's refusal, and whether the folder is as it was."""
    result = []
    for verb, overrides in cases:
        before = listing(root)
        torch.distributed.barrier()
        message = run_verb(verb, overrides, root)
        torch.distributed.barrier()
        result.append((message, listing(root) == before))
        torch.distributed.barrier()
    return result


def read_whole(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    from megatron.core import dist_checkpointing

    return [dist_checkpointing.load_plain_tensors(str(folder / "iter_0000000")) for folder in folders]


def fail_while_saving(root: Path) -> list[bool]:
    """A rank dies while the student is saved: what stood there before, and nothing that looks like a new one."""
    import minitron_mcore.pruning.apply as apply

    def broken(*arguments: Any, **keywords: Any) -> None:
        raise OSError("disk full")

    common = ["teacher.checkpoint=@/teacher", "scores=@/scores.safetensors"]
    original, apply.save_stream = apply.save_stream, broken  # type: ignore[assignment]
    result = []
    try:
        for target in ("planned", "fresh"):
            before = listing(root / target)
            with pytest.raises(OSError, match="disk full"):
                run_verb("prune", [*common, f"student.checkpoint=@/{target}", "prune.overwrite=true"], root)
            result.append(listing(root / target) == before)
    finally:
        apply.save_stream = original
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prune_stage")
    for name, architecture in (
        ("scores", tiny("llama")),
        ("other", tiny("llama", hidden_size=64)),
        ("again", tiny("llama")),
    ):
        draw = numpy.random.default_rng(len(name))
        a = architecture
        shapes = {
            "hidden": (a.hidden_size,),
            "ffn": (a.num_layers, a.ffn_hidden_size),
            "heads": (a.num_layers, a.num_attention_heads),
            "layers": (a.num_layers,),
        }
        arrays: dict[str, Any] = {axis: draw.random(shape) + 1 for axis, shape in shapes.items()}
        arrays["groups"] = draw.random((a.num_layers, a.num_query_groups)) + 1
        arrays["variants"] = {"mean/mean/pre_activation": {axis: 3 - arrays[axis] for axis in WIDTH_AXES}}
        arrays["depth"] = {"lm_loss@1": draw.random(a.num_layers)}
        save_scores(Scores(a, **arrays), path / f"{name}.safetensors")
    assert run_on_ranks(build, 2, path, 2) == [["", "", ""]] * 2
    plan = json.loads((path / "plan.json").read_text())
    plan["hidden"][-1] = 48
    (path / "beyond.json").write_text(json.dumps(plan))
    shutil.copytree(path / "teacher", path / "damaged")
    weights = next((path / "damaged" / "iter_0000007").glob("__1_*.distcp"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (path / "papers").mkdir()
    (path / "papers" / "thesis.txt").write_text("years of work")
    return path


def test_the_student_describes_itself(root: Path) -> None:
    plan, folder = load_plan(root / "plan.json", tiny("llama")), root / "planned"
    assert {path.name for path in folder.iterdir()} == {
        "architecture.yaml",
        "recipe.yaml",
        "lineage.yaml",
        "plan.json",
        "tokenizer",
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
    }
    assert (folder / "tokenizer" / "tokenizer.model").read_text() == "pieces"
    assert load_plan(folder / "plan.json") == plan
    lineage = yaml.safe_load((folder / "lineage.yaml").read_text())
    assert lineage["teacher"] == {
        "checkpoint": str(root / "teacher"),
        "iteration": 7,
        "lineage": {"stage": "train", "tokens": 99, "tokenizer": "abc"},
    }
    assert lineage["plan"]["fingerprint"] == plan.fingerprint
    assert lineage["scores"]["fingerprint"] == plan.settings["scores_fingerprint"]
    assert (lineage["stage"], lineage["tokenizer"]) == ("prune", "abc")
    assert (plan.student.num_layers, plan.student.hidden_size, plan.student.ffn_hidden_size) == (3, 32, 64)
    assert not [*root.glob(".*"), *root.glob("students/.*")], "something unfinished is left"


def test_a_plan_and_its_scores_give_the_same_student(root: Path) -> None:
    planned, scored = run_on_ranks(read_whole, 1, [root / "planned", root / "students" / "scored"])[0]
    assert planned.keys() == scored.keys()
    for key, value in planned.items():
        same = torch.equal(value, scored[key]) if isinstance(value, torch.Tensor) else value == scored[key]
        assert same, key


SCORED = ["teacher.checkpoint=@/teacher", "scores=@/scores.safetensors"]
INTO = "student.checkpoint=@/new"
BAD: list[tuple[str, list[str], str]] = [
    ("plan", [*SCORED], "plan is not given"),
    ("plan", ["plan=@/new.json"], "scores is not given"),
    (
        "plan",
        [],
        "plan, scores are not given: plan is the file to write, as in plan=plan.json; scores is the file that",
    ),
    (
        "plan",
        [*SCORED, "plan=@/new.json"],
        "student asks for nothing smaller than the teacher: set student.layers, s",
    ),
    ("plan", ["plan=@/new.json", "scores=@/none"], "scores=@/none does not exist"),
    (
        "plan",
        ["plan=@/new.json", "scores=@/plan.json"],
        "scores=@/plan.json is a pruning plan: name the file that `min",
    ),
    ("plan", ["plan=@/new.json", "scores=@/teacher"], "scores=@/teacher is a checkpoint: name the file that `minitron"),
    ("prune", [SCORED[0], "plan=@/scores.safetensors", INTO], "plan=@/scores.safetensors is a scores file: name the"),
    (
        "plan",
        ["plan=@/new.json", SCORED[0], "scores=@/other.safetensors"],
        "scores=@/other.safetensors was made for another model than this teacher: hidden_size is 64 there and 48 here",
    ),
    ("plan", [*SCORED, "plan=@/new.json", "student.ffn_hidden_size=97"], "is larger than the teacher's 96"),
    ("prune", [SCORED[1], INTO], "teacher.checkpoint is not given"),
    ("prune", [SCORED[0], INTO], "scores is not given"),
    ("prune", ["teacher.checkpoint=@/papers", SCORED[1], INTO], "teacher.checkpoint=@/papers holds no finished"),
    ("prune", [SCORED[0], "scores=@/other.safetensors", INTO], "was made for another model than this teacher"),
    ("prune", [*SCORED, INTO, "student.num_attention_heads=3"], "not a multiple of the teacher's num_query_groups=2"),
    ("prune", [*SCORED, INTO, "student.ffn_hidden_size=33"], "student.ffn_hidden_size=33 is not a multiple of"),
    (
        "prune",
        [*SCORED, INTO, "parallel.tensor=1", "parallel.pipeline=2", "student.num_layers=1"],
        "student.num_layers=1 is fewer than the 2 stages of parallel.pipeline=2",
    ),
    ("prune", [*SCORED, INTO, "parallel.tensor=4"], "but 2 were started"),
    (
        "prune",
        [*SCORED, INTO, "student.num_query_groups=1"],
        "student.num_query_groups=1 is not a multiple of paralle",
    ),
    ("prune", [*SCORED, INTO, "student.num_query_groups=3"], "student.num_query_groups=3 is larger than the teacher's"),
    (
        "plan",
        [*SCORED, "plan=@/new.json", "student.ratios.hidden=0.5"],
        "student.ratios.hidden=0.5 cannot be pruned: choose from num_layers",
    ),
    ("plan", [*SCORED, "plan=@/new.json", "student.ratios.hidden_size=1.5"], "must be above 0 and at most 1"),
    (
        "plan",
        [*SCORED, "plan=@/new.json", "student.ratios.hidden_size=0.5", "student.hidden_size=24"],
        "student.hidden_size=24 and student.ratios.hidden_size=0.5 are both given",
    ),
    ("prune", [*SCORED, INTO, "prune.divisible_by=32", "student.hidden_size=40"], "choose 32"),
    ("prune", [*SCORED, INTO, "student.layers=[0,9]"], "student.layers=[0, 9] must be among the teacher's layers"),
    (
        "prune",
        [*SCORED, INTO, "student.layers=[0,1]", "student.num_layers=3"],
        "student.layers=[0, 1] names 2 layers, but student.num_layers=3: leave one of them out",
    ),
    (
        "prune",
        [*SCORED, INTO, "student.layers=[0,1,2]", "plan=@/plan.json"],
        "[0, 1, 2] is not what plan=@",
    ),
    ("prune", [*SCORED, INTO, "student.ratios.hidden_size=0.5", "plan=@/plan.json"], "was made with, none: plan again"),
    ("prune", [*SCORED, INTO, "prune.head_residual=paper", "plan=@/plan.json"], "was made with, none: plan again"),
    (
        "prune",
        [*SCORED, INTO, "prune.head_residual=paper", "student.num_attention_heads=2"],
        "student.num_attention_heads=2 keeps 1 of 3 in each KV group",
    ),
    (
        "prune",
        [*SCORED, INTO, "prune.head_residual=laco", "prune.residual_matrices=[value]", "student.num_attention_heads=4"],
        "prune.residual_matrices=[value] holds value, which is not allowed, because the query heads of a KV group",
    ),
    (
        "plan",
        [*SCORED, "plan=@/new.json", "prune.variant=l2/l2/pre_activation"],
        "prune.variant=l2/l2/pre_activation is not among",
    ),
    (
        "plan",
        [*SCORED, "plan=@/new.json", "prune.depth_metric=accuracy", "student.num_layers=2"],
        "prune.depth_metric=accuracy was not measured for blocks of 1 layer, only block_influence, lm_loss",
    ),
    (
        "plan",
        [*SCORED, "plan=@/new.json", "prune.depth_metric=lm_loss", "prune.layers=contiguous", "student.num_layers=2"],
        "prune.depth_metric=lm_loss was not measured for blocks of 2 layers",
    ),
    ("prune", ["teacher.checkpoint=@/damaged", SCORED[1], INTO], "is damaged"),
    ("prune", [*SCORED, INTO, "plan=@/none.json"], "plan=@/none.json does not exist"),
    ("prune", [*SCORED, INTO, "plan=@/beyond.json"], "plan=@/beyond.json has the index 48 in hidden, but the teac"),
    ("prune", [*SCORED, INTO, "plan=@/plan.json", "student.num_layers=2"], "student.num_layers=2 is not what plan=@"),
    ("prune", [SCORED[0], "scores=@/again.safetensors", INTO, "plan=@/plan.json"], "was made from other scores"),
    ("prune", [*SCORED], "student.checkpoint is not given"),
    ("prune", [*SCORED, "student.checkpoint=@/plan.json"], "is a file"),
    ("prune", [*SCORED, "student.checkpoint=@/planned"], "exists already: name another folder, or set prune.overw"),
    ("prune", [*SCORED, "student.checkpoint=@/papers", "prune.overwrite=true"], "something other than a checkpoint"),
    ("prune", [*SCORED, "student.checkpoint=@/teacher", "prune.overwrite=true"], "the teacher's own folder"),
    ("prune", [*SCORED, "student.checkpoint=@", "prune.overwrite=true"], "one lies within the other"),
]


def test_wrong_input_is_named_and_nothing_is_written(root: Path) -> None:
    ranks = run_on_ranks(run_all, 2, [(verb, overrides) for verb, overrides, _ in BAD], root)
    for rank in ranks:
        for (_, overrides, words), (message, untouched) in zip(BAD, rank, strict=True):
            assert words.replace("@", str(root)) in message and untouched, (overrides, message)
            assert "\n" not in message


def test_every_choice_reaches_the_plan(root: Path) -> None:
    wanted = [
        "student.layers=[0,2,3]",
        "student.ratios.hidden_size=0.6",
        "student.num_attention_heads=4",
        "prune.divisible_by=16",
        "prune.variant=mean/mean/pre_activation",
        "prune.head_residual=laco",
        "prune.residual_matrices=[output]",
        "student.checkpoint=@/chosen",
    ]
    assert [rank[0][0] for rank in run_on_ranks(run_all, 2, [("prune", [*SCORED, *wanted])], root)] == ["", ""]
    plan = load_plan(root / "chosen" / "plan.json")
    assert (plan.layers, plan.student.hidden_size, plan.student.num_attention_heads) == ([0, 2, 3], 32, 4)
    assert plan.settings["variant"] == "mean/mean/pre_activation" and plan.settings["divisible_by"] == 16
    assert plan.residual is not None and (plan.residual.rule, plan.residual.matrices) == ("laco", ["output"])
    assert all(len(pairs) == 2 for pairs in plan.residual.pairs.values())  # one of three heads in each of two groups
    with_loss = ["student.num_layers=3", "prune.depth_metric=lm_loss", "plan=@/by_loss.json"]
    assert [rank[0][0] for rank in run_on_ranks(run_all, 2, [("plan", [*SCORED, *with_loss])], root)] == ["", ""]
    losses = load_scores(root / "scores.safetensors").depth["lm_loss@1"]
    assert load_plan(root / "by_loss.json").layers == sorted(set(range(4)) - {int(losses.argmin())})


@pytest.mark.parametrize(
    ("num_layers", "parallel", "said"),
    [
        (6, {}, []),
        (6, {"pipeline": 2}, []),
        (8, {"pipeline": 2, "virtual_pipeline": 2}, []),
        (
            3,
            {"pipeline": 2, "virtual_pipeline": 2},
            [
                "3 layers are fewer than the 4 stages of parallel.pipeline=2 x parallel.virtual_pipeline=2: train this "
                "student with fewer"
            ],
        ),
        (5, {"pipeline": 2}, ["layers on each pipeline stage: 3, 2"]),
        (
            6,
            {"pipeline": 2, "virtual_pipeline": 2},
            ["layers on each pipeline stage: 2 + 1, 2 + 1"],
        ),
    ],
)
def test_the_split_over_stages_is_told(num_layers: int, parallel: dict[str, Any], said: list[str]) -> None:
    assert pipeline_split(num_layers, ParallelConfig(**parallel)) == said


def test_scores_of_other_weights_are_warned_about(root: Path) -> None:
    plan, source = load_plan(root / "plan.json"), (root / "teacher", 7)
    assert other_teacher(plan, source) == []
    for scored, count in (
        ({"checkpoint": str(root / "x" / ".." / "teacher"), "iteration": 7}, 0),
        ({"checkpoint": str(root / "teacher"), "iteration": 6}, 1),
    ):
        plan.settings["scores"]["teacher"] = scored
        assert len(other_teacher(plan, source)) == count


def test_a_failure_while_saving_leaves_what_was_there(root: Path) -> None:
    assert run_on_ranks(fail_while_saving, 2, root) == [[True, True]] * 2
    assert not (root / "fresh").exists()


def test_overwrite_replaces_a_student(root: Path) -> None:
    (root / "planned" / "old_file").write_text("of the old student")
    overrides = [*SCORED, "student.checkpoint=@/planned", "prune.overwrite=true", "student.num_layers=2"]
    assert [rank[0][0] for rank in run_on_ranks(run_all, 2, [("prune", overrides)], root)] == ["", ""]
    assert not (root / "planned" / "old_file").exists()
    assert load_plan(root / "planned" / "plan.json").student.num_layers == 2
    assert not [*root.glob(".planned*")], "what an earlier attempt left goes too"
