"""A recipe as SLURM's jobs: what each waits for, how large and long it is, its script, what is refused beforehand; and
what becomes of them under stand-ins for sbatch, squeue and scancel."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minitron_mcore import cli
from minitron_mcore.errors import InputError
from minitron_mcore.jobs import submit
from minitron_mcore.jobs.batch import Stage, SubmitJob
from minitron_mcore.jobs.job import Promises, resolve
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.slurm import LAUNCH, read_template, time_text
from minitron_mcore.runtime.world import World
from tests.e2e.launchers import write_tool

BATCH = 2 * 16
STUDENTS = ["run.students.thin={ffn_hidden_size: 32}", "run.students.short={num_layers: 2}"]
GRID = ["search.ffn_hidden_size=[16,32,48,64]", "search.num_layers=[2,3]", "run.baselines=[random]"]
SEARCH = [*GRID, f"search.tokens={4 * BATCH}", f"search.halving.rungs=[{2 * BATCH}]"]


@pytest.fixture
def common(words: Path, tmp_path: Path) -> list[str]:
    """Keys of a run from random weights on the tokens that are there, into tmp_path/run."""
    model = "{num_layers: 4, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, max_position_embeddings: 64}"
    small = {"global_batch_size": 2, "micro_batch_size": 1, "lr": 1e-3, "tokens": 8 * BATCH}
    return [
        f"output={tmp_path}/run",
        f"tokenizer.model={words}/tokenizer.model",
        f"data.train={words}/tokens_text_document",
        "data.sequence_length=16",
        f"model={model}",
        *(f"{section}.{name}={value}" for section in ("train", "distill") for name, value in small.items()),
        "importance.num_samples=4",
        "evaluate.samples=4",
        "cluster.gpus_per_node=2",
    ]


def stages_of(common: list[str], *words: str) -> dict[str, Stage]:
    job = submit.resolve(load_recipe(None, [*common, *words]), World())
    return {stage.name: stage for stage in job.stages}


def test_jobs_wait_for_what_they_read(common: list[str]) -> None:
    """Two students side by side; what lies beside the road waits for the shapes that its job will look up."""
    found = stages_of(common, *STUDENTS, "run.baselines=[next_token,random]", "run.prompts=[a]")
    names = [name for name in found if not name.startswith("generate-")]
    generates = next(name for name in found if name.startswith("generate-"))
    after = {name: list(found[name].after) for name in names}
    assert after == {
        "train-teacher": [],
        "evaluate-teacher": ["train-teacher"],
        "score": ["train-teacher"],
        "prune-thin": ["score"],
        "evaluate-thin-pruned": ["prune-thin"],
        "distill-thin": ["prune-thin"],
        "evaluate-thin-distilled": ["distill-thin"],
        "export-thin": ["distill-thin"],
        "prune-short": ["score"],
        "evaluate-short-pruned": ["prune-short"],
        "distill-short": ["prune-short"],
        "evaluate-short-distilled": ["distill-short"],
        "export-short": ["distill-short"],
        "baseline-next_token": ["prune-thin"],
        "evaluate-thin-next-token-loss": ["baseline-next_token"],
        "baseline-random": ["prune-thin"],
        "evaluate-thin-random-weights": ["baseline-random"],
        "report": [name for name in found if name.startswith(("evaluate", "export"))] + [generates],
    }
    assert list(found[generates].after) == ["distill-thin", "distill-short"]
    # Every job finds what it needs where only those before it have been.
    for stage in found.values():
        if stage.job is not None:
            behind: list[str] = [*stage.after]
            for name in behind:
                behind += found[name].after
            promises = Promises()
            for name in sorted({*behind}, key=[*found].index):
                before = found[name].job
                assert before is not None
                promises = promises.after(before)
            kind = stage.name.partition("-")[0]
            options = {"prompts": ("a",), "shows": False} if kind == "generate" else {}
            verb = "train" if kind == "baseline" else kind
            again = resolve(verb, stage.job.recipe, stage.size.world, promises, **options)
            assert [*map(str, again.makes)] == [*map(str, stage.job.makes)]


def test_sizes_and_times(common: list[str]) -> None:
    """A step's own name counts before its verb; the rest is what holds a copy, trainings what the cluster has."""
    sized = ["distill.global_batch_size=8", "train.global_batch_size=8", "cluster.gpus=4", "parallel.tensor=2"]
    said = ["distill.nodes=4", "distill-short.nodes=1", "distill-short.gpus_per_node=8", "score.time=1-00:00:00"]
    found = stages_of(common, *STUDENTS, *sized, *(f"cluster.stages.{each}" for each in said), "cluster.time=02:00:00")
    sizes = {name: (stage.size.nodes, stage.size.tasks, stage.size.time) for name, stage in found.items()}
    assert sizes["train-teacher"] == (2, 2, "02:00:00") and sizes["prune-thin"] == (1, 2, "02:00:00")
    assert sizes["distill-thin"] == (4, 2, "02:00:00") and sizes["distill-short"] == (1, 8, "02:00:00")
    assert sizes["score"] == (1, 2, "1-00:00:00") and sizes["report"] == (1, 2, "00:30:00")
    assert found["distill-thin"].size.world.size == 8 and found["distill-thin"].size.world.device == "cuda"
    assert [time_text(seconds) for seconds in (1, 900, 901, 90000)] == [
        *("00:15:00", "00:15:00", "00:30:00", "1-01:00:00")
    ]


