"""The newest numbers of a training as a text file for node_exporter's textfile collector. Pure.

    # HELP minitron_lm_loss lm loss
    # TYPE minitron_lm_loss gauge
    minitron_lm_loss{run="quickstart-width",stage="distill"} 2.1

Names are those of metrics.jsonl in Prometheus's letters; a validation's source is a label. The file is written aside
and renamed, so that a scrape sees all of one state.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from minitron_mcore.errors import InputError
from minitron_mcore.files import write_whole
from minitron_mcore.training.config import LogConfig

PREFIX = "minitron_"
RUNNING, ITERATION, ITERATIONS = "training running", "iteration", "iterations"


def check_prometheus(log: LogConfig, rank: int) -> None:
    """Raise InputError where the file cannot be one that node_exporter reads; asked on the first rank, which writes."""
    if log.prometheus is None or rank:
        return
    path = Path(log.prometheus)
    if path.suffix != ".prom" or path.is_dir():
        raise InputError("log.prometheus", path, "is no file that node_exporter reads", "name one that ends in .prom")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        rule = "lies in a folder that is not there, or that this user may not write to"
        raise InputError("log.prometheus", path, rule, "name a file in node_exporter's --collector.textfile.directory")


class PrometheusFile:
    """The file at `path`, of the first rank; what cannot be written is told once, and stops nothing."""

    def __init__(self, path: Path, labels: dict[str, str], iterations: int) -> None:
        self.path, self.labels = path, labels
        self.newest: dict[str, float] = {RUNNING: 1, ITERATIONS: iterations}
        self._warned = False

    def write(self, iteration: int, row: dict[str, float]) -> None:
        """`row` beside the newest of the others."""
        self.newest |= {ITERATION: iteration, **row}
        try:
            write_whole(self.path, as_text(self.newest, self.labels))
        except OSError as error:
            if not self._warned:
                print(f"WARNING: log.prometheus={self.path} is not written: {error.strerror}", flush=True)
            self._warned = True

    def close(self, iteration: int) -> None:
        """The last numbers stay, of a training that no longer runs."""
        self.write(iteration, {RUNNING: 0})


def as_text(numbers: dict[str, float], labels: dict[str, str]) -> str:
    """Prometheus's text format, version 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats."""
    families: dict[str, tuple[str, dict[str, float]]] = {}
    for name, value in numbers.items():
        title, found, source = name.partition(" validation")
        title, own = title + found, {**labels, "source": source.strip()} if source.strip() else labels
        shown = ",".join(f'{key}="{escaped(text, quotes=True)}"' for key, text in own.items())
        families.setdefault(metric_name(title), (title, {}))[1][shown] = value
    lines = []
    for family, (title, series) in families.items():
        lines += [f"# HELP {family} {escaped(title)}", f"# TYPE {family} gauge"]
        lines += [f"{family}{{{shown}}} {as_number(value)}" for shown, value in series.items()]
    return "\n".join(lines) + "\n"


def metric_name(title: str) -> str:
    """`peak memory (GiB)` -> minitron_peak_memory_gib."""
    words = title.lower().replace("%", "percent")
    return PREFIX + re.sub(r"[^a-z0-9]+", "_", words).strip("_")


def escaped(text: str, *, quotes: bool = False) -> str:
    """As help texts need it; label values need quotation marks escaped besides."""
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def as_number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
