"""Weights & Biases, the real one offline and one that is down or slow: a training neither stops nor waits for it."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.dashboard import Dashboard, check_wandb
from minitron_mcore.training.metrics import MetricsLog
from tests.unit.training.test_metrics import ROWS, log_rows

# In the place of wandb: writes down what is done with it, and fails or blocks where FAKE_WANDB says so.
FAKE = """
import json, os, time

class UsageError(Exception):
    pass

class Settings:
    def __init__(self, **given):
        pass

def at(place, **facts):
    with open(os.environ["FAKE_LOG"], "a") as stream:
        stream.write(json.dumps({"at": place, **facts}) + "\\n")
    asked = os.environ.get("FAKE_WANDB", "").split(":")
    if asked[0] == place:
        if asked[1] == "blocks":
            time.sleep(600)
        raise (UsageError if asked[1] == "refuses" else OSError)("no route to host.")

class Artifact:
    def __init__(self, name, type):
        self.name, self.type = name, type

    def new_file(self, name, mode, encoding):
        self.path = os.environ["FAKE_LOG"] + "." + name
        return open(self.path, mode, encoding=encoding)

class Run:
    def __init__(self, given):
        self.name, self.dir, self.url = given["name"], os.path.join(given["dir"], "wandb", "run-1", "files"), "URL"

    def log(self, row, step):
        at("log", step=step, **row)

    def log_artifact(self, artifact):
        at("artifact", name=artifact.name, type=artifact.type, text=open(artifact.path).read())

    def finish(self, exit_code):
        at("finish", exit_code=exit_code)

def init(settings, **given):
    at("init", **given)
    return Run(given)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the stand-in does, and reads what was done with it."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    log = tmp_path / "fake" / "log"
    log.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_LOG", str(log))

    def found(asked: str | None = None) -> list[dict[str, Any]]:
        if asked is not None:
            monkeypatch.setenv("FAKE_WANDB", asked)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return found


PATIENCE = 300.0  # seconds that a process may take to start on a busy machine


