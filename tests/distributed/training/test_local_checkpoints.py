"""Local checkpoints by nvidia-resiliency-ext itself: a run that `kill -9` ended on all ranks, one of whose nodes has
lost its folder, goes on from them and ends as one that nothing disturbed, to the last bit. Of ranks that a test calls a
node each has a folder of its own.

Bit for bit: weights and the optimizer's state by the checksums of the last checkpoint on the persistent path.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from minitron_mcore.checkpoint.folder import latest_iteration
from tests.distributed import models
from tests.distributed.ranks import RankError, run_on_ranks
from tests.distributed.training import test_resume
from tests.distributed.training.test_resume import STEPS, fit_on_rank

library = pytest.importorskip("nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager")

LAYOUTS = {**models.LAYOUTS, "TP2-DP2": (4, {"tensor": 2})}
PERSISTENT, LOCAL = 3, 4  # the newest of each kind when the run is killed, after iteration 5
NOW = STEPS  # the iteration whose batch is never read


def local_on_rank(
    layout: str, folder: str, nodes: str, per_node: int, killed: bool, how: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """(what was printed, what is left in the node's folder) of `fit`, or its end by SIGKILL on every rank."""
    from minitron_mcore.runtime.start import Runtime

    world_size, parallel = LAYOUTS[layout]
    rank, said, batches = int(os.environ["RANK"]), [], []
    printing, hosts, my_batch = Runtime.print, Runtime.hosts, test_resume.my_batch

    def reading(batch: Any) -> Any:
        batches.append(1)
        if killed and len(batches) == NOW:
            os.kill(os.getpid(), signal.SIGKILL)
        return my_batch(batch)

    node = Path(nodes) / f"node{rank // per_node}"
    keys: dict[str, Any] = {"non_persistent_save_interval": 2, "non_persistent_local_ckpt_dir": str(node)}
    keys |= {"replication": True, "replication_jump": per_node}
    keys = {name: value for name, value in {**keys, **how}.items() if value is not None}
    precision, interval = keys.pop("precision", "fp32"), keys.pop("save_interval", PERSISTENT)
    Runtime.print = lambda self, *words: said.append(" ".join(map(str, words)))  # type: ignore[method-assign]
    Runtime.hosts = lambda self: [f"node{each // per_node}" for each in range(world_size)]  # type: ignore[method-assign]
    test_resume.my_batch = reading  # type: ignore[assignment]
    try:
        fit_on_rank(parallel, world_size, folder, precision, interval, **keys)
    finally:
        Runtime.print, Runtime.hosts, test_resume.my_batch = printing, hosts, my_batch  # type: ignore[method-assign]
    torch.distributed.barrier()
    return said, sorted(str(path.relative_to(node)) for path in node.rglob("*"))


def start(layout: str, folder: Path, nodes: Path, *, killed: bool = False, **how: Any) -> list[str]:
    """What the first rank said."""
    world_size, _ = LAYOUTS[layout]
    per_node = how.pop("per_node", 1)
    if killed:
        with pytest.raises(RankError, match="exit code"):
            run_on_ranks(local_on_rank, world_size, layout, str(folder), str(nodes), per_node, True, how)
        return []
    ranks = run_on_ranks(local_on_rank, world_size, layout, str(folder), str(nodes), per_node, False, how)
    assert [left for _, left in ranks] == [[]] * world_size, "what is whole on the persistent path stays in no node"
    return ranks[0][0]


def ended_as(folder: Path) -> tuple[dict[int, Any], dict[str, Any]]:
    """(what was logged of each iteration, checksums of all tensors of the last checkpoint)"""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    place = folder / f"iter_{STEPS:07d}"
    tensors = json.loads((place / "manifest.json").read_text())["tensors"]
    assert any(key.startswith("optimizer.state.exp_avg") for key in tensors)
    return {row["iteration"]: (row["lm loss"], row["grad-norm"]) for row in rows}, tensors


def files(nodes: Path) -> list[Path]:
    return sorted(nodes.glob("node*/*/*/iter_*_local.pt"))


def resumed(said: list[str]) -> str:
    lines = [line for line in said if line.startswith("resumed")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def of(layout: str, precision: str = "fp32", **how: Any) -> Any:
        if (layout, precision) not in known:
            place = tmp_path_factory.mktemp(layout)
            start(layout, place / "run", place, precision=precision, **how)
            known[layout, precision] = ended_as(place / "run")
        return known[layout, precision]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "per_node", "precision"),
    [("DP2", 1, "fp32"), ("DP2", 1, "bf16"), ("TP2", 1, "fp32"), ("TP2-DP2", 2, "fp32"), ("PP2-VPP2", 1, "bf16")],
)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_run_goes_on_without_one_of_its_nodes(
    layout: str, per_node: int, precision: str, lost: int, undisturbed: Callable[..., Any], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"per_node": per_node, "precision": precision}
    start(layout, tmp_path / "run", tmp_path, killed=True, **how)
    assert latest_iteration(tmp_path / "run") == PERSISTENT
    world_size, _ = LAYOUTS[layout]
    names = {f"iter_{LOCAL:07d}_{rank}_local.pt" for rank in range(world_size)}
    assert {path.name for path in files(tmp_path)} == names and len(files(tmp_path)) == 2 * world_size
    assert {path.name for path in files(tmp_path) if f"node{lost}" in path.parts} == names if world_size == 2 else True
    shutil.rmtree(tmp_path / f"node{lost}")
    said = start(layout, tmp_path / "run", tmp_path, **how)
    assert resumed(said) == f"resumed the local checkpoint of {tmp_path / 'run'} at iteration {LOCAL} of {STEPS}"
    assert not [line for line in said if "WARNING" in line]
    history, tensors = ended_as(tmp_path / "run")
    expected, weights = undisturbed(layout, precision, per_node=per_node)
    assert history == expected and len(history) == STEPS
    assert tensors == weights


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed run on two nodes leaves: `run`, and the nodes' folders."""
    place = tmp_path_factory.mktemp("killed")
    start("DP2", place / "run", place, killed=True)
    return place


