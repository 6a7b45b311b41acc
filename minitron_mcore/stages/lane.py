"""How a candidate of a search is tried: cut out of the teacher in memory, evaluated, distilled, evaluated again."""

from __future__ import annotations

import gc
from functools import partial

import torch

from minitron_mcore.checkpoint.companions import carry_companions
from minitron_mcore.checkpoint.store import as_chunks
from minitron_mcore.distillation.cache.teacher import CachedTeacher
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.errors import DivergedError
from minitron_mcore.estimate.forecast import explaining_memory
from minitron_mcore.evaluation.held_out import held_out, held_out_batches, mean_loss
from minitron_mcore.files import writing
from minitron_mcore.importance.scores import Scores
from minitron_mcore.jobs.plan import plan_at
from minitron_mcore.jobs.trials import Trial, Trials
from minitron_mcore.model.fp8 import passes_of
from minitron_mcore.model.gpt import LanguageModel, build_model
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.pruning.apply import load_pruned
from minitron_mcore.pruning.plan_file import PruningPlan, save_plan
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.interrupt import made_progress, name_of, stopped_code
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.search.halving import Result, finite, read_result, write_result
from minitron_mcore.stages.distill import distil, find_teacher
from minitron_mcore.stages.prune import lineage
from minitron_mcore.stages.train import prepare
from minitron_mcore.training.budget import Timetable
from minitron_mcore.training.metrics_file import logged


class Lane:
    """The ranks that try one candidate after another, with the teacher and the held-out text that all of them share."""

    def __init__(self, trials: Trials, scores: Scores, runtime: Runtime) -> None:
        self.trials, self.scores, self.runtime = trials, scores, runtime
        self._teacher: Teacher | CachedTeacher | None = None
        self._held_out: list[list[Microbatch]] = []

    def train(self, trial: Trial, rung: int, iteration: int, tokens: int) -> Result:
        """`trial`, up to the stop after `iteration`; as it is where it has been there. Every rank calls."""
        runtime, recipe = self.runtime, trial.recipe
        result = runtime.on_main(partial(read_result, trial.result))
        if result and (result["diverged"] or result["tokens"] >= tokens):
            return result
        plan = plan_at(recipe, self.scores, recipe.student, recipe.prune)
        origin = lineage(recipe, self.trials.teacher, plan)
        job = all_or_none(lambda: self.trials.training(trial, lineage=origin))
        data, memory = prepare(job, runtime)
        with explaining_memory(memory, "while loading"):
            # The teacher, whatever layout and placement it has, is loaded once for all.
            self._teacher = self._teacher or find_teacher(job, runtime, data)
            chunks = build_model(job.architecture, recipe.parallel, recipe.precision, **passes_of(job.config))
            if result is None or not job.resumes:
                load_pruned(self.trials.teacher.place, plan, as_chunks(chunks))
        if result is None:
            result = self._begun(trial, plan, self.loss(chunks))
        try:
            distil(job, runtime, chunks, self._teacher, data, memory, until=iteration)
            loss = self.loss(chunks)
        except DivergedError as error:
            loss, result["diverged"] = None, str(error)
        result |= {"loss": loss, "curve": [*result["curve"], [tokens, loss]], "tokens": tokens, "rung": rung}
        result["validation"] = runtime.on_main(partial(validations, trial, job.timetable))
        runtime.on_main(partial(self._write, result, trial))
        made_progress()
        del chunks
        gc.collect()
        torch.cuda.empty_cache()
        if runtime.stop_signal:
            runtime.print(f"{name_of(runtime.stop_signal)}: {trial.name} is done; the same command goes on after it")
            raise SystemExit(stopped_code(runtime.stop_signal))
        return result

    def _begun(self, trial: Trial, plan: PruningPlan, loss: float | None) -> Result:
        """The result of a candidate before its training, written with all that lies beside its weights."""

        def begin() -> None:
            with writing(f"output={trial.folder}"):
                carry_companions(self.trials.teacher.folder, trial.folder)
                save_plan(plan, trial.plan)

        self.runtime.on_main(begin)
        result = {"name": trial.name, "parameters": trial.architecture.num_parameters, "zero_shot": loss, "loss": loss}
        result |= {"curve": [[0, loss]], "validation": [], "tokens": 0, "rung": 0, "diverged": None}
        result["made_with"] = self.trials.made_with
        self.runtime.on_main(partial(self._write, result, trial))
        return result

    def _write(self, result: Result, trial: Trial) -> None:
        with writing(f"output={trial.folder}"):
            write_result(result, trial.result)

    def loss(self, chunks: list[LanguageModel]) -> float | None:
        """Held-out LM loss, in nats a token, on text that is read once for all; None where it is NaN or infinite. Every
        rank calls."""
        recipe, config, teacher = self.trials.recipe, self.trials.recipe.evaluate, self.trials.teacher
        if not self._held_out:
            dataset = held_out(recipe.data, teacher.tokenizer, config.samples, seed=recipe.seed)
            size, parallel = config.micro_batch_size, recipe.parallel
            self._held_out = [*held_out_batches(dataset, config.samples, micro_batch_size=size, parallel=parallel)]
        objective = Objective(LossSettings(teacher.architecture.vocab_size))
        return finite(mean_loss(as_chunks(chunks), self._held_out, objective)["lm loss"])


def validations(trial: Trial, timetable: Timetable) -> list[list[float | None]]:
    """[tokens, LM loss] of the validations of its training. One rank calls."""
    file, name = trial.distilled / "metrics.jsonl", "lm loss validation"
    rows = logged(file) if file.is_file() else ()
    return [[timetable.at(at).tokens_before, finite(row[name])] for at, _, row in rows if name in row]
