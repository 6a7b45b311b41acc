"""What became of a claim: its arms' losses, their differences with intervals, and the verdict, in words. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.reproduction import statistics
from minitron_mcore.reproduction.config import ReproduceConfig, parse_orders
from minitron_mcore.reproduction.measured import Measured
from minitron_mcore.tables import counted, markdown, table

Result = dict[str, Any]


def result_of(name: str, config: ReproduceConfig, found: Mapping[str, Sequence[Measured]]) -> Result:
    """found: by arm, what each of `config.seeds` measured, all on the same documents."""
    tokens = numpy.array(next(iter(found.values()))[0].tokens, float)
    nats = {arm: numpy.array([each.nats for each in those]) for arm, those in found.items()}
    orders: list[Result] = []
    for order in parse_orders(config.orders, [*config.arms]):
        apart = statistics.difference(nats[order.left], nats[order.right], tokens, config.confidence)
        left, right = config.arms[order.left].paper, config.arms[order.right].paper
        orders.append(
            {
                "order": str(order),
                "difference": apart.mean,
                "interval": [apart.low, apart.high],
                "seeds": list(apart.seed_means),
                "paper": None if left is None or right is None else round(left - right, 6),
                "verdict": statistics.verdict(order.relation, apart, config.margin),
            }
        )
    arms = {
        arm: {
            "loss": float(statistics.losses(nats[arm], tokens).mean()),
            "seeds": statistics.losses(nats[arm], tokens).tolist(),
            "paper": config.arms[arm].paper,
            "model": config.arms[arm].model,
            "keys": config.arms[arm].keys,
        }
        for arm in config.arms
    }
    return {
        "name": name,
        "claim": config.claim,
        "source": config.source,
        "verdict": statistics.together([each["verdict"] for each in orders]),
        "seeds": config.seeds,
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
        "confidence": config.confidence,
        "margin": config.margin,
        "arms": arms,
        "orders": orders,
    }


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _arm_rows(result: Result) -> list[list[str]]:
    """The lowest loss first."""
    return [
        [name, "-" if arm["paper"] is None else f"{arm['paper']:g}", f"{arm['loss']:.4f}"]
        + [f"{loss:.4f}" for loss in arm["seeds"]]
        for name, arm in sorted(result["arms"].items(), key=lambda pair: pair[1]["loss"])
    ]


def _order_rows(result: Result) -> list[list[str]]:
    return [
        [
            each["order"],
            _difference(each["paper"]),
            _difference(each["difference"]),
            f"{each['interval'][0]:+.4f} to {each['interval'][1]:+.4f}",
            each["verdict"],
        ]
        for each in result["orders"]
    ]


def _headers(result: Result) -> tuple[list[str], list[str]]:
    seeds = [f"seed {seed}" for seed in result["seeds"]]
    interval = f"{result['confidence']:.0%} interval"
    return ["arm", "paper", "loss", *seeds], ["order", "paper", "difference", interval, "verdict"]


def measured_on(result: Result) -> str:
    seeds = counted(len(result["seeds"]), "seed")
    return f"{counted(result['documents'], 'document')}, {result['tokens']:,} tokens, {seeds}"


def in_words(result: Result) -> str:
    """Both tables, for the console."""
    arms, orders = _headers(result)
    lines = [
        f"{result['name']}: {result['claim'] or 'no claim in words'} ({result['source'] or 'no source'})",
        f"held-out loss, nats a token, on {measured_on(result)}",
        "",
        table(_arm_rows(result), arms),
        "",
        table(_order_rows(result), orders, left=(0, 4)),
        "",
        f"{result['name']}: {result['verdict']}",
    ]
    return "\n".join(lines)


def read_results(files: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """(the results that can be read and shown, the files that cannot)."""
    results: list[Result] = []
    damaged: list[str] = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            page([found])
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged.append(str(file))
        else:
            results.append(found)
    return results, damaged


def page(results: Sequence[Result]) -> str:
    """Every claim in Markdown: the verdicts, then each with its tables."""
    rows = [[each["name"], each["claim"] or "", each["source"] or "", f"**{each['verdict']}**"] for each in results]
    parts = ["# Reproduced claims", markdown(rows, ["name", "claim", "source", "verdict"])]
    for each in results:
        arms, orders = _headers(each)
        parts += [
            f"## {each['name']}: {each['verdict']}",
            f"{each['claim'] or ''} ({each['source'] or ''}). Held-out loss, nats a token, on {measured_on(each)}; of "
            f"`a = b` the margin is {each['margin']:g}.",
            markdown(_arm_rows(each), arms),
            markdown(_order_rows(each), orders),
        ]
    return "\n\n".join(parts) + "\n"