@pytest.fixture
def place(killed: Path, tmp_path: Path) -> Path:
    """A copy of it; a run finds its local checkpoints by the path of its folder."""
    for each in killed.iterdir():
        shutil.copytree(each, tmp_path / each.name, dirs_exist_ok=True)
    for session in tmp_path.glob("node*/*"):
        session.rename(session.parent / xxhash.xxh3_128_hexdigest(os.fsencode((tmp_path / "run").resolve())))
    assert len(files(tmp_path)) == 4
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def of_rank(place: Path, rank: int) -> list[Path]:
    return [path for path in files(place) if path.name.endswith(f"_{rank}_local.pt")]


def flip_all_of_rank_1(place: Path) -> None:
    for path in of_rank(place, 1):
        flip(path)


def cut_off_all_of_rank_0(place: Path) -> None:
    for path in of_rank(place, 0):
        os.truncate(path, path.stat().st_size - 1)


def lose_both_of_rank_1(place: Path) -> None:
    for path in of_rank(place, 1):
        path.unlink()


def go_back(place: Path) -> None:
    """The user deletes what the run has saved, and nothing else."""
    shutil.rmtree(place / "run" / f"iter_{PERSISTENT:07d}")
    (place / "run" / "latest_checkpointed_iteration.txt").unlink()


def begin_anew(place: Path) -> None:
    shutil.rmtree(place / "run")


def nothing(place: Path) -> None:
    pass


