"""The plots of a search: losses against what the shapes cost, and against tokens. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mcore.files import write_figure
from minitron_mcore.search.ranking import Ranked, Ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Axis of the plot by the figure on it.
_LABELS = {
    "total_parameters": "parameters",
    "prefill_latency": "prefill, seconds a batch",
    "decode_latency": "decode, seconds a step",
    "latency": "seconds a batch",
    "prefill_throughput": "prefill, tokens a second",
    "decode_throughput": "decode, tokens a second",
}
NAMED = 12  # so many candidates the legend names


def write_costs(ranking: Ranking, path: Path) -> None:
    """`costs_figure` as PNG, whole or not at all. One process calls."""
    write_figure(path, costs_figure(ranking))


def costs_figure(ranking: Ranking) -> Figure:
    """Loss against cost, one dot a candidate that trained to the end, with the Pareto front as a line and its
    candidates named; those that halving stopped are hollow."""
    from matplotlib.figure import Figure

    rows = [each for each in ranking.rows if each.result["loss"] is not None]
    most = max(each.result["tokens"] for each in rows)

    def point(each: Ranked) -> tuple[float, float]:
        return each.candidate.figures[ranking.cost], each.result["loss"]

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panel = figure.subplots()
    for each in rows:
        full = each.result["tokens"] == most
        panel.plot(*point(each), "o", color="C0", fillstyle="full" if full else "none", ms=6)
    front = sorted((each for each in rows if each.on_front), key=point)
    panel.plot(*zip(*map(point, front), strict=True), color="C1", lw=1.5, zorder=0, label="Pareto front")
    costs = [point(each)[0] for each in rows]
    middle, rises = (min(costs) + max(costs)) / 2, ranking.cost.endswith("throughput")
    for each in front:
        # Towards the middle, where there is room, and away from the line.
        is_left = point(each)[0] < middle
        shift, side = (6, "left") if is_left else (-6, "right")
        drop, height = (4, "bottom") if is_left != rises else (-4, "top")
        place, name = (shift, drop), each.candidate.name
        panel.annotate(name, point(each), place, textcoords="offset points", ha=side, va=height, fontsize=7)
    if any(each.result["tokens"] < most for each in rows):
        panel.plot([], [], "o", color="C0", fillstyle="none", label="stopped by halving")
    panel.set_xlabel(_LABELS[ranking.cost])
    panel.set_ylabel("held-out LM loss, nats a token")
    panel.margins(x=0.15, y=0.1)
    panel.legend(fontsize=8)
    return figure


def write_curves(ranking: Ranking, path: Path) -> None:
    """Held-out loss against tokens, one line a candidate: dots where candidates were compared, a thin line through the
    training's own validations where there are some. The loss before training is left out, far above. PNG, whole or not
    at all. One process calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panel = figure.subplots()
    for place, each in enumerate(ranking.rows):
        color = f"C{place}" if place < NAMED else "0.8"
        dots = [(tokens, loss) for tokens, loss in each.result["curve"] if tokens and loss is not None]
        line = [(tokens, loss) for tokens, loss in each.result.get("validation", []) if loss is not None]
        for points, style in ((dots, {"marker": "o", "ms": 4, "lw": 0 if line else 1}), (line, {"lw": 0.8})):
            if points:
                label = each.candidate.name if points is dots and place < NAMED else None
                panel.plot(*zip(*points, strict=True), color=color, zorder=-place, label=label, **style)
    panel.set_xlabel("tokens")
    panel.set_ylabel("held-out LM loss, nats a token")
    panel.legend(fontsize=7)
    write_figure(path, figure)
