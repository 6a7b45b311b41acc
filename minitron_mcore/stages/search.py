"""Verb `search`: the candidates of a grid, listed, and ranked by what becomes of them when they are distilled a little.

output/candidates.json     the teacher, the budgets, and every candidate: its shape, what it costs, how it fared
output/candidates.csv      the candidates alone, without curves
output/search.png          losses against parameters, or what the budget is on, with the Pareto front
output/curves.png          losses against tokens
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.errors import DivergedError
from minitron_mcore.files import write_whole, writing
from minitron_mcore.jobs.search import CSV, CURVES, JSON, PLOT, SearchJob
from minitron_mcore.jobs.trials import CANDIDATES
from minitron_mcore.search.candidates import table, to_csv
from minitron_mcore.search.figures import write_costs, write_curves
from minitron_mcore.search.halving import RESULT, Result, read_result
from minitron_mcore.search.ranking import Ranking, ranked, summary
from minitron_mcore.search.ranking import table as ranking_table
from minitron_mcore.tables import counted

if TYPE_CHECKING:
    from minitron_mcore.runtime.start import Runtime


def run(job: SearchJob, runtime: Runtime | None) -> dict[str, Any]:
    """List the candidates, and rank them where the recipe says so; every rank calls, of a list the first process alone.

    Returns the name of the best candidate, None where none was ranked, and Spearman's correlation of the ranks. Raises
    DivergedError, when all is written, where no candidate could be trained to its end.
    """
    if runtime is None:
        list_candidates(job)
        print(f"search: -> {write(job, results_there(job))[1]}", flush=True)
        return {"winner": None, "correlation": None}
    # Only here: a list needs no torch.
    from minitron_mcore.stages import trials

    assert job.trials is not None
    if job.trials.stop is not None:  # others are at work on the rest
        reached = trials.run(job.trials, runtime)
        runtime.print(f"search: {counted(len(reached), 'candidate')} at stop {job.trials.stop} -> {job.target}")
        return {"winner": None, "correlation": None}

    def begin() -> None:
        list_candidates(job)
        write(job, results_there(job))

    runtime.on_main(begin)
    results = trials.run(job.trials, runtime)
    ranking, files = runtime.on_main(lambda: write(job, results))
    runtime.print(f"\n{ranking_table(ranking)}\n\nsearch: {summary(ranking)}\nsearch: -> {files}")
    if results[0]["loss"] is None:
        raise DivergedError(
            f"every candidate diverged, as {results[0]['name']}: {results[0]['diverged']}; lower distill.lr, and name "
            "another folder as output"
        )
    return {"winner": results[0]["name"], "correlation": ranking.correlation}


def list_candidates(job: SearchJob) -> None:
    """What the grid holds, on the console. One process calls."""
    print(f"search: {job.where}: {job.space.summary}")
    for reason, count in job.space.dropped.items():
        print(f"search: {count:,} left out: {reason}")
    print(f"\n{table(job.candidates, [*job.recipe.search.budget.given()])}\n", flush=True)


def results_there(job: SearchJob) -> list[Result]:
    """Those of an earlier search in the same folder, which a new list is not to lose."""
    files = [job.target / CANDIDATES / each.name / RESULT for each in job.candidates]
    return [result for file in files if (result := read_result(file)) is not None]


def write(job: SearchJob, results: Sequence[Result]) -> tuple[Ranking, str]:
    """Write the files; (the ranking, their names). One process calls."""
    ranking = ranked(job.candidates, results, [*job.recipe.search.budget.given()])
    tried = {each.candidate.name for each in ranking.rows}
    rows = [each.row for each in ranking.rows] + [each.row for each in job.candidates if each.name not in tried]
    names, target = [CSV], job.target
    with writing(f"output={target}"):
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / CSV, to_csv(rows))
        write_whole(target / JSON, json.dumps(described(job, ranking, rows), indent=2) + "\n")
        if any(each.result["loss"] is not None for each in ranking.rows):
            plot(ranking, target)
            names += [PLOT, CURVES]
    return ranking, ", ".join([str(target / JSON), *names])


def plot(ranking: Ranking, folder: Path) -> None:
    write_costs(ranking, folder / PLOT)
    write_curves(ranking, folder / CURVES)


def described(job: SearchJob, ranking: Ranking, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What candidates.json holds."""
    space, search = job.space, job.recipe.search
    curves = {each.candidate.name: each.curves for each in ranking.rows}
    return {
        "teacher": job.teacher.to_dict(),
        "budgets": {"tolerance": search.budget.tolerance, **search.budget.given()},
        "combinations": space.combinations,
        "shapes": space.shapes,
        "left_out": space.dropped,
        "correlation": ranking.correlation,
        "candidates": [row | curves.get(row["name"], {}) for row in rows],
    }