NOT_TAKEN: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "flipped": (flip_all_of_rank_1, {}, "has changed since it was written: its checksum is another, and 1 more"),
    "cut off": (cut_off_all_of_rank_0, {}, "is cut off, and 1 more"),
    "lost": (lose_both_of_rank_1, {}, f"of iteration {LOCAL} there is none of rank 1"),
    "another recipe": (nothing, {"identity": "another"}, "is of another recipe, and 3 more"),
    "another run": (begin_anew, {}, "is of another run, and 3 more"),
    "taken back": (go_back, {}, f"was written after iteration {PERSISTENT}, which is not there any more, and 3 more"),
    "other buckets": (nothing, {"overlap_grad_reduce": True, "ddp_bucket_size": 4000}, "is of another layout: the sta"),
    "other copies": (nothing, {"replication": None, "replication_jump": None}, "replication [1, 2] there and None her"),
    "to stop before": (nothing, {"until": LOCAL}, "iteration 4 is not before the last one here, 4"),
}
SLOW = {"cut off", "another recipe", "other buckets", "other copies"}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NOT_TAKEN]
)
def test_what_is_not_taken(case: str, place: Path, undisturbed: Callable[..., Any]) -> None:
    change, how, words = NOT_TAKEN[case]
    change(place)
    said = start("DP2", place / "run", place, **how)
    warnings = [line for line in said if line.startswith("WARNING: a local checkpoint is not taken: ")]
    assert len(warnings) == 1 and words in warnings[0], said
    if case in ("another run", "taken back"):
        assert not [line for line in said if line.startswith("resumed")]
    else:
        assert resumed(said) == f"resumed {place / 'run'} at iteration {PERSISTENT} of {STEPS}"
    if case not in ("other buckets", "to stop before"):
        assert ended_as(place / "run") == undisturbed("DP2")


@pytest.mark.slow
def test_another_layout_goes_on_from_the_other_checkpoint(place: Path) -> None:
    said = start("TP2", place / "run", place)
    assert resumed(said) == f"resumed {place / 'run'} at iteration {PERSISTENT} of {STEPS}"
    assert [line for line in said if "is of another layout: tensor 1 there and 2 here, and 3 more" in line]


def test_a_copy_stands_in_for_a_damaged_file(place: Path, undisturbed: Callable[..., Any]) -> None:
    mine = [path for path in of_rank(place, 1) if "node1" in path.parts]
    flip(mine[0])
    (mine[0].parent / "iter_0000006_1_local.pt.tmp").write_bytes(b"what was being written")
    (mine[0].parent.parent / "7").mkdir()
    said = start("DP2", place / "run", place)
    assert resumed(said).startswith("resumed the local checkpoint of")
    assert [
        line for line in said if line.startswith(f"WARNING: part of a local checkpoint is not taken: {mine[0]} has")
    ]
    assert ended_as(place / "run") == undisturbed("DP2")


@pytest.mark.slow
def test_ranks_that_have_changed_places(place: Path, undisturbed: Callable[..., Any]) -> None:
    (place / "node0").rename(place / "other")
    (place / "node1").rename(place / "node0")
    (place / "other").rename(place / "node1")
    assert resumed(start("DP2", place / "run", place)).startswith("resumed the local checkpoint of")
    assert ended_as(place / "run") == undisturbed("DP2")


@pytest.mark.slow
def test_before_the_first_checkpoint_and_without_copies(tmp_path: Path, undisturbed: Callable[..., Any]) -> None:
    how: dict[str, Any] = {"replication": None, "replication_jump": None, "save_interval": 0}
    start("DP2", tmp_path / "run", tmp_path, killed=True, **how)
    assert latest_iteration(tmp_path / "run") is None
    assert len(files(tmp_path)) == 2
    said = start("DP2", tmp_path / "run", tmp_path, **how)
    assert resumed(said).startswith("resumed the local checkpoint of")
    assert ended_as(tmp_path / "run") == undisturbed("DP2")


def full_on_rank(folder: str, nodes: str) -> tuple[list[str], dict[str, list[str]]]:
    """A run whose rank 1 cannot write its local checkpoint of iteration 4: what was printed, and what lay in the nodes
    once that was known."""
    from minitron_mcore.checkpoint import local_manager
    from minitron_mcore.training.local_checkpoints import LocalCheckpoints

    write, save, there = local_manager.write_local, LocalCheckpoints.save, {}

    def full(path: Path, about: dict[str, Any], state: Any) -> None:
        if about["iteration"] == 4 and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        write(path, about, state)

    def saving(self: Any, progress: Any, newest: int) -> None:
        save(self, progress, newest)
        there[str(progress.iteration)] = sorted(path.name for path in Path(nodes).glob("node*/*/*/*"))

    local_manager.write_local, LocalCheckpoints.save = full, saving  # type: ignore[method-assign]
    try:
        said, _ = local_on_rank("DP2", folder, nodes, 1, False, {})
    finally:
        local_manager.write_local, LocalCheckpoints.save = write, save  # type: ignore[method-assign]
    return said, there


