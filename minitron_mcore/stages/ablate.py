"""`ablate`: a grid of importance settings; each prunes the teacher in memory and is evaluated, untrained.

output/ablation.csv                  a line for each student; the same command computes none of them again
output/parts/NUMBER-of-COUNT.csv     the same of ablate.share, and what was there before
output/ablation.png                  the same, as bars
output/scores-DIGEST.safetensors     one scoring pass for all settings (by a fingerprint of what was scored)
"""

from __future__ import annotations

from functools import partial

import torch

from minitron_mcore.checkpoint.store import as_chunks, load_model
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.evaluation.held_out import held_out, held_out_batches, mean_loss
from minitron_mcore.files import writing
from minitron_mcore.importance.magnitude import magnitude_scores
from minitron_mcore.importance.scores import Scores, load_scores, random_scores
from minitron_mcore.jobs.ablate import AblateJob, plan_of
from minitron_mcore.pruning.apply import prune_chunks
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.search.ablation import Row, Setting, squares, table, write_plot, write_rows
from minitron_mcore.stages import score


def run(job: AblateJob, runtime: Runtime) -> list[Row]:
    """Fill the table of `output`, print and plot it; every rank calls, and gets all rows."""
    recipe, architecture, path, called = job.recipe, job.model.architecture, job.target, f"output={job.target.parent}"
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    done = runtime.broadcast(dict(job.done))  # the first rank's: a later one may have looked at what that wrote since
    left = [setting for setting in job.grid if setting not in done]
    before = len(job.grid) - len(left)
    runtime.print(f"ablate: {len(job.grid)} students of {job.model.folder}, {before} done before -> {path}")
    scores = find_scores(job, runtime, left)
    chunks = as_chunks(load_model(job.model.place, architecture, recipe.parallel, recipe.precision))
    config = recipe.evaluate
    dataset = held_out(recipe.data, job.model.tokenizer, config.samples, seed=recipe.seed)
    size, parallel = config.micro_batch_size, recipe.parallel
    # Read once for all students.
    groups = list(held_out_batches(dataset, config.samples, micro_batch_size=size, parallel=parallel))

    def loss_of(model: list[torch.nn.Module]) -> dict[str, float]:
        return mean_loss(model, groups, Objective(LossSettings(architecture.vocab_size)))

    whole = loss_of(chunks)["lm loss"]
    runtime.print(f"ablate: the teacher's lm loss is {whole:.4f}")
    with runtime.progress(len(left), "students", "ablate") as bar:
        for number, setting in enumerate(bar.over(left), start=1):
            plan = plan_of(recipe, setting, scores[setting.method, setting.seed], job.shapes[setting.shape])
            student = as_chunks(prune_chunks(chunks, plan))
            found = loss_of(student)
            done[setting] = Row(setting, found["lm loss"], found["ppl"], plan.student.num_parameters)
            del student
            runtime.on_main(writing(called)(partial(write_rows, list(done.values()), path, job.made_with)))
            runtime.print(f"ablate: [{number}/{len(left)}] {found['lm loss']:.4f}  {setting.label}")
    runtime.on_main(writing(called)(partial(write_rows, list(done.values()), path, job.made_with)))  # of shares, too
    if job.is_share:
        return [done[setting] for setting in job.grid]
    # Rows of earlier, larger grids stay in the file; shown are those of this one.
    rows = [done[setting] for setting in job.grid]
    picture = path.with_suffix(".png")
    runtime.on_main(writing(called)(partial(write_plot, rows, whole, picture)))
    runtime.print("\n\n".join(["", table(rows, whole), *squares(rows), f"ablate: -> {path}, {picture}"]))
    return rows


def find_scores(job: AblateJob, runtime: Runtime, left: list[Setting]) -> dict[tuple[str, str], Scores]:
    """(method, seed) -> its scores, for every row that is left; activations in one pass. Every rank calls."""
    found: dict[tuple[str, str], Scores] = {}
    for method, seed in dict.fromkeys((row.method, row.seed) for row in left):
        if method == "random":
            found[method, seed] = random_scores(job.model.architecture, int(seed))
        elif method == "magnitude":
            found[method, seed] = magnitude_scores(*job.model.place, job.model.architecture)
        else:
            assert job.scoring is not None
            found[method, seed] = load_scores(score.run(job.scoring, runtime))
    return found
