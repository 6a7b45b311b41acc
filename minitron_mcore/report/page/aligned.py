"""The section on the rounds of an alignment: from what, by which loss, for how long, and what came of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minitron_mcore.report.figures.curves import Line, against_tokens
from minitron_mcore.report.gather.report import Report
from minitron_mcore.report.gather.rounds import Round
from minitron_mcore.report.page.parts import NONE, Drawn, Part, Section, Table, decimals, whole

# Title -> (axis, names in metrics.jsonl: what a line is called beside its round's name). The second of two sides is
# dashed.
CURVES: dict[str, tuple[str, dict[str, str]]] = {
    "Loss": ("loss that is trained", {"loss": ""}),
    "Rewards of both answers": ("reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    "Margins of the rewards": ("chosen less rejected", {"rewards/margins": ""}),
    "Share of pairs whose chosen answer has the larger reward": ("share of pairs", {"rewards/accuracies": ""}),
    "Log-probabilities of both answers": ("nats an answer", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    "Mean lengths of what is learnt": (
        "tokens",
        {"mean length": "answers", "mean length chosen": "chosen", "mean length rejected": "rejected"},
    ),
}
# Names in the table of held-out values, in this order; what else is logged follows.
FIRST = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
TWICE = "lm loss"  # with sft the same as `loss`
# Of one set of samples they are the same at every validation.
UNCHANGED = ("mean length", "share of counted tokens")


def alignment(report: Report) -> Section | None:
    """The rounds in the order that they follow one another in."""
    if not report.rounds:
        return None
    parts: list[Part] = [*tables(report), *_drawn(report)]
    return Section("alignment", "Alignment", parts)


def tables(report: Report) -> list[Table]:
    """Of the rounds what the terminal shows too; none of what is no alignment."""
    if not report.rounds:
        return []
    return [_rounds(report), *_data(report), *_held_out(report)]


def _rounds(report: Report) -> Table:
    rows = [
        (
            each.label,
            each.load or NONE,
            each.method,
            ", ".join(f"{name} {_shown(value)}" for name, value in each.settings.items()),
            each.budget,
            f"{each.training.done:,}" + (f" of {each.training.iterations:,}" if each.training.is_cut_off else ""),
            whole(each.training.tokens),
        )
        for each in report.rounds
    ]
    head = ("round", "starts from", "method", "with", "budget", "iterations", "tokens")
    return Table("The rounds of alignment, in order", head, tuple(rows), (1, 2, 3, 4))


def _shown(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data(report: Report) -> Iterator[Table]:
    rows = []
    for each in report.rounds:
        for name, counts in each.samples.items():
            title = each.label if name == "train" else f"{each.label}, held out"
            share = counts.get("learnt", 0) / counts["tokens"] if counts.get("tokens") else None
            rows.append(
                (
                    title,
                    "preferences" if each.pairs else "chats",
                    *(whole(counts.get(count)) for count in ("read", "kept", "cut", "too_long", "skipped", "tokens")),
                    f"{share:.1%}" if share is not None else NONE,
                    _files(each.files.get(name, ())),
                )
            )
    head = ("round", "samples", "records", "kept", "cut", "too long", "skipped", "tokens", "counted", "files")
    if rows:
        yield Table("What each round learnt from", head, tuple(rows), (1, 9))


def _files(paths: Sequence[str]) -> str:
    """Their names; of many the first."""
    names = [path.rpartition("/")[2] for path in paths]
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _held_out(report: Report) -> Iterator[Table]:
    """The first and the last value of each name, of each round."""
    rows = []
    for each in report.rounds:
        for name, curve in _ordered(each).items():
            (_, first), (_, last) = curve[0], curve[-1]
            change = f"{last - first:+,.4f}" if len(curve) > 1 else ""
            rows.append((each.label, name, decimals(first, 4), decimals(last, 4), change))
    head = ("round", "name", "first", "last", "change")
    if rows:
        yield Table("Held-out samples: the first validation of each round, and the last", head, tuple(rows), (1,))


def _ordered(each: Round) -> Mapping[str, Any]:
    found = {name: curve for name, curve in each.ends() if not name.startswith(UNCHANGED)}
    names = [*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST)]
    return {name: found[name] for name in names if name != TWICE or "loss" not in found}


def _drawn(report: Report) -> Iterator[Drawn]:
    for title, (ylabel, names) in CURVES.items():
        lines = [line for each in report.rounds for line in _lines(each, names, report.shades[each.label])]
        if not lines:
            continue
        svg = against_tokens(f"align-{title.split()[0].lower()}-{len(title)}", title, lines, ylabel)
        dots = "; dots are validations on held-out samples" if any(line.dots for line in lines) else ""
        yield Drawn(svg, f"{title}, of each round over its own tokens{dots}")


def _lines(each: Round, names: Mapping[str, str], shade: int) -> Iterator[Line]:
    for name, side in names.items():
        points, dots = each.training.curves.get(name, ()), each.training.validation.get(name, ())
        if len(points) > 1:
            yield Line(" ".join(filter(None, (each.label, side))), shade, points, dots, is_dashed=side == "rejected")