def test_the_time_is_the_estimates(common: list[str]) -> None:
    """A quarter more, and half an hour; what is longer than a job may be is said."""
    from minitron_mcore.estimate.cost import cost_of
    from minitron_mcore.estimate.forecast import settings_of
    from minitron_mcore.jobs.train import TrainingJob
    from minitron_mcore.runtime.devices import machine_of

    words = ["cluster.device=H100", "train.tokens=32M", "cluster.time=10-00:00:00", STUDENTS[0]]
    recipe = load_recipe(None, [*common, *words])
    stage = submit.resolve(recipe, World()).stages[0]
    job, world = stage.job, stage.size.world
    assert isinstance(job, TrainingJob)
    settings = settings_of(job.recipe, "train", job.architecture, job.timetable, world)
    seconds = cost_of(job.timetable, settings, machine_of(recipe.cluster)).seconds
    assert stage.size.time == time_text(1.25 * seconds + 1800)
    short = submit.resolve(load_recipe(None, [*common, *words, "cluster.time=00:02:00"]), World())
    assert short.stages[0].size.time == "00:02:00" and seconds > 3 * 120
    assert short.notes == (
        f"train-teacher is estimated at {seconds / 3600:,.1f} hours and asks for cluster.time=00:02:00: SLURM starts "
        f"it about {-(-1.25 * seconds // 120):.0f} times",
    )


def test_a_search_is_an_array_for_each_stop(common: list[str]) -> None:
    found = stages_of(common, *SEARCH)
    chain = [(name, stage.array, list(stage.after)) for name, stage in found.items() if name.startswith("search")]
    # Of 4 x 2 shapes all eight are smaller than the teacher; half of them go on.
    assert chain == [("search-1", 8, ["score"]), ("search-2", 4, ["search-1"]), ("search", 0, ["search-2"])]
    assert found["search-2"].recipe.search.stop == 2 and found["search"].recipe.run.only == "search"
    assert found["baseline-random"].after == ("search",), "whose winner's shape it has"
    fewer = stages_of(common, *SEARCH, "cluster.stages.search.tasks=3", "cluster.stages.search-2.tasks=9")
    assert fewer["search-1"].array == 3 and fewer["search-2"].array == 3
    place = Path("/runs/a b")
    assert found["search-1"].command(place) == (
        "search --config '/runs/a b/search-1.yaml' \"search.share=$SLURM_ARRAY_TASK_ID/8\""
    )


REFUSED = [
    (
        ["cluster.stages.distil.nodes=2"],
        "cluster.stages.distil is no stage of this recipe: its stages are train-teacher",
    ),
    (
        ["cluster.stages.distill.nodes=3", "parallel.tensor=4", "model.num_query_groups=4"],
        "cluster.stages.distill.nodes=3 x 2 tasks of a node = 6 ranks, of which a copy of the model takes 4 "
        "(parallel.tensor=4): 2 nodes divide so",
    ),
    (["cluster.gpus=3"], "cluster.gpus=3 is not whole nodes of 2 tasks: the nearest is 2"),
    (["cluster.stages.distill.nodes=4"], "distill.global_batch_size=2 is not a multiple of distill.micro_batch_size=1"),
    (["cluster.stages.distill.nodes=4"], "(this is distill-thin on 4 nodes x 2 tasks)"),
    (["cluster.time=4h"], "cluster.time=4h must be HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, as 04:00:00"),
    (["cluster.stages.score.time=0:00:00"], "cluster.stages.score.time=0:00:00 must be HOURS:MINUTES:SECONDS"),
    (["teacher.checkpoint=@/none"], "teacher.checkpoint=@/none is not there"),
    (["cluster.template=@/none"], "cluster.template=@/none is not there"),
    (["submit.verb=search", "search.train=false", *GRID[:1]], "search.train=false only lists candidates"),
    (["run.only=score", "output="], "output is not given"),
]


