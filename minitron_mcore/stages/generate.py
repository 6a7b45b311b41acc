"""Verb `generate`: what checkpoints write to the same prompts, under one another, at any layout."""

from __future__ import annotations

import gc
import json
import textwrap
import time
from typing import Any

import torch

from minitron_mcore.checkpoint.store import load_model
from minitron_mcore.files import write_whole, writing
from minitron_mcore.inference.engine import Engine, Generated
from minitron_mcore.inference.prompts import Continuation
from minitron_mcore.inference.sampling import Sampling
from minitron_mcore.jobs.compared import titled
from minitron_mcore.jobs.generate import GenerateJob, Writer
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.tables import counted


def run(job: GenerateJob, runtime: Runtime) -> list[dict[str, Any]]:
    """Let each of `job.writers` go on with every prompt, show it, and write `job.target`; every rank calls.

    Returns, the same on every rank, a dictionary for each prompt: `prompt` or `messages`, and `continuations` by the
    checkpoint's name: `text`, number of `tokens`, and `finish_reason`, "stop" or "length".
    """
    recipe = job.recipe
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    rows: list[dict[str, Any]] = [{**prompt.as_json(), "continuations": {}} for prompt in job.prompts]
    for writer in job.writers:
        begun = time.perf_counter()
        for row, continuation in zip(rows, _written(writer, job, runtime), strict=True):
            row["continuations"][writer.name] = continuation
        taken = time.perf_counter() - begun
        tokens = counted(sum(row["continuations"][writer.name]["tokens"] for row in rows), "token")
        prompts = counted(len(rows), "prompt")
        runtime.print(f"generate: {writer.name} ({writer.model.folder}): {prompts}, {tokens} in {taken:.1f} s")
        gc.collect()
        torch.cuda.empty_cache()
    if job.shows:
        runtime.print(side_by_side(rows))
    if target := job.target:

        def write() -> None:
            with writing(f"generate.output={target}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        runtime.on_main(write)
        runtime.print(f"\ngenerate: {counted(len(rows), 'prompt')} -> {target}")
    return rows


def side_by_side(rows: list[dict[str, Any]]) -> str:
    """Each prompt of what `run` returns, and under it what every checkpoint wrote."""
    lines = []
    for number, row in enumerate(rows, 1):
        asked = row["prompt"] if "prompt" in row else "\n".join(map(_as_said, row["messages"]))
        lines.append(f"\nprompt {number}: {_indented(asked.rstrip())}")
        written = row["continuations"].items()
        lines += [f"  {name}: {_indented(continuation['text'].rstrip())}" for name, continuation in written]
    return "\n".join(lines)


def _as_said(message: dict[str, str]) -> str:
    return f"{message['role']}: {message['content']}"


def _written(writer: Writer, job: GenerateJob, runtime: Runtime) -> list[dict[str, Any]]:
    """A model's continuations of all prompts; its weights are gone afterwards."""
    recipe, config, model = job.recipe, job.recipe.generate, writer.model
    assert model.tokenizer is not None
    chunks = load_model(model.place, model.architecture, recipe.parallel, recipe.precision)
    engine = Engine(chunks, model.architecture, max_batch=config.batch_size)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, recipe.seed)
    continuation = Continuation(model.tokenizer, config.stop)
    is_stopped = continuation.is_stopped if config.stop else None
    # Of this data-parallel rank, the first of which has the most; a batch that ends before its time makes it fewer.
    batches = -(-len(writer.ids) // (config.batch_size * data_group().size()))
    title = titled("generate", writer.name, job.writers)
    with runtime.progress(batches * config.max_new_tokens, "steps", title) as bar:
        found = engine.generate(
            writer.ids,
            sampling,
            stop_tokens=writer.stop_ids,
            is_stopped=is_stopped,
            on_token=lambda step: bar.advance(),
        )
    return [_in_words(each, continuation, writer.stop_ids) for each in found]


def _in_words(each: Generated, continuation: Continuation, stop_ids: frozenset[int]) -> dict[str, Any]:
    said = each.tokens[:-1] if each.tokens[-1] in stop_ids else each.tokens
    reason = "stop" if each.stopped else "length"
    return {"text": continuation.cut(said), "tokens": len(each.tokens), "finish_reason": reason}


def _indented(text: str) -> str:
    """Further lines stand under the first."""
    return textwrap.indent(text, "    ").removeprefix("    ")
