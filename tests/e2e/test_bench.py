"""`bench` as typed, on tiny models: figures that hold together, and a file that `search` and `estimate` read.

No time is compared with a number of seconds: the machine may be busy.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.estimate.config import ServingConfig
from minitron_mcore.estimate.roofline import serving_figures
from minitron_mcore.jobs import bench
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.devices import Machine
from minitron_mcore.runtime.world import World
from tests.distributed.hf_cases import save_with_transformers
from tests.e2e.verbs import minitron, run_well
from tests.refusals import refuses

NEW = 6
SIZES = ["bench.batch_size=[1,3]", "bench.prompt_tokens=7", f"bench.output_tokens={NEW}"]
SIZES += ["bench.threads=1", "bench.repeats=1", "bench.warmup=0"]
MACHINE = Machine(peak_flops=5e10, peak_flops_fp32=5e10, memory_bandwidth=1e10, intra_node_bandwidth=1e9)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `teacher` and `student`, of two families."""
    root = tmp_path_factory.mktemp("bench")
    for name, case in (("teacher", "llama-tied"), ("student", "qwen3")):
        save_with_transformers(case, root / f"hf-{name}")
        run_well("import", f"hf={root / f'hf-{name}'}", f"checkpoint={root / name}")
    return root


def rows_in(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


@pytest.fixture(scope="module")
def measured(root: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of two engines, at two batch sizes, and what was shown."""
    output = root / "new" / "bench.json"
    settings = ["bench.engines=[minitron,transformers]", *SIZES, f"bench.output={output}"]
    shown = run_well("bench", f"checkpoint={root / 'teacher'}", *settings)
    assert [path.name for path in output.parent.iterdir()] == ["bench.json"], "what was made for the while is gone"
    return rows_in(output), shown


def hold_together(row: dict[str, Any]) -> None:
    """What one repeat's figures must be to each other."""
    batch, step, request = row["batch_size"], row["step_percentiles"], row["request_percentiles"]
    assert row["prefill_throughput"] * row["prefill_latency"] == pytest.approx(batch * 7)
    assert row["decode_throughput"] * row["decode_latency"] == pytest.approx(batch)
    assert 0 < step["p50"] <= step["p90"] <= step["p99"] < request["p99"]
    # Of an odd number of steps more than half take as long as the median, which one run's decode is.
    assert row["decode_latency"] == pytest.approx(step["p50"])
    assert request["p50"] >= row["prefill_latency"] + NEW // 2 * row["decode_latency"]
    assert row["memory"] is None or row["memory"] > 0
    assert row["version"] and row["weights"] == "fp32" and row["repeats"] == 1


def test_two_engines(measured: tuple[list[dict[str, Any]], str]) -> None:
    """Their figures hold together, and they make the same tokens."""
    rows, shown = measured
    assert [(row["batch_size"], row["engine"]) for row in rows] == [
        (batch, engine) for batch in (1, 3) for engine in ("minitron", "transformers")
    ]
    for row in rows:
        hold_together(row)
        assert row["same_tokens"] == (None if row["engine"] == "minitron" else 1), "greedy, in fp32"
    for words in ("batch 3, 7 prompt and 6 output tokens", "of teacher", "depth 2.7x, width 1.8x", "TensorRT-LLM"):
        assert words in shown
    assert "fp32: one run" in shown and "±" not in shown


def test_search_reads_the_file(measured: tuple[list[dict[str, Any]], str], root: Path) -> None:
    """One reader: a measured point is met exactly, and `search` lists by it; without an engine it is refused."""
    path = root / "new" / "bench.json"
    asked: dict[str, Any] = {"measured": str(path), "batch_size": 3, "prompt_tokens": 7, "output_tokens": NEW}
    asked |= {"weights": "fp32", "kv_cache": "fp32"}
    for row in measured[0][2:]:
        architecture = build_architecture(row["architecture"])
        found = serving_figures(architecture, ServingConfig(**asked, engine=row["engine"]), MACHINE)
        for name in ("prefill_latency", "decode_latency"):
            assert found[name] == pytest.approx(row[name], rel=1e-9), (row["engine"], name)
    with refuses("serving.engine", None, "holds the speeds of minitron, transformers", "name one"):
        serving_figures(architecture, ServingConfig(**asked), MACHINE)
    with refuses("serving.measured", path, "engine=vllm", "engine=minitron"):
        serving_figures(architecture, ServingConfig(**asked, engine="vllm"), MACHINE)

    serving = [f"serving.{name}={value}" for name, value in asked.items()]
    machine = ["cluster.peak_tflops=0.05", "cluster.peak_tflops_fp32=0.05", "cluster.memory_bandwidth=10"]
    grid = ["search.train=false", "search.num_layers=[2,3]", "search.budget.latency=[0,1000]"]
    words = [f"teacher.checkpoint={root / 'teacher'}", *grid, *serving, *machine, f"output={root / 'search'}"]
    run_well("search", *words, "serving.engine=minitron")
    (found,) = json.loads((root / "search" / "candidates.json").read_text())["candidates"]
    student = build_architecture({**architecture.to_dict(), "num_layers": 2})
    expected = serving_figures(student, ServingConfig(**asked, engine="minitron"), MACHINE)
    assert found["latency"] == pytest.approx(expected["latency"], rel=1e-6)
    uncorrected = serving_figures(student, ServingConfig(**{**asked, "measured": None}), MACHINE)
    assert found["latency"] != pytest.approx(uncorrected["latency"], rel=0.1), "a machine of round numbers"


def test_at_other_layouts(root: Path) -> None:
    """Our engine alone, two models; rows of pipeline stages or of data-parallel ranks, one of which has no prompt of a
    batch of one, are no points for a roofline, which knows neither."""
    layouts = {"parallel.tensor=1": "data=2", "parallel.tensor=2": "", "parallel.pipeline=2": "pipeline=2"}
    for layout, unknown in layouts.items():
        output = root / f"{layout}.json"
        models = [f"checkpoints.{name}={root / name}" for name in ("teacher", "student")]
        run_well("bench", *models, *SIZES, layout, f"bench.output={output}", world_size=2)
        rows = rows_in(output)
        assert [(row["engine"], row["model"]) for row in rows] == [("minitron", "teacher"), ("minitron", "student")] * 2
        for row in rows:
            hold_together(row)
        ratio = rows[3]["decode_throughput"] / rows[2]["decode_throughput"]
        assert [row["speed_up"]["decode"] for row in rows[2:]] == [1, pytest.approx(ratio)]
        asked: dict[str, Any] = {"measured": str(output), "batch_size": 3, "prompt_tokens": 7, "output_tokens": NEW}
        serving = ServingConfig(**asked, weights="fp32", kv_cache="fp32", tensor=rows[3]["tensor"])
        architecture = build_architecture(rows[3]["architecture"])
        if not unknown:
            found = serving_figures(architecture, serving, MACHINE)
            assert found["decode_latency"] == pytest.approx(rows[3]["decode_latency"], rel=1e-9)
        else:
            with refuses("serving.measured", output, "has no point for", unknown):
                serving_figures(architecture, serving, MACHINE)


def job_of(*words: str) -> bench.BenchJob:
    return bench.resolve(load_recipe(None, [*words]), World())


def test_a_shape_that_transformers_does_not_take(root: Path) -> None:
    """Engines that read its export leave it out, and say why; ours measures it."""
    odd, output = root / "odd", root / "odd.json"
    shutil.copytree(root / "teacher", odd)
    told = (odd / "architecture.yaml").read_text()
    (odd / "architecture.yaml").write_text(told.replace("rotary_percent: 1.0", "rotary_percent: 0.5"))
    models = [f"checkpoints.odd={odd}", f"checkpoints.teacher={root / 'teacher'}"]
    words = [*SIZES, "bench.batch_size=1", f"bench.output={output}"]
    shown = run_well("bench", *models, "bench.engines=[transformers,minitron]", *words)
    rule = f"rotary_percent=0.5 of checkpoints.odd={odd} cannot be written into a LlamaForCausalLM config"
    assert f"transformers: odd is left out, since it cannot be exported: {rule}" in " ".join(shown.split())
    rows = rows_in(output)
    assert [(row["engine"], row["model"]) for row in rows] == [
        *(("transformers", "teacher"), ("minitron", "odd"), ("minitron", "teacher"))
    ]
    assert [row["speed_up"] == {} for row in rows] == [True, False, False], "the first is the first, measured or not"
    with refuses("rotary_percent", 0.5, "cannot be written into"):
        job_of(models[0], "bench.engines=[transformers]", *words)
    gguf = root / "there.gguf"
    gguf.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "lacks", lambda other, python: False)
        job = job_of(models[0], "bench.engines=[llama.cpp]", f"bench.gguf.odd={gguf}", *words)
    assert [engine for engine, _ in job.pairs] == ["llama.cpp"] and not job.notes, "it needs no folder"


def test_an_engine_without_its_files_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed and not measured, llama.cpp is missed; what is not installed is not."""
    words = [f"checkpoint={root / 'teacher'}", *SIZES, f"bench.output={root / 'dry.json'}"]
    monkeypatch.setattr(bench, "lacks", lambda other, python: other.modules == ("vllm",))
    job = job_of(*words)
    assert [engine for engine, _ in job.pairs] == ["minitron", "transformers"]
    (note,) = job.notes
    assert note.startswith("llama.cpp is installed and left out: it needs GGUF files: name") and "converter" in note
    (root / "convert.py").touch()
    job = job_of(*words, f"bench.converter={root / 'convert.py'}")
    assert [engine for engine, _ in job.pairs] == ["minitron", "transformers", "llama.cpp"] and not job.notes


def test_threads_are_those_of_openmp(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"checkpoint={root / 'teacher'}", "bench.engines=[minitron]", *SIZES[:3]]
    cores = len(os.sched_getaffinity(0))
    for said, threads in (("3", 3), ("2,1", 2), (" 4 , 2", 4), ("", cores), ("0", cores), ("many", cores)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert job_of(*words).threads == threads, said
    assert job_of(*words, "bench.threads=5").threads == 5


def test_what_is_seen_beforehand(root: Path) -> None:
    """A dry run says what would be made; nothing is."""
    words = [f"checkpoint={root / 'teacher'}", *SIZES, f"bench.output={root / 'dry.json'}", "--dry-run"]
    code, shown = minitron("bench", *words)
    assert code == 0 and "dry.json" in shown and not (root / "dry.json").exists()
