"""`cache`: the teacher's targets of the samples that `distill` will train on, written once, read at any layout."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, iteration_folder, read_architecture
from minitron_mcore.checkpoint.folder_lock import FolderLock
from minitron_mcore.checkpoint.manifest import MANIFEST, bytes_checksum
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.dataset import Dataset, batches_once, build_datasets
from minitron_mcore.data.described import describe, split_part
from minitron_mcore.data.index import digest_of
from minitron_mcore.data.index_size import Wanted, check_index_size
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.draw import Drawing, make_targets
from minitron_mcore.distillation.cache.file import (
    DESCRIPTION,
    CacheReader,
    encode_targets,
    settings_digest,
    shard_file,
    token_checksum,
    write_settings,
    write_shard,
)
from minitron_mcore.distillation.cache.teacher import PREFIX, check_served
from minitron_mcore.distillation.config import CacheConfig
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.jobs.tokenizers import checkpoint_tokenizer
from minitron_mcore.model.gpt import LanguageModel, build_model
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import in_calls, visit_final_states
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.agree import all_or_none, raise_together
from minitron_mcore.runtime.groups import data_group, on_last_stage, tensor_group
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import check_model, lay_out, output_folder, refuse_context
from minitron_mcore.stages.score import flat
from minitron_mcore.training.budget import plan_timetable
from minitron_mcore.training.reader import to_device

LOCK = "cache.lock"


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write what is missing of `cache.folder` and return it; the same command goes on where it was cut off, and
    one that asks for more samples adds them."""
    lay_out(recipe, runtime)
    refuse_context(recipe, "cache")
    cache = recipe.cache
    folder = output_folder(cache.folder, "cache.folder")
    teacher_folder, iteration = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    architecture = read_architecture(teacher_folder)
    check_model(architecture, recipe)
    temperature = recipe.distill.temperature if cache.temperature is None else cache.temperature
    check_cache(cache, architecture)
    tokenizer = checkpoint_tokenizer(recipe, teacher_folder)
    num_samples = cache.num_samples or samples_needed(recipe)
    asked = ("cache.num_samples", num_samples) if cache.num_samples else ("distill.tokens", recipe.distill.tokens)
    wanted = [Wanted(num_samples, recipe.data.sequence_length, *asked)]
    all_or_none(lambda: check_index_size(recipe.data, wanted))
    dataset, _, _ = build_datasets(recipe.data, tokenizer, train_samples=num_samples, valid_samples=0, seed=recipe.seed)
    assert dataset is not None
    precision = recipe.teacher.precision or recipe.precision
    settings = json.loads(
        json.dumps(
            {
                **how_drawn(cache, temperature, architecture),
                "num_samples": num_samples,
                "shard_samples": cache.shard_samples,
                "precision": precision,
                "tokenizer": tokenizer.fingerprint,
                **runtime.on_main(lambda: describe_data(recipe, tokenizer)),
                "teacher": {
                    "checkpoint": str(teacher_folder),
                    "architecture": architecture.to_dict(),
                    **identity(teacher_folder, iteration),
                },
            }
        )
    )
    there = runtime.on_main(lambda: find_cache(folder, settings))
    warn_of_refusal(recipe, runtime, folder, settings)
    if there is not None and there["num_samples"] < num_samples:
        check_order(runtime, CacheReader(folder), dataset, num_samples)
    lock = cache_lock(folder)
    try:
        settings, missing = runtime.on_main(lambda: claim(folder, settings, lock))
        if not missing:
            runtime.print(f"cache: {folder} holds all {num_samples:,} samples")
            return folder
        chunks = build_model(architecture, recipe.parallel, precision, trainable=False)
        load_weights(teacher_folder, iteration, as_chunks(chunks), architecture)
        runtime.print(
            f"cache: {cache.method} targets of {teacher_folder}, {num_samples:,} samples of "
            f"{recipe.data.sequence_length:,} tokens, {len(missing)} shards to write -> {folder}"
        )
        write_missing(recipe, runtime, chunks, dataset, folder, settings, missing)
    finally:
        lock.release()
    return folder


