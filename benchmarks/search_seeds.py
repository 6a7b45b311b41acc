"""What a search is worth: its ranks before and after training over several seeds, and what halving would have kept.

    for seed in 1234 4321; do
        torchrun --nproc-per-node 2 -m minitron_mcore search --config configs/search-quickstart.yaml \
            search.side_by_side=2 seed=$seed output=runs/search-$seed
    done
    python benchmarks/search_seeds.py runs/search-1234 runs/search-4321

Each folder is a finished search of the same candidates, without halving, by another seed (other calibration samples,
another order of the text). Ends with one JSON line.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from minitron_mcore.search.halving import Result, best_first, read_result
from minitron_mcore.search.ranking import halved, mean_ranks, spearman
from minitron_mcore.tables import table

KEEP = 0.5


def results_of(folder: Path) -> dict[str, Result]:
    """Name -> result of every candidate of the search in `folder`."""
    files = sorted((folder / "candidates").glob("*/result.json"))
    found = {result["name"]: result for file in files if (result := read_result(file))}
    if not found:
        raise SystemExit(f"{folder} holds no results of candidates: run the search first")
    return found


def seed_noise(seeds: list[dict[str, Result]], names: list[str], key: str) -> float:
    """Standard deviation of a candidate's loss over seeds, what a seed does to all of them alike taken out."""
    means = [statistics.mean(seed[name][key] for name in names) for seed in seeds]
    left = [[seed[name][key] - mean for seed, mean in zip(seeds, means, strict=True)] for name in names]
    return statistics.mean(statistics.variance(values) for values in left) ** 0.5


def halvings(seeds: list[dict[str, Result]]) -> list[dict[str, Any]]:
    """What halving at every one, and every two, of the points of the curves would have done, over the seeds."""
    points = sorted({int(at) for at, _ in next(iter(seeds[0].values()))["validation"]})[:-1]
    found = []
    for rungs in [*itertools.combinations(points, 1), *itertools.combinations(points[::2], 2)]:
        tried = [halved([*seed.values()], rungs, KEEP) for seed in seeds]
        losses = [(seed[each.winner]["loss"], seed[each.best]["loss"]) for seed, each in zip(seeds, tried, strict=True)]
        found.append(
            {
                "rungs": list(rungs),
                "keeps the winner": sum(each.keeps_the_best for each in tried),
                "of": len(tried),
                "loss above the best": max(mine - best for mine, best in losses),
                "tokens": tried[0].tokens / tried[0].full_tokens,
            }
        )
    return found


def main(folders: list[str]) -> None:
    seeds = [results_of(Path(folder)) for folder in folders]
    names = [result["name"] for result in best_first([*seeds[0].values()])]
    if any({*seed} != {*names} for seed in seeds):
        raise SystemExit("the folders hold searches of different candidates")
    print(f"{len(names)} candidates, {seeds[0][names[0]]['tokens']:,} tokens each; held-out LM loss, nats a token\n")
    columns: list[tuple[str, list[Any]]] = []
    for number, seed in enumerate(seeds, start=1):
        for key, word in (("zero_shot", "untrained"), ("loss", "distilled")):
            losses = [seed[name][key] for name in names]
            columns += [(f"{word} {number}", [f"{loss:.4f}" for loss in losses]), ("rank", mean_ranks(losses))]
    rows = [
        (
            name,
            f"{seeds[0][name]['parameters']:,}",
            *(f"{values[place]:g}" if head == "rank" else values[place] for head, values in columns),
        )
        for place, name in enumerate(names)
    ]
    print(table(rows, ("candidate", "parameters", *(head for head, _ in columns))))

    def correlation(first: dict[str, Result], key: str, second: dict[str, Result], other: str) -> float | None:
        return spearman([first[name][key] for name in names], [second[name][other] for name in names])

    summary: dict[str, Any] = {
        "candidates": len(names),
        "seeds": len(seeds),
        "zero-shot and final": [correlation(seed, "zero_shot", seed, "loss") for seed in seeds],
        "final over seeds": correlation(seeds[0], "loss", seeds[-1], "loss") if len(seeds) > 1 else None,
        "winners": [best_first([*seed.values()])[0]["name"] for seed in seeds],
        "first before training": [min(names, key=lambda name: seed[name]["zero_shot"]) for seed in seeds],
        "median minus winner": [
            statistics.median(seed[name]["loss"] for name in names) - min(seed[name]["loss"] for name in names)
            for seed in seeds
        ],
    }
    if len(seeds) > 1:
        noise = seed_noise(seeds, names, "loss")
        gain = min(summary["median minus winner"])
        summary |= {"seed noise": noise, "winner beats the median by more": gain > noise}
        says = "by more than the seeds differ" if gain > noise else "by no more than the seeds differ"
        print(f"\nthe winner beats the median candidate by {gain:.4f}, {says} ({noise:.4f}, one standard deviation)")
    print(f"\nhalving, keep={KEEP}, on the trainings' own validations:")
    tried = halvings(seeds)
    cells = [
        (
            ", ".join(f"{rung:,}" for rung in each["rungs"]),
            f"{each['keeps the winner']} of {each['of']}",
            f"{each['loss above the best']:.4f}",
            f"{each['tokens']:.0%}",
        )
        for each in tried
    ]
    print(table(cells, ("rungs (tokens)", "keeps the winner", "loss above the best, at most", "tokens spent")))
    print(json.dumps({**summary, "halving": tried}))


if __name__ == "__main__":
    main(sys.argv[1:])
