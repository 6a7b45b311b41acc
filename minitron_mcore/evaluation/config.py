"""Recipe section `evaluate`."""

from typing import Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import PathName, Sources, key, refuse_idle, section


@section
class EvaluateConfig:
    """Held-out LM loss, and tasks of the LM Evaluation Harness."""

    samples: int = key(64, "sequences of the validation set", at_least=1)
    micro_batch_size: int = key(
        1,
        "sequences at a time; of a task's rows as many as fill so many sequences of data.sequence_length",
        at_least=1,
        may_change=True,
    )
    tasks: list[str] = key(
        [],
        "tasks of the LM Evaluation Harness, each as NAME or NAME:SHOTS; minitron: the papers' tasks and shots; "
        "minitron_continuation and minitron_perplexity: made from held-out text, without a network",
        distinct=True,
    )
    task_folder: Optional[PathName] = key(None, "folder of further tasks, in the harness's YAML")
    shots: Optional[int] = key(
        None, "examples before a question, for tasks named without a number; null: the task's own", at_least=0
    )
    limit: Optional[float] = key(
        None, "documents of each task, below 1 the share of them; null: all. For a trial: scores mean little", above=0
    )
    text: Sources = key(
        None, "text that minitron_continuation and minitron_perplexity are made from; null: the held-out documents"
    )
    answers: Optional[PathName] = key(
        None,
        "folder that keeps the models' answers, so that the same command goes on where it was cut off; null: `answers` "
        "in the folder of the harness's results",
        may_change=True,
    )

    def __post_init__(self) -> None:
        if not self.tasks:
            names = ("task_folder", "shots", "limit", "text", "answers")
            refuse_idle(self, dict.fromkeys(names, "without evaluate.tasks"), "name tasks, or leave it out")
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            raise InputError("limit", self.limit, "is neither a whole number nor below 1", "write one of them")
