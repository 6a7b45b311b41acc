"""The students that an ablation prunes: every combination of the recipe's choices that matters, once. Pure."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import write_figure, write_whole
from minitron_mcore.pruning.plan_file import check_residual
from minitron_mcore.pruning.targets import TARGETS, no_target
from minitron_mcore.search.config import AblateConfig
from minitron_mcore.tables import table as tabulate

# name of a shape that prunes one axis alone -> the fields it takes from the student
ALONE = {
    "depth": ("num_layers",),
    "hidden": ("hidden_size",),
    "ffn": ("ffn_hidden_size",),
    "attention": ("num_attention_heads", "num_query_groups"),
}
WHOLE = "student"


@dataclass(frozen=True)
class Setting:
    """One row: what is pruned, and how it is chosen. A choice that has no effect on the row is ""."""

    shape: str  # WHOLE or a name of ALONE
    method: str
    aggregation: str = ""
    neuron_site: str = ""
    depth_metric: str = ""
    layers: str = ""
    head_residual: str = ""
    residual_matrices: str = ""
    seed: str = ""

    @property
    def label(self) -> str:
        """The choices in words, without those that have no effect."""
        aggregation = self.aggregation and f"{self.aggregation} (batch/sequence)"
        residual = "" if self.head_residual in ("", "none") else f"{self.head_residual} in {self.residual_matrices}"
        seed = self.seed and f"seed {self.seed}"
        parts = [self.shape, self.method, seed, aggregation, self.neuron_site, self.depth_metric, self.layers, residual]
        return ", ".join(part for part in parts if part)


def shapes_of(teacher: Architecture, student: Architecture, per_axis: bool) -> dict[str, Architecture]:
    """The shapes to prune to, by name. Raises InputError unless the student is smaller than the teacher."""
    smaller = {
        name: fields
        for name, fields in ALONE.items()
        if any(getattr(student, field) < getattr(teacher, field) for field in fields)
    }
    if not smaller:
        raise no_target(teacher)
    shapes = {WHOLE: student}
    if per_axis and len(smaller) > 1:
        for name, fields in smaller.items():
            shapes[name] = teacher.replace(**{field: getattr(student, field) for field in fields})
    return shapes


def grid_of(
    config: AblateConfig, teacher: Architecture, shapes: dict[str, Architecture], seed: int, *, layers_given: bool
) -> list[Setting]:
    """Every row, in the order of the recipe's lists. `layers_given`: the student's layers are named, not chosen.

    Raises InputError for head residuals that a shape cannot have.
    """
    choices = itertools.product(
        shapes,
        config.methods,
        config.aggregations,
        config.neuron_sites,
        config.depth_metrics,
        config.layers,
        config.head_residuals,
        config.residual_matrices,
        [str(seed + number) for number in range(config.random_seeds)],
    )
    rows: dict[Setting, None] = {}
    for shape, *values in choices:
        setting = without_idle(Setting(shape, *values), teacher, shapes[shape], layers_given=layers_given)
        if setting.head_residual:
            matrices = setting.residual_matrices.split("+") if setting.residual_matrices else []
            check_residual(teacher, shapes[shape], setting.head_residual, matrices)
        rows[setting] = None
    return list(rows)


def without_idle(setting: Setting, teacher: Architecture, shape: Architecture, *, layers_given: bool) -> Setting:
    """`setting` with "" for every choice that this shape or method does not look at."""
    fewer = {name: getattr(shape, name) < getattr(teacher, name) for name in TARGETS}
    heads = fewer["num_attention_heads"] or fewer["num_query_groups"]
    by_activation = setting.method == "activation"
    by_width = by_activation and (fewer["hidden_size"] or fewer["ffn_hidden_size"] or heads)
    picks_layers = fewer["num_layers"] and not layers_given
    is_looked_at = {
        "aggregation": by_width,
        "neuron_site": by_width and fewer["ffn_hidden_size"],
        "depth_metric": by_activation and picks_layers,
        "layers": picks_layers and teacher.num_layers - shape.num_layers > 1,  # or else a block of one
        "head_residual": heads,
        "residual_matrices": heads and setting.head_residual != "none",
        "seed": setting.method == "random",
    }
    return replace(setting, **{name: "" for name, counts in is_looked_at.items() if not counts})


CHOICES = [entry.name for entry in dataclasses.fields(Setting)]
NUMBERS = ["lm_loss", "ppl", "parameters"]
COLUMNS = [*CHOICES, *NUMBERS, "made_with"]
SHOWN = 30  # rows of a panel of the plot


@dataclass(frozen=True)
class Row:
    """A student and its loss before any training, in nats per token on held-out text."""

    setting: Setting
    lm_loss: float
    ppl: float
    parameters: int


def read_rows(path: Path, made_with: str) -> list[Row]:
    """The finished rows in `path`; none if the file does not exist.

    Raises InputError if the file holds something else, or rows made with settings of another fingerprint.
    """
    if not path.is_file():
        return []
    rows, makers, remedy = [], set(), "name another folder as output, or delete that file"
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for line in csv.DictReader(stream):
                setting = Setting(**{name: line[name] for name in CHOICES})
                rows.append(Row(setting, float(line["lm_loss"]), float(line["ppl"]), int(line["parameters"])))
                makers.add(line["made_with"])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError("output", path.parent, f"holds {path.name}, not the table of an ablation", remedy) from error
    if makers - {made_with}:
        rule = f"holds {path.name} with rows of another teacher, student, text or seed"
        raise InputError("output", path.parent, rule, remedy)
    return rows


def write_rows(rows: Sequence[Row], path: Path, made_with: str) -> None:
    """All rows, with every digit; whole or not at all. One process calls. Makes the folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        numbers = {name: getattr(row, name) for name in NUMBERS}
        writer.writerow({**dataclasses.asdict(row.setting), **numbers, "made_with": made_with})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue())