def test_a_full_disk_is_told_and_the_one_before_stays(tmp_path: Path, undisturbed: Callable[..., Any]) -> None:
    said, there = run_on_ranks(full_on_rank, 2, str(tmp_path / "run"), str(tmp_path))[0]
    warnings = [line for line in said if line.startswith("WARNING")]
    assert len(warnings) == 1 and warnings[0].endswith("goes on: rank 1: [Errno 28] No space left on device")
    assert warnings[0].startswith("WARNING: no local checkpoint of iteration 4 in ")
    assert set(there["4"]) == {"iter_0000002_0_local.pt", "iter_0000002_1_local.pt"}
    assert ended_as(tmp_path / "run") == undisturbed("DP2")


def two_models_on_rank(layout: str, folder: str, precision: str) -> list[bool]:
    """A student and the teacher that is trained with it, whose tensors have the same names: whether each is as it was
    when its state was taken, once it has been put back after two more steps."""
    from minitron_mcore.checkpoint.local_file import read_local, write_local
    from minitron_mcore.checkpoint.local_state import CLASSES, LocalState
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, set_schedule, train_step

    world_size, parallel = LAYOUTS[layout]
    placed = models.start_layout(parallel, world_size)
    student = models.tiny("llama")
    objective = Objective(LossSettings(vocab_size=student.vocab_size))

    def build(architecture: Any, seed: int) -> Any:
        train = TrainConfig(lr=1e-2, min_lr=1e-3, global_batch_size=8)
        built = build_model(architecture, placed, precision)
        initialize(built, architecture, seed=seed)
        timetable = models.steady(train, STEPS)
        return Trained.of(built, train, timetable), timetable

    both = {"model": build(student, 1), "teacher": build(student.replace(ffn_hidden_size=128), 2)}

    def step(number: int) -> list[Any]:
        batch = models.my_batch(models.global_batch(student.vocab_size, number))
        return [
            train_step(trained, objective, timetable.at(number).shape, batch) for trained, timetable in both.values()
        ]

    def held() -> list[torch.Tensor]:
        found = []
        for (chunks, optimizer, _), _ in both.values():
            found += [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
            for part in getattr(optimizer, "chained_optimizers", [optimizer]):
                found += [value.clone() for each in part.optimizer.state.values() for value in each.values()]
        return found

    for number in range(2):
        step(number)
    before, state = held(), LocalState({name: trained for name, (trained, _) in both.items()})
    taken = state.take({"iteration": 2, "metrics": {"lm loss": 0.5}})
    taken.copy_tensors_to_cpu()
    path = Path(folder) / os.environ["RANK"]
    write_local(path, {}, taken)
    expected = [step(2), step(3)]
    put = state.put(read_local(path, CLASSES))
    for trained, timetable in both.values():
        set_schedule(trained.scheduler, timetable.at(2).tokens_before)
    same = [torch.equal(*pair) for pair in zip(held(), before, strict=True)]
    return [*same, put == {"iteration": 2, "metrics": {"lm loss": 0.5}}, [step(2), step(3)] == expected]


@pytest.mark.parametrize(
    ("layout", "precision"), [("DP2", "bf16"), pytest.param("TP2", "fp32", marks=pytest.mark.slow)]
)
def test_a_teacher_in_training_goes_along(layout: str, precision: str, tmp_path: Path) -> None:
    for found in run_on_ranks(two_models_on_rank, 2, layout, str(tmp_path), precision):
        assert len(found) > 100 and all(found)
