"""The text file for node_exporter, read back by Prometheus's own rules."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.metrics import MetricsLog
from minitron_mcore.training.prometheus import as_text, check_prometheus, metric_name

# The grammar of https://prometheus.io/docs/instrumenting/exposition_formats, text format 0.0.4.
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({LABEL}(?:,{LABEL})*)?\}})? (\S+)")
HEAD = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.*)")
ESCAPES = {r"\\": "\\", r"\n": "\n", r"\"": '"'}


def parse(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name and labels. Every line is of the grammar, each family is in one piece behind its HELP and TYPE,
    no series comes twice, and the file ends with a line feed."""
    assert text.endswith("\n")
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    families: list[str] = []
    heads: list[str] = []
    for line in text.removesuffix("\n").split("\n"):
        if head := HEAD.fullmatch(line):
            kind, name, words = head.groups()
            assert (name not in families) if kind == "HELP" else (heads[-1] == name and words == "gauge")
            heads.append(name)
            families += [name] if kind == "HELP" else []
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample and sample[1] == families[-1], line
        labels = frozenset(
            (key, re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], value))
            for key, value in re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', sample[2] or "")
        )
        assert (sample[1], labels) not in found
        found[sample[1], labels] = float(sample[3])
    assert heads == [name for name in families for _ in range(2)]
    return found


def test_names_sources_and_escapes() -> None:
    odd = 'a "quoted"\\back\nline'
    numbers = {
        "lm loss": 2.5,
        "lm loss validation": 1.5,
        "lm loss validation wiki\\n_text_document": 1.25,
        "ppl validation": math.inf,
        "grad-norm": math.nan,
        "peak memory (GiB)": 70.0,
        "throughput per GPU (TFLOP/s/GPU)": 312.5,
        "model FLOPs utilization (%)": 41.0,
        "rewards/chosen": -math.inf,
    }
    found = parse(as_text(numbers, {"run": odd, "stage": "distill"}))
    own = {("run", odd), ("stage", "distill")}
    nan = found.pop(("minitron_grad_norm", frozenset(own)))
    assert math.isnan(nan)
    assert found == {
        ("minitron_lm_loss", frozenset(own)): 2.5,
        ("minitron_lm_loss_validation", frozenset(own)): 1.5,
        ("minitron_lm_loss_validation", frozenset(own | {("source", "wiki\\n_text_document")})): 1.25,
        ("minitron_ppl_validation", frozenset(own)): math.inf,
        ("minitron_peak_memory_gib", frozenset(own)): 70.0,
        ("minitron_throughput_per_gpu_tflop_s_gpu", frozenset(own)): 312.5,
        ("minitron_model_flops_utilization_percent", frozenset(own)): 41.0,
        ("minitron_rewards_chosen", frozenset(own)): -math.inf,
    }
    # Two that have the same letters are one family, and never the same series twice.
    assert parse(as_text({"a b": 1.0, "a-b": 2.0}, {})) == {("minitron_a_b", frozenset()): 2.0}
    assert metric_name("top-1 agreement") == "minitron_top_1_agreement"


def test_the_newest_numbers_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every log.interval, validation beside training; in the end it no longer runs. Nothing else is left there."""
    exported = tmp_path / "exporter" / "minitron.prom"
    exported.parent.mkdir()
    log = LogConfig(tensorboard=False, prometheus=str(exported))
    metrics = MetricsLog(tmp_path / "run", log, 20, name="tiny", recipe={}, stage="distill")
    labels = frozenset({("run", "tiny"), ("stage", "distill")})

    def newest() -> dict[str, float]:
        found = parse(exported.read_text())
        assert {each for _, each in found} == {labels}
        return {name.removeprefix("minitron_"): value for (name, _), value in found.items()}

    metrics.open(0)
    assert not exported.exists()
    row = {"lm loss": 2.5, "grad-norm": 0.1 + 0.2}
    metrics.write(10, row, shown=row)
    metrics.write(10, {"lm loss validation": 2.0}, shown={"lm loss validation": 2.0}, kind="validation")
    metrics.write(11, {"lm loss": 9.0}, shown=None)
    expected = {"training_running": 1, "iterations": 20, "iteration": 10, "lm_loss": 2.5, "grad_norm": 0.1 + 0.2}
    assert newest() == expected | {"lm_loss_validation": 2.0}, "to the last bit, as in metrics.jsonl"
    metrics.close()
    assert newest() == expected | {"lm_loss_validation": 2.0, "training_running": 0, "iteration": 11}
    assert [path.name for path in exported.parent.iterdir()] == ["minitron.prom"]
    # A folder that went away is told once.
    capsys.readouterr()
    log = LogConfig(tensorboard=False, prometheus=f"{tmp_path}/gone/m.prom")
    metrics = MetricsLog(tmp_path / "run", log, 20, name="tiny", recipe={})
    metrics.open(0)
    for iteration in (1, 2):
        metrics.write(iteration, row, shown=row)
    metrics.close()
    shown = capsys.readouterr().out
    assert shown.count("WARNING") == 1
    assert f"WARNING: log.prometheus={tmp_path}/gone/m.prom is not written: No such file or directory\n" in shown
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_place_that_node_exporter_would_not_read(tmp_path: Path) -> None:
    for path, told in (
        (tmp_path / "metrics.txt", "is no file that node_exporter reads: name one that ends in .prom"),
        (tmp_path / "gone" / "m.prom", "lies in a folder that is not there, or that this user may not write to"),
    ):
        log = LogConfig(prometheus=str(path))
        with pytest.raises(InputError, match=re.escape(f"log.prometheus={path} {told}")):
            check_prometheus(log, 0)
        check_prometheus(log, 1)  # which writes nothing
    check_prometheus(LogConfig(prometheus=str(tmp_path / "m.prom")), 0)
    check_prometheus(LogConfig(), 0)
    assert not os.listdir(tmp_path)