@pytest.mark.parametrize(("keys", "said"), REFUSED, ids=[f"{keys[0]} {said[:12]}" for keys, said in REFUSED])
def test_refused(keys: list[str], said: str, common: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        stages_of(common, STUDENTS[0], *(word.replace("@", str(tmp_path)) for word in keys))
    assert said.replace("@", str(tmp_path)) in str(refused.value) and "\n" not in str(refused.value)


def test_a_step_that_says_it_is_done_and_is_not(common: list[str], tmp_path: Path) -> None:
    """Nothing would make the teacher that the others wait for."""
    (tmp_path / "run" / "done").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("name: run\n")
    (tmp_path / "run" / "done" / "train-teacher.json").write_text("1")
    with pytest.raises(InputError, match=r"teacher.checkpoint=.*/run/teacher is not there"):
        stages_of(common, STUDENTS[0])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("--nodes={nodes}", "--nodes=1"), "lacks {nodes}: put it where launch/pipeline.sbatch has it"),
        (("{command}", "{comand}"), "has a field that there is none of, {comand}: write {{comand}} for braces"),
        (("#!/usr/bin/env bash", "# none"), "is no batch script: begin it with #!/usr/bin/env bash"),
    ],
)
def test_templates_that_are_refused(tmp_path: Path, edit: tuple[str, str], said: str) -> None:
    file = tmp_path / "site.sbatch"
    file.write_text((LAUNCH / "pipeline.sbatch").read_text().replace(*edit))
    with pytest.raises(InputError) as refused:
        read_template(str(file))
    assert str(refused.value).startswith(f"cluster.template={file} {said}")