def train(folder: Path, rows: int = 3, timeout: float = PATIENCE, **settings: Any) -> list[Any]:
    """What metrics.jsonl has in the end; the training itself must not wait."""
    log = LogConfig(tensorboard=False, wandb="offline", wandb_timeout=timeout, **settings)
    documents = {"recipe": "seed: 7\n", "plan": "{}"}
    told: dict[str, Any] = {"name": "tiny-width", "recipe": {"name": "tiny-width", "seed": 7}, "stage": "distill"}
    metrics = MetricsLog(folder, log, rows, **told, documents=documents)
    metrics.open(0)
    begun = time.process_time()
    for iteration in range(1, rows + 1):
        metrics.write(iteration, {"lm loss": 1.0 / iteration}, shown=None)
    assert time.process_time() - begun < 5, "of this process alone, however busy the machine is"
    (folder / "lineage.yaml").write_text("stage: distill\n")
    metrics.close()
    return [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_a_stage_in_the_group_of_its_recipe_with_what_made_it(tmp_path: Path, fake: Any) -> None:
    assert train(tmp_path / "run", wandb_group="tiny") == [1, 2, 3]
    done = fake()
    (init,) = (each for each in done if each["at"] == "init")
    expected = {"project": "minitron", "name": "tiny-width", "group": "tiny", "job_type": "distill", "mode": "offline"}
    assert expected.items() <= init.items() and init["config"]["seed"] == 7 and init["resume"] == "allow"
    assert [(each["step"], each["lm loss"]) for each in done if each["at"] == "log"] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    kept = {each["type"]: (each["name"], each["text"]) for each in done if each["at"] == "artifact"}
    assert kept == {
        "recipe": ("tiny-width-recipe", "seed: 7\n"),
        "plan": ("tiny-width-plan", "{}"),
        "lineage": ("tiny-width-lineage", "stage: distill\n"),
    }
    assert done[-1] == {"at": "finish", "exit_code": 0}
    train(tmp_path / "run")
    assert [each["id"] for each in fake() if each["at"] == "init"] == [init["id"]] * 2, "it goes on in the same run"


@pytest.mark.parametrize(
    ("asked", "timeout", "told"),
    [
        ("init:fails", PATIENCE, ["no route to host: going on without it", "it lacks 3 rows (no route to host)"]),
        ("init:blocks", 0.5, ["no answer within 0.5 s: training", "not done 0.5 s after", "it lacks 3 rows (it was"]),
        ("log:fails", PATIENCE, ["it lacks 3 rows (no route to host), all of which are in "]),
        ("finish:fails", PATIENCE, []),
    ],
)
def test_down_or_slow(
    asked: str, timeout: float, told: list[str], tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told in a line each, and every row is in metrics.jsonl."""
    fake(asked)
    assert train(tmp_path / "run", timeout=timeout) == [1, 2, 3]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: wandb: ")]
    assert len(warnings) == len(told), warnings
    assert all(text in line for text, line in zip(told, warnings, strict=True)), warnings


@pytest.mark.parametrize("place", ["log", "finish"])
def test_what_blocks_in_the_middle_is_left_behind(
    place: str, tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows come than may wait: no row waits, and the process is ended soon after the training."""
    monkeypatch.setattr("minitron_mcore.training.dashboard.MOST", 20)
    fake(f"{place}:blocks")
    log = LogConfig(wandb="offline", wandb_timeout=PATIENCE)
    (tmp_path / "run").mkdir()
    dashboard = Dashboard(tmp_path / "run", log, "tiny", {})
    rows = 5000 if place == "log" else 5  # more than a pipe holds
    for iteration in range(rows):
        dashboard.write(iteration, {"lm loss": 2.0, "a name that makes the row long" * 10: 1.0})
    while not any(each["at"] == "log" for each in fake()) or (place == "finish" and dashboard.taken < rows):
        time.sleep(0.01)
    process, dashboard.timeout = dashboard._process, 0.3
    dashboard.close(finished=True)
    assert process is not None and process.poll() is not None
    shown = capsys.readouterr().out
    assert (
        f"not done 0.3 s after the training: what it had lies in {tmp_path}/run/wandb/run-1, for `wandb sync`" in shown
    )
    assert ("it lacks 5,000 rows (it was too slow)" in shown) == (place == "log")


def test_wrong_settings_are_refused_before_the_first_step_alone(
    tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training that goes on does so without it."""
    fake("init:refuses")
    log = LogConfig(tensorboard=False, wandb="offline", wandb_timeout=PATIENCE)
    with pytest.raises(InputError, match=r"log\.wandb=offline is refused by Weights & Biases \(no route to host\)"):
        MetricsLog(tmp_path / "run", log, 3, name="tiny", recipe={}).open(0)
    assert {path.name for path in (tmp_path / "run").iterdir()} == set()
    metrics = MetricsLog(tmp_path / "run", log, 3, name="tiny", recipe={})
    metrics.open(2)
    metrics.close()
    assert "WARNING: wandb: no route to host: going on without it\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_one_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that nobody reaches, and one that takes connections and never answers."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for listens in (False, True):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if listens:
                server.listen()
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
            log_rows(tmp_path / str(listens), ROWS, wandb="online", wandb_timeout=3.0)
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: wandb: ")]
        assert 2 <= len(warnings) <= 3 and f"it lacks {len(ROWS)} rows" in warnings[-1], warnings
        assert len((tmp_path / str(listens) / "metrics.jsonl").read_text().splitlines()) == len(ROWS)


def test_wandb_offline_is_one_run_in_one_folder(tmp_path: Path) -> None:
    """Killed after iteration 15, with a checkpoint of 10: the folder that is to be synced has each iteration once."""
    log_rows(tmp_path, [*ROWS[:1], (15, {"lm loss": 9.0}, "train")], wandb="offline", wandb_timeout=PATIENCE)
    run_id = (tmp_path / "wandb_run_id").read_text()
    time.sleep(1.1)  # wandb names a folder by the second
    log_rows(tmp_path, ROWS[1:], after=10, wandb="offline", wandb_timeout=PATIENCE)
    assert (tmp_path / "wandb_run_id").read_text() == run_id
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    assert file.name == f"run-{run_id}.wandb"
    assert history(file) == [{"_step": 10, **ROWS[0][1]}, {"_step": 20, **ROWS[1][1], **ROWS[2][1]}]


@pytest.mark.parametrize("said", ["", "x/../../../precious", "..", "a b"])
def test_a_runs_id_is_a_name_and_no_path(tmp_path: Path, fake: Any, said: str) -> None:
    """A stranger's folder may say anything; its earlier runs' folders are deleted once their rows are in a new one."""
    run, precious = tmp_path / "run", tmp_path / "precious"
    train(run)
    (run / "wandb_run_id").write_text(said)
    (run / "wandb" / "offline-run-1-x").mkdir(parents=True)
    precious.mkdir()
    train(run, rows=2)
    assert precious.is_dir() and (run / "wandb_run_id").read_text() != said


def test_wandb_is_off_unless_it_is_asked_for() -> None:
    assert LogConfig().wandb == "disabled"


def history(path: Path) -> list[dict[str, float]]:
    """The rows in a wandb run file: a header of 7 bytes, then records as in a LevelDB log, each a protobuf message."""
    from wandb.proto import wandb_internal_pb2

    content, rows, position = path.read_bytes(), [], 7
    assert content.startswith(b":W&B") and len(content) < 1 << 15, "one block, so that no record is split"
    while position < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, position)
        assert kind == 1, "a whole record"
        record = wandb_internal_pb2.Record.FromString(content[position + 7 : position + 7 + length])  # type: ignore[attr-defined]
        position += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if key == "_step" or not key.startswith("_")})
    return rows


def test_wandb_online_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"log\.wandb=online is refused by Weights & Biases .*log\.wandb=offline"):
        log_rows(tmp_path / "run", ROWS, wandb="online", wandb_timeout=PATIENCE)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "wandb_run_id").exists()
    with pytest.raises(InputError, match=r"log\.wandb=online needs an API key: .*log\.wandb=offline"):
        check_wandb(LogConfig(wandb="online"), 0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_wandb(LogConfig(wandb="online"), 0)
