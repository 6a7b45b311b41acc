"""The plot of a claim: each arm's loss, and each difference with its interval. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.files import write_figure
from minitron_mcore.reproduction.statistics import DOES_NOT, HOLDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {HOLDS: "C2", DOES_NOT: "C3"}


def write_plot(result: dict[str, Any], path: Path) -> None:
    """`figure_of` as PNG, whole or not at all. One process calls."""
    write_figure(path, figure_of(result))


def figure_of(result: dict[str, Any]) -> Figure:
    """Left: a dot a seed and a bar at the mean, arm by arm. Right: the differences with their intervals, green where
    the order holds, red where it does not, grey where it is undecided."""
    from matplotlib.figure import Figure

    arms, orders = result["arms"], result["orders"]
    figure = Figure(figsize=(11, 1.6 + 0.35 * max(len(arms), len(orders))), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted(arms, key=lambda name: arms[name]["loss"], reverse=True)
    for place, name in enumerate(names):
        left.plot(arms[name]["seeds"], [place] * len(arms[name]["seeds"]), "o", color="C0", ms=4, alpha=0.6)
        left.plot(arms[name]["loss"], place, "|", color="C0", ms=16, mew=2)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("held-out loss, nats a token")
    right.axvline(0, color="0.6", lw=0.8)
    for place, each in enumerate(reversed(orders)):
        low, high = each["interval"]
        color = _COLORS.get(each["verdict"], "0.5")
        right.plot([low, high], [place, place], color=color, lw=2)
        right.plot(each["difference"], place, "o", color=color, ms=5)
    right.set_yticks(range(len(orders)), [each["order"] for each in reversed(orders)])
    right.set_xlabel(f"difference, nats a token, with {result['confidence']:.0%} intervals")
    for panel in (left, right):
        panel.margins(y=0.15)
        panel.tick_params(labelsize=8)
    figure.suptitle(f"{result['name']}: {result['verdict']}", fontsize=11)
    return figure
