"""The whole road in memory, from Python: in a notebook or a script, alone or under torchrun.

    import minitron_mcore.api as minitron

    teacher = minitron.import_hf("tiny-llama/", "teacher/")
    scores = minitron.score(teacher, batches, aggregation="l2/mean")
    plan = minitron.plan(scores, ffn_hidden_size=320, num_layers=8)
    pruned = minitron.prune(teacher, plan)
    student = minitron.distill(pruned, teacher, batches, lr=1e-3)
    minitron.evaluate(student, batches, teacher)
    minitron.export(student, "student-hf/")

`batches` is a sequence of int64 tensors [b, s] of token ids, on any device: all of one s, the last of at most the
others' b. Under a launcher every rank calls every function with its own data-parallel rank's batches, equally many on
each; `start` sets the model's layout. Every function raises `minitron_mcore.errors.InputError` for wrong input, in one
sentence. Worked examples: docs/api.md. The verbs themselves, on files and recipes: `minitron_mcore.commands`.
"""

from minitron_mcore.runtime.libraries import quiet_libraries

quiet_libraries()  # Megatron warns while it is imported

from minitron_mcore.importance.hooks import Measure
from minitron_mcore.importance.scores import load_scores, save_scores
from minitron_mcore.in_memory.models import Model, build, export, import_hf, load, save
from minitron_mcore.in_memory.process import start
from minitron_mcore.in_memory.pruning import measure, plan, prune, score
from minitron_mcore.in_memory.training import distill, evaluate, lm_loss, train
from minitron_mcore.pruning.plan_file import load_plan, save_plan

__all__ = ["Measure", "Model", "build", "distill", "evaluate", "export", "import_hf", "lm_loss", "load", "load_plan"]
__all__ += ["load_scores", "measure", "plan", "prune", "save", "save_plan", "save_scores", "score", "start", "train"]
