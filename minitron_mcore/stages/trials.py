"""The ranking half of `search`: every candidate is distilled a little, and the best one is kept.

Whatever is killed, the same command goes on: a candidate's result is written when it has reached a stop, and its
training resumes from its own checkpoints. Source: arXiv 2407.14679, section 2.3.
"""

from __future__ import annotations

from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.jobs.trials import Trials
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.subsets import Subset, apart
from minitron_mcore.search.halving import Result, best_first, loss_at, survivors
from minitron_mcore.stages import score
from minitron_mcore.stages.bench import Bench
from minitron_mcore.stages.winner import crown


def run(trials: Trials, runtime: Runtime) -> list[Result]:
    """Every candidate's result, the best one first; every rank calls, and gets all of them."""
    scores = load_scores(score.run(trials.scoring, runtime))
    with apart(runtime, trials.side_by_side) as subset:
        ranked = best_first(tried(trials, scores, subset))
    if ranked[0]["loss"] is not None:
        best = next(trial for trial in trials.trials if trial.name == ranked[0]["name"])
        crown(trials, best, ranked[0]["tokens"], runtime)
    return ranked


def tried(trials: Trials, scores: Scores, subset: Subset) -> list[Result]:
    """What becomes of every candidate, from rung to rung; every rank of every subset calls."""
    bench = Bench(trials, scores, subset.runtime)
    results: dict[str, Result] = {}
    alive, keep = trials.trials, trials.recipe.search.halving.keep
    for rung, (iteration, tokens) in enumerate(trials.stops, start=1):
        mine = []
        for number in subset.numbers(len(alive)):
            mine.append(bench.train(alive[number], rung, iteration, tokens))
            subset.runtime.print(f"search: [{number + 1}/{len(alive)}] {in_words(mine[-1])}")
        reached = {result["name"]: result for part in subset.gathered(mine) for result in part}
        results |= {trial.name: reached[trial.name] for trial in alive}
        kept = survivors({trial.name: loss_at(results[trial.name], tokens) for trial in alive}, keep)
        alive = tuple(trial for trial in alive if trial.name in kept)
    return [*results.values()]


def in_words(result: Result) -> str:
    """A candidate's result in one line."""
    before, loss = (f"{loss:.4f}" if loss is not None else "none" for loss in (result["zero_shot"], result["loss"]))
    if result["diverged"]:
        return f"{result['name']}: diverged before {result['tokens']:,} tokens: {result['diverged']}"
    return f"{result['name']}: held-out loss {loss} after {result['tokens']:,} tokens, {before} before"
