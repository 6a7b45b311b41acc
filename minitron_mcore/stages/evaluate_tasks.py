"""The part of `evaluate` that runs the LM Evaluation Harness's tasks: the first rank talks to it, all ranks compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.checkpoint.companions import end_tokens, tokenizer_class
from minitron_mcore.evaluation.harness.answers import answers_file
from minitron_mcore.evaluation.harness.local_tasks import documents_of_files, documents_of_tokens, task_config
from minitron_mcore.evaluation.harness.papers import published
from minitron_mcore.evaluation.harness.requests import Server
from minitron_mcore.evaluation.harness.scores import Score, differences, in_words, scores_of
from minitron_mcore.jobs.compared import titled
from minitron_mcore.jobs.evaluate import Evaluated, EvaluateJob
from minitron_mcore.runtime.agree import led
from minitron_mcore.runtime.start import Runtime

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass
class TaskRun:
    """`job.tasks` loaded, for one model after another. Every rank makes one and calls its methods; what the harness
    has is on the first rank alone."""

    job: EvaluateJob
    runtime: Runtime
    loaded: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)  # by model, task and metric

    def __post_init__(self) -> None:
        self.runtime.on_main(self._load)

    def _load(self) -> None:
        from minitron_mcore.evaluation.harness.loading import load_tasks

        job, config, seed = self.job, self.job.recipe.evaluate, self.job.recipe.seed
        local: dict[str, Any] = {}
        if names := [each.name for each in job.tasks if each.is_local]:
            if config.text is not None:
                documents = documents_of_files(config.text, seed)
            else:
                tokenizer = job.models[0].tokenizer
                assert job.part is not None and tokenizer is not None
                documents = documents_of_tokens(job.part, tokenizer, seed)
            local = {name: task_config(name, documents, seed) for name in names}
        self.loaded |= load_tasks(job.tasks, config.task_folder, local)

    def in_place(self, each: Evaluated, chunks: Any) -> dict[str, Any]:
        """The scores of a model that lies over the ranks, as plain data. Every rank calls."""
        architecture, tokenizer, folder = each.architecture, each.tokenizer, each.compared.folder
        assert architecture is not None and tokenizer is not None
        server, recipe = Server(chunks, architecture, tokenizer), self.job.recipe
        title = titled("evaluate", each.name, self.job.models)

        def work(ask: Callable[[Any], Any]) -> dict[str, Any]:
            from minitron_mcore.evaluation.harness.running import sharded_model

            model = sharded_model(
                server,
                ask,
                family=architecture.family,
                classes=tokenizer_class(folder),
                end_tokens=end_tokens(folder, tokenizer.eod),
                tokens_at_once=recipe.evaluate.micro_batch_size * recipe.data.sequence_length,
                bars=lambda total, unit: self.runtime.progress(total, unit, title),
            )
            return self._run(each, model, "minitron_mcore")

        return led(work, server)

    def through_transformers(self, each: Evaluated, whole: Any) -> dict[str, Any]:
        """The same of a Hugging Face folder, whose model is `whole` on the first rank. Every rank calls."""

        def work() -> dict[str, Any]:
            from minitron_mcore.evaluation.harness.running import hugging_face_model

            size = self.job.recipe.evaluate.micro_batch_size
            return self._run(each, hugging_face_model(whole, each.compared.folder, size), "hf")

        return self.runtime.on_main(work)

    def differences(self) -> dict[str, Any]:
        """Of every model but the first, by name: its `tasks`' differences to the first. Every rank calls."""

        def work() -> dict[str, Any]:
            first, *others = self.scores
            return {name: {"tasks": differences(self.scores[name], self.scores[first])} for name in others}

        return self.runtime.on_main(work)

    def _run(self, each: Evaluated, model: LM, kind: str) -> dict[str, Any]:
        """What the harness finds; its own results go to files. The first rank calls."""
        from minitron_mcore.evaluation.harness.running import run_tasks, write_details

        job, folder = self.job, each.compared.folder
        iteration = each.compared.model.iteration if each.compared.model else None
        fingerprint = each.tokenizer.fingerprint if each.tokenizer else None
        answers = answers_file(job.answers, each.name, folder, iteration, fingerprint, job.recipe.precision)
        named = {"model": kind, "model_args": {"pretrained": str(folder)}}
        results = run_tasks(model, self.loaded, answers, limit=job.recipe.evaluate.limit, named=named)
        write_details(Path(job.details, each.name), results)
        self.scores[each.name] = scores_of(results)
        return in_words(self.scores[each.name], published(each.architecture))
