"""A model through the harness's loaded tasks, on the first rank. Importing this module imports the harness."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from lm_eval.api.model import LM, CachingLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import configure_pad_token
from lm_eval.utils import handle_non_serializable
from sqlitedict import SqliteDict

from minitron_mcore import __version__
from minitron_mcore.data.templating import transformers_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.harness.loading import quiet
from minitron_mcore.evaluation.harness.model import Bars, ShardedModel
from minitron_mcore.evaluation.harness.names import KEY
from minitron_mcore.evaluation.harness.requests import Server
from minitron_mcore.files import first_line, write_whole

BOOTSTRAP_ITERATIONS = 1_000  # for standard errors of scores that are no means


class Answers(CachingLM):
    """The harness's own way of keeping answers in the file `path`, but as JSON: its own are pickles, which run what a
    stranger's file says. Raises ValueError, where one is read, for a file that holds them otherwise."""

    def __init__(self, model: LM, path: Path) -> None:
        super().__init__(model, str(path))
        self.dbdict: SqliteDict
        self.dbdict.close()
        self.dbdict = SqliteDict(str(path), autocommit=True, encode=json.dumps, decode=_answer)
        model.set_cache_hook(self.get_cache_hook())


def _answer(text: str | bytes) -> Any:
    """A log-likelihood comes with whether its tokens are the likeliest."""
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value


def run_tasks(
    model: LM, tasks: Mapping[str, Any], answers: Path, *, limit: float | None, named: Mapping[str, Any]
) -> dict[str, Any]:
    """What `lm_eval.evaluate` gives, samples included, with the settings behind it.

    answers: file that keeps them; those that it has are not asked for again. named: what the model is, for `config`.
    """
    started = time.time()
    answers.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), own_numbers():
        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # anew: every model sees the same examples
        cached = Answers(model, answers)
        try:
            limited = int(limit) if limit is not None and limit >= 1 else limit
            results = evaluate(
                lm=cached, task_dict=dict(tasks), limit=limited, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True
            )
        except (ValueError, AssertionError) as error:
            if isinstance(error, InputError):
                raise
            rule = f"cannot be evaluated: {first_line(error)}"
            raise InputError(KEY, sorted(tasks["tasks"]), rule, "leave the task that it speaks of out") from error
        finally:
            cached.dbdict.close()
    results["config"] = {
        **named,
        "limit": limit,
        "bootstrap_iters": BOOTSTRAP_ITERATIONS,
        "random_seed": DEFAULT_RANDOM_SEED,
        "numpy_seed": DEFAULT_OTHER_SEED,
        "fewshot_seed": DEFAULT_OTHER_SEED,
    }
    results |= {"date": started, "lm_eval_version": version("lm_eval"), "minitron_mcore_version": __version__}
    return dict(results)


@contextmanager
def own_numbers() -> Iterator[None]:
    """Afterwards the random numbers go on as if nobody had drawn any: the harness seeds them on this rank alone."""
    python, numbers, tensors = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
        torch.set_rng_state(tensors)


def sharded_model(
    server: Server,
    ask: Callable[[Any], Any],
    *,
    family: str,
    classes: Mapping[str, str],
    end_tokens: Sequence[int],
    tokens_at_once: int,
    bars: Bars,
) -> LM:
    """The harness's model over `server`, which every rank has, and `ask`, which has every rank call it.

    family, classes: what the exported config.json says of the model and its tokenizer.
    """
    tokenizer = transformers_tokenizer(server.tokenizer, {"model_type": family, **classes})
    return ShardedModel(
        configure_pad_token(tokenizer),
        server.architecture.max_position_embeddings,
        ask,
        inputs_at_once=server.inputs_at_once,
        tokens_at_once=tokens_at_once,
        end_tokens=end_tokens,
        bars=bars,
    )


def hugging_face_model(model: Any, folder: Path, batch_size: int) -> LM:
    """The harness's own `hf` model of a folder, which transformers has loaded: by itself the harness would start as
    many processes as the launcher has."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=model, tokenizer=str(folder), batch_size=batch_size, softmax_dtype=torch.float32)


def write_details(folder: Path, results: dict[str, Any]) -> None:
    """results.json as the harness's own command writes it, and its samples as samples_TASK.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in results["samples"].items():
        lines = (json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in samples)
        write_whole(folder / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines))
    rest = {name: value for name, value in results.items() if name != "samples"}
    text = json.dumps(rest, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_whole(folder / "results.json", text + "\n")
