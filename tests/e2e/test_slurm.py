"""launch/slurm.sbatch on a SLURM cluster (slurm_cluster.py): a distillation over two nodes, ended by whatever ends jobs
there, is started again and ends with the losses of one that nothing disturbs. And the jobs of `submit`, one after
another, give what `run` does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.distributed.search.searching import COMMON
from tests.e2e.launchers import ROOT, start_ranks
from tests.e2e.slurm_cluster import PATIENCE, Cluster, lacking, running
from tests.e2e.verbs import all_run_well, run_well

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS, INTERVAL = 200, 20  # of the distillation: some 5 s; between two checkpoints
# Two nodes of one GPU each, as launch/README.md has it where there are not eight.
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
Losses = dict[int, tuple[float, float]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := lacking():
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(cluster: Cluster, corpus_with_teacher: Callable[[str], Path]) -> Path:
    """Of a distillation whose teacher and student are there."""
    folder = corpus_with_teacher("slurm_recipe")
    sections = {
        "tokenizer": {"model": str(folder / "tokenizer.model")},
        "data": {"train": str(folder / "email_text_document"), "split": "1", "sequence_length": 16, "num_workers": 0},
        "scores": str(folder / "scores.safetensors"),
        "teacher": {"checkpoint": str(folder / "teacher")},
        "student": {"checkpoint": str(folder / "student"), "ffn_hidden_size": 16},
        "distill": {"tokens": STEPS * 8 * 16, "global_batch_size": 8, "micro_batch_size": 4, "lr": 1e-2}
        | {"eval_iters": 0, "save_interval": INTERVAL},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    all_run_well([["score", "--config", str(path)], ["prune", "--config", str(path)]])
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Losses:
    folder = recipe.parent / "undisturbed"
    ranks = start_ranks(distillation(recipe, folder), recipe.parent / "ranks", 2)
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    whole = losses(folder)
    assert sorted(whole) == list(range(1, STEPS + 1))
    return whole


def distillation(recipe: Path, folder: Path) -> list[str]:
    return ["distill", "--config", str(recipe), f"distill.checkpoint={folder}"]


def losses(folder: Path) -> Losses:
    """By iteration; each stands there once, whatever was done again."""
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        found = {row["iteration"]: (row["logits distillation loss"], row["grad-norm"]) for row in rows}
        assert len(found) == len(rows)
        return found
    return {}


class Run:
    """One job: a distillation into `folder`."""

    def __init__(self, cluster: Cluster, recipe: Path, folder: Path, *options: str) -> None:
        self.cluster, self.folder = cluster, folder
        script = str(ROOT / "launch" / "slurm.sbatch")
        self.number = cluster.submit(*SIZE, *options, script, *distillation(recipe, folder))

    def log(self) -> str:
        return (self.cluster.folder / f"minitron-{self.number}.log").read_text(encoding="utf-8")

    def hold(self, iterations: int) -> None:
        """Let it get `iterations` further than it is, then stop both ranks where they are, so that it does not end
        before what is to end it. SLURM sends SIGCONT with the signals that ask for an end."""
        goal = len(losses(self.folder)) + iterations
        self.cluster.wait(f"iteration {goal}", lambda: len(losses(self.folder)) >= goal)
        ranks = self._ranks()
        assert len(ranks) == 2, self.log()
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        assert len(losses(self.folder)) < STEPS, "too late"

    def _ranks(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                words = path.read_text(encoding="utf-8").split("\0")
                if f"distill.checkpoint={self.folder}" in words and words[1] == "-m":
                    found.append(int(path.parent.name))
        return found

    def finish(self, undisturbed: Losses) -> None:
        self.cluster.wait_for(self.number, "COMPLETED")
        assert losses(self.folder) == undisturbed


def test_preempted_then_out_of_time(cluster: Cluster, recipe: Path, undisturbed: Losses, tmp_path: Path) -> None:
    """Either way it saves, and SLURM starts it again without anybody's doing."""
    run = Run(cluster, recipe, tmp_path / "distilled", "--time=60", "--signal=USR1@100")
    run.hold(5)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    cluster.wait_for(urgent, "COMPLETED")
    cluster.wait("it is queued again", lambda: cluster.job(run.number)["Restarts"] == "1")
    saved = len(losses(run.folder))
    assert f"SIGTERM: saved {run.folder} at iteration {saved} of {STEPS}" in run.log()

    # SLURM counts in minutes, and looks every 30 s: once it trains, there are two minutes left at most.
    run.hold(5)
    minutes = int(cluster.job(run.number)["RunTime"].split(":")[1])
    cluster.ask("scontrol", "update", f"JobId={run.number}", f"TimeLimit={minutes + 2}")
    cluster.wait("it is queued again", lambda: cluster.job(run.number)["Restarts"] == "2")
    cluster.ask("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    again = len(losses(run.folder))
    assert f"SIGUSR1: saved {run.folder} at iteration {again} of {STEPS}" in run.log()
    assert f"resumed {run.folder} at iteration {saved} of {STEPS}" in run.log() and saved < again
    run.finish(undisturbed)
    assert f"resumed {run.folder} at iteration {again} of {STEPS}" in run.log()


def test_cancelled_then_a_node_is_lost(cluster: Cluster, recipe: Path, undisturbed: Losses, tmp_path: Path) -> None:
    """`scancel` is the end of a job, but loses nothing. A node whose daemon was killed loses what is not saved."""
    folder = tmp_path / "distilled"
    first = Run(cluster, recipe, folder)
    first.hold(5)
    cluster.ask("scancel", first.number)
    assert cluster.wait_for(first.number, "CANCELLED")["Restarts"] == "0"
    saved = len(losses(folder))
    assert f"SIGTERM: saved {folder} at iteration {saved} of {STEPS}" in first.log()

    run = Run(cluster, recipe, folder)
    run.hold(INTERVAL)
    reached = len(losses(folder))
    cluster.kill_daemon("n2")
    cluster.wait("it is queued again", lambda: cluster.job(run.number)["JobState"] == "PENDING")
    assert cluster.nodes()["n2"].startswith("down")
    cluster.start_daemon("n2")  # which ends the rank that is left there
    run.finish(undisturbed)
    assert cluster.job(run.number)["Restarts"] == "1"
    assert f"resumed {folder} at iteration {saved} of {STEPS}" in run.log()
    assert f"resumed {folder} at iteration {reached - reached % INTERVAL} of {STEPS}" in run.log()


def test_submitted_from_import_to_export(cluster: Cluster, recipe: Path) -> None:
    """Each job begins once what it reads is there, also where the one that makes it has stopped on its way and was
    queued again: the distillation, on two nodes."""
    root = recipe.parent
    all_run_well([["export", f"checkpoint={root}/teacher", f"hf={root}/hf", f"tokenizer.model={root}/tokenizer.model"]])
    kept = [text.replace("@", str(root)) for text in COMMON if not text.startswith(("teacher", "tokenizer", "search"))]
    words = [*kept, f"hf={root}/hf", "run.students.thin={ffn_hidden_size: 64, num_layers: 3}"]
    ours, theirs = root / "submitted", root / "by run"
    size = ["cluster.gpus_per_node=1", "cluster.stages.distill.nodes=2"]
    cut_off = "distill.exit_interval=5"
    command = ["python", "-m", "minitron_mcore", "submit", *words, *size, cut_off, f"output={ours}"]
    said = cluster.ask(*command)
    jobs = json.loads((ours / "submit" / "jobs.json").read_text(encoding="utf-8"))
    assert list(jobs) == [
        *("import", "evaluate-teacher", "score", "prune-thin", "evaluate-thin-pruned", "distill-thin"),
        *("evaluate-thin-distilled", "export-thin", "report"),
    ], said
    refused = cluster.ask("bash", "-c", f"{shlex.join(command)} 2>&1", check=False)
    assert re.fullmatch(rf"minitron submit: output={ours} has [1-9] jobs in the queue: .*", refused), refused

    def logs() -> str:
        paths = sorted((ours / "submit").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(encoding='utf-8')[-3000:]}" for path in paths)

    def state() -> str:
        return cluster.job(jobs["report"])["JobState"]

    cluster.wait("the last job has ended", lambda: state() not in ("PENDING", "RUNNING", "COMPLETING"), 3 * PATIENCE)
    assert state() == "COMPLETED", logs()
    log = (ours / "submit" / f"distill-thin-{jobs['distill-thin']}.log").read_text(encoding="utf-8")
    assert log.count("the job is requeued") == 1 and "resumed" in log and "at iteration 5 of 8" in log, log

    run_well("run", *words, f"output={theirs}")
    found, expected = (json.loads((each / "results.json").read_text(encoding="utf-8")) for each in (ours, theirs))
    assert found.keys() == expected.keys() and len(found) == 3
    for name, losses_there in expected.items():
        # Two ranks add in another order than one.
        assert found[name]["lm loss"] == pytest.approx(losses_there["lm loss"], abs=1e-4), name
    written, known = (load_file(each / "hf" / "thin" / "model.safetensors") for each in (ours, theirs))
    assert written.keys() == known.keys()
    assert max((written[name] - known[name]).abs().max() for name in known) < 1e-3  # weights of some 0.1