def best_first(rows: Sequence[Row]) -> list[Row]:
    """By shape, in order of appearance, then by loss."""
    shapes = list(dict.fromkeys(row.setting.shape for row in rows))
    return sorted(rows, key=lambda row: (shapes.index(row.setting.shape), row.lm_loss))


def table(rows: Sequence[Row], teacher_loss: float) -> str:
    """One line a row, the lowest loss of each shape first; columns in which all rows are alike are left out."""
    rows = best_first(rows)
    columns = [name for name in CHOICES if len({getattr(row.setting, name) for row in rows}) > 1]
    head = [*columns, "lm loss", "over teacher", "parameters"]
    cells = [
        [
            *(getattr(row.setting, name) or "-" for name in columns),
            f"{row.lm_loss:.4f}",
            f"{row.lm_loss - teacher_loss:+.4f}",
            f"{row.parameters:,}",
        ]
        for row in rows
    ]
    return tabulate(cells, head, left=range(len(columns)))


def squares(rows: Sequence[Row]) -> list[str]:
    """As in table 13 of arXiv 2407.14679: loss by batch (down) and sequence (across) aggregation, for choices that were
    combined with several of both."""
    groups: dict[Setting, dict[tuple[str, str], float]] = {}
    for row in rows:
        if row.setting.aggregation:
            batch, _, sequence = row.setting.aggregation.partition("/")
            groups.setdefault(dataclasses.replace(row.setting, aggregation=""), {})[batch, sequence] = row.lm_loss
    found = []
    for setting, losses in groups.items():
        batches = sorted({batch for batch, _ in losses})
        sequences = sorted({sequence for _, sequence in losses})
        if len(batches) > 1 and len(sequences) > 1:
            cells = [
                [batch, *(f"{losses[batch, name]:.4f}" if (batch, name) in losses else "" for name in sequences)]
                for batch in batches
            ]
            found.append(f"{setting.label}:\n{tabulate(cells, ('batch / sequence', *sequences))}")
    return found


def write_plot(rows: Sequence[Row], teacher_loss: float, path: Path) -> None:
    """A panel for each shape with bars for its best rows, drawn from the teacher's loss, the lowest loss on top; PNG,
    whole or not at all. One process calls."""
    # Takes a second to import. Without pyplot there is no window system to ask for.
    from matplotlib.figure import Figure

    by_shape: dict[str, list[Row]] = {}
    for row in best_first(rows):
        by_shape.setdefault(row.setting.shape, []).append(row)
    shown = {shape: found[:SHOWN] for shape, found in by_shape.items()}
    methods = list(dict.fromkeys(row.setting.method for row in rows))
    heights = [1 + len(found) for found in shown.values()]
    figure = Figure(figsize=(12, 1 + 0.24 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(shown), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for panel, (shape, found) in zip(panels, shown.items(), strict=True):
        panel.barh(
            range(len(found)),
            [row.lm_loss - teacher_loss for row in found],
            left=teacher_loss,
            color=[f"C{methods.index(row.setting.method)}" for row in found],
            height=0.7,
        )
        panel.axvline(teacher_loss, color="0.3", lw=1)
        for place, row in enumerate(found):
            panel.annotate(f" {row.lm_loss:.4f}", (max(row.lm_loss, teacher_loss), place), va="center", fontsize=7)
        panel.set_yticks(range(len(found)), [_short_label(row, found) for row in found], fontsize=8)
        panel.set_ylim(len(found) - 0.4, -0.6)
        panel.margins(x=0.08)
        more = f", the best {len(found)} of {len(by_shape[shape])}" if len(found) < len(by_shape[shape]) else ""
        panel.set_title(f"{shape}{more}", fontsize=9, loc="left")
    panels[-1].set_xlabel(f"held-out LM loss before training, nats a token (teacher: {teacher_loss:.4f})", fontsize=9)
    write_figure(path, figure)


def _short_label(row: Row, among: Sequence[Row]) -> str:
    """The method, and the choices in which the rows differ."""
    differ = [name for name in CHOICES if len({getattr(other.setting, name) for other in among}) > 1]
    words = [getattr(row.setting, name) for name in differ if name != "method"]
    return "  ".join([row.setting.method, *filter(None, words)])