def write_missing(
    recipe: Recipe,
    runtime: Runtime,
    chunks: list[LanguageModel],
    dataset: Dataset,
    folder: Path,
    settings: dict[str, Any],
    missing: list[tuple[int, int]],
) -> None:
    """Shard after shard, each by one data-parallel replica; the replicas meet after each. Every rank calls.

    missing: the shards, with how many samples are in each already, which stay as they are.
    """
    cache, total, reader = recipe.cache, settings["num_samples"], CacheReader(folder)
    drawing = Drawing(
        method=cache.method,
        vocab_size=settings["vocab_size"],
        temperature=settings["temperature"],
        draws=cache.draws,
        proposal_temperature=cache.proposal_temperature,
        top_k=settings.get("top_k", 0),
        seed=recipe.seed,
        chunk_tokens=cache.chunk_tokens,
    )
    replica, replicas = data_group().rank(), data_group().size()
    writes = on_last_stage()
    writes = writes and tensor_group().rank() == 0
    started, written = time.perf_counter(), torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for turn in range(0, len(missing), replicas):
        failure: InputError | None = None
        if turn + replica < len(missing):
            shard, held = missing[turn + replica]
            first = shard * cache.shard_samples
            samples = list(range(first + held, min(first + cache.shard_samples, total)))
            try:
                blocks = ask_teacher(recipe, chunks, dataset, samples, drawing, settings)
                if writes:
                    path = shard_file(folder, shard)
                    with writing(str(path)):
                        write_shard(path, settings_digest(settings), first, [*reader.stored(shard, held), *blocks])
                    size = sum(len(block) for block, _ in blocks)
                    written += torch.tensor([len(samples), size], device=written.device)
            except InputError as error:
                failure = error
        raise_together(failure)
        so_far = written.clone()
        torch.distributed.all_reduce(so_far)
        tokens = so_far[0].item() * recipe.data.sequence_length
        runtime.print(
            f"cache: {min(turn + replicas, len(missing))}/{len(missing)} shards, "
            f"{tokens / (time.perf_counter() - started):,.0f} tokens/s, {so_far[1].item() / tokens:.2f} bytes a token"
        )