def test_the_template_asks_for_what_the_launcher_does() -> None:
    asked = [
        {line.partition("=")[0]: line for line in re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)}
        for text in ((LAUNCH / name).read_text() for name in ("pipeline.sbatch", "slurm.sbatch"))
    ]
    filled = {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--output"}
    assert asked[0].keys() == asked[1].keys() - {"--output"}, "`submit` names the log itself"
    assert all(asked[0][name] == asked[1][name] for name in asked[0].keys() - filled)


WORDS = ["$(touch {0})", "`touch {0}`", "'; touch {0}; '", "a b", "%j\\", '"${{HOME}}"']


def test_no_shell_reads_the_recipe(common: list[str], tmp_path: Path) -> None:
    """A name and a folder of a shell's words come out as one word each; one with a line break is refused."""
    mark = tmp_path / "touched"
    site = tmp_path / "site.sbatch"
    site.write_text("#!/bin/sh\n# {name} {nodes} {ntasks_per_node} {time} ${HOME} {{x}}\nprintf '%s\\0' {command}\n")
    for word in WORDS:
        text = word.format(mark)
        folder = tmp_path / text.replace("/", "_")
        job = submit.resolve(
            load_recipe(None, [*common, STUDENTS[0], f"cluster.template={site}"], name=text, output=str(folder)),
            World(),
        )
        stage = job.stages[0]
        script = stage.script(job.place, job.template)
        assert script.splitlines()[1].endswith(" ${HOME} {x}")
        assert re.fullmatch(r"[\w.-]+", script.splitlines()[1].split()[1])
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split("\0")[:-1] == ["run", "--config", f"{job.place}/train-teacher.yaml"]
        assert f"--output={job.place}/train-teacher".replace("%", "%%") in stage.sbatch(job.place, {})[3]
    assert not mark.exists()
    broken = submit.resolve(load_recipe(None, [*common, STUDENTS[0]], output=f"{tmp_path}/a\n#SBATCH"), World())
    with pytest.raises(InputError, match="would put a control character into a batch script"):
        broken.stages[0].script(broken.place, broken.template)


# Records its words, and gives ids from 101 on; refuses the job whose script is named $REFUSES.
FAKE_SBATCH = """#!/bin/sh
echo "$*" >> "$FAKE_SLURM/submitted"
case "$*" in *"/$REFUSES.sbatch") echo "sbatch: error: invalid partition specified" >&2; exit 1;; esac
echo "$((100 + $(wc -l < "$FAKE_SLURM/submitted")));cluster"
"""
FAKE_SQUEUE = """#!/bin/sh
[ -f "$FAKE_SLURM/queue" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
cat "$FAKE_SLURM/queue"
"""
FAKE_SCANCEL = '#!/bin/sh\necho "$*" >> "$FAKE_SLURM/cancelled"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-ins, where they record what they are asked for."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("squeue", FAKE_SQUEUE), ("scancel", FAKE_SCANCEL)):
        write_tool(folder, name, text)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("REFUSES", "nothing")
    return folder


def minitron(common: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["submit", *common, STUDENTS[0], *words])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_submitted(common: list[str], slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, each with the ids of those it waits for; then refused while one is queued."""
    code, said = minitron(common, capsys)
    assert code == 0, said
    place = tmp_path / "run" / "submit"
    ids = json.loads((place / "jobs.json").read_text())
    calls = [line.split() for line in (slurm / "submitted").read_text().splitlines()]
    assert list(ids.values()) == [str(101 + number) for number in range(len(ids))] and len(calls) == len(ids) == 9
    assert [call[-1] for call in calls] == [f"{place}/{name}.sbatch" for name in ids]
    assert calls[0][:2] == ["--parsable", "--kill-on-invalid-dep=yes"] and "--dependency" not in str(calls[0])
    assert f"--dependency=afterok:{ids['prune-thin']}" in calls[[*ids].index("distill-thin")]
    assert "9 jobs ->" in said and f"{ids['score']}  score: 1 node x 2 tasks for 04:00:00, after train-teacher" in said
    recipe = load_recipe(str(place / "distill-thin.yaml"), [])
    assert recipe.run.only == "distill-thin" and recipe.run.students.keys() == {"thin"}
    assert (place / "distill-thin.sbatch").read_text().endswith(f"run --config {place}/distill-thin.yaml\n")
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml"), []).run.only is None

    (slurm / "queue").write_text("103 PENDING\n107 RUNNING\n999 RUNNING\n")
    code, said = minitron(common, capsys)
    assert code == 2 and said == (
        f"minitron submit: output={tmp_path}/run has 2 jobs in the queue: 103 (score, PENDING), 107 "
        "(evaluate-thin-distilled, RUNNING): wait for them, or set submit.force=true, which cancels them and submits "
        "anew\n"
    )
    assert len((slurm / "submitted").read_text().splitlines()) == 9
    code, said = minitron(common, capsys, "submit.force=true")
    assert code == 0 and (slurm / "cancelled").read_text().split() == list(ids.values())
    (slurm / "queue").unlink()
    write_tool(slurm, "squeue", "#!/bin/sh\nexit 1\n")
    code, said = minitron(common, capsys)
    assert code == 2 and "has jobs of which squeue does not say whether they have ended: 110, 111" in said


def test_one_that_sbatch_refuses_takes_the_others_back(
    common: list[str],
    slurm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REFUSES", "prune-thin")
    code, said = minitron(common, capsys)
    assert code == 2 and said.splitlines()[-1] == (
        f"minitron submit: sbatch refused {tmp_path}/run/submit/prune-thin.sbatch: sbatch: error: invalid partition "
        "specified; 3 jobs submitted before, 101 102 103, were cancelled"
    )
    assert (slurm / "cancelled").read_text().split() == ["101", "102", "103"]
    write_tool(slurm, "scancel", "#!/bin/sh\necho 'scancel: error: down' >&2\nexit 1\n")
    monkeypatch.setenv("REFUSES", "score")
    code, said = minitron(common, capsys)
    assert code == 2 and "could not be cancelled (scancel: error: down): cancel them yourself" in said


def test_without_slurm(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run needs none of it; without sbatch nothing is written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = minitron(common, capsys, "--dry-run")
    assert code == 0 and not (tmp_path / "run").exists()
    assert (
        f"  | exec bash {shlex.quote(str(LAUNCH / 'slurm.sbatch'))} run --config {tmp_path}/run/submit/score.yaml"
        in said
    )
    assert "[4/9] prune thin: 1 node x 2 tasks for 04:00:00, after score\n  reads  teacher.checkpoint=" in said
    code, said = minitron(common, capsys)
    assert code == 2 and said.startswith("minitron submit: sbatch is not there: submit on a login node")
    assert not (tmp_path / "run").exists()


def test_what_is_done_is_left_out(common: list[str], tmp_path: Path) -> None:
    words = [*common, *STUDENTS]
    job = submit.resolve(load_recipe(None, words), World())
    assert isinstance(job, SubmitJob) and not job.skipped
    done = tmp_path / "run" / "done"
    done.mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("name: run\n")
    for name in ("evaluate-thin-distilled", "export-thin"):
        (done / f"{name}.json").write_text("{}")
    again = submit.resolve(load_recipe(None, words), World())
    assert {*(s.name for s in job.stages)} - {*(s.name for s in again.stages)} == {
        "evaluate-thin-distilled",
        "export-thin",
    }
    assert again.skipped == ("evaluate thin distilled", "export thin")
