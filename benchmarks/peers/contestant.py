"""One contestant of benchmarks/kd_peers.py, in a process of its own.

    contestant.py NAME FOLDER OPTIONS      FOLDER holds the models, in `hf/` and `checkpoint/`; OPTIONS: a JSON object

It says {"empty": bytes} when everything is imported and no model is there, then waits for a line before each
distillation step, and answers with {"seconds", "loss", "peak"}: the step's time, its mean loss, and the largest
resident set since the models were loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0
Answer = Callable[[dict[str, Any]], None]
Step = Callable[[torch.Tensor], float]


def draw_ids(options: dict[str, int], step: int) -> torch.Tensor:
    """Token ids [batch, sequence + 1] of a step, the same for all contestants."""
    shape = (options["batch"], options["sequence"] + 1)
    return torch.randint(0, options["vocabulary"], shape, generator=torch.Generator().manual_seed(step))


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def wanted_steps() -> Iterator[int]:
    """A number for each line that asks for a step."""
    for number, _ in enumerate(sys.stdin):
        yield number


def take_steps(step: Step, options: dict[str, int], answer: Answer) -> None:
    forget_peak()
    for number in wanted_steps():
        ids = draw_ids(options, number)
        started = time.perf_counter()
        loss = step(ids)
        answer({"seconds": time.perf_counter() - started, "loss": loss, "peak": resident("VmHWM")})


def ours(folder: Path, options: dict[str, int], answer: Answer) -> None:
    """Our training step, on checkpoints that `import` made; the losses that it reports come with it."""
    from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.microbatch import Microbatch
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import seed_everything, use_layout
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    runtime, layout = start(), ParallelConfig()
    use_layout(layout, runtime.world_size)
    seed_everything(1)
    answer({"empty": resident("VmRSS")})

    def found(name: str) -> tuple[tuple[Path, int], Any]:
        place = find_checkpoint(folder / "checkpoint" / name, "checkpoint")
        return place, read_architecture(place[0])

    place, wide = found("teacher")
    teacher = Teacher.load(*place, wide, layout, "fp32")
    place, architecture = found("student")
    models = build_model(architecture, layout, "fp32")
    load_weights(*place, as_chunks(models), architecture)
    batch, sequence = options["batch"], options["sequence"]
    train = TrainConfig(
        tokens=1000 * batch * sequence,
        global_batch_size=batch,
        micro_batch_size=batch,
        lr=ADAM["lr"],
        min_lr=ADAM["lr"],
        lr_decay_style="constant",
        weight_decay=ADAM["weight_decay"],
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_eps=ADAM["eps"],
        clip_grad=CLIP,
    )
    timetable = plan_timetable(train, sequence, "train")
    trained = Trained.of(models, train, timetable)
    objective = Objective(LossSettings(architecture.vocab_size, lm_weight=0.0, kd_weight=1.0), teacher=teacher)
    mask, positions = torch.ones(batch, sequence), torch.arange(sequence).expand(batch, sequence).contiguous()

    def step(ids: torch.Tensor) -> float:
        microbatch = Microbatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask, positions)
        means = train_step(trained, objective, timetable.at(0).shape, [microbatch])
        return means["logits distillation loss"]

    take_steps(step, options, answer)


def loaded(folder: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "hf" / name, dtype=torch.float32, attn_implementation="sdpa")


def plain(folder: Path, options: dict[str, int], answer: Answer) -> None:
    """`transformers` and torch alone: whole logits, F.kl_div, fused AdamW."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    functional = torch.nn.functional
    answer({"empty": resident("VmRSS")})
    teacher, student = loaded(folder, "teacher").eval(), loaded(folder, "student").train()
    optimizer = torch.optim.AdamW(student.parameters(), fused=True, **ADAM)

    def step(ids: torch.Tensor) -> float:
        tokens = ids[:, :-1]
        with torch.no_grad():
            target = teacher(tokens, use_cache=False).logits.softmax(-1)
        log_probs = functional.log_softmax(student(tokens, use_cache=False).logits, dim=-1)
        loss = functional.kl_div(log_probs.flatten(0, 1), target.flatten(0, 1), reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    take_steps(step, options, answer)


def trl(folder: Path, options: dict[str, int], answer: Answer, trainer_class: type, given: dict[str, Any]) -> None:
    """A trainer of TRL's, in its own `train`; what is not the step is off: logging, saving, recomputation, generation.

    A step is timed from the callback at its beginning, with the batch there, to the one at its end.
    given: fields of its configuration besides those of all trainers.
    """
    import logging

    import transformers
    from datasets import Dataset
    from transformers import TrainerCallback

    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    config_class = given.pop("config_class")
    answer({"empty": resident("VmRSS")})
    losses: list[torch.Tensor] = []

    class Timed(trainer_class):  # type: ignore[misc, valid-type]
        def get_train_dataloader(self) -> Any:
            rows: Any = [as_inputs(draw_ids(options, number)) for number in range(options["steps"] + 1)]
            return torch.utils.data.DataLoader(rows, batch_size=None)

        def compute_loss(self, *words: Any, **named: Any) -> Any:
            loss = super().compute_loss(*words, **named)
            losses.append(loss.detach())
            return loss

        def _generate_and_score_completions(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {**inputs, "num_items_in_batch": inputs["completion_mask"].sum()}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.asked = wanted_steps()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if next(self.asked, None) is None:
                os._exit(0)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = time.perf_counter() - self.started
            answer({"seconds": seconds, "loss": losses[-1].item(), "peak": resident("VmHWM")})

    settings = config_class(
        output_dir=str(folder / f"trl-{os.getpid()}"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=options["steps"] + 1,
        per_device_train_batch_size=options["batch"],
        learning_rate=ADAM["lr"],
        lr_scheduler_type="constant",
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_epsilon=ADAM["eps"],
        weight_decay=ADAM["weight_decay"],
        max_grad_norm=CLIP,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **given,
    )
    trainer = Timed(
        model=loaded(folder, "student"),
        teacher_model=loaded(folder, "teacher"),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": [""], "messages": [[]]}),
        processing_class=tokenizer_of_one(),
        callbacks=[Clock()],
    )
    forget_peak()
    trainer.train()


def tokenizer_of_one() -> Any:
    """What the trainers insist on, and use for its padding token alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<s>": 0}, "<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<s>", eos_token="<s>", unk_token="<s>")


def as_inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What both of TRL's trainers read of a batch: a prompt of one token, and all others to be learnt."""
    ones, labels = torch.ones_like(ids), ids.clone()
    labels[:, 0] = -100
    prompt, completion = (slice(None), slice(0, 1)), (slice(None), slice(1, None))
    return {
        "input_ids": ids,
        "attention_mask": ones,
        "labels": labels,
        "prompt_ids": ids[prompt],
        "prompt_mask": ones[prompt],
        "completion_ids": ids[completion],
        "completion_mask": ones[completion],
    }


def trl_gkd(folder: Path, options: dict[str, int], answer: Answer) -> None:
    """TRL's trainer for given answers: whole logits."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    trl(folder, options, answer, GKDTrainer, {"config_class": GKDConfig, "lmbda": 0.0, "beta": 0.0, "temperature": 1.0})


def trl_chunked(folder: Path, options: dict[str, int], answer: Answer) -> None:
    """TRL's trainer for the student's own answers, with the data in their place: logits by chunks."""
    from trl import DistillationConfig, DistillationTrainer

    given = {"config_class": DistillationConfig, "beta": 0.0, "temperature": 1.0}
    trl(folder, options, answer, DistillationTrainer, given)


CONTESTANTS = {"ours": ours, "plain": plain, "trl_gkd": trl_gkd, "trl_chunked": trl_chunked}


def main() -> None:
    name, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def answer(found: dict[str, Any]) -> None:
        out.write(json.dumps(found) + "\n")
        out.flush()

    torch.set_num_threads(options["threads"])
    CONTESTANTS[name](folder, options, answer)


if __name__ == "__main__":
    main()