def ask_teacher(
    recipe: Recipe,
    chunks: list[LanguageModel],
    dataset: Dataset,
    samples: list[int],
    drawing: Drawing,
    settings: dict[str, Any],
) -> list[tuple[bytes, str]]:
    """(block, checksum of its tokens) of each of `samples`, on the first tensor-parallel rank of the last stage.

    Every rank of a replica calls, with the same samples. Raises InputError where logits are NaN or Inf.
    """
    group = tensor_group()
    blocks: dict[int, tuple[bytes, str]] = {}
    bad: list[int] = []

    def visit(chunk: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> None:
        assert microbatch.valid is not None and microbatch.samples is not None
        real = microbatch.valid.bool()
        numbers = microbatch.samples[real]
        if not len(numbers):
            return
        targets, finite = make_targets(
            hidden_SBH[:, real],
            chunk.head_weight(),
            numbers,
            drawing,
            tp_group=group,
            sequence_parallel=chunk.config.sequence_parallel,
        )
        bad.extend(numbers[~finite].tolist())
        if group.rank() > 0:
            return
        tokens = microbatch.tokens[real].cpu().numpy()
        for number, tokens_S, of_sample in zip(numbers.tolist(), tokens, targets, strict=True):
            block = encode_targets(of_sample, settings["vocab_size"], settings["dtype"])
            blocks[number] = (block, token_checksum(tokens_S))

    for part in groups(recipe, dataset, samples, len(chunks) > 1):
        visit_final_states(chunks, part, visit)
    if bad:
        raise InputError(
            f"the teacher's logits are NaN or Inf in sample {min(bad)} of the training data: check the weights of "
            f"teacher.checkpoint={recipe.teacher.checkpoint} and the precision"
        )
    return [blocks[number] for number in samples if number in blocks]


def groups(recipe: Recipe, dataset: Dataset, samples: list[int], interleaved: bool) -> Iterator[list[Microbatch]]:
    """Microbatches of `samples` for one call of the schedule after another; the last ones are filled up."""
    stream = batches_once(
        dataset,
        samples,
        micro_batch_size=recipe.cache.micro_batch_size,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=recipe.data.num_workers,
    )
    return in_calls(map(to_device, stream), interleaved=interleaved)


def check_cache(cache: CacheConfig, architecture: Architecture) -> None:
    """Raise InputError where the teacher has fewer tokens than are to be kept."""
    if cache.method == "top_k" and cache.top_k > architecture.vocab_size:
        rule = f"is more than the teacher's vocab_size={architecture.vocab_size}"
        raise InputError("cache.top_k", cache.top_k, rule, "lower it, or set 0 to keep all")


def samples_needed(recipe: Recipe) -> int:
    """Samples that `distill.tokens` takes. Raises InputError where they are not all of one length."""
    timetable = plan_timetable(recipe.distill, recipe.data.sequence_length, "distill")
    needed = timetable.samples_needed()
    if list(needed) != [recipe.data.sequence_length]:
        raise InputError(
            f"distill.phases have the sequence lengths {sorted(needed)}, but a cache holds samples of "
            f"data.sequence_length={recipe.data.sequence_length} alone: give every phase that one"
        )
    return needed[recipe.data.sequence_length]


def how_drawn(cache: CacheConfig, temperature: float, architecture: Architecture) -> dict[str, Any]:
    """The settings that decide how targets follow from logits."""
    said: dict[str, Any] = {"method": cache.method, "temperature": temperature, "vocab_size": architecture.vocab_size}
    if cache.method == "sampled":
        said |= {"draws": cache.draws, "proposal_temperature": cache.proposal_temperature}
    else:
        said["top_k"] = cache.top_k or architecture.vocab_size
    return {**said, "dtype": cache.dtype}


def describe_data(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides which tokens a sample has, beside the number of samples. The first rank calls. Raises InputError."""
    data = recipe.data
    part = split_part(data, "train", None)
    digest = digest_of(describe(data, [part], tokenizer).sources)
    described = {
        "data.train": {"digest": digest, "weights": part.blend.weights},
        "data.split": part.share,
        "data.sequence_length": data.sequence_length,
        "seed": recipe.seed,
    }
    return json.loads(json.dumps(described))


def identity(folder: Path, iteration: int) -> dict[str, Any]:
    """Which weights: the iteration, and the checksum of the manifest of its tensors where there is one."""
    manifest = iteration_folder(folder, iteration) / MANIFEST
    return {"iteration": iteration, "weights": bytes_checksum(manifest) if manifest.is_file() else None}


def warn_of_refusal(recipe: Recipe, runtime: Runtime, folder: Path, settings: dict[str, Any]) -> None:
    """Say on the first rank where `distill` of the same recipe would not take the targets; every rank calls."""
    try:
        check_served(settings, recipe.distill, f"distill.teacher={PREFIX}{folder}")
    except InputError as error:
        runtime.print(f"WARNING: `distill` will refuse what `cache` writes by this recipe: {error}")


def find_cache(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the cache in `folder`, None where there is none yet. The first rank calls.

    Raises InputError where something else lies there, or another cache than one of `settings` with fewer samples. Where
    a teacher of the same weights lay does not count.
    """
    if not (folder / DESCRIPTION).is_file():
        if folder.is_dir() and any(path.suffix != ".tmp" and path.name != LOCK for path in folder.iterdir()):
            raise InputError(f"cache.folder={folder} holds other files: name another folder")
        return None
    stored = CacheReader(folder).settings
    there, here = flat(stored), flat(settings)
    same_weights = here["teacher.weights"] is not None and here["teacher.weights"] == there.get("teacher.weights")
    for key in sorted({*there, *here} - {"num_samples"} - ({"teacher.checkpoint"} if same_weights else set())):
        if there.get(key) != here.get(key):
            raise InputError(
                f"cache.folder={folder} holds another cache: {key} is {there.get(key)!r} there and {here.get(key)!r} "
                "here; name another folder, or delete that one"
            )
    if there["num_samples"] > here["num_samples"]:
        raise InputError(
            f"cache.folder={folder} holds {there['num_samples']} samples, and cache.num_samples or distill.tokens asks "
            f"for {here['num_samples']}: it may grow, not shrink; ask for as many, or name another folder"
        )
    return stored


def check_order(runtime: Runtime, reader: CacheReader, dataset: Dataset, num_samples: int) -> None:
    """Raise InputError where a sample that is there would have other tokens among `num_samples`. Every rank calls, and
    reads some of them."""
    count, size = reader.settings["num_samples"], reader.settings["shard_samples"]

    def check_mine() -> None:
        for shard in range(runtime.rank, -(-count // size), runtime.world_size):
            for sample in range(shard * size, shard * size + reader.held(shard)):
                if token_checksum(numpy.asarray(dataset[sample]["tokens"])) != reader.tokens_of(sample):
                    raise InputError(
                        f"cache.folder={reader.folder} cannot grow from {count} samples to {num_samples}: sample "
                        f"{sample} would have other tokens, since the order depends on the number of passes through "
                        "the text; ask for no more passes than it was made with, or name another folder"
                    )

    all_or_none(check_mine)


def cache_lock(folder: Path) -> FolderLock:
    """The right to write the cache in `folder`, not yet taken."""
    rule, remedy = "is being written by another `cache`", "wait for it, or name another folder"
    return FolderLock(folder / LOCK, InputError("cache.folder", folder, rule, remedy))


def claim(folder: Path, settings: dict[str, Any], lock: FolderLock) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """(the settings in the folder from now on, the shards that are to be written and how many samples each holds).

    The first rank calls; `lock` is taken where there is something to write. Raises InputError where another process
    writes there, and as `find_cache`.
    """
    there = find_cache(folder, settings)
    if there is not None and there["num_samples"] == settings["num_samples"]:
        reader = CacheReader(folder)
        if not reader.missing_shards(settings["num_samples"]):
            return there, []
    with writing(str(folder)):
        lock.take()
        there = find_cache(folder, settings)
        settings = {**(there or settings), "num_samples": settings["num_samples"]}
        if settings != there:
            write_settings(folder, settings)
        if lock.is_sure:
            for partial in folder.glob("*.tmp"):
                partial.unlink()
    reader = CacheReader(folder)
    return settings, [(shard, reader.held(shard)) for shard in reader.missing_shards(settings["num_samples"])]
