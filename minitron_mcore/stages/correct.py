"""`correct`: fine-tune the teacher on the distillation's own data before it teaches (arXiv 2408.11796, section 4).

A teacher guides a student worse on data that it was not trained on; the correction lowers the student's loss by more
than 6% there. To correct it while the student is distilled, in one job, see `distill.correct_teacher`.
"""

from minitron_mcore.stages.train import run

__all__ = ["run"]
