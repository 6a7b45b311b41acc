"""The ranking half of `search`: every candidate is distilled a little, and the best one is kept.

Whatever is killed, the same command goes on: a candidate's result is written when it has reached a stop, and its
training resumes from its own checkpoints. Source: arXiv 2407.14679, section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minitron_mcore.checkpoint.folder import drop_every_iteration
from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.jobs.trials import Trial, Trials
from minitron_mcore.runtime.named_lines import named_lines
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.subsets import Subset, apart
from minitron_mcore.search.halving import Result, best_first, kept_of, loss_at, survivors
from minitron_mcore.stages import score
from minitron_mcore.stages.lane import Lane
from minitron_mcore.stages.winner import crown


def run(trials: Trials, runtime: Runtime) -> list[Result]:
    """Every candidate's result, the best one first; every rank calls, and gets all of them. With search.stop: of those
    that were to reach it, in their order."""
    scores = load_scores(score.run(trials.scoring, runtime))
    if trials.stop is not None:
        with apart(runtime, trials.side_by_side) as subset:
            lane = Lane(trials, scores, subset.runtime)
            mine = list(advanced(lane, trials.trials, trials.stop, subset))
            return [result for part in subset.gathered(mine) for result in part]
    with apart(runtime, trials.side_by_side) as subset:
        ranked = best_first(tried(trials, scores, subset))
    if ranked[0]["loss"] is not None:
        best = next(trial for trial in trials.trials if trial.name == ranked[0]["name"])
        crown(trials, best, ranked[0]["tokens"], runtime)
    return ranked


def tried(trials: Trials, scores: Scores, subset: Subset) -> list[Result]:
    """What becomes of every candidate, from rung to rung; every rank of every subset calls."""
    lane, search = Lane(trials, scores, subset.runtime), trials.recipe.search
    results: dict[str, Result] = {}
    alive, last = trials.trials, len(trials.stops)
    for rung, (_, tokens) in enumerate(trials.stops, start=1):
        goes_on = kept_of(len(alive), search.halving.keep) if rung < last else 0
        mine: list[Result] = []
        for result in advanced(lane, alive, rung, subset):
            mine.append(result)
            drop(trials, beyond(mine, search.keep_checkpoints, goes_on), subset)
        reached = {result["name"]: result for part in subset.gathered(mine) for result in part}
        results |= {trial.name: reached[trial.name] for trial in alive}
        # Of the same tokens, those that go on are the first ones.
        drop(trials, beyond([*results.values()], search.keep_checkpoints, goes_on), subset)
        kept = survivors({trial.name: loss_at(results[trial.name], tokens) for trial in alive}, search.halving.keep)
        alive = tuple(trial for trial in alive if trial.name in kept)
    return [*results.values()]


def advanced(lane: Lane, alive: Sequence[Trial], rung: int, subset: Subset) -> Iterator[Result]:
    """Those of `alive` that this subset takes, each brought to the stop `rung`; every rank of every subset calls."""
    (iteration, tokens), last = lane.trials.stops[rung - 1], len(lane.trials.stops)
    with subset.runtime.progress(len(alive), "candidates", f"search: stop {rung} of {last}") as bar:
        for number in subset.numbers(len(alive)):
            with named_lines(alive[number].name if subset.count > 1 else None):
                result = lane.train(alive[number], rung, iteration, tokens)
            subset.runtime.print(f"search: [{number + 1}/{len(alive)}] {in_words(result)}")
            bar.reach(number + 1)
            yield result


def beyond(results: Sequence[Result], stay: int | None, go_on: int) -> list[Result]:
    """Those of which it is clear that they are neither among the best, which `stay`, nor among those that `go_on`."""
    return [] if stay is None else best_first(results)[max(stay, go_on) :]


def drop(trials: Trials, results: Sequence[Result], subset: Subset) -> None:
    """Delete the checkpoints of candidates; every rank of the subset calls."""
    names = {result["name"] for result in results}

    def delete() -> None:
        for trial in trials.trials:
            if trial.name in names:
                drop_every_iteration(trial.distilled)

    subset.runtime.on_main(delete)


def in_words(result: Result) -> str:
    """A candidate's result in one line."""
    before, loss = (f"{loss:.4f}" if loss is not None else "none" for loss in (result["zero_shot"], result["loss"]))
    if result["diverged"]:
        return f"{result['name']}: diverged before {result['tokens']:,} tokens: {result['diverged']}"
    return f"{result['name']}: held-out loss {loss} after {result['tokens']:,} tokens, {before} before"
