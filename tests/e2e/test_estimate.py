"""`minitron estimate`, as it is typed: on any machine, quickly, without torch or megatron."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore import cli

ROOT = Path(__file__).parents[2]
LLAMA = ["--config", "configs/llama-3.1-8b-to-4b-width.yaml", "teacher.checkpoint=configs/models/llama-3.1-8b"]


def estimate(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """What is printed, and the file."""
    target = folder / "new" / "estimate.json"
    assert cli.main(["estimate", *words, f"estimate.output={target}"]) == 0
    return capsys.readouterr().out, json.loads(target.read_text())


def test_a_thousand_gpus_on_a_laptop(tmp_path: Path) -> None:
    """In a process of its own: neither torch nor megatron is imported, and nothing but the file is written. The time
    limit is generous; what it takes is in docs/estimate.md."""
    words = ["estimate", *LLAMA, "cluster.gpus=1024", "cluster.device=H100", f"estimate.output={tmp_path}/e.json"]
    words += ["correct.global_batch_size=1024", "distill.global_batch_size=1024"]
    program = f"""
import sys
from minitron_mcore.cli import main
code = main({words})
print(code, [name for name in ("torch", "megatron", "transformers", "scipy", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["gpus"] == 1024 and found["fits"] is True


def test_only_the_first_of_several_ranks_acts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["estimate", "--config", "configs/quickstart.yaml", f"output={tmp_path}/new"]) == 0
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_what_is_said_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters as the model cards have them; on 32 nodes 18 GiB to distil and 21 to correct."""
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=256", "cluster.device=H100")
    assert found["teacher"]["parameters"] == 8_030_261_248
    correct, distill = found["trainings"]
    assert distill["model"]["parameters"] == pytest.approx(4.51e9, rel=2e-3)
    assert [round(each["memory"]["total"] / 2**30) for each in (correct, distill)] == [21, 18]
    assert "student  4.51B parameters, 3.72B without embeddings: hidden_size 4096 -> 3072" in shown
    for each in found["trainings"]:
        assert sum(each["memory"]["parts"].values()) == each["memory"]["total"]
        assert each["memory"]["parts"] in each["memory_by_stage"]
    assert "together" in shown and "17.9 GiB" in shown
    assert f"{found['trainings'][0]['memory']['total'] / 2**30:.1f} GiB" in shown
    assert {each["verb"] for each in found["stages"]} == {"evaluate", "score", "prune", "export"}
    assert found["fits"] is True and "DOES NOT FIT" not in shown
    assert found["left_out"] == [] and "left out" not in shown


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, found = estimate(capsys, tmp_path, "--config", "configs/quickstart.yaml", "cluster.gpus=2")
    assert found["left_out"] == ["let teacher and students write"]
    assert "\nleft out: let teacher and students write, which needs the weights, and keys and values" in shown


def test_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The arithmetic between the numbers of the file; FLOPs by the models' cards: three times forward of the student,
    once of the teacher, 2 a parameter (without the embedding's table) and 4 s h L of attention's scores."""
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=256", "cluster.device=H100", "cluster.price=2")
    for each in found["trainings"]:
        cost = each["cost"]
        assert sum(cost["step"]["parts"].values()) == pytest.approx(cost["step"]["seconds"])
        assert cost["tokens_per_second"] * cost["seconds"] == pytest.approx(each["tokens"])
        assert cost["gpu_hours"] == pytest.approx(256 * cost["seconds"] / 3600)
        assert cost["cost"] == pytest.approx(2 * cost["gpu_hours"])
        assert cost["kilowatt_hours"] == pytest.approx(0.7 * cost["gpu_hours"])
        flops = cost["student_flops"] + cost["teacher_flops"]
        assert cost["mfu"] == pytest.approx(flops / cost["step"]["seconds"] / 256 / 989.4e12)
    scores = 2 * 2 * 8192 * 32 * 128 * 32
    student, teacher = 2 * (4.51e9 - 128256 * 3072) + scores, 2 * (8.03e9 - 128256 * 4096) + scores
    assert cost["student_flops"] / cost["step"]["tokens"] == pytest.approx(3 * student, rel=5e-3)
    assert cost["teacher_flops"] / cost["step"]["tokens"] == pytest.approx(teacher, rel=5e-3)
    best = found["layouts"][0]
    assert f"{found['layouts_that_fit']} layouts of 256 fit, the fastest first" in shown
    assert f"for the first of them set {' '.join(best['keys'])}" in shown
    assert found["fewest"][0]["gpus"] < 8 and found["twice"]["gpus"] == 512
    assert "\n  a step    " in shown and "MFU" in shown and "at 2 an hour" in shown and "all trainings: " in shown


def test_without_a_device_there_are_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=256")
    assert "no times: name a device" in shown and "fits" not in shown
    assert found["fits"] is None and found["trainings"][0]["cost"] is None and found["layouts"][0]["seconds"] is None


def test_what_does_not_fit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=256", "cluster.gpu_memory=20Gi")
    assert found["fits"] is False
    assert "DOES NOT FIT" in shown and "correct the teacher: what helps most: " in shown
    assert "layouts of 256 fit, the least recomputed and cut first" in shown
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=8", "cluster.gpu_memory=8Gi")
    assert "no layout of 8 GPUs fits" in shown and found["layouts"] == [] and found["fewest"][0]["gpus"] > 8
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=8", "cluster.gpu_memory=8Mi")
    assert "no number of such GPUs would do" in shown and found["fewest"] == []
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=1", "cluster.gpu_memory=8Gi", "correct.tokens=0")
    assert "no layout of 1 GPU fits" in shown
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=6", "cluster.device=H100")
    assert found["fits"] is False and found["trainings"][0]["memory"] is None
    assert shown.count("parallel.tensor=4 x parallel.pipeline=1 = 4 ranks for one copy of the model") == 1


def test_it_lies_in_the_folder_of_a_run_that_is_still_to_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "configs/quickstart.yaml", f"output={tmp_path}/run", "cluster.gpus=2"]
    assert cli.main(["estimate", *words]) == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["estimate.json"]
    assert cli.main(["estimate", *words]) == 0, "its own file is written anew"
    assert cli.main(["run", *words, "--dry-run"]) == 0
    assert "[1/20] train the tokenizer" in capsys.readouterr().out


def test_the_precision_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who leaves it out trains in fp32, which an H100 multiplies 15 times as slowly (its data sheet)."""
    words = [*LLAMA, "cluster.gpus=64", "cluster.device=H100", "correct.tokens=0"]
    assert estimate(capsys, tmp_path, *words)[0].splitlines()[0].endswith("on 64 x H100 in bf16")
    slow = estimate(capsys, tmp_path, *words, "precision=fp32")[0].splitlines()[0]
    assert slow.endswith("on 64 x H100 in fp32 (67 TFLOP/s at most; with precision=bf16 989)")


def test_a_recipe_without_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, found = estimate(capsys, tmp_path, *LLAMA, "cluster.gpus=8", "correct.tokens=0", "distill.tokens=0")
    assert "no training: give it a budget of tokens, as distill.tokens=94B" in shown and found["trainings"] == []
